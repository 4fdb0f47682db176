"""The torch.fx frontend."""
