"""Runs Metal kernels on a machine without Metal, and counts and checks what they do with memory.

    run = run_function(kernel, [query, key, value])          # a scheduled PrimFunc
    run = run_model(module, [image])                         # a Relax module, through every pass of the compiler
    run.outputs, run.launches, run.findings

    model = EmulatedModel("swin-metal/")                     # an artifact, its library as it stands there
    model.run({"x": array}), model.findings

`device.py` is the device that TVM sees, `kernels.py` turns Metal source into a library, `include/` is what that source
is compiled against, `library.py` reads an artifact's library. This needs TVM.
"""

from attnrewrite.emulator.device import BufferTraffic, Launch, MetalDevice, Traffic, metal_device, metal_target
from attnrewrite.emulator.model import EmulatedModel
from attnrewrite.emulator.run import Run, run_function, run_model

__all__ = [
    "BufferTraffic",
    "EmulatedModel",
    "Launch",
    "MetalDevice",
    "Run",
    "Traffic",
    "metal_device",
    "metal_target",
    "run_function",
    "run_model",
]
