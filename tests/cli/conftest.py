"""Running the command as a user does, and small models to run it on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnrewrite.cli import app
from tests import tiny


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.stdout)


Command = Callable[..., Finished]


@pytest.fixture
def command() -> Command:
    """`command("inspect", path)` in this process; nothing but SystemExit leaves it."""

    def run(*arguments: object) -> Finished:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Finished(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def process() -> Command:
    """The same in a process of its own."""

    def run(*arguments: object) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "attnrewrite", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def attention(tmp_path: Path) -> Path:
    """A model with one softmax and nothing local."""
    return tiny.save(tmp_path / "vit.onnx", tiny.global_attention())


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    """A model without a softmax."""
    return tiny.save(tmp_path / "mlp.onnx", tiny.linear())
