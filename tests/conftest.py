"""What every test runs under."""

from __future__ import annotations

import os

# Tests run side by side (pytest -n): one thread each, set before any numerical library reads it.
for variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# Operators called in passing compile nothing; tests/operators/test_compiled.py switches their kernels on.
os.environ.setdefault("ATTNREWRITE_KERNELS", "off")
