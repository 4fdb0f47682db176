"""Run an `arm` artifact on this machine: aarch64 Linux under qemu-user, with the TVM runtime's own aarch64 wheels.

What qemu needs beside itself is collected once in a cache directory (ATTNREWRITE_CACHE, or ~/.cache/attnrewrite): the
arm64 packages of Debian's Python, unpacked and not installed, and the wheels of TVM and NumPy for it. No root rights.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import attnrewrite
from attnrewrite.errors import CompilerError
from attnrewrite.lowering.cache import cache_directory
from attnrewrite.lowering.compile import TVM_VERSION
from attnrewrite.runtime import read_manifest

_QEMU_NAMES = ("qemu-aarch64-static", "qemu-aarch64")
_TOOLS = ("apt-get", "apt-cache", "dpkg-deb")

# Oldest first: what pip may take for a glibc of Debian 12 and later.
_PLATFORMS = tuple(f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 26, 27, 28, 31, 34))

_GUEST = """
import sys
import numpy as np
from attnrewrite import runtime
model = runtime.load(sys.argv[1])
with np.load(sys.argv[2]) as arrays:
    inputs = {t.name: arrays[f"arr_{i}"] for i, t in enumerate(model.inputs)}
results = model.run(inputs, threads=int(sys.argv[4]))
np.savez(sys.argv[3], *(results[t.name] for t in model.outputs))
"""


@dataclass(frozen=True)
class Missing:
    """Why artifacts for ARM cannot run on this machine."""

    reason: str


@dataclass(frozen=True)
class Emulator:
    """qemu: the emulator; home: the folder with `root` (the unpacked system) and `site` (the wheels).

    interpreter: file name of the guest's Python.
    """

    qemu: Path
    home: Path
    interpreter: str

    def run(
        self, directory: Path, inputs: Mapping[str, np.ndarray], threads: int = 1, timeout: float | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name. timeout: seconds. Raises CompilerError, with the guest's last words, where the run fails."""
        manifest = read_manifest(directory)
        with tempfile.TemporaryDirectory(prefix="attnrewrite-qemu-") as name:
            work = Path(name)
            # The package alone: beside it in an installation lie wheels of this machine's own architecture.
            (work / "package").mkdir()
            (work / "package" / "attnrewrite").symlink_to(Path(attnrewrite.__file__).resolve().parent)
            np.savez(work / "inputs.npz", *(inputs[tensor.name] for tensor in manifest.inputs))
            arguments = [str(directory.resolve()), str(work / "inputs.npz"), str(work / "outputs.npz"), str(threads)]
            self.python(["-c", _GUEST, *arguments], what=directory.name, path=[work / "package"], timeout=timeout)
            with np.load(work / "outputs.npz") as arrays:
                return {tensor.name: arrays[f"arr_{i}"] for i, tensor in enumerate(manifest.outputs)}

    def python(
        self,
        arguments: Sequence[str],
        *,
        what: str,
        path: Sequence[Path] = (),
        timeout: float | None = None,
        processor: str | None = None,
    ) -> str:
        """Standard output of the guest's Python, which finds TVM, NumPy and, before them, what `path` holds.

        processor: one that qemu knows; None for its default, which has every extension. Raises CompilerError about
        `what`, with the guest's last words, where the run fails or takes more than `timeout` seconds.
        """
        root = self.home / "root"
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "QEMU_LD_PREFIX": str(root),
            "PYTHONHOME": str(root / "usr"),
            "PYTHONPATH": os.pathsep.join(map(str, [*path, self.home / "site"])),
            "PYTHONDONTWRITEBYTECODE": "1",
            **({} if processor is None else {"QEMU_CPU": processor}),
        }
        command = [str(self.qemu), str(root / "usr" / "bin" / self.interpreter), *arguments]
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise CompilerError(f"{what} did not finish under qemu within {timeout} seconds") from None
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            raise CompilerError(f"{what} failed under qemu: {lines[-1]}")
        return run.stdout

    def onnxruntime(self, version: str) -> Path:
        """A folder to put on `path` that holds ONNX Runtime's own wheel for aarch64, fetched once.

        Raises CompilerError where it cannot be fetched.
        """
        minor = int(self.interpreter.rpartition(".")[2])
        folder = self.home.parent / f"aarch64-onnxruntime-{version}-python3.{minor}"
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=self.home.parent, prefix=".aarch64-") as name:
                work = Path(name)
                try:
                    # NumPy is there already, in the version of this machine.
                    needed = (f"onnxruntime=={version}", f"numpy=={np.__version__}")
                    _unpack_wheels(work / "wheels", work / "site", minor, *needed)
                except subprocess.CalledProcessError as error:
                    raise CompilerError(
                        f"ONNX Runtime {version} for aarch64 cannot be fetched: {_words(error)}"
                    ) from None
                (work / "site").rename(folder)
        _describe_processors(self.home / "root")
        return folder


def find_emulator(*, prepare: bool = True) -> Emulator | Missing:
    """An emulator ready to run ARM artifacts, or why there is none.

    prepare: fetch what it needs where the cache does not hold it yet (about 120 MB, once); without, only look.
    """
    qemu = next((path for name in _QEMU_NAMES if (path := shutil.which(name))), None)
    if qemu is None:
        return Missing("qemu-user is not installed (on Debian: apt-get install qemu-user-static)")
    home = cache_directory() / f"aarch64-tvm-{TVM_VERSION}-numpy-{np.__version__}"
    if not home.is_dir():
        if not prepare:
            return Missing(f"the aarch64 system is not prepared in {home}")
        if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
            return Missing(f"{absent[0]} is not installed, and the aarch64 system is made of Debian packages")
        try:
            _prepare(home)
        except subprocess.CalledProcessError as error:
            return Missing(f"{Path(error.cmd[0]).name} failed: {_words(error)}")
        except OSError as error:
            return Missing(f"the aarch64 system cannot be prepared: {error}")
    pythons = sorted(
        path.name for path in (home / "root" / "usr" / "bin").glob("python3.*") if path.suffix[1:].isdigit()
    )
    return Emulator(Path(qemu), home, pythons[-1]) if pythons else Missing(f"{home} holds no Python; delete it")


def _prepare(home: Path) -> None:
    """Fill `home`, whole or not at all."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".aarch64-") as name:
        work = Path(name)
        minor = _unpack_system(work / "apt", work / "root")
        needed = (f"apache-tvm=={TVM_VERSION}", f"numpy=={np.__version__}")
        _unpack_wheels(work / "wheels", work / "site", minor, *needed)
        target = work / "ready"
        target.mkdir()
        for part in ("root", "site"):
            (work / part).rename(target / part)
        target.rename(home)


def _unpack_system(state: Path, root: Path) -> int:
    """Debian's Python for arm64 with what it depends on, into `root`; returns the minor version of that Python."""
    options = [
        f"Dir::State={state / 'state'}",
        f"Dir::State::status={state / 'status'}",
        f"Dir::Cache={state / 'cache'}",
        "APT::Architecture=arm64",
        "APT::Architectures::=arm64",
        "APT::Sandbox::User=root",
        "Debug::NoLocking=1",
    ]
    settings = [word for option in options for word in ("-o", option)]
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()
    _command("apt-get", *settings, "-q", "update")
    found = re.search(r"^Version: 3\.(\d+)", _command("apt-cache", *settings, "show", "python3-minimal"), re.MULTILINE)
    if found is None:
        raise OSError("the package sources hold no python3 for arm64")
    minor = int(found.group(1))
    packages = [f"python3.{minor}-minimal", f"libpython3.{minor}-stdlib", "libstdc++6"]
    _command("apt-get", *settings, "-q", "-y", "install", "--download-only", "--no-install-recommends", *packages)
    root.mkdir()
    for package in (state / "cache" / "archives").glob("*.deb"):
        _command("dpkg-deb", "-x", str(package), str(root))
    return minor


def _unpack_wheels(wheels: Path, site: Path, minor: int, *packages: str) -> None:
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    abis = [word for abi in (f"cp3{minor}", "abi3", "none") for word in ("--abi", abi)]
    version = ["--python-version", f"3.{minor}", "--implementation", "cp", "--only-binary", ":all:"]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--dest", str(wheels)]
    _command(*pip, *version, *platforms, *abis, *packages)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _describe_processors(root: Path) -> None:
    """/proc/cpuinfo as an aarch64 kernel writes it: ONNX Runtime crashes at the host's, which qemu would show it."""
    fields = {
        "processor": "{}",
        "Features": "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp",
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x3",
        "CPU part": "0xd0c",  # Neoverse N1
        "CPU revision": "1",
    }
    text = "".join(f"{name}\t: {value}\n" for name, value in fields.items()) + "\n"
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text("".join(text.format(i) for i in range(os.cpu_count() or 1)))


def _words(error: subprocess.CalledProcessError) -> str:
    lines = (error.stderr or error.stdout or "").strip().splitlines()
    return str(lines[-1] if lines else error.returncode)


def _command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
