"""What a network has learned, made visible: attention, tokens, similarity of layers. Pure functions on built models."""
