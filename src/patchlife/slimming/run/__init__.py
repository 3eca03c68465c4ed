"""Running the blocks from the start block on: fixed, adaptive, and gated (for training the scorer)."""
