"""Functions of ours in TVM's registry for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tvm_ffi

from attnrewrite.errors import CompilerError

tvm_ffi.register_error("CompilerError", CompilerError)  # which comes out of TVM as itself, then, not as RuntimeError


@contextlib.contextmanager
def registered(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """While open, what TVM finds by this name; afterwards what it found before, if anything."""
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(name)
        else:
            tvm_ffi.register_global_func(name, before, override=True)
