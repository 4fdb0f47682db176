"""The operators by TVM's kernels: those of lowering/kernels, compiled once per site and kept on disk.

A kernel is found by the spec, the operands present, their dtypes, their shapes without the batch, and the device
(kernel.py). `prepare` compiles those of many sites together and waits. On CPUs a call whose kernel is not there
yet has it compiled in the background and is computed in torch until then; on CUDA devices the first call waits for it.
All that no kernel computes is left to torch: other dtypes and devices, other specs, gradients. Calls that gradients go
through use prepared kernels alone, so that a training run does not depend on when one is ready.

CUDA kernels are launched on torch's current stream. While that is captured as a CUDA graph, only those are used that
were launched on that device before: loading one may not be captured. Sites whose kernel a device refuses are left to
torch as those are whose kernel cannot be compiled.

ATTNREWRITE_KERNELS=off, or `use_kernels(False)`, leaves everything to torch.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import platform
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnrewrite.errors import CompilerError, last_line
from attnrewrite.functions.spec import Spec
from attnrewrite.operators.kernel import CPU, MAPS, Kernel, indices_fit, kernel_of
from attnrewrite.operators.read import as_read_by_cpu, as_read_by_gpu
from attnrewrite.operators.schema import result_shapes

_VARIABLE = "ATTNREWRITE_KERNELS"

# Seconds that the background waits for further kernels before it starts a compiler for those it has.
_GATHERING_SECONDS = 0.3


@dataclass(frozen=True)
class Loaded:
    """A kernel in memory. lanes: of the vectors that the operands added to logits are laid out for."""

    function: Callable[..., Any]
    lanes: int


@dataclass(frozen=True)
class Prepared:
    """What `prepare` found: kernels compiled now, kept from before, and sites that no kernel computes.

    failed: sentences of those that could not be compiled. seconds: of the compiling process.
    """

    compiled: int
    kept: int
    uncovered: int
    failed: tuple[str, ...]
    seconds: float


class _State:
    """enabled: None until it is asked for. ready: of each kernel asked for, the loaded one; None: left to torch, for
    good or while it is among `making`. plans: of the kinds of calls seen. launched: what ran on CUDA devices before.
    """

    def __init__(self) -> None:
        self.enabled: bool | None = None
        self.ready: dict[Kernel, Loaded | None] = {}
        self.making: set[Kernel] = set()
        self.prepared: set[Kernel] = set()
        self.plans: dict[Any, Plan] = {}
        self.launched: set[tuple[Kernel, torch.device]] = set()
        self.launches = 0
        self.pending: list[Kernel] = []
        self.lock = threading.Lock()
        self.worker: threading.Thread | None = None
        self.children: list[subprocess.Popen[str]] = []
        self.ending = threading.Event()
        self.warned = False


_state = _State()


def use_kernels(enabled: bool) -> None:
    """Whether calls from now on may use compiled kernels; ATTNREWRITE_KERNELS=off is the same as False."""
    _state.enabled = enabled


def kernels_are_used() -> bool:
    """Whether calls use compiled kernels: not switched off, and apache-tvm is installed."""
    if _state.enabled is None:
        wanted = os.environ.get(_VARIABLE, "auto").lower() not in ("off", "0", "no", "false")
        _state.enabled = wanted and importlib.util.find_spec("tvm") is not None
    return _state.enabled


# -- calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How one kind of call is made. kernel, loaded: None where torch computes it. shapes: of the results. prepared:
    whether `prepare` made the kernel.
    """

    kernel: Kernel | None
    loaded: Loaded | None
    shapes: tuple[tuple[int, ...], ...]
    prepared: bool


# Kinds of calls that are remembered; they differ in their batch as well.
_MOST_PLANS = 4096


def results_of(spec: Spec, operands: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
    """The op computed by its kernel; None where there is none, or none yet.

    Raises ValueError where an operand's shape is not the op's.
    """
    if not kernels_are_used():
        return None
    trained = any(t.requires_grad for name, t in operands.items() if name in MAPS)
    key = (spec, *((name, t.shape, t.stride(), t.dtype, t.device) for name, t in operands.items()))
    plan = _state.plans.get(key)
    if plan is None:
        plan = _plan(spec, operands, trained)
        if plan is None:
            return None
        if len(_state.plans) >= _MOST_PLANS:
            _state.plans.clear()
        _state.plans[key] = plan
    if plan.kernel is None or plan.loaded is None or (trained and not plan.prepared):
        return None
    if plan.kernel.device == CPU:
        return _call_on_cpu(plan.kernel, plan.loaded, plan.shapes, operands)
    return _call_on_gpu(plan.kernel, plan.loaded, plan.shapes, operands)


def _plan(spec: Spec, operands: Mapping[str, Tensor], trained: bool) -> Plan | None:
    """The plan of a call; None where its kernel is not there yet."""
    shapes = tuple(tuple(map(int, shape)) for shape in result_shapes(spec, operands))
    kernel = kernel_of(spec, operands)
    if kernel is None or not indices_fit(kernel, operands, shapes):
        return Plan(None, None, shapes, False)
    if kernel not in _state.ready:
        if trained or (kernel.device != CPU and _is_capturing()):
            return None
        if kernel.device == CPU:
            _ask(kernel)
            return None
        _make([kernel])
    loaded = _state.ready[kernel]
    if loaded is None and kernel in _state.making:
        return None
    return Plan(kernel, loaded, shapes, kernel in _state.prepared)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


Shapes = Sequence[tuple[int, ...]]


def _call_on_cpu(kernel: Kernel, loaded: Loaded, shapes: Shapes, operands: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    results = tuple(torch.empty(shape) for shape in shapes)
    if results[0].numel():
        steps = dict(kernel.steps)
        given = [as_read_by_cpu(kernel.spec, n, t.detach(), steps.get(n), loaded.lanes) for n, t in operands.items()]
        _follow_threads()
        loaded.function(*given, *results)
    return results


def _call_on_gpu(
    kernel: Kernel, loaded: Loaded, shapes: Shapes, operands: Mapping[str, Tensor]
) -> tuple[Tensor, ...] | None:
    """On torch's current stream, without waiting, and with no memory but torch's. None where the device cannot."""
    value = operands["value"]
    launch = (kernel, value.device)
    is_first = launch not in _state.launched
    if is_first and _is_capturing():
        return None
    results = tuple(torch.empty(shape, dtype=value.dtype, device=value.device) for shape in shapes)
    if not results[0].numel():
        return results
    dtypes, steps = dict(kernel.dtypes), dict(kernel.steps)
    given = [
        as_read_by_gpu(kernel.spec, t.detach(), getattr(torch, dtypes[n]), steps.get(n)) for n, t in operands.items()
    ]
    try:
        with torch.cuda.device_of(value):  # type: ignore[no-untyped-call]  # TVM changes the current device
            loaded.function(*given, *results)  # which tells TVM of the stream
    except RuntimeError as error:  # of the driver; what is wrong with operands is a ValueError
        if not is_first:
            raise
        _state.plans.clear()
        _left_to_torch([kernel], f"the GPU does not take a kernel: {last_line(error)}")
        return None
    _state.launched.add(launch)
    _state.launches += 1
    return results


_of_thread = threading.local()


def _follow_threads() -> None:
    """Let TVM's pool, of which every thread has its own, use as many threads as torch does."""
    threads = torch.get_num_threads()
    if getattr(_of_thread, "threads", None) != threads:
        from attnrewrite.runtime import set_threads

        set_threads(threads)
        _of_thread.threads = threads


# -- compiling --------------------------------------------------------------------------------------------------------


def prepare(sites: Iterable[tuple[Spec, Mapping[str, Tensor]]]) -> Prepared:
    """Compile the kernels of these sites together, and wait for them; later calls use them.

    sites: spec and operands by name, of which only dtype, shape and strides are read (fake and meta tensors will do).
    Where TVM is missing or compiling fails the sites are left to torch, with one warning.
    """
    listed = [(spec, kernel_of(spec, operands)) for spec, operands in sites]
    kernels = list(dict.fromkeys(kernel for _, kernel in listed if kernel is not None))
    uncovered = sum(kernel is None for _, kernel in listed)
    if not kernels_are_used():
        return Prepared(0, 0, len(listed), (), 0.0)
    known = [kernel for kernel in kernels if _state.ready.get(kernel) is not None]
    report = _make([kernel for kernel in kernels if kernel not in known])
    _state.prepared.update(kernels)
    _state.plans.clear()  # some say that torch computes what a kernel computes now
    return Prepared(
        report.compiled, report.kept + len(known), report.uncovered + uncovered, report.failed, report.seconds
    )


def compile_for(architecture: str, sites: Iterable[tuple[Spec, Mapping[str, Tensor]]]) -> tuple[str, ...]:
    """Compile the kernels of these sites into the cache, for GPUs of an architecture (sm_90) that need not be at hand.

    Their names do not depend on this machine: a cache may be copied. Returns the sentences of those that failed.
    Raises CompilerError where nothing can be compiled.
    """
    kernels = dict.fromkeys(kernel_of(spec, operands, architecture) for spec, operands in sites)
    absent = [k for k in kernels if k is not None and not (_folder() / f"{_name(k)}.so").exists()]
    missing = _covered(absent)
    return tuple(_compile_side_by_side(architecture, missing).values()) if missing else ()


def launched_kernels() -> int:
    """How many times kernels were launched on CUDA devices so far."""
    return _state.launches


def _ask(kernel: Kernel) -> None:
    """Have a kernel made in the background."""
    with _state.lock:
        if kernel in _state.ready:
            return
        _state.ready[kernel] = None
        _state.making.add(kernel)
        _state.pending.append(kernel)
        if _state.worker is None:
            _state.worker = threading.Thread(target=_work, name="attnrewrite-kernels", daemon=True)
            _state.worker.start()


def _work() -> None:
    while not _state.ending.wait(_GATHERING_SECONDS):
        with _state.lock:
            kernels, _state.pending = _state.pending, []
            if not kernels:
                _state.worker = None
                return
        _make(kernels)
        _state.making.difference_update(kernels)


def _make(kernels: Sequence[Kernel]) -> Prepared:
    """Load these kernels, compiling those that are not on disk. For loading, TVM's runtime is enough."""
    absent = [kernel for kernel in kernels if not _load(kernel)]
    try:
        missing = _covered(absent)
    except Exception as error:  # whatever a broken installation raises
        return _left_to_torch(absent, f"TVM cannot be imported: {error}")
    _state.ready.update(dict.fromkeys(k for k in absent if k not in missing))
    start, failed = time.perf_counter(), dict[Kernel, str]()
    if missing:
        try:
            failed = _compile(missing)
        except (CompilerError, OSError) as error:
            return _left_to_torch(missing, str(error))
        for kernel in missing:
            if kernel not in failed and not _load(kernel):
                failed[kernel] = "the library cannot be loaded"
    if failed:
        _left_to_torch(list(failed), next(iter(failed.values())))
    return Prepared(
        len(missing) - len(failed),
        len(kernels) - len(absent),
        len(absent) - len(missing),
        tuple(failed.values()),
        round(time.perf_counter() - start, 3),
    )


def _covered(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Those that can be compiled. Raises ImportError where TVM cannot be imported with its compiler."""
    if not kernels:
        return []
    import tvm  # noqa: F401 - its runtime is what a kernel's library finds its threads in

    from attnrewrite.lowering.kernels.coverage import covers

    return [k for k in kernels if covers(k.spec, {n: _sized(shape) for n, shape in k.shapes}, k.kind)]


def _sized(shape: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(1 if e is None else e for e in shape)


def _left_to_torch(kernels: Sequence[Kernel], reason: str) -> Prepared:
    _state.ready.update(dict.fromkeys(kernels))
    if not _state.warned and not _state.ending.is_set():
        _state.warned = True
        warnings.warn(f"attnrewrite computes in torch what its kernels would: {reason}", stacklevel=2)
    return Prepared(0, 0, 0, (reason,) * len(kernels), 0.0)


def _compile(kernels: Sequence[Kernel]) -> dict[Kernel, str]:
    """Libraries and what is to be known of them, in the cache; the reasons of those that failed."""
    failed: dict[Kernel, str] = {}
    for device in dict.fromkeys(kernel.device for kernel in kernels):
        wanted = [kernel for kernel in kernels if kernel.device == device]
        if device == CPU:
            failed |= _compile_for(device, wanted)
        elif missing := _missing_for_cuda():
            failed |= dict.fromkeys(wanted, missing)
        else:
            failed |= _compile_side_by_side(device, wanted)
    return failed


# Of several hundred megabytes each.
_MOST_PROCESSES = 8


def _compile_side_by_side(device: str, kernels: Sequence[Kernel]) -> dict[Kernel, str]:
    """In a process for each core: a GPU's compiler takes seconds for a kernel, and uses one."""
    from attnrewrite.runtime import default_threads

    count = min(len(kernels), default_threads(), _MOST_PROCESSES)
    groups = [kernels[first::count] for first in range(count)]
    with ThreadPoolExecutor(count) as pool:
        found = pool.map(lambda group: _compile_for(device, group), groups)
        return {kernel: why for failed in found for kernel, why in failed.items()}


def _missing_for_cuda() -> str | None:
    """Why no kernel can be compiled, or none be loaded: known at once, where a compiling process takes seconds."""
    from attnrewrite.lowering.cuda_compiler import find_compiler
    from attnrewrite.runtime import load_cuda

    try:
        find_compiler()
    except CompilerError as error:
        return str(error)
    return load_cuda()


def _compile_for(device: str, kernels: Sequence[Kernel]) -> dict[Kernel, str]:
    from attnrewrite.lowering.compile import REQUEST_NAME, RESULT_NAME, CompilerCrash, check_tvm_version, run_child
    from attnrewrite.lowering.targets import parse_target

    if _state.ending.is_set():
        raise CompilerError("the process ends")
    check_tvm_version()
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    names = {kernel: _name(kernel) for kernel in kernels}
    target = parse_target("cpu") if device == CPU else parse_target("cuda", _gpu_target(device))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compile-") as scratch:
        work = Path(scratch)
        request = {
            "target": target.to_json(),
            "kernels": [kernel.request() | {"name": name} for kernel, name in names.items()],
        }
        (work / REQUEST_NAME).write_text(json.dumps(request), encoding="utf-8")
        try:
            run_child(work, f"{len(kernels)} kernels", on_start=_remember_child)
        except CompilerCrash as crash:
            if len(kernels) == 1:
                return {kernels[0]: str(crash)}
            return {k: why for kernel in kernels for k, why in _compile_for(device, [kernel]).items()}
        result = json.loads((work / RESULT_NAME).read_text(encoding="utf-8"))
        for name in names.values():
            if name not in result["failed"]:
                about = work / f"{name}.json"
                about.write_text(json.dumps({"lanes": result["lanes"]}), encoding="utf-8")
                about.replace(folder / about.name)
                (work / f"{name}.so").replace(folder / f"{name}.so")
    return {kernel: result["failed"][name] for kernel, name in names.items() if name in result["failed"]}


def _gpu_target(architecture: str) -> str:
    """For launches by any CPU of this kind."""
    return json.dumps({"arch": architecture, "host": {"kind": "llvm", "mtriple": f"{platform.machine()}-linux-gnu"}})


def _load(kernel: Kernel) -> bool:
    """Whether the kernel's library is in the cache and can be loaded."""
    from attnrewrite.lowering.kernel_entry import ENTRY, load_kernel

    library = _folder() / f"{_name(kernel)}.so"
    try:
        lanes = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))["lanes"]
        _state.ready[kernel] = Loaded(load_kernel(library, ENTRY, kernel.device != CPU), int(lanes))
    except Exception:  # whatever a damaged file makes the loader raise; it is compiled again
        return False
    return True


def _folder() -> Path:
    from attnrewrite.lowering.cache import cache_directory

    return cache_directory() / "operators"


def _name(kernel: Kernel) -> str:
    """Of the kernel's files: a digest of the kernel, of what compiles it and of the CPU, if it is compiled for that."""
    from attnrewrite.lowering.kernel_entry import compiler_digest

    digest = compiler_digest(for_cpu=kernel.device == CPU)
    return sha256(json.dumps([kernel.request(), digest], sort_keys=True).encode()).hexdigest()[:24]


def _remember_child(child: subprocess.Popen[str]) -> None:
    _state.children.append(child)
    if _state.ending.is_set():
        child.kill()


@atexit.register
def _end_background() -> None:
    """Nobody waits any more for a compiler. Its thread is joined: an interpreter that ends under a thread which is in
    C++ (importing TVM, loading a library) aborts.
    """
    _state.ending.set()
    worker = _state.worker
    for child in _state.children:
        if child.poll() is None:
            child.kill()
    if worker is not None:
        worker.join()


def _after_fork() -> None:
    """The threads of TVM's pool do not follow into a forked process, where a kernel would wait for them."""
    _state.enabled = False


os.register_at_fork(after_in_child=_after_fork)
