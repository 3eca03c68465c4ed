"""Comparison with other methods: baselines, side-by-side timing, schedule search, reports.

`patchlife bench` uses this room. The rest of the package never imports it; import-linter checks that.
"""
