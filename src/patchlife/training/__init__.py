"""Training from photos: regression of the dense model's patch importance, then distillation with gates."""
