"""The passes on whole ONNX models."""
