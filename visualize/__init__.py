"""Figures, notebook and demo; run as `python -m visualize.NAME`."""
