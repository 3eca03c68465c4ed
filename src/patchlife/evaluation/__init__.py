"""Measures models: accuracy, agreement and KL divergence, timing, memory."""
