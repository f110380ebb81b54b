"""Transfer: heads, LoRA, features, the shared recipe."""
