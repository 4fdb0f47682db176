"""The documents are true: their snippets run, print what stands below them, and name what exists.

In docs/*.md every ```python and ```bash block runs, in order, in one directory per document; a ```text block below it
is what it prints (white space at line ends aside, `...` for anything). Two comments above a block change that:

    <!-- not run: reason -->     an excerpt of a source file, if it is Python; a command that is only parsed, otherwise
    <!-- file: name.py -->       the block is written to this file

README.md and the documents of examples/ are read, not run: their commands are parsed, their Python compiled.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import attnrewrite
from attnrewrite import passes, testing
from attnrewrite.cli import app

ROOT = Path(__file__).parents[2]
RUN = sorted((ROOT / "docs").glob("*.md"))
READ = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
ALL = [*RUN, *READ]


@dataclass(frozen=True)
class Block:
    """One fenced block. line: where its text begins, from 1; mark: the comment above it, or ''."""

    language: str
    text: str
    line: int
    mark: str


def blocks(path: Path) -> list[Block]:
    found: list[Block] = []
    mark, language, start, text = "", None, 0, list[str]()
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if language is not None:
            if line == "```":
                found.append(Block(language, "\n".join(text) + "\n", start, mark))
                mark, language = "", None
            else:
                text.append(line)
        elif line.startswith("```"):
            language, start, text = line[3:], number + 1, []
        elif comment := re.fullmatch(r"<!-- (.*) -->", line):
            mark = comment[1]
        elif line:
            mark = ""
    assert language is None, f"{path.name} ends inside a block"
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -- what runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [p for p in RUN if any(b.language in ("python", "bash") for b in blocks(p))], ids=name_of
)
def test_snippets_run_and_print_what_is_shown(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any("examples/export" in b.text or "import torch" in b.text for b in blocks(path)):
        pytest.importorskip("torch")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(path):
        place = f"{name_of(path)}:{block.line}"
        if block.language == "text":
            assert printed is not None, f"{place}: nothing was run that could print this"
            assert matches(printed, block.text), f"{place} shows\n{block.text}but what is printed is\n{printed}"
            printed = None
        elif block.mark.startswith("not run:"):
            if block.language == "python":
                assert block.text in sources(), f"{place} is in no source file"
        elif file := block.mark.removeprefix("file: ").strip():
            assert block.mark.startswith("file: "), f"{place}: what does {block.mark!r} mean?"
            Path(file).write_text(block.text)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("\n" * (block.line - 1) + block.text, path, "exec"), names)
            printed = output.getvalue()
        elif block.language == "bash":
            printed = shell(block.text, place)


def shell(text: str, place: str) -> str:
    """Standard output of a script that must succeed; `attnrewrite` and `python` are those of this interpreter."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    command = ["bash", "-e", "-c", text]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{place} ends with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def matches(printed: str, shown: str) -> bool:
    """Whether the two are equal, `...` standing for any text, blank ends of lines and of the whole aside."""
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    pattern = r".*?".join(map(re.escape, shown.strip("\n").split("...")))
    return re.fullmatch(pattern, "\n".join(lines).strip(), re.DOTALL) is not None


def sources() -> str:
    files = [f for folder in ("attnrewrite", "passes", "tests") for f in sorted((ROOT / folder).rglob("*.py"))]
    return "\n".join(f.read_text() for f in files)


def test_output_is_compared() -> None:
    assert matches("a 1 b  \n\n", "a ... b\n")
    assert not matches("a 1 b\n", "a 1\n")
    assert not matches("a 1 b\nc\n", "a 1 b\n")


def test_the_custom_pass_is_short() -> None:
    guide = blocks(ROOT / "docs" / "add-a-pass.md")
    assert [len(b.text.splitlines()) < 40 for b in guide if b.mark.startswith("file: ")] == [True, True]


# -- what is read -----------------------------------------------------------------------------------------------------


def commands(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of every command line in the bash blocks and `$` lines of a document."""
    shown = [
        (b.line + i, text) for b in blocks(path) if b.language == "bash" for i, text in enumerate(b.text.splitlines())
    ]
    shown += [
        (i, match[1])
        for i, text in enumerate(path.read_text().splitlines(), start=1)
        if (match := re.match(r" {4}\$ (.*)", text))
    ]
    for line, text in shown:
        words = shlex.split(text, comments=True)
        if words:
            yield line, words


@pytest.mark.parametrize("path", [p for p in ALL if any(commands(p))], ids=name_of)
def test_commands_exist_and_take_these_options(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    for line, words in commands(path):
        place = f"{name_of(path)}:{line}"
        match words:
            case ["attnrewrite", verb, *arguments]:
                assert verb in group.commands, f"{place}: there is no command {verb}"
                try:
                    group.commands[verb].make_context(verb, list(arguments))
                except typer.Exit:
                    pass
                except Exception as error:
                    raise AssertionError(f"{place}: {' '.join(words)}: {error}") from error
            case ["make", target, *_]:
                makefile = (ROOT / "Makefile").read_text()
                assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{place}: make has no {target}"
            case ["python", script, *_] if script.startswith("examples/"):
                assert (ROOT / script).is_file(), f"{place}: there is no {script}"


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (path.parent / target).exists(), f"{name_of(path)} links to {target}"
    for named in re.findall(r"`((?:attnrewrite|passes|tests|examples|docs|benchmarks)/[\w./-]*)`", text):
        assert (ROOT / named).exists(), f"{name_of(path)} names {named}"


@pytest.mark.parametrize("path", READ, ids=name_of)
def test_python_compiles_and_names_exist(path: Path) -> None:
    homes = {"attnrewrite": attnrewrite, "passes": passes, "testing": testing}
    for block in blocks(path):
        if block.language != "python":
            continue
        tree = ast.parse(block.text)
        if not any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
            continue  # a printed graph
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in homes:
                assert hasattr(homes[node.value.id], node.attr), f"{name_of(path)}:{block.line}: {ast.unparse(node)}"


# -- the import order of docs/architecture.md -------------------------------------------------------------------------


# Where torch may be imported at the top: nothing else reaches these but through an import of its own in a function.
OF_TORCH = ("frontend.fx", "operators", "nn", "surgery", "dynamo", "modules")


def layers() -> list[list[str]]:
    (listed,) = [b for b in blocks(ROOT / "docs" / "architecture.md") if b.mark == "import order"]
    return [line.split() for line in listed.text.splitlines()]


def rank(module: str) -> int:
    """The line of the longest listed name that the module is, or lies in."""
    inner = module.removeprefix("attnrewrite.")
    at = {name: i for i, line in enumerate(layers()) for name in line}
    fitting = [name for name in at if inner == name or inner.startswith(f"{name}.")]
    assert fitting, f"docs/architecture.md does not say where {module} stands"
    return at[max(fitting, key=len)]


def imported(tree: ast.Module) -> Iterator[str]:
    """What a module imports at its top."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" if node.module == "attnrewrite" else node.module for a in node.names)


def test_modules_import_from_the_lines_above() -> None:
    files = {p.relative_to(ROOT / "attnrewrite").with_suffix(""): p for p in (ROOT / "attnrewrite").rglob("*.py")}
    files |= {Path("passes") / p.stem: p for p in (ROOT / "passes").glob("*.py")}
    for relative, path in files.items():
        if relative.name in ("__init__", "__main__") and len(relative.parts) == 1:
            continue
        module = ".".join(("attnrewrite", *(p for p in relative.parts if p != "__init__")))
        for other in imported(ast.parse(path.read_text())):
            if other.split(".")[0] == "torch":
                assert module.removeprefix("attnrewrite.").startswith(OF_TORCH), f"{module} imports torch"
            if other.split(".")[0] == "tvm":
                assert rank(module) == rank("attnrewrite.lowering"), f"{module} imports {other}"
            if other.startswith("attnrewrite.") and other != "attnrewrite.__version__":
                assert rank(other) <= rank(module), f"{module} imports {other}, which stands below it"
