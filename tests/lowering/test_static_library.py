"""Models as static libraries: the iOS one by its objects, the same C interface on this machine by running it."""

from __future__ import annotations

import ctypes
import math
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi

from attnrewrite import runtime
from attnrewrite.emulator.device import metal_device, metal_target
from attnrewrite.errors import UserError
from attnrewrite.lowering import build, importer
from attnrewrite.lowering.compile import c_name
from attnrewrite.lowering.split_linear import split_linear
from attnrewrite.lowering.static_library import export_static, system_prefix
from attnrewrite.lowering.targets import Target, parse_target
from attnrewrite.lowering.weights import WEIGHTS_NAME, write_weights
from attnrewrite.runtime import tensors_of
from tests.lowering.compiling import artifact, model, node, normal, reference, relative_error

RUNTIME = (Path(tvm_ffi.libinfo.find_libtvm_ffi()), Path(tvm.__file__).with_name("lib") / "libtvm_runtime.so")
MAIN = Path(__file__).with_name("static_library_main.c")
LC_SEGMENT_64, LC_SYMTAB, LC_BUILD_VERSION = 0x19, 0x2, 0x32
PLATFORM_IOS = 2


def small():
    """A symbolic batch, two weights that go into the file, and one too small for that."""
    nodes = [
        node("Conv", "x w b", "c", strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        node("MatMul", "c v", "m"),
        node("Softmax", "m", "y", axis=-1),
    ]
    weights = {"w": normal(96, 3, 3, 3), "b": normal(96), "v": normal(5, 500)}
    return model(nodes, {"x": ["batch", 3, 13, 10]}, weights)


def zig(*arguments: object, folder: Path | None = None) -> None:
    command = [sys.executable, "-m", "ziglang", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr


SENTENCES = [
    "the model is not loaded",
    r"the weights are not all there: \d+ bytes are needed",
    "the model is loaded already",
    "an input is not set",
    "the model has not run",
    "there is no input of this index",
    ".*",  # TVM's own words about the shape
    *["the array is not of the output's size", "500 axes of 1"],
    *["the array is not of the output's size", "500 axes of 2"],
    "the model is not loaded",
]


def export_small(directory: Path, target: Target, description: Any) -> None:
    """The model `small` for this machine, as `--target metal:ios` makes it for another."""
    target = replace(target, link=None, library="model.a")
    proto = small()
    split_linear(proto)
    mod = importer.import_onnx(proto, target, description)
    inputs, outputs = map(tensors_of, importer.interface(mod, *importer.interface_names(proto)))
    built = build.build(mod, description, separate_weights=0, system_prefix=system_prefix("small"))
    weights = write_weights(built.weights, directory / WEIGHTS_NAME)
    assert weights
    export_static(
        built.executable,
        target,
        directory,
        name="small",
        entry=build.ENTRY,
        inputs=inputs,
        outputs=outputs,
        weights=weights,
        weights_file=WEIGHTS_NAME,
    )


def test_a_program_with_the_library_linked_in_computes_what_the_model_does(tmp_path):
    target = parse_target("cpu")
    export_small(tmp_path, target, build.tvm_target(target))
    strict = ("-std=c11", "-Wall", "-Werror", "-I", tmp_path)
    zig("cc", *strict, MAIN, tmp_path / "model.a", *RUNTIME, "-lm", "-o", tmp_path / "main")
    images = normal(3, 3, 13, 10)
    images.tofile(tmp_path / "images")
    run = subprocess.run(
        [tmp_path / "main", tmp_path / WEIGHTS_NAME, tmp_path / "images", tmp_path / "outputs"],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(str(path.parent) for path in RUNTIME)},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.fullmatch("\n".join(SENTENCES), run.stdout.strip()), run.stdout
    found = np.fromfile(tmp_path / "outputs", np.float32).reshape(3, 96, 7, 500)
    assert relative_error(found, reference(small(), images)) <= 1e-5


def test_with_a_metal_device_weights_and_inputs_are_copied_there(tmp_path):
    """The device is this CPU; every access to its memory is checked, so a tensor left on the host would be found."""
    export_small(tmp_path, parse_target("metal"), metal_target())
    zig("cc", "-shared", "-Wl,-u,small_load", tmp_path / "model.a", *RUNTIME, "-lm", "-o", tmp_path / "small.so")
    weights = np.fromfile(tmp_path / WEIGHTS_NAME, np.uint8)
    images = normal(2, 3, 13, 10)
    found = np.empty((2, 96, 7, 500), np.float32)
    with metal_device(recording=True) as device:
        library = ctypes.CDLL(str(tmp_path / "small.so"))
        library.small_error.restype = ctypes.c_char_p
        codes = [
            library.small_load(weights.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(weights.nbytes)),
            library.small_set_input(0, images.ctypes.data_as(ctypes.c_void_p), (ctypes.c_int64 * 4)(*images.shape)),
            library.small_run(),
            library.small_get_output(0, found.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(found.nbytes)),
        ]
        assert codes == [0, 0, 0, 0], library.small_error()
        assert device.launches
        assert device.findings == ()
        library.small_unload()
    assert relative_error(found, reference(small(), images)) <= 1e-5


def commands_of(macho: bytes) -> dict[int, bytes]:
    magic, cpu, _, kind, count, _ = struct.unpack("<6I", macho[:24])
    assert (magic, cpu, kind) == (0xFEEDFACF, 0x0100000C, 1)  # a 64-bit object for arm64
    at, found = 32, {}
    for _ in range(count):
        command, size = struct.unpack("<2I", macho[at : at + 8])
        found[command] = macho[at : at + size]
        at += size
    return found


def symbols_of(macho: bytes) -> tuple[set[str], set[str]]:
    """Names of the external symbols that an object defines, and of those it needs, as C knows them."""
    table, count, strings, _ = struct.unpack("<4I", commands_of(macho)[LC_SYMTAB][8:24])
    defined, needed = set(), set()
    for i in range(count):
        name, kind, *_ = struct.unpack("<IBBHQ", macho[table + 16 * i : table + 16 * (i + 1)])
        if kind & 1:
            text = macho[strings + name :].partition(b"\0")[0].decode()
            (defined if kind & 0x0E else needed).add(text.removeprefix("_"))
    return defined, needed


def members_of(archive: Path) -> dict[str, bytes]:
    folder = archive.with_suffix(".members")
    folder.mkdir()
    zig("ar", "x", archive.resolve(), folder=folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def for_ios(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ios")
    return directory, artifact(small(), directory, "metal:ios", name="Swin-S.v2", precision="fp16")


def test_ios_objects(for_ios):
    directory, report = for_ios
    members = members_of(directory / report.library)
    assert len(members) == 3
    for content in members.values():
        platform, minimum = struct.unpack("<2I", commands_of(content)[LC_BUILD_VERSION][8:16])
        assert (platform, minimum >> 16) == (PLATFORM_IOS, 16)
    declared = set(re.findall(r"\b(\w+)\(", re.sub(r"/\*.*?\*/", "", (directory / "model.h").read_text(), flags=re.S)))
    assert {f"swin_s_v2_{verb}" for verb in ("load", "set_input", "run", "get_output", "unload", "error")} < declared
    assert declared <= symbols_of(members["model.o"])[0]
    pairs = [symbols_of(content) for content in members.values()]
    defined, needed = (set().union(*sets) for sets in zip(*pairs, strict=True))
    runtime_symbols = {name for name in needed - defined if name.startswith(("TVMFFI", "TVMBackend"))}
    assert needed - defined - runtime_symbols <= {"memcpy", "memset", "bzero"}  # of the C library
    assert not missing_in_the_runtime(runtime_symbols)
    # Two models in one app: nothing of this one's has a name that another's could have, but for what is weak.
    assert all("swin_s_v2_" in name for name in defined if name not in ("__extendhfsf2", "__truncsfhf2"))
    assert b"metal_stdlib" in b"".join(members.values())


def missing_in_the_runtime(names: set[str]) -> set[str]:
    """Those that TVM's runtime libraries do not export."""
    libraries = [ctypes.CDLL(str(path)) for path in RUNTIME]
    return {name for name in names if not any(hasattr(library, name) for library in libraries)}


def test_half_precision_halves_the_weights_file(for_ios):
    directory, report = for_ios
    assert report.weights_file == "swin_s_v2_weights.bin"
    assert {weight.dtype for weight in report.weights} == {"float16"}
    elements = [math.prod(weight.shape) for weight in report.weights]
    assert sorted(elements) == [5 * 500, 96 * 3 * 3 * 3]
    assert (directory / report.weights_file).stat().st_size <= 2 * sum(elements) + runtime.ALIGNMENT
    assert runtime.read_manifest(directory).precision == "fp16"


def test_a_library_for_an_app_is_not_loaded(for_ios):
    with pytest.raises(UserError, match=r"model\.a is compiled for metal:ios: it is linked into an app"):
        runtime.load(for_ios[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Swin-B.v2", "swin_b_v2"), ("3d", "model_3d"), ("_", "model"), ("ünet", "net"), ("", "model")],
)
def test_names_in_c(name, expected):
    assert c_name(name) == expected
