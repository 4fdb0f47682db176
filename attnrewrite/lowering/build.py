"""From a Relax module to a shared library: the passes, in order, and the linker."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import IRModule, ir, relax, tirx
from tvm.relax import transform

from attnrewrite.errors import CompilerError
from attnrewrite.lowering import limits
from attnrewrite.lowering.choices import Choices
from attnrewrite.lowering.cuda_graph import add_replayed
from attnrewrite.lowering.kernels.vector_math import vector_unit
from attnrewrite.lowering.layout import channels_last
from attnrewrite.lowering.packing import pack_weights
from attnrewrite.lowering.schedules import stack
from attnrewrite.lowering.targets import HOST_CODE, Target
from attnrewrite.lowering.weights import lift_weights
from attnrewrite.lowering.widened import legalizations
from attnrewrite.lowering.zig import run_zig

ENTRY = "main"
REPLAYED_ENTRY = "main_replayed"


@dataclass(frozen=True)
class Built:
    """kernels: functions in the library; attention_kernels: those of the two ops among them. constant_outputs:
    positions of the outputs that are constants, which every run returns in the same memory. weights: what the entry
    takes after the model's inputs; empty where the executable holds its weights itself. replayed: whether there is a
    second entry, REPLAYED_ENTRY.
    """

    executable: Any
    kernels: int
    attention_kernels: int
    constant_outputs: tuple[int, ...]
    weights: Sequence[tvm.runtime.Tensor]
    replayed: bool = False


def tvm_target(target: Target) -> tvm.target.Target:
    """TVM's own target, with this machine's CPU wherever the description leaves the host open."""
    description = dict(target.tvm)
    if target.device == "cuda":
        description["host"] = _with_host_cpu(description.get("host", {"kind": "llvm"}))
    elif target.kind == "cpu":
        description = _with_host_cpu(description)
    try:
        return tvm.target.Target(description)
    except Exception as error:
        raise CompilerError(
            f"TVM does not accept the target {description}: {str(error).strip().splitlines()[-1]}"
        ) from None


def _with_host_cpu(description: dict[str, Any]) -> dict[str, Any]:
    if description.get("kind") != "llvm" or "mtriple" in description or "mcpu" in description:
        return description
    # Not the CPU's name: a container or an emulator may lack features the name promises; TVM asks the CPU itself.
    cpu = tvm.get_global_func("target.llvm_get_system_cpu")()
    return {**description, "mcpu": cpu}


@contextmanager
def device_compiler(target: Target) -> Iterator[Callable[[Path], None]]:
    """While open, device code is compiled for the target's GPU; what it yields is called on the linked library.

    Raises CompilerError where the GPU's compiler is missing.
    """
    if target.device != "cuda":
        yield lambda library: None
        return
    from attnrewrite.lowering.cuda_compiler import embedded_cubins

    with embedded_cubins(target.architectures) as cubins:
        yield cubins.finish


def fuse(mod: IRModule, target: tvm.target.Target, tuned: Choices | None = None, precision: str = "fp32") -> IRModule:
    """The module as calls of fused functions, each of them plain loops still."""
    with target, tvm.transform.PassContext(opt_level=3):
        mod = _apply(mod, transform.DecomposeOpsForInference(), transform.CanonicalizeBindings())
        on_cpu = target.kind.name == "llvm"
        if on_cpu:
            mod = pack_weights(channels_last(mod), vector_unit(target), tuned, precision)
        return _apply(
            mod,
            transform.LegalizeOps(None if on_cpu else legalizations()),
            transform.AnnotateTIROpPattern(),
            transform.FoldConstant(),
            transform.FuseOps(),
            transform.FuseTIR(),
            transform.DeadCodeElimination(),
            # Before scheduling: it recognises reshapes by their loops.
            transform.RewriteDataflowReshape(),
        )


def build(
    mod: IRModule,
    target: tvm.target.Target,
    tuned: Choices | None = None,
    precision: str = "fp32",
    *,
    separate_weights: int | None = None,
    system_prefix: str | None = None,
    replay: bool = False,
) -> Built:
    """The module compiled for the target: operators made loops, fused, scheduled, turned into machine code.

    tuned: tiles to use in place of the cost model's, on CPUs. precision: of products by constant weights, on CPUs
    (lowering/narrow.py). separate_weights: bytes of weights from which they stay outside (lowering/weights.py); None:
    never. system_prefix: for a library that is linked into a program, what its functions' names begin with. replay:
    whether to look for launches that can be replayed, for a second entry (lowering/cuda_graph.py).
    """
    on_cpu = target.kind.name == "llvm"
    mod = fuse(mod, target, tuned, precision)
    with target, tvm.transform.PassContext(opt_level=3):
        mod = _schedule(mod, target, tuned)
        constants = _constant_outputs(mod)
        weights: Sequence[tvm.runtime.Tensor] = ()
        if separate_weights is not None:
            mod, weights = lift_weights(mod, ENTRY, separate_weights)
        kernels = [name.name_hint for name, func in mod.functions.items() if isinstance(func, tirx.PrimFunc)]
        mod = _apply(
            mod,
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
        )
        replayed = add_replayed(mod, ENTRY, REPLAYED_ENTRY, len(weights)) if replay else None
        mod = _apply(
            replayed or mod,
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        )
        if system_prefix is not None:
            mod = _linked_in(mod, system_prefix)
        pipeline = stack.PIPELINE if on_cpu else limits.PIPELINE
        executable = relax.build(mod, target, relax_pipeline=None, tir_pipeline=pipeline)
    attention = [name for name in kernels if name.startswith(("flash_window_attention", "slide_attention"))]
    return Built(executable, len(kernels), len(attention), constants, weights, replayed is not None)


def _linked_in(mod: IRModule, prefix: str) -> IRModule:
    """The module as a system library, its kernels' symbols prefixed: those of two models meet in one program.

    AttachGlobalSymbol would prefix them too, but by renaming inside functions, which it cannot with GPU kernels.
    """
    for name, func in mod.functions.items():
        if isinstance(func, tirx.PrimFunc):
            mod[name] = func.with_attr("global_symbol", prefix + func.attrs["global_symbol"])
    return mod.with_attr("system_lib_prefix", prefix)


def _constant_outputs(mod: IRModule) -> tuple[int, ...]:
    body = mod[ENTRY].body
    bound = {binding.var: binding.value for block in body.blocks for binding in block.bindings}

    def origin(value: Any) -> Any:
        while value in bound:
            value = bound[value]
        return value

    result = origin(body.body)
    outputs = result.fields if isinstance(result, relax.Tuple) else [result]
    return tuple(i for i, output in enumerate(outputs) if isinstance(origin(output), ir.GenericConst))


def _apply(mod: IRModule, *passes: Any) -> IRModule:
    return tvm.transform.Sequential(list(passes))(mod)


def _schedule(mod: IRModule, target: tvm.target.Target, tuned: Choices | None) -> IRModule:
    if target.kind.name == "llvm":
        from attnrewrite.lowering.schedules import cpu

        return cpu.schedule(mod, target, tuned)
    from attnrewrite.lowering.schedules import gpu

    mod = gpu.schedule(mod, target)
    for name, func in mod.functions.items():
        # TVM's generic schedule calls every function `main`; the module's own names come with the last passes.
        if isinstance(func, tirx.PrimFunc) and "global_symbol" in func.attrs:
            mod[name] = func.without_attr("global_symbol")
    return mod


def export(executable: Any, target: Target, path: Path) -> tuple[str, ...]:
    """Link the library; for Metal, keep what its machine code was made from beside it, as gzipped LLVM IR.

    Returns the names of the files beside the library. Raises CompilerError with the linker's own words where linking
    fails.
    """

    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None, **_: Any) -> None:
        command = ["cc", "-shared", "-fPIC", "-s", "-o", output]
        if target.link is not None:
            command += ["-target", target.link]
        if path.suffix == ".dylib":
            command += ["-Wl,-undefined,dynamic_lookup", f"-Wl,-install_name,@rpath/{path.name}"]
        run_zig([*command, *objects, *(options or ())], f"linking {path.name} failed")

    link.output_format = path.suffix.removeprefix(".")  # type: ignore[attr-defined]
    executable.export_library(str(path), fcompile=link)
    if target.kind != "metal":
        return ()
    (host,) = executable.mod.imports
    path.with_name(HOST_CODE).write_bytes(gzip.compress(host.inspect_source("ll").encode(), mtime=0))
    return (HOST_CODE,)
