"""Load an artifact directory and run it. Needs NumPy and the TVM runtime, nothing else of this package's dependencies.

model = load("swin-cpu/")
model.run({"x": array}, threads=1)["logits"]
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attnrewrite.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = 1

_POOL_VARIABLE = "TVM_NUM_THREADS"
_CUDA_RUNTIME = "nvidia/*/lib/libcudart.so.13"  # of the release that TVM's wheel is built with
_CUDA_NEEDS = "the GPU's driver and CUDA 13's runtime (pip install nvidia-cuda-runtime)"

# Bytes: what compiled code expects of an address.
ALIGNMENT = 64
# Elements from which an output is handed over uncopied.
_LARGE = 1 << 18


@dataclass(frozen=True)
class Tensor:
    """One input or output. A symbolic extent is the text of its expression: `batch`, `64*batch`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Weight:
    """A constant of the model in its weights file, at `offset` bytes, a multiple of ALIGNMENT."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says of a compiled library.

    device: cpu, metal or cuda, where its tensors live. threads: how many to use where the caller does not say.
    constant_outputs: names of those that every run returns in the same memory. weights: what the entry takes after the
    inputs, from `weights_file`; empty where the library holds its weights itself. precision: what it computes in.
    replayed_entry: the same as `entry`, with launches captured in the first run and replayed as CUDA graphs later.
    """

    target: str
    device: str
    library: str
    entry: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    source_sha256: str = ""
    threads: int | None = None
    constant_outputs: tuple[str, ...] = ()
    precision: str = "fp32"
    weights_file: str | None = None
    weights: tuple[Weight, ...] = ()
    replayed_entry: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Manifest:
        fields = {key: value for key, value in document.items() if key != "format"}
        for key in ("inputs", "outputs"):
            fields[key] = tensors_of(fields[key])
        fields["constant_outputs"] = tuple(document.get("constant_outputs", ()))
        fields["weights"] = weights_of(document.get("weights", ()))
        return cls(**fields)


def tensors_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """From their JSON form."""
    return tuple(Tensor(row["name"], row["dtype"], tuple(row["shape"])) for row in rows)


def weights_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Weight, ...]:
    """From their JSON form."""
    return tuple(Weight(row["dtype"], tuple(row["shape"]), row["offset"]) for row in rows)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.to_json(), indent=2)
    (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Raises UserError where the directory holds no manifest this version can read."""
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory with a compiled model")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{directory} holds no {MANIFEST_NAME}, so no compiled model") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}, the one this version reads")
    try:
        return Manifest.from_json(document)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


class LoadedModel:
    """A compiled model in memory. Calls of one instance must not overlap; the thread count is the process's.

    cuda_graph: whether to replay launches where the library can. What lies between inputs and outputs then stays in GPU
    memory from the first run on. device: which of several GPUs it runs on; with CUDA, torch numbers them alike.
    """

    def __init__(self, directory: Path, cuda_graph: bool = True, device: int = 0) -> None:
        self.manifest = read_manifest(directory)
        if is_linked_in(self.manifest.library):
            raise UserError(linked_in_sentence(str(directory / self.manifest.library), self.manifest.target))
        self._devices = _devices(self.manifest, device)
        library = directory / self.manifest.library
        if not library.exists():
            raise UserError(f"{directory} holds no {library.name}, which its manifest names")
        # Looked up once, because a lookup costs as much as a small kernel.
        entry = (self.manifest.replayed_entry if cuda_graph else None) or self.manifest.entry
        self._function = self._open(library)[entry]
        self._weights = _weights(directory, self.manifest, self._devices[0])

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.manifest.outputs

    def run(self, inputs: Mapping[str, Any], threads: int | None = None) -> dict[str, np.ndarray]:
        """Outputs by name. inputs: NumPy arrays, or tensors that speak DLPack, by name, of the dtypes `inputs` says.

        threads: of the CPU; None leaves the manifest's choice, or all cores. On the CPU an input made by
        `empty_aligned` is read where it is; others are copied first. Raises UserError where names, dtypes or shapes are
        not the model's.
        """
        arrays = self._checked(inputs)
        threads = threads if threads is not None else self.manifest.threads
        if threads is not None:
            set_threads(threads)
        results = self._call(*(_to_device(array, self._devices[0]) for array in arrays))
        values = [results] if hasattr(results, "numpy") else list(results)
        on_cpu = self.manifest.device == "cpu"
        found: dict[str, np.ndarray] = {}
        for tensor, value in zip(self.outputs, values, strict=True):
            own = on_cpu and tensor.name not in self.manifest.constant_outputs
            found[tensor.name] = _handed_over(value, [*arrays, *found.values()]) if own else value.numpy()
        return found

    def run_on_device(self, *tensors: Any) -> tuple[Any, ...]:
        """Outputs, in order, for inputs that lie on the model's device: tensors of TVM's, or of torch's.

        Nothing is copied, waited for, or checked beyond shapes and dtypes: inputs are contiguous and begin at multiples
        of 16 bytes. Launches are on the current stream of the inputs' framework, the same in all calls, since these
        share memory. Outputs speak DLPack.
        """
        results = self._call(*tensors)
        return (results,) if hasattr(results, "numpy") else tuple(results)

    def _call(self, *tensors: Any) -> Any:
        with _current(self._devices[0]) if self.manifest.device == "cuda" else contextlib.nullcontext():
            return self._function(*tensors, *self._weights)

    def _open(self, library: Path) -> Any:
        """The library as a virtual machine of TVM's, a mapping of functions."""
        import tvm
        from tvm.runtime.vm import VirtualMachine

        try:
            return VirtualMachine(tvm.runtime.load_module(str(library)), self._devices)
        except Exception as error:  # whatever TVM's loader raises
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{library} is compiled for {self.manifest.target} and cannot be loaded on this machine: {first}"
            ) from error

    def _checked(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        expected = [tensor.name for tensor in self.inputs]
        if missing := [name for name in expected if name not in inputs]:
            raise UserError(f"input {missing[0]!r} is missing; the model takes {', '.join(map(str, self.inputs))}")
        if unknown := [name for name in inputs if name not in expected]:
            raise UserError(f"the model has no input {unknown[0]!r}; it takes {', '.join(map(str, self.inputs))}")
        symbols: dict[str, int] = {}
        return [_checked_array(tensor, inputs[tensor.name], symbols) for tensor in self.inputs]


def load(directory: str | Path, cuda_graph: bool = True, device: int = 0) -> LoadedModel:
    """The model of an artifact directory. Raises UserError where it cannot run on this machine, and says why.

    cuda_graph, device: of `LoadedModel`.
    """
    return LoadedModel(Path(directory), cuda_graph, device)


def is_linked_in(library: str) -> bool:
    """Whether a library of this file name is a static one, which nothing loads at run time."""
    return library.endswith(".a")


def linked_in_sentence(library: str, target: str) -> str:
    """Why such a library is not run."""
    return f"{library} is compiled for {target}: it is linked into an app for that device and does not run here"


def empty_aligned(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    """An uninitialised array at an address from which `LoadedModel.run` reads without copying."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def set_threads(threads: int) -> None:
    """CPU threads of every model of the process from now on. Raises UserError unless positive."""
    import tvm

    if threads < 1:
        raise UserError(f"the number of threads must be at least 1, got {threads}")
    size_thread_pool(threads)
    all_cores = 1  # of the runtime's affinity modes, the one for equal cores
    tvm.get_global_func("runtime.config_threadpool")(all_cores, threads)


def default_threads() -> int:
    """One for every core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def size_thread_pool(threads: int = 0) -> None:
    """Let TVM's pool, which is made on first use and never grows, have a thread for every core this process may use.

    On x86 TVM would take half the cores for hyperthreads and leave them idle.
    """
    if threads > int(os.environ.setdefault(_POOL_VARIABLE, str(default_threads()))):
        os.environ[_POOL_VARIABLE] = str(threads)


def _checked_array(tensor: Tensor, value: Any, symbols: dict[str, int]) -> np.ndarray:
    """The array of one input; `symbols` collects the extents its symbolic dimensions stand for."""
    array = value if isinstance(value, np.ndarray) else _from_dlpack(tensor, value)
    if array.dtype != np.dtype(tensor.dtype):
        raise UserError(f"input {tensor.name!r} must be {tensor.dtype}, got {array.dtype}")
    if array.ndim != len(tensor.shape):
        raise UserError(f"input {tensor.name!r} must have {_shape(tensor.shape)}, got {_shape(array.shape)}")
    for expected, found in zip(tensor.shape, array.shape, strict=True):
        if isinstance(expected, str):
            expected = symbols.setdefault(expected, found)
        if expected != found or found == 0:
            raise UserError(f"input {tensor.name!r} must have {_shape(tensor.shape)}, got {_shape(array.shape)}")
    return np.ascontiguousarray(array)


def _from_dlpack(tensor: Tensor, value: Any) -> np.ndarray:
    try:
        return np.from_dlpack(value)
    except (AttributeError, TypeError, BufferError, RuntimeError) as error:
        kind = type(value).__name__
        raise UserError(
            f"input {tensor.name!r} must be a NumPy array or a DLPack tensor, got {kind}: {error}"
        ) from None


def _shape(shape: Sequence[int | str]) -> str:
    return f"shape [{', '.join(map(str, shape))}]"


def _devices(manifest: Manifest, number: int) -> list[Any]:
    missing = load_cuda() if manifest.device == "cuda" else None
    import tvm

    size_thread_pool()
    if manifest.device == "cpu":
        if number:
            raise UserError(f"the model is compiled for {manifest.target}, where there is no device {number} to choose")
        return [tvm.cpu()]
    if number >= 0 and (device := tvm.device(manifest.device, number)).exist:
        return [device, tvm.cpu()]
    count = next(n for n in itertools.count() if not tvm.device(manifest.device, n).exist)
    those = f" {number}: it has {count}, numbered from 0" if count else ""
    raise UserError(
        f"the model is compiled for {manifest.target}, and this machine has no {manifest.device} device{those}"
        + (f": {missing}" if missing else "")
    )


@contextlib.contextmanager
def _current(device: Any) -> Iterator[None]:
    """With the CUDA device as the thread's current one, for which TVM captures graphs; then again with that before."""
    cuda, before = ctypes.CDLL(str(_part_for_cuda())), ctypes.c_int()
    cuda.cudaGetDevice(ctypes.byref(before))
    cuda.cudaSetDevice(device.index)
    try:
        yield
    finally:
        cuda.cudaSetDevice(before)


def _part_for_cuda() -> Path:
    """TVM's, which is linked with CUDA's runtime."""
    import tvm

    return Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"


def load_cuda() -> str | None:
    """Load TVM's part for CUDA, which TVM leaves out where it is installed without its compiler. It needs CUDA's
    runtime, which is loaded from where pip puts it unless it is found by name. Returns what is missing,
    None where nothing is.
    """
    own = _part_for_cuda()
    reason = _load_library(own)
    found = next((library for entry in sys.path for library in Path(entry).glob(_CUDA_RUNTIME)), None)
    if reason is not None and found is not None:
        reason = _load_library(found) or _load_library(own)
    return None if reason is None else f"TVM's part for CUDA cannot be loaded ({reason}); it needs {_CUDA_NEEDS}"


def _load_library(path: Path) -> str | None:
    """Why it cannot be loaded, None where it is."""
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    return None


def _weights(directory: Path, manifest: Manifest, device: Any) -> tuple[Any, ...]:
    """The weights beside the library as tensors: the mapped file itself on the CPU, copies of it on other devices."""
    if manifest.weights_file is None or not manifest.weights:
        return ()
    import tvm

    path = directory / manifest.weights_file
    sizes = [math.prod(w.shape) * tvm.DataType(w.dtype).itemsize for w in manifest.weights]
    if not path.is_file():
        raise UserError(f"{directory} holds no {path.name}, which its manifest names")
    found, expected = path.stat().st_size, manifest.weights[-1].offset + sizes[-1]
    if found < expected:
        raise UserError(f"{path} is truncated: {found} bytes, {expected} expected")
    file = np.memmap(path, np.uint8, "c")  # writable, as DLPack wants it, in this process alone
    tensors = []
    for weight, size in zip(manifest.weights, sizes, strict=True):
        content = tvm.runtime.from_dlpack(file[weight.offset : weight.offset + size])
        tensor = content._create_view(weight.shape, weight.dtype)
        tensors.append(tensor if manifest.device == "cpu" else tensor.copyto(device))
    device.sync()  # for streams that do not wait for the default one
    return tuple(tensors)


def _to_device(array: np.ndarray, device: Any) -> Any:
    import tvm

    if device == tvm.cpu() and array.ctypes.data % ALIGNMENT == 0 and array.flags.writeable and array.size:
        return tvm.runtime.from_dlpack(array)  # which read-only arrays do not speak
    return tvm.runtime.tensor(array, device)


def _handed_over(value: Any, others: Sequence[np.ndarray]) -> np.ndarray:
    """An output as an array of the caller's own; a large one is not copied unless it lies in one of the others."""
    if int(np.prod(value.shape, dtype=np.int64)) < _LARGE:
        return value.numpy()
    array = np.from_dlpack(value)
    shared = not array.flags.writeable or any(np.may_share_memory(array, other) for other in others)
    return array.copy() if shared else array
