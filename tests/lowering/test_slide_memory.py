"""Keys and values are never expanded: the slide kernel's memory does not grow with the map."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("tvm")

pytestmark = pytest.mark.slow

SIZE, CHANNELS, KERNEL = 1024, 96, 7
# Of the kernel beyond its operands; a copy of the slots of keys and values would take more than 30 GB.
LIMIT_MB = 200

CHILD = """
import json, resource, sys
import numpy as np, tvm
from tvm.target import Target, codegen
from attnrewrite.functions.spec import SlideAttention
from attnrewrite.localattention.geometry import NeighborhoodGeometry
from attnrewrite.lowering.kernels.slide_cpu import slide_attention
from attnrewrite.lowering.schedules.stack import PIPELINE

size, channels, kernel = map(int, sys.argv[1:])
shape = (1, channels, size, size)
target = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
spec = SlideAttention(NeighborhoodGeometry((size, size), (kernel, kernel), (1, 1)), 3, 32**-0.5)
operands = ("query", "key", "value")
function = slide_attention(spec, operands, {name: shape for name in operands}, "float32", target, "attend")
module = tvm.compile(tvm.IRModule({"attend": function}), target, tir_pipeline=PIPELINE)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

maps = [tvm.runtime.empty(shape, "float32") for _ in range(4)]
for i, feature_map in enumerate(maps):
    np.from_dlpack(feature_map)[:] = i + 1.0
before = resident()
module["attend"](*maps)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
inside = float(np.from_dlpack(maps[3])[0, 0, size // 2, size // 2])
print(json.dumps({"beyond_mb": (peak - before) / 1e6, "inside": inside}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_map_of_a_million_pixels_needs_no_more_than_a_strip_beyond_its_operands() -> None:
    arguments = [str(SIZE), str(CHANNELS), str(KERNEL)]
    run = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    measured = json.loads(run.stdout)
    assert measured["inside"] == pytest.approx(3.0, rel=1e-6)
    assert 0 <= measured["beyond_mb"] < LIMIT_MB
