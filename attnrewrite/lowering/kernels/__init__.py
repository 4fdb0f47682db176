"""The two ops as kernels, with a NumPy reference beside them. docs/ops.md defines both."""
