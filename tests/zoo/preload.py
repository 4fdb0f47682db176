"""Imports what most models need; a child is forked from the process that did so (tests/zoo/measure.py)."""

from __future__ import annotations

import contextlib
import importlib

from examples.exporting import import_torchvision

import_torchvision()
for name in ("onnx", "onnxruntime", "onnxscript", "timm", "transformers", "spandrel", "attnrewrite.passes"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
