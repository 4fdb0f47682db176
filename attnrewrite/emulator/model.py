"""A compiled Metal artifact, run on this machine's CPU from what lies in its directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from attnrewrite.emulator.device import metal_device
from attnrewrite.emulator.library import load_library
from attnrewrite.runtime import LoadedModel


class EmulatedModel(LoadedModel):
    """The model of an artifact directory for Metal: its kernels' own source, launched by its own byte code.

    findings: what the runs so far did that a GPU would not forgive; see `MetalDevice.findings`. Raises UserError where
    the directory holds no such model, and CompilerError where its kernels do not compile.
    """

    def __init__(self, directory: str | Path) -> None:
        self.findings: tuple[str, ...] = ()
        with metal_device(recording=True) as self._device:
            super().__init__(Path(directory))

    def run(self, inputs: Mapping[str, Any], threads: int | None = None) -> dict[str, np.ndarray]:
        """As `LoadedModel.run`; one thread does it all."""
        with metal_device(recording=True) as device:
            outputs = super().run(inputs, threads)
            self.findings = tuple(dict.fromkeys((*self.findings, *device.findings)))
        return outputs

    def _open(self, library: Path) -> Any:
        machine = relax.VirtualMachine(load_library(library), [tvm.metal(), tvm.cpu()])
        self._device.watch(machine)
        return machine
