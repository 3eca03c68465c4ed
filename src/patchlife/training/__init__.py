"""Learning lives from photos: regression of the dense model's importance, then distillation through gates."""
