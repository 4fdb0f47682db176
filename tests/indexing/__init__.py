"""Indexing maps against ONNX Runtime on an integer iota. Imports no torch."""
