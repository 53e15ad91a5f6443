"""Keys that hold what can change the numbers and nothing else, and random numbers that are a function."""

from __future__ import annotations

import math
import shutil
from collections import OrderedDict
from dataclasses import replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mergecore.arithmetic.trims import RandomDrop, dropped
from mergecore.errors import IdentityError
from mergecore.events import silent
from mergecore.identity.content import model_digest, tensor_digest
from mergecore.identity.draws import drop_limit, random_key, random_words
from mergecore.identity.keys import Step, canonical, digest
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.pool import resolve_pool
from mergecore.planning.work import MergeWork
from mergecore.plugins.block import Block
from mergecore.recipes.merge_recipe import _base, _no_data
from mergecore.spec.recipe import parse_recipe
from tests.recipe_files import find, plain
from tests.tiny_lm import write_adapter, write_base, write_expert

# --- canonical JSON -----------------------------------------------------------------------------------------------


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (float("nan"), r"\$ is nan"),
        ({"a": [1, float("inf")]}, r"\$\.a\[1\] is inf"),
        (-math.inf, r"\$ is -inf"),
        ({"a": {1, 2}}, r"\$\.a is a set"),
        (Path("/tmp"), r"\$ is a PosixPath"),
        ([PurePosixPath("x")], r"\$\[0\] is a PurePosixPath"),
        ({1: "a"}, r"\$ has a key that is no string"),
        ({"a": {None: 1}}, r"\$\.a has a key that is no string"),
        (b"bytes", r"\$ is a bytes"),
        (torch.tensor(1.0), r"\$ is a Tensor"),
        (torch.float32, r"\$ is a dtype"),
        (np.int64(3), r"\$ is a int64"),
        (object(), r"\$ is a object"),
        (1j, r"\$ is a complex"),
        ((item for item in ()), r"\$ is a generator"),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_what_has_no_canonical_form_is_refused(value: Any, place: str) -> None:
    with pytest.raises(IdentityError, match=place):
        canonical(value)


def test_one_text_for_one_value() -> None:
    assert canonical({"b": 1, "a": [True, None, 0.1, "é"]}) == '{"a":[true,null,0.1,"é"],"b":1}'.encode()
    assert canonical(OrderedDict(b=1, a=2)) == canonical(MappingProxyType({"a": 2, "b": 1}))
    assert canonical((1, 2)) == canonical([1, 2])
    assert canonical(Colour.RED) == canonical("red")
    assert canonical(np.float64(0.1)) == canonical(0.1)
    assert canonical(1) != canonical(1.0) != canonical("1.0")
    assert canonical(True) != canonical(1)
    assert canonical({"a": None}) != canonical({})
    assert canonical(["a", "b"]) != canonical(["ab"]) != canonical("ab")
    assert canonical(0.1 + 0.2) != canonical(0.3)
    for value in (5e-324, 1.7976931348623157e308, 2.0**-126, 1e16, 123456789012345678901234567890):
        assert canonical(value) == repr(value).encode()


def test_golden_keys() -> None:
    """Keys of finished work: if one of these changes, every store in the world is empty."""
    step = Step("merge", "ties", 1, {"values": {"density": 0.2, "drop": None}}, {"experts": ["a", "b"], "base": "c"})
    assert step.key == "d35ac54f0f149afe3d83be882d16a9a4f5bdd6b6db1ef84a431aed85c02a31fe"
    assert step.name == f"ties-{step.key[:12]}"
    assert digest([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
    assert tensor_digest(["aa", "bb"]) == "486b34250bd4400c0aa90516fce9a9c0633a922eb40d0828cf299bc4e825acf4"
    assert (
        model_digest({"w": ("F32", (2, 3), "aa"), "a": ("I64", (), "bb")})
        == "d5d183b56e01f229786cd0d1bf290ba34ac0ed608f166b2d4c2517527de637de"
    )
    assert random_key(0, "expert", "tensor") == (3722757719, 246263726)
    assert random_words((1, 2), 0, 4).tolist() == [-457511036, 229106191, -43879530, 481164195]
    assert random_words((1, 2), (1 << 32) - 2, 4).tolist() == [19665607, 151942424, -192994754, 1190955536]


def test_every_field_of_a_step_counts_and_order_of_keys_does_not() -> None:
    step = Step("merge", "ties", 1, {"a": 1, "b": 2}, {"x": "1"})
    others = [
        Step("statistic", "ties", 1, {"a": 1, "b": 2}, {"x": "1"}),
        Step("merge", "tie", 1, {"a": 1, "b": 2}, {"x": "1"}),
        Step("merge", "ties", 2, {"a": 1, "b": 2}, {"x": "1"}),
        Step("merge", "ties", 1, {"a": 1, "b": 3}, {"x": "1"}),
        Step("merge", "ties", 1, {"a": 1, "b": 2}, {"x": "2"}),
    ]
    assert len({step.key, *(other.key for other in others)}) == 6
    assert Step("merge", "ties", 1, {"b": 2, "a": 1}, {"x": "1"}) == step
    assert set(step.as_json()) == {"kind", "plugin", "version", "parameters", "inputs"}


# --- keys of merges -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    base = write_base(folder / "base")
    full = [write_expert(base, folder / f"e{number}", number) for number in (1, 2)]
    return base, [*full, write_adapter(base, folder / "e3", 3)]


def planned(recipe: dict[str, Any]) -> MergeWork:
    parsed = parse_recipe(plain(recipe), "recipe")
    pool = resolve_pool(_base(parsed), parsed.experts, None, find, silent)
    builder = MergeBuilder(pool, parsed.select, parsed.dtype, _no_data)
    return builder.build(parsed.built(), list(pool.experts.values()))


def keys(recipe: dict[str, Any]) -> list[str]:
    """The key of the merge and those of everything it must know beforehand."""
    plan = planned(recipe)
    inner = [work.step.key for plans in plan.inputs.values() for group in plans for work in group.with_inputs()]
    return [plan.step.key, *inner]


DROP = {"kind": "random", "rate": 0.5, "seed": 1}
RECIPES: list[dict[str, Any]] = [
    {"method": "average"},
    {"method": "task_arithmetic", "scale": 0.5, "drop": DROP},
    {"method": "ties", "density": 0.3},
    {"method": "ties", "density": 0.3, "drop": {**DROP, "rescale": "l1"}, "zero_sign": "majority"},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_where_what_called_and_in_which_order_is_not_in_a_key(
    recipe: dict[str, Any], models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = models
    first = keys({**recipe, "base": base, "experts": experts})
    assert keys({**recipe, "base": base, "experts": experts}) == first
    elsewhere = [shutil.copytree(path, tmp_path / f"moved-{path.name}") for path in [base, *experts]]
    assert keys({**recipe, "base": elsewhere[0], "experts": elsewhere[1:]}) == first
    renamed = [{"source": path, "name": f"nickname-{number}"} for number, path in enumerate(experts)]
    assert keys({**recipe, "base": base, "experts": renamed}) == first
    assert keys({**recipe, "base": base, "experts": experts[::-1]}) == first
    assert keys({**recipe, "base": base, "experts": experts, "shard_size": "1KB"}) == first
    defaults = parse_recipe(plain({**recipe, "base": base, "experts": experts}), "").built().parameters()
    assert keys({"method": recipe["method"], **defaults, "base": base, "experts": experts}) == first


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_what_can_change_the_numbers_is_in_the_key(
    recipe: dict[str, Any], models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = models
    whole = {**recipe, "base": base, "experts": experts}
    first = keys(whole)[0]

    def nudged(source: Path, name: str, file: str = "model.safetensors") -> Path:
        path = shutil.copytree(source, tmp_path / name) / file
        tensors = load_file(path)
        tensor = tensors[sorted(tensors)[-1]]
        tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(1e9))
        save_file(tensors, path, metadata={"format": "pt"})
        return path.parent

    other_alpha = write_adapter(base, tmp_path / "other-alpha", 3, alpha=5.0)
    changed: list[dict[str, Any]] = [
        {"base": nudged(base, "base")},
        {"experts": [nudged(experts[0], "full"), *experts[1:]]},
        {"experts": [*experts[:2], nudged(experts[2], "adapter", "adapter_model.safetensors")]},
        {"experts": [*experts[:2], other_alpha]},
        {"experts": experts[:2]},
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
        {"select": [{"names": "*mlp*"}]},
        {"select": [{"layers": [0, 1]}]},
    ]
    if "drop" in recipe:
        changed += [{"drop": {**recipe["drop"], "seed": 2}}, {"drop": {**recipe["drop"], "rate": 0.25}}]
    if recipe["method"] == "average":
        changed += [{"weights": [1, 2, 3]}, {"weights": [3, 2, 1]}]
    all_keys = [first, *(keys({**whole, **change})[0] for change in changed)]
    assert len(set(all_keys)) == len(all_keys)


def test_weights_move_along_with_their_experts(models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    first = keys({"method": "average", "weights": [1, 2, 3], "base": base, "experts": experts})
    assert keys({"method": "average", "weights": [3, 2, 1], "base": base, "experts": experts[::-1]}) == first


def test_a_select_that_takes_everything_is_no_select(models: tuple[Path, list[Path]]) -> None:
    """A key holds what is selected, not how that was said."""
    base, experts = models
    recipe = {"method": "ties", "base": base, "experts": experts}
    assert (
        keys({**recipe, "select": [{"names": "*"}]}) == keys({**recipe, "select": [{"names": "/./"}]}) == keys(recipe)
    )


def test_profiles_are_shared_by_selections_and_companions_are_in_no_merge(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = models
    recipe = {"method": "ties", "base": base, "experts": experts[:1]}

    def profile(changes: dict[str, Any]) -> str:
        threshold = planned({**recipe, **changes}).inputs["threshold"][0]
        return threshold.inputs["profile"][0].step.key

    assert profile({}) == profile({"select": [{"names": "*mlp*"}]}) == profile({"density": 0.7})
    other = shutil.copytree(base, tmp_path / "base")
    (other / "chat_template.jinja").write_text("another")
    (other / "generation_config.json").write_text("{}")
    assert keys({**recipe, "base": other}) == keys(recipe)


# --- random numbers -----------------------------------------------------------------------------------------------

COUNT = 1 << 20


def unsigned(key: tuple[int, int], start: int = 0, count: int = COUNT) -> NDArray[np.uint64]:
    return random_words(key, start, count).numpy().view(np.uint32).astype(np.uint64)


def chi_squared(counts: NDArray[Any], expected: float) -> float:
    """Standard deviations from what is expected of a χ² with len(counts) − 1 degrees of freedom."""
    freedom = counts.size - 1
    value = float(((counts - expected) ** 2 / expected).sum())
    return (value - freedom) / math.sqrt(2 * freedom)


KEYS = [(0, 0), (1, 0), (0, 1), random_key(0, "a", "w"), random_key(1, "a", "w"), random_key(0, "b", "w")]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("start", [0, 12_345_678, (1 << 32) - COUNT // 2, 7 << 33], ids=hex)
def test_words_are_uniform(key: tuple[int, int], start: int) -> None:
    words = unsigned(key, start)
    for shift in (0, 8, 16, 24):
        counts = np.bincount(((words >> np.uint64(shift)) & np.uint64(255)).astype(np.int64), minlength=256)
        assert abs(chi_squared(counts, COUNT / 256)) < 6, shift
    bits = np.array([(words >> np.uint64(bit) & np.uint64(1)).sum() for bit in range(32)], dtype=float)
    assert np.abs(bits - COUNT / 2).max() < 6 * math.sqrt(COUNT) / 2
    pairs = ((words[:-1] >> np.uint64(28)) * np.uint64(16) + (words[1:] >> np.uint64(28))).astype(np.int64)
    assert abs(chi_squared(np.bincount(pairs, minlength=256), (COUNT - 1) / 256)) < 6


def correlation(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Correlation of words as fractions, in its standard deviations."""
    a, b = left / 2.0**32 - 0.5, right / 2.0**32 - 0.5
    return float((a * b).mean() * 12 * math.sqrt(a.size))


@pytest.mark.parametrize("key", KEYS[:4], ids=str)
def test_no_correlation_at_any_lag(key: tuple[int, int]) -> None:
    words = unsigned(key)
    for lag in (1, 2, 3, 7, 16, 64, 255, 256, 1024, 4096, 65536, 65537, 1 << 19):
        assert abs(correlation(words[:-lag], words[lag:])) < 5.5, lag
        flips = np.bitwise_count((words[:-lag] ^ words[lag:]).astype(np.uint32)).astype(float)
        assert abs(flips.mean() - 16) < 5.5 * math.sqrt(8 / flips.size), lag


def test_avalanche() -> None:
    """One bit of the index, or of either half of the key, flips every bit of the word in half of the cases."""
    count = 1 << 14
    base = unsigned((123, 456), 0, count)
    for bit in range(32):
        changes = {
            "first": unsigned((123 ^ (1 << bit), 456), 0, count),
            "second": unsigned((123, 456 ^ (1 << bit)), 0, count),
        }
        if bit < 14:
            changes["index"] = base[np.arange(count) ^ (1 << bit)]
        for what, words in changes.items():
            flips = (base ^ words).astype(np.uint32)
            share = np.array([((flips >> np.uint32(out)) & np.uint32(1)).mean() for out in range(32)])
            assert np.abs(share - 0.5).max() < 0.035, (what, bit, share)


def kept_by(drop: RandomDrop, expert: str, tensor: str, start: int) -> torch.Tensor:
    """Which of COUNT elements from `start` on a drop leaves."""
    drawn = drop.drawn(Block(tensor, (), start, start + COUNT, None, (), (expert,)), [1.0])
    index = torch.arange(start, start + COUNT)
    return dropped([torch.ones(COUNT)], replace(drawn, index=index))[0] > 0


def test_masks_of_experts_tensors_and_seeds_are_independent() -> None:
    """Of two masks with rate ½ a quarter of the elements is dropped by both; likewise far along a tensor."""
    for start in (0, (1 << 32) + 5):
        kept = {
            (seed, expert, tensor): kept_by(RandomDrop(rate=0.5, seed=seed), expert, tensor, start)
            for seed in (0, 1)
            for expert in ("a", "b")
            for tensor in ("layers.0.w", "layers.1.w")
        }
        names = list(kept)
        for position, left in enumerate(names):
            assert abs(float(kept[left].float().mean()) - 0.5) < 6 * 0.5 / math.sqrt(COUNT)
            for right in names[:position]:
                both = float((kept[left] & kept[right]).float().mean())
                assert abs(both - 0.25) < 6 * math.sqrt(0.25 * 0.75 / COUNT), (left, right)
        words = [unsigned(random_key(*name), start) for name in names]
        for position, left_words in enumerate(words):
            for right_words in words[:position]:
                assert abs(correlation(left_words, right_words)) < 5.5


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 2**-32])
def test_share_that_is_dropped(rate: float) -> None:
    dropped = sum(
        int((random_words(random_key(seed, "e", "t"), 0, COUNT) < drop_limit(rate)).sum()) for seed in range(4)
    )
    expected, spread = 4 * COUNT * rate, math.sqrt(4 * COUNT * rate * (1 - rate))
    assert abs(dropped - expected) <= 6 * spread + (rate > 0.99999)
    assert rate != 0 or dropped == 0


@pytest.mark.parametrize("start", [0, 5, (1 << 31) - 50, (1 << 32) - 50, (1 << 33) - 1, (5 << 32) + 17], ids=hex)
def test_any_chunk_gives_the_same_words(start: int) -> None:
    key = random_key(3, "e", "t")
    whole = random_words(key, start, 1000)
    for step in (1, 7, 64, 999):
        pieces = [random_words(key, at, min(step, start + 1000 - at)) for at in range(start, start + 1000, step)]
        assert torch.equal(torch.cat(pieces), whole)
    assert random_words(key, start, 0).shape == (0,)


def test_indices_beyond_2_to_the_32_are_others() -> None:
    key = random_key(0, "e", "t")
    words = [unsigned(key, high << 32, 1 << 16) for high in range(8)]
    for position, left in enumerate(words):
        for right in words[:position]:
            assert float((left == right).mean()) < 1e-3
            assert abs(correlation(left, right)) < 5.5
