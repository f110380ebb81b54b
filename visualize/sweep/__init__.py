"""Parts of `visualize.mask_sweep`: trained checkpoints side by side, in numbers, sheets, plots and words."""
