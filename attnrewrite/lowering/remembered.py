"""What tuning found, kept between runs: one file per machine kind in the cache directory.

A machine kind is a CPU, what is compiled for it, and the versions of this package and of TVM. A damaged file counts as
empty, a damaged entry as absent: every entry is a choice among correct kernels, so nothing but speed is at stake.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnrewrite.lowering.cache import cache_directory
from attnrewrite.lowering.choices import Choice, Choices, Product

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """cpu: the model's name as the system gives it. target: the TVM target, as text. versions: of what compiles."""

    cpu: str
    target: str
    versions: Mapping[str, str]

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{re.sub(r'[^a-z0-9]+', '-', self.cpu.lower()).strip('-') or 'cpu'}-{digest}.json"


@dataclass(frozen=True)
class Finding:
    """What is known of one product: the best choice (None: the cost model's), and how much of the search is done.

    tried: candidates measured so far, in their order. speedup: of the choice over the cost model's.
    """

    choice: Choice | None
    tried: int
    speedup: float

    def to_json(self) -> dict[str, Any]:
        return {
            "choice": None if self.choice is None else self.choice.to_json(),
            "tried": self.tried,
            "speedup": round(self.speedup, 4),
        }

    @classmethod
    def from_json(cls, document: Any) -> Finding:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        choice = None if document["choice"] is None else Choice.from_json(document["choice"])
        return cls(choice, int(document["tried"]), float(document["speedup"]))


class Memory:
    """Findings of one machine kind with one number of threads. Writing them is safe beside other processes."""

    def __init__(self, machine: Machine, threads: int, directory: Path | None = None) -> None:
        self.machine = machine
        self.path = (cache_directory() / "tuned" if directory is None else directory) / machine.file_name
        self._section = f"threads={threads}"

    def read(self) -> dict[str, Finding]:
        """Findings by `Product.key`; empty where there is no file, or one that cannot be read."""
        entries = self._document()["findings"].get(self._section, {})
        found: dict[str, Finding] = {}
        for key, entry in entries.items() if isinstance(entries, dict) else ():
            try:
                found[key] = Finding.from_json(entry)
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def choices(self) -> Choices:
        """What `read` finds, as a table."""
        return choices_of(self.read())

    def write(self, product: Product, finding: Finding) -> None:
        """Adds one finding to what the file holds by then. Raises OSError where the cache cannot be written."""
        document = self._document()
        entries = document["findings"].get(self._section)
        entries = entries if isinstance(entries, dict) else {}
        document["findings"][self._section] = {**entries, product.key: finding.to_json()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.stem}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=1) + "\n")
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _document(self) -> dict[str, Any]:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            document = None
        whole = isinstance(document, dict) and document.get("format") == FORMAT
        if whole and isinstance(document.get("findings"), dict):
            return document
        return {"format": FORMAT, "machine": asdict(self.machine), "findings": {}}


def choices_of(findings: Mapping[str, Finding]) -> Choices:
    """Of the findings, those that differ from the cost model."""
    return Choices({key: finding.choice for key, finding in findings.items() if finding.choice is not None})


def cpu_model() -> str:
    """The CPU's name as the system gives it, or its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found is not None:
            return found.group(1).strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()
