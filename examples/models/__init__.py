"""Vision models with local attention, written from their papers: Swin, unfold attention and Slide-Transformer."""
