"""The training loop and what it needs: checkpoints, weights from anywhere, optimizers."""
