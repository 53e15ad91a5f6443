"""A sample of `make every-model-type`: one type of each kind of naming."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints.every_model_type import FAILS, NONE, NOT_BUILT, PASSES, REFUSED, STEPS, Row, check, table

ALL = dict.fromkeys(STEPS, PASSES)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        pytest.param("gpt2", ALL, id="a head tied to the embedding, layers kept as (in, out)"),
        pytest.param("vit", ALL, id="modules called otherwise than in files"),
        pytest.param("llava", ALL, id="a language model within"),
        pytest.param("whisper", ALL, id="a decoder with a tied head of another name"),
        pytest.param("mixtral", ALL | {"in memory": REFUSED}, id="experts kept apart in files"),
        pytest.param("gte", ALL | {"in memory": REFUSED, "folded": REFUSED}, id="projections joined in files"),
        pytest.param("git", ALL, id="a module called as the end of others"),
        pytest.param("pi0", ALL, id="names that PEFT renames once more"),
        pytest.param("lw_detr", ALL, id="boxes tied over layers"),
        pytest.param("falcon_h1", ALL, id="layers that PEFT refuses"),
    ],
)
def test_a_type(kind: str, steps: dict[str, str]) -> None:
    threads = torch.get_num_threads()
    try:
        row = check(kind)
    finally:
        torch.set_num_threads(threads)
    assert row.steps == steps, row.why
    assert (REFUSED in steps.values()) == ("fold the adapter" in row.why or "save it again" in row.why)


def test_the_table_says_what_came_of_each_type() -> None:
    rows = [
        Row("a", "A", ALL, ""),
        Row("b", "B", ALL | {"folded": NONE}, ""),
        Row("c", "C", ALL | {"merged": REFUSED}, "merged: a | b\nc"),
        Row("d", "D", ALL | {"merged": REFUSED, "folded": FAILS}, "folded: x"),
        Row("e", "", {"built": NOT_BUILT}, "no library"),
    ]
    lines = table(rows).splitlines()
    assert any(line.endswith("5 model types; 2 passes, 1 refused, 1 fails, 1 not built") for line in lines)
    assert "| c | C | refused | passes | passes | passes | merged: a / b c |" in lines
    assert lines[-1] == "| e |  | not built | not built | not built | not built | no library |"
