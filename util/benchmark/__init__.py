"""Metrics, one file per family: pure functions on arrays, no I/O."""
