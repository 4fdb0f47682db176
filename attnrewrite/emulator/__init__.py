"""Runs Metal kernels on a machine without Metal, and counts and checks what they do with memory.

    run = run_function(kernel, [query, key, value])          # a scheduled PrimFunc
    run = run_model(module, [image])                         # a Relax module, through every pass of the compiler
    run.outputs, run.launches, run.findings

`device.py` is the device that TVM sees, `kernels.py` turns Metal source into a library, `include/` is what that source
is compiled against. This needs TVM.
"""

from attnrewrite.emulator.device import BufferTraffic, Launch, MetalDevice, Traffic, metal_device, metal_target
from attnrewrite.emulator.run import Run, run_function, run_model

__all__ = [
    "BufferTraffic",
    "Launch",
    "MetalDevice",
    "Run",
    "Traffic",
    "metal_device",
    "metal_target",
    "run_function",
    "run_model",
]
