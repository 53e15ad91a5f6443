"""Nothing that stands in a file makes a command hang or grow without bound."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from flows.session.startup import hash_ahead
from mergecore.checkpoints import patterns
from mergecore.checkpoints.experts import adapter_factors
from mergecore.checkpoints.patterns import check_pattern, matches, search
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.errors import EvaluationError, MismatchError, SpecError
from mergecore.evaluators.lm_tasks import read_yaml as read_task
from mergecore.evaluators.lm_tasks import tasks_in
from mergecore.plugins import bounded_yaml
from mergecore.spec.yaml_files import read_documents
from mergecore.tensors.source import TensorInfo

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGED = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12))
REFUSED = {
    "aliases of aliases": (BOMB, "stands for more than 1,000,000 values"),
    "merges of merges": (MERGED, "stands for more than 1,000,000 values"),
    "an alias in itself": ("a: &a [*a]\n", "an alias stands inside what it stands for"),
    "a giant number": (f"a: {'9' * 5000}\n", "not a number of 64 bits"),
    "a giant number in hexadecimal": (f"a: 0x{'f' * 5000}\n", "not a number of 64 bits"),
    "a day that is none": ("a: 2026-99-99\n", "not valid YAML"),
    "deep": ("a: " + "[" * 30_000, "nested too deep"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_yaml_stays_within_bounds(case: str, tmp_path: Path) -> None:
    text, said = REFUSED[case]
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=said):
        read_documents(path)
    with pytest.raises(EvaluationError, match=r"task\.yaml cannot be read"):
        read_task(path)
    assert tasks_in(tmp_path) == {}
    hash_ahead(path, DigestCache())


def test_aliases_that_people_write_are_read(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\nd: 18446744073709551615\n")
    (document,) = read_documents(tmp_path / "spec.yaml")
    assert document == {"a": {"x": [1, 2]}, "b": {"x": [1, 2]}, "c": {"x": [1, 2], "y": 3}, "d": 2**64 - 1}


def test_devices_pipes_and_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(SpecError, match=f"{path} is no ordinary file"):
            read_documents(path)
        with pytest.raises(EvaluationError, match="is no ordinary file"):
            read_task(path)
        hash_ahead(path, DigestCache())
    monkeypatch.setattr(bounded_yaml, "LARGEST", 10)
    (tmp_path / "spec.yaml").write_text("name: too_long")
    with pytest.raises(SpecError, match="has 14 bytes; a file of settings has 10 at most"):
        read_documents(tmp_path / "spec.yaml")


# --- regular expressions ------------------------------------------------------------------------------------------

ENDLESS = "(?:(\\w)|(\\w)\\w)+(?<=[0-9])$"
NAME = "a" * 90


def test_expressions_of_a_file_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    with pytest.raises(SpecError, match=r"takes more than 0\.05 s on 'aaaa.*without a repeat inside a repeat"):
        search(ENDLESS, NAME)
    base = {f"{NAME}.weight": TensorInfo("F32", (4, 4))}
    factors = {f"{NAME}.lora_{side}.weight": TensorInfo("F32", shape) for side, shape in (("A", (2, 4)), ("B", (4, 2)))}
    with pytest.raises(
        MismatchError, match=r"expert 'e': alpha_pattern in its adapter_config\.json: .* takes more than"
    ):
        adapter_factors(factors, {"alpha_pattern": {ENDLESS: 2}}, base, "expert 'e'", {})


@pytest.mark.parametrize("text", ["(", "a" * 1001, "*", "(?P<a>", "a{2,1}", "(" * 900])
def test_texts_that_are_no_expression(text: str) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        check_pattern(text)
    with pytest.raises(SpecError, match="regular expression"):
        search(text, "name")


@pytest.mark.parametrize(
    "text", ["attn\\.[qk]", "^embed|head", "bias$", ".", "layers\\.(?:[0-3])\\.", "(?=.*mlp)(?=.*up)", "(?i)MLP", "\\bup\\b",
             "(?!.*norm)", "[.]", "a{,3}q", "\\d+"]
)  # fmt: skip
def test_expressions_mean_what_they_mean_in_python(text: str) -> None:
    names = [
        "model.layers.1.attn.q.weight",
        "embed.weight",
        "lm_head.bias",
        "layers.2.mlp.up.weight",
        "norm",
        "",
        "[x]",
    ]
    assert [search(text, name) for name in names] == [re.search(text, name) is not None for name in names]
    assert [matches(text, name) for name in names] == [re.match(text, name) is not None for name in names]
