"""`mergeloom store`: what it counts, what it deletes and what it never deletes, and that damage is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from flows.cli.main import main
from mergecore.store.store import RECORD, Store
from tests.digits import DigitsTier
from tests.digits_sweep import contents, digits_spec, leftovers, opened, records

SHORT = {"counts": [2], "evaluate__validation": None, "evaluate__limit": 10, "output__keep": "all"}
TIES = {"method": "ties", "density": 0.3, "scale": 1.0}
AVERAGE = {"method": "average"}


@pytest.fixture(scope="module")
def world(tier: DigitsTier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sweeps over one store: `first` of averages, `second` of ties with its thresholds. And `alone`: only the first."""
    world = tmp_path_factory.mktemp("store-commands")
    for name, methods, store in (
        ("first", [AVERAGE], "store"),
        ("second", [TIES], "store"),
        ("alone", [AVERAGE], "alone"),
    ):
        # `alone` has the name of the first sweep: its store is what deleting the second must leave.
        sweep = {"name": "second" if name == "second" else "first"}
        spec = digits_spec(tier, world / store, methods=methods, **sweep, **SHORT)
        (world / f"{name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        swept = opened(spec)
        assert not swept.run().failures
        (swept.store.root / "sweeps" / sweep["name"]).mkdir(parents=True, exist_ok=True)
    return world


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of both stores, links between files included; the specs point to it."""
    monkeypatch.chdir(tmp_path)
    for name in ("store", "alone"):
        _copied(world / name, tmp_path / name)
    for path in world.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text().replace(str(world), str(tmp_path)))
    return tmp_path


def _copied(source: Path, target: Path) -> None:
    first: dict[int, Path] = {}

    def copy(old: str, new: str) -> None:
        inode = Path(old).stat().st_ino
        if inode in first:
            Path(new).hardlink_to(first[inode])
        else:
            shutil.copy2(old, new)
            first[inode] = Path(new)

    shutil.copytree(source, target, copy_function=copy)


def called(*words: str) -> Result:
    result = CliRunner().invoke(main, ["store", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def spec_of(folder: Path, name: str) -> Mapping[str, Any]:
    spec: Mapping[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text())
    return spec


def bytes_in(folder: Path) -> int:
    """What the files below a folder take, each inode once."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def size_in(text: str) -> float:
    """Bytes, of a text like '12.3 kB'."""
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


def test_ls_counts_results_and_bytes(folder: Path) -> None:
    swept = opened(spec_of(folder, "first"))
    swept.store.drop(swept.cell("average n2 s0").model)
    result = called("ls", "--store", "store")
    rows = {line.split()[0]: line.split() for line in result.output.splitlines()[2:]}
    known = records(Store(folder / "store"))
    for kind in ("snapshot", "statistic", "merge", "evaluation", "registration"):
        of_kind = [record for name, record in known.items() if name.startswith(f"{kind}/")]
        dropped = sum(record["dropped"] for record in of_kind)
        assert (dropped == 1) == (kind == "merge")
        assert rows[kind][1:5] == [str(len(of_kind)), str(len(of_kind) - dropped), str(dropped), "0"]
    assert size_in(" ".join(rows["total"][-2:])) == pytest.approx(bytes_in(folder / "store"), rel=0.01)
    each = called("ls", "--store", "store", "--each").output.splitlines()[2:]
    assert {line.split()[0] for line in each} == set(known)
    with_specs = called("ls", "first.yaml", "second.yaml").output
    assert "not asked for" in with_specs


def test_all_that_live_specs_reach_stays(folder: Path) -> None:
    before = contents(Store(folder / "store"))
    result = called("gc", "first.yaml", "second.yaml", "--yes")
    assert result.exit_code == 0 and "nothing to delete" in result.output
    assert contents(Store(folder / "store")) == before


def test_nothing_is_deleted_without_yes_nor_of_a_sweep_that_nobody_named(folder: Path) -> None:
    before = contents(Store(folder / "store"))
    dry = called("gc", "first.yaml")
    assert dry.exit_code == 0 and "nothing was deleted" in dry.output and "sweep 'second'" in dry.output
    refused = called("gc", "first.yaml", "--yes")
    assert refused.exit_code == 1 and "--forget second" in refused.output
    unknown = called("gc", "first.yaml", "--forget", "third", "--yes")
    assert unknown.exit_code == 1 and "there are: second" in unknown.output
    live = called("gc", "first.yaml", "--forget", "first")
    assert live.exit_code == 1
    assert contents(Store(folder / "store")) == before


def test_what_is_left_is_the_store_of_the_specs_that_were_named(folder: Path) -> None:
    """The store after it is that of the first sweep alone, but for the second's registered model."""
    store, size = Store(folder / "store"), bytes_in(folder / "store")
    store.fail(opened(spec_of(folder, "second")).plan.cells[-1].model, "out of memory")
    result = called("gc", "first.yaml", "--forget", "second", "--yes")
    assert result.exit_code == 0, result.output
    alone = records(Store(folder / "alone"))
    second = {name for name in records(store) if name.startswith("registration/ties")}
    assert set(records(store)) == set(alone) | second and len(second) == 1
    assert not store.failures() and not (folder / "store" / "sweeps" / "second").exists()
    assert bytes_in(folder / "store") < size
    again = opened(spec_of(folder, "first")).run()
    assert again.steps == [] and not again.failures
    assert called("gc", "first.yaml", "--former", "--yes").exit_code == 0
    assert set(records(store)) == set(alone)
    assert contents(store) == contents(Store(folder / "alone"))


def test_a_file_with_two_names_is_free_once_both_are_gone(folder: Path) -> None:
    """A registered model shares its weights with the merge."""
    shared = bytes_in(folder / "store" / "registration")
    dry = called("gc", "first.yaml", "--forget", "second").output.splitlines()[-1]
    with_former = called("gc", "first.yaml", "--forget", "second", "--former").output.splitlines()[-1]
    gain = size_in(" ".join(with_former.split()[:2])) - size_in(" ".join(dry.split()[:2]))
    weights = next(path for path in (folder / "store" / "registration").glob("ties*/*.safetensors"))
    assert weights.stat().st_nlink == 2
    assert weights.stat().st_size < gain < shared


def test_what_dead_processes_left_goes_and_a_living_one_is_waited_for(folder: Path) -> None:
    store = Store(folder / "store")
    draft = store.root / "drafts" / ("a" * 64)
    draft.mkdir(parents=True)
    (draft / "model.safetensors").write_bytes(b"0" * 5000)
    (store.root / "sweeps" / "first" / ".registration.json.0123456789ab").write_text("{")
    with store.lock("b" * 64):
        (store.root / "drafts" / ("b" * 64)).mkdir()
        dry = called("gc", "--store", "store")
        rows = [line.split()[:2] for line in dry.output.splitlines()[2:4]]
        assert rows == [["drafts", "1"], ["sweeps", "1"]] and "5.0 kB would be free" in dry.output and draft.exists()
        busy = called("gc", "--store", "store", "--yes")
        assert busy.exit_code == 1 and "a process works in" in busy.output and draft.exists()
    assert called("gc", "--store", "store", "--yes").exit_code == 0
    assert leftovers(store) == []
    assert "nothing to delete" in called("gc", "--store", "store").output


def test_damage_is_seen_and_made_good(folder: Path) -> None:
    """A byte in a tensor, in a parquet file, a file that is short, a record that is no JSON."""
    store = Store(folder / "store")
    sound = called("verify", "--store", "store")
    assert sound.exit_code == 0 and "damaged" not in sound.output
    before, damaged = contents(store), []
    for kind, pattern in (
        ("statistic", "*.safetensors"),
        ("evaluation", "*.parquet"),
        ("registration", "*.safetensors"),
    ):
        path = next(path for path in sorted((store.root / kind).glob(f"*/{pattern}")) if path.stat().st_nlink < 3)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        damaged.append(path.parent)
    short = next(path for path in sorted((store.root / "evaluation").glob("*/*.parquet")) if path.parent not in damaged)
    short.write_bytes(short.read_bytes()[:-1])
    record = next(path for path in sorted((store.root / "snapshot").glob(f"*/{RECORD}")))
    record.write_text("{")
    result = called("verify", "--store", "store")
    assert result.exit_code == 1
    for path in (*damaged, short.parent, record.parent):
        assert str(path) in result.output, path
    assert json.loads((damaged[0] / RECORD).read_text())["key"][:12] in damaged[0].name
    assert called("gc", "--store", "store", "--yes").exit_code == 0
    assert not short.parent.exists() and not record.parent.exists() and damaged[0].exists()
    for path in damaged:
        shutil.rmtree(path)
    for linked in (store.root / "merge").iterdir():  # the registered model shares its file with the merge
        shutil.rmtree(linked)
    for name in ("first", "second"):
        assert not opened(spec_of(folder, name)).run().failures
    after = contents(store)
    asked = ("evaluation/", "registration/", "snapshot/")
    assert {name for name in after if name.startswith(asked)} == {name for name in before if name.startswith(asked)}
    assert after.items() <= before.items()
    assert called("verify", "--store", "store").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "--store", "nowhere"], "is no store"),
        (["gc", "first.yaml", "alone.yaml"], "several stores"),
        (["gc", "first.yaml", "--store", "alone"], "several stores"),
        (["verify", "--store", "first.yaml"], "is no store"),
    ],
)
def test_what_cannot_be_meant_is_said(folder: Path, words: list[str], message: str) -> None:
    result = called(*words)
    assert result.exit_code == 1 and message in result.output
