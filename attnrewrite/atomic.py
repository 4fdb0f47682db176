"""Output directories that appear whole or not at all.

A directory is built beside its destination and renamed at the end; whatever goes wrong before, an interrupt included,
leaves the destination as it was. Only a directory that an earlier run wrote is replaced, and the files somebody else
put into it are carried over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from attnrewrite.errors import UserError

GENERATOR = "attnrewrite"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def is_ours(directory: Path, marker: str) -> bool:
    """Whether an earlier run wrote the directory: its marker, a JSON file, names us as the generator."""
    return _recorded_files(directory, marker) is not None


@contextlib.contextmanager
def staged_directory(destination: Path, marker: str, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A directory to write into, which becomes `destination` when the block ends without an exception.

    marker: name of the JSON file that the block writes with the fields "generator" (`GENERATOR`) and "files", the names
    of everything it wrote, the marker itself excepted; by it a later run knows the directory as ours.
    inputs: files that must survive, so `destination` may not contain them.
    Raises UserError where the destination cannot be written or is not ours to replace.
    """
    destination = Path(os.path.abspath(destination))
    _check_replaceable(destination, marker, inputs)
    created = _make_parents(destination)
    stage: Path | None = None
    try:
        try:
            stage = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
            stage.chmod(0o777 & ~_umask())
        except OSError as error:
            raise _unwritable(destination, error) from error
        try:
            yield stage
        except OSError as error:
            if error.errno in NO_ROOM:
                raise _unwritable(destination, error) from error
            raise
        try:
            _swap(stage, destination, marker)
        except OSError as error:
            raise _unwritable(destination, error) from error
    except BaseException:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for directory in reversed(created):
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _check_replaceable(destination: Path, marker: str, inputs: tuple[Path, ...]) -> None:
    resolved = destination.resolve()
    for path in inputs:
        if path.resolve() == resolved or resolved in path.resolve().parents:
            raise UserError(f"the output {destination} would overwrite the input {path}: choose another directory")
    if destination.is_symlink() and not destination.exists():
        raise UserError(f"cannot write {destination}: it is a link to nowhere")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UserError(f"cannot write {destination}: it exists and is not a directory")
    if any(destination.iterdir()) and not is_ours(destination, marker):
        raise UserError(
            f"cannot write {destination}: it is not empty and holds no {marker} of an earlier run; "
            "choose another directory or empty this one"
        )


def _recorded_files(directory: Path, marker: str) -> set[str] | None:
    """Names of the entries an earlier run wrote, the marker included; None where the directory is not ours."""
    try:
        document = json.loads((directory / marker).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("generator") != GENERATOR:
        return None
    files = document.get("files")
    if not isinstance(files, list):
        return None
    return {*map(str, files), marker}


def _make_parents(destination: Path) -> list[Path]:
    """Create the directories above the destination; returns those that were missing, outermost first."""
    missing = [p for p in reversed(destination.parents) if not p.exists()]
    created: list[Path] = []
    try:
        for directory in missing:
            directory.mkdir()
            created.append(directory)
    except OSError as error:
        for directory in reversed(created):
            directory.rmdir()
        raise _unwritable(destination, error) from error
    return created


def _swap(stage: Path, destination: Path, marker: str) -> None:
    """Rename the finished stage to the destination, keeping there what is not ours."""
    destination = destination.resolve()  # a link to a directory stays a link
    if not destination.exists():
        stage.rename(destination)
        return
    ours = _recorded_files(destination, marker) or set()
    for foreign in sorted(p for p in destination.iterdir() if p.name not in ours):
        if (stage / foreign.name).exists():
            raise UserError(
                f"cannot write {destination}: its {foreign.name} is not of an earlier run and is in the way"
            )
        _duplicate(foreign, stage / foreign.name)
    retired = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    destination.rename(retired / "previous")
    try:
        stage.rename(destination)
    except BaseException:
        (retired / "previous").rename(destination)
        retired.rmdir()
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _duplicate(source: Path, target: Path) -> None:
    """A second name for the same file where the file system can, else a copy; directories with all they hold."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy)
    else:
        _link_or_copy(source, target)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(destination: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {destination}: {error.strerror or error}")
