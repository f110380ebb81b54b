"""Parts of SimCLR (arXiv 2002.05709): pairs of views, the projection head, the loss."""
