"""What the machine at hand can do, measured: its fastest matrix product and its copy bandwidth.

The peak is that of chains of square products with constant weights, in ONNX Runtime, in OpenVINO and compiled by this
package: whichever is fastest, over some shapes. The winner then takes part in every contest, so that a share of the
peak compares two figures of the same minute.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Rows and columns: tokens and channels of layers that a model with windows has in plenty.
GEMM_SHAPES = ((784, 384), (1024, 512), (512, 768))
GEMM_ENGINES = ("onnxruntime", "openvino", "compiled")
CHAIN = 8
COPY_BYTES = 256_000_000
COPY_TRIALS = 8
PACKAGES = ("attnrewrite", "apache-tvm", "onnxruntime", "openvino", "torch", "timm", "spandrel", "numpy")


def gemm_name(rows: int, columns: int) -> str:
    return f"gemm_{rows}_{columns}"


def gemm_flops(rows: int, columns: int) -> int:
    """Of the whole chain."""
    return 2 * rows * columns * columns * CHAIN


def write_gemm(rows: int, columns: int, path: Path) -> None:
    """A chain of products `[rows, columns] x [columns, columns]`, scaled so that the values keep their size."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(
            (generator.standard_normal((columns, columns)) / columns**0.5).astype(np.float32), f"w{i}"
        )
        for i in range(CHAIN)
    ]
    names = ["x", *(f"h{i}" for i in range(1, CHAIN)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(CHAIN)]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, columns])] for name in ("x", "y")]
    graph = helper.make_graph(nodes, gemm_name(rows, columns), *ends, initializer=weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def copy_bandwidth(threads: int) -> float:
    """Bytes read and written per second by copying arrays far larger than any cache; the best of some trials."""
    size = COPY_BYTES // 4 // threads
    pairs = [(np.ones(size, np.float32), np.empty(size, np.float32)) for _ in range(threads)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        np.copyto(pair[1], pair[0])

    with ThreadPoolExecutor(threads) as pool:
        return 2 * 4 * size * threads / min(_seconds(lambda: list(pool.map(copy, pairs))) for _ in range(COPY_TRIALS))


def description() -> str:
    """The kind of machine, without its name."""
    return f"{_cpu()}, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Of the packages that take part and are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    cores = sum(line.startswith("processor") for line in lines)
    return ", ".join(filter(None, [fields.get("model name", "unknown CPU"), f"{cores} cores", vectors]))


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
