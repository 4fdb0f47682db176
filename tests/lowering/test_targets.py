"""Names of targets, what they stand for, and what is said of wrong ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from attnrewrite.errors import UserError
from attnrewrite.lowering.targets import Target, known_targets, list_targets, parse_target

# text, link triple, library
TARGETS = [
    ("arm", "aarch64-linux-gnu", "model.so"),
    ("arm:cortex-a76", "aarch64-linux-gnu", "model.so"),
    ("ARM:Neoverse-V1", "aarch64-linux-gnu", "model.so"),
    ("arm:apple-m1", "aarch64-macos", "model.dylib"),
    ("metal", "aarch64-macos", "model.dylib"),
    ("metal:m2", "aarch64-macos", "model.dylib"),
    ("metal:ios", "aarch64-ios.16.0", "model.a"),
    ("cuda", None, "model.so"),
    ("cuda:sm_90", None, "model.so"),
    ("cuda:sm_90+sm_75", None, "model.so"),
    ("cuda:all", None, "model.so"),
]


@pytest.mark.parametrize(("text", "link", "library"), TARGETS)
def test_targets_by_name(text, link, library):
    target = parse_target(text)
    assert (target.link, target.library) == (link, library)
    assert target.name == text.lower()


def test_cuda_architecture_is_the_chip():
    assert parse_target("cuda:sm_86").tvm["arch"] == "sm_86"


ARCHITECTURES = [
    ("cuda", ("sm_80",)),
    ("cuda:sm_90+sm_75", ("sm_75", "sm_90")),
    ("cuda:sm_100+sm_90", ("sm_90", "sm_100")),
    ("cuda:sm_86+sm_86", ("sm_86",)),
    ("cuda:all", ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")),
    ("metal:m1", ()),
]


@pytest.mark.parametrize(("text", "expected"), ARCHITECTURES)
def test_a_library_for_several_gpus_is_written_for_the_oldest(text, expected):
    target = parse_target(text)
    assert target.architectures == expected
    assert Target.from_json(target.to_json()) == target
    assert not expected or target.tvm["arch"] == expected[0]


def test_an_architecture_of_ones_own_replaces_the_single_one():
    assert parse_target("cuda", '{"arch": "sm_121"}').architectures == ("sm_121",)


WRONG = [
    ("tpu", "unknown target 'tpu'; known are cpu, arm, metal, cuda"),
    ("cuda:sm_1", "unknown chip in target 'cuda:sm_1'; known are cuda:sm_70"),
    ("cuda:sm_80+sm_1", "unknown chip in target 'cuda:sm_80+sm_1'; known are cuda:sm_70"),
    ("cuda:sm_80+all", "unknown chip in target 'cuda:sm_80+all'; known are cuda:sm_70"),
    ("cpu:zen4", "unknown chip in target 'cpu:zen4'; known are only cpu"),
    ("", "unknown target ''"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG)
def test_unknown_target(text, sentence):
    with pytest.raises(UserError) as raised:
        parse_target(text)
    assert str(raised.value).startswith(sentence)


def test_tvm_target_overrides_fields():
    target = parse_target("cpu", '{"mcpu": "znver4"}')
    assert target.tvm == {"kind": "llvm", "mcpu": "znver4"}
    assert Target.from_json(target.to_json()) == target


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_tvm_target_must_be_an_object(text):
    with pytest.raises(UserError, match="--tvm-target"):
        parse_target("cpu", text)


def test_every_known_target_is_one_tvm_knows():
    import tvm

    assert [t.name for t in list_targets()] == known_targets()
    for target in list_targets():
        assert tvm.target.Target(target.tvm).kind.name == target.tvm["kind"], target.name


def test_targets_do_not_import_tvm():
    code = "import sys; import attnrewrite.lowering.targets, attnrewrite.lowering.compile; print('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
