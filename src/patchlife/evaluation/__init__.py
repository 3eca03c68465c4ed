"""How good and how fast a model is: accuracy, agreement and KL divergence, timing, memory."""
