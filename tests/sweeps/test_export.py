"""A cell's model as a directory: the bytes that the sweep made, wherever they come from, and nothing half done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from flows.cli.main import main
from mergecore.errors import SpecError, StoreError
from mergecore.reporting.report import markdown
from mergecore.reporting.summary import summarise
from mergecore.store.store import RECORD, State
from mergecore.sweeps.exporting import Exported, cell_named, export
from mergecore.sweeps.registration import registration_step
from tests.digits import DigitsTier
from tests.digits_sweep import Swept, contents, digits_spec, opened
from tests.recipe_files import merge_into
from tests.tiny_sweep import write_spec

LOSER = "ties(density=0.3, scale=1) n2 s0"


def short(tier: DigitsTier, store: Path, **changes: Any) -> Swept:
    few = {"counts": [2], "evaluate__limit": 10, "evaluate__validation": {"limit": 10}, **changes}
    return opened(digits_spec(tier, store, **few))


@pytest.fixture(scope="module")
def swept(tier: DigitsTier, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A finished sweep. Its registered model is kept; the others were dropped."""
    swept = short(tier, tmp_path_factory.mktemp("export") / "store")
    assert not swept.run().failures
    return swept


def exported(swept: Swept, name: str, out: Path) -> Exported:
    return export(swept.place, swept.frontier, cell_named(swept.frontier, name), out)


def files(folder: Path) -> dict[str, bytes]:
    """Content by name, without the store's own record."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != RECORD]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def merges(swept: Swept) -> list[str]:
    return [cell.name for cell in swept.plan.cells if cell.kind == "merge"]


def test_the_registered_model_is_what_was_registered(swept: Swept, tmp_path: Path) -> None:
    record = swept.registered()
    assert record is not None
    winner = next(cell for cell in swept.plan.cells if cell.id == record["cell"])
    registered = files(swept.store.folder(registration_step(swept.frontier, winner)))
    before = contents(swept.store)
    for number, name in enumerate((f"@{record['alias'] or record['name']}", winner.name, winner.id)):
        done = exported(swept, name, tmp_path / str(number))
        assert done.origin == "registered" and done.digest == record["digest"]
        assert files(tmp_path / str(number)) == registered
    assert contents(swept.store) == before


def test_made_anew_it_is_the_same_to_the_byte(swept: Swept, tier: DigitsTier, tmp_path: Path) -> None:
    """The registered directory is gone and its merge too: the card with its scores is the same as well."""
    shutil.copytree(swept.store.root, tmp_path / "store")
    copy = short(tier, tmp_path / "store")
    record = swept.registered()
    assert record is not None
    winner = next(cell for cell in copy.plan.cells if cell.id == record["cell"])
    wanted = files(copy.store.folder(registration_step(copy.frontier, winner)))
    copy.store.remove(registration_step(copy.frontier, winner))
    copy.store.remove(winner.model)
    assert exported(copy, winner.id, tmp_path / "out").origin == "made anew"
    assert files(tmp_path / "out") == wanted


def test_every_cell_is_had_and_the_store_is_as_it_was(swept: Swept, tier: DigitsTier, tmp_path: Path) -> None:
    """Weights of a sweep that kept all of them; what was made for this alone is dropped again, and nothing is linked."""
    kept = short(tier, tmp_path / "kept", output__keep="all")
    assert not kept.run().failures
    before = contents(swept.store)
    assert merges(swept) == merges(kept) and len(merges(swept)) > 3
    origins = set()
    for number, name in enumerate(merges(swept)):
        out = tmp_path / f"out-{number}"
        origins.add(exported(swept, name, out).origin)
        model = kept.store.folder(kept.cell(name).model)
        weights = {name: content for name, content in files(model).items() if name != "digests.json"}
        assert {file: (out / file).read_bytes() for file in weights} == weights
        assert (out / "config.json").exists() and f"by {kept.cell(name).merge.method.name}" in _card(out)  # type: ignore[union-attr]
        assert all(path.stat().st_nlink == 1 for path in out.iterdir())
        assert files(tmp_path / f"out-{number}") == files(_of(kept, name, tmp_path / f"kept-{number}"))
    assert origins == {"registered", "made anew"}
    assert contents(swept.store) == before


def _of(swept: Swept, name: str, out: Path) -> Path:
    exported(swept, name, out)
    return out


def _card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_the_recipe_on_its_card_makes_it_again(swept: Swept, tmp_path: Path) -> None:
    exported(swept, LOSER, tmp_path / "out")
    recipe = yaml.safe_load(_card(tmp_path / "out").split("```yaml\n")[1].split("```")[0])
    merge_into(recipe, tmp_path / "again")
    first, second = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_that_is_still_to_be_scored_stays(tier: DigitsTier, tmp_path: Path) -> None:
    fresh = short(tier, tmp_path / "store")
    assert exported(fresh, LOSER, tmp_path / "out").origin == "made anew"
    assert fresh.store.state(fresh.cell(LOSER).model) is State.PRESENT
    assert exported(fresh, LOSER, tmp_path / "again").origin == "store"
    assert files(tmp_path / "out") == files(tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tees n2 s0", "has no cell 'tees n2 s0'"),
        ("base", "is no merge but a checkpoint as it stands"),
        ("@former", "has registered '@"),
    ],
)
def test_a_cell_that_cannot_be_had_is_told_of(swept: Swept, name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        cell_named(swept.frontier, name)


def test_nothing_is_written_over_and_damage_is_not_copied(tier: DigitsTier, tmp_path: Path) -> None:
    fresh, out = short(tier, tmp_path / "store"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(StoreError, match="exists already"):
        exported(fresh, LOSER, out)
    assert not (tmp_path / "store").exists()
    exported(fresh, LOSER, tmp_path / "sound")
    path = next(fresh.store.folder(fresh.cell(LOSER).model).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(StoreError, match="is not what was written there"):
        exported(fresh, LOSER, tmp_path / "spoiled")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "sound", "store"]


def test_the_report_says_where_kept_models_are(swept: Swept, tmp_path: Path) -> None:
    text = markdown(summarise(swept.scores(), "test"))
    rows = [line for line in text.partition("## Models that are kept")[2].splitlines() if line.startswith("| ")]
    folders = [row.split("`")[1] for row in rows[2:]]
    present = {f"merge/{path.parent.name}" for path in swept.store.root.glob("merge/*/model*.safetensors")}
    assert folders[0].startswith("registration/") and set(folders[1:]) == present
    assert all((swept.store.root / folder / RECORD).exists() for folder in folders)
    assert "## Models that are kept" not in markdown(summarise(short_of(swept, tmp_path).scores(), "test"))


def short_of(swept: Swept, folder: Path) -> Swept:
    """The same sweep over an empty store."""
    spec = swept.spec.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    return opened(spec | {"output": {**spec["output"], "store": str(folder / "empty")}})


def test_transformers_loads_it(tmp_path: Path) -> None:
    """On the command line, of a sweep that was never run: logits are those of `mergeloom merge` of the same recipe."""
    import transformers

    spec, out = write_spec(tmp_path), tmp_path / "out"
    result = CliRunner().invoke(main, ["export", str(spec), "ties(density=0.2, scale=1) n3 s0", str(out)])
    assert result.exit_code == 0, result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens = transformers.AutoTokenizer.from_pretrained(out)("red green", return_tensors="pt")
    merged = CliRunner().invoke(main, ["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "merged")])
    assert merged.exit_code == 0, merged.output
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(model(**tokens).logits, other(**tokens).logits)
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "merged/config.json").read_text())
    refused = CliRunner().invoke(main, ["export", str(spec), "ties(density=0.2) n3", str(tmp_path / "no")])
    assert refused.exit_code == 1 and "did you mean 'ties(density=0.2, scale=1) n3 s0'?" in refused.output
