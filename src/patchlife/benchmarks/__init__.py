"""Comparison with other methods: baselines, side-by-side timing, schedule search, reports. The core never uses it."""
