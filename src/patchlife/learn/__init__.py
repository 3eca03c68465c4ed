"""Learning lives: first to foretell what the dense model does later, then to run its blocks on fewer patches."""
