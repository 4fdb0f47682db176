"""Models the tests rewrite: exported PyTorch models (build) and attention spelled by hand in ONNX (spellings)."""
