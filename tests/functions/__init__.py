"""The two ops as ONNX functions."""
