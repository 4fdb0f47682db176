"""Runs the Metal source that TVM emits on the CPU, through the same host code that would launch it on a Mac.

Metal Shading Language is C++14 with a few words more. `metal_stdlib` supplies those words, `fibers.h` the grid, and the
result is a TVM runtime library whose kernels are imported into the host module as a GPU's would be. So a PrimFunc, or a
module of many, is called with CPU tensors, and symbolic shapes, launch extents and temporary buffers are the real ones.

    module = emulate(tvm.IRModule({"main": scheduled_prim_func}))
    module["main"](*tensors)
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import tvm
from tvm import tirx
from tvm.target import Target
from tvm.tirx.build import codegen_build, split_host_device_mods

HERE = Path(__file__).parent
METAL_SHARED_BYTES = 32768
METAL_THREADS = 1024
METAL_BUFFERS = 31
_BYTES = {"float": 4, "half": 2, "int": 4, "uint": 4, "long": 8, "bool": 1, "uchar": 1, "char": 1, "float4": 16}
_ARGUMENT_UNION = re.compile(r"^union __TVMArgUnion \{[^}]*\};", re.MULTILINE)
_SHARED = re.compile(r"^(\s*)threadgroup (\w+) (\w+)\[(\d+)\];", re.MULTILINE)


def metal_target() -> Target:
    """A Metal target whose host code expects CPU tensors: kernels are Metal source, memory is the CPU's."""
    cpu_device = 1  # DLDeviceType.kDLCPU
    metal = {"kind": "metal", "max_shared_memory_per_block": METAL_SHARED_BYTES, "target_device_type": cpu_device}
    return Target({**metal, "thread_warp_size": 32}).with_host(Target("llvm"))


def split(module: tvm.IRModule, target: Target) -> tuple[tvm.IRModule, tvm.IRModule]:
    """Lowers scheduled PrimFuncs; returns host functions and kernels."""
    module = tirx.transform.BindTarget(target)(module)
    pipeline, finalize_host, finalize_device = tirx.get_tir_pipeline("s_tir")
    host, devices = split_host_device_mods(pipeline(module))
    (device,) = devices.values()
    return finalize_host()(host), finalize_device()(device)


def metal_source(device: tvm.IRModule, target: Target) -> str:
    """The source of all kernels of a lowered device module."""
    return str(codegen_build(device, target).inspect_source())


def emulate(module: tvm.IRModule, directory: Path, target: Target | None = None) -> tvm.runtime.Module:
    """Compiles scheduled PrimFuncs to Metal source, that to a CPU library in `directory`, and links both.

    Raises AssertionError where a kernel exceeds Metal's limits or its source does not compile.
    """
    target = target or metal_target()
    host, device = split(module, target)
    source = metal_source(device, target)
    kernels = {str(f.attrs["global_symbol"]): f for f in device.functions.values()}
    library = compile_source(_translate(source) + "".join(map(_entry, kernels.values())), directory)
    executable = codegen_build(host, Target("llvm"))
    executable.import_module(tvm.runtime.load_module(str(library)))
    return executable


@contextlib.contextmanager
def emulated_builds(directory: Path) -> Iterator[None]:
    """While open, whatever builds for `metal_target()` (relax.build, too) gets a module that runs on the CPU."""
    count = itertools.count()

    def build(module: tvm.IRModule, target: Target, pipeline: object = None) -> tvm.runtime.Module:
        return emulate(module, directory / str(next(count)), target)

    original = tirx.build
    tirx.build = build
    try:
        yield
    finally:
        tirx.build = original


def compile_source(text: str, directory: Path) -> Path:
    """A shared library from C++ text, by the clang inside ziglang."""
    directory.mkdir(parents=True, exist_ok=True)
    source, library = directory / "kernels.cpp", directory / "kernels.so"
    source.write_text(text)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{HERE}"]
    command = [sys.executable, "-m", "ziglang", "cc", *flags, str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{source} does not compile: {result.stderr[:2000]}"
    return library


def _translate(source: str) -> str:
    """One translation unit; its threadgroup arrays are slices of the emulator's shared memory, common to all fibers."""
    union = _ARGUMENT_UNION.search(source)
    source = (union.group() if union else "") + _ARGUMENT_UNION.sub("", source)
    functions = re.split(r"(?=^// Function: )", source, flags=re.MULTILINE)
    return "".join(_place_shared(function) for function in functions)


def _place_shared(function: str) -> str:
    offset = 0

    def place(match: re.Match[str]) -> str:
        nonlocal offset
        indent, element, name, count = match.groups()
        address = offset
        offset += -(-int(count) * _BYTES[element] // 16) * 16
        return f"{indent}{element}* {name} = ({element}*)(emulator::shared_memory() + {address});"

    function = _SHARED.sub(place, function)
    assert offset <= METAL_SHARED_BYTES, f"{offset} bytes of threadgroup memory exceed Metal's {METAL_SHARED_BYTES}"
    return function


def _entry(kernel: tirx.PrimFunc) -> str:
    """The function by which TVM's host code calls a kernel: unpacks arguments and launch extents, runs the grid.

    Arguments arrive as the kernel's parameters (pointers first), then the extents in the order of its launch tags.
    """
    name = str(kernel.attrs["global_symbol"])
    tags = [str(tag) for tag in kernel.attrs["tirx.kernel_launch_params"]]
    pointers = [isinstance(p.ty, tvm.ir.PointerType) for p in kernel.params]
    num_pointers, num_scalars = sum(pointers), len(pointers) - sum(pointers)
    assert pointers == [True] * num_pointers + [False] * num_scalars, "pointers come before scalars"
    assert num_pointers + (num_scalars > 0) <= METAL_BUFFERS, f"{name} has more than {METAL_BUFFERS} buffers"
    extents = {tag: f"args[{len(pointers) + i}].integer" for i, tag in enumerate(tags)}

    def index3(kind: str) -> str:
        return "{" + ", ".join(f"(uint32_t){extents.get(f'{kind}.{axis}', '1')}" for axis in "xyz") + "}"

    operands = [f"emulator::Pointer{{args[{i}].pointer}}" for i in range(num_pointers)]
    if num_scalars:
        operands.append(f"*({name}_args_t*)scalars")
    scalars = ", ".join(f"args[{num_pointers + i}].integer" for i in range(num_scalars)) or "0"
    call = ", ".join([*operands, "Position{block}", "Position{thread_index}"])
    return f"""
static void {name}_body(void* arguments, emulator::Index3 block, emulator::Index3 thread_index) {{
  const emulator::Any* args = (const emulator::Any*)arguments;
  int64_t scalars[] = {{{scalars}}};
  {name}({call});
}}
extern "C" int __tvm_ffi_{name}(void*, const emulator::Any* args, int32_t, emulator::Any* result) {{
  result->type_index = 0;
  if (emulator::run_grid({name}_body, (void*)args, {index3("blockIdx")}, {index3("threadIdx")})) return 0;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", "{name}: threads diverge around a barrier");
  return -1;
}}
"""
