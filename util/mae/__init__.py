"""What is particular to masked autoencoders: masks, position embeddings, losses."""
