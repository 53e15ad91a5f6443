"""Searches by themselves: scores are formulas, so that what has to come out is known by hand. Nothing is merged
here.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from mergecore.errors import SpecError
from mergecore.plugins.search import Answer, Candidate, Ground, NoScore, Score, Search
from mergecore.registry import search_from
from mergecore.sweeps.search_progress import FRUITLESS, SearchState

Formula = Callable[[Candidate], Answer]


def ground(experts: Sequence[str] = ("A", "B", "C"), ids: Mapping[str, str] | None = None) -> Ground:
    return Ground({name: (ids or {}).get(name, name) for name in experts}, {name: (name,) for name in experts})


def scored(mean: float, tasks: Mapping[str, float] | None = None) -> Score:
    return Score(round(mean, 12), tasks or {})


def played(search: Search, formula: Formula, where: Ground | None = None) -> SearchState:
    """A search whose every candidate is scored at once."""
    run = SearchState(search, where or ground())
    run.advance(formula)
    assert run.ended
    return run


def asked(run: SearchState) -> list[list[Candidate]]:
    return [list(round.candidates) for round in run.rounds]


POINTS = {"A": (1.0, 0.0), "B": (0.0, 1.0), "C": (3.0, -2.0)}


def soup(candidate: Candidate) -> Score:
    """The worked example of the specs: val(θ) = −‖θ − (0.6, 0.4)‖ of the mean of points."""
    points = [POINTS[name[0]] for name in candidate.experts]
    x, y = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
    return scored(-math.hypot(x - 0.6, y - 0.4))


def greedy(**values: Any) -> Search:
    return search_from("greedy", values, "test")


def grid(**values: Any) -> Search:
    return search_from("grid", values, "test")


def optimised(**values: Any) -> Search:
    pytest.importorskip("nevergrad")
    return search_from("nevergrad", values, "test")


# --- greedy soup ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["at_least", "above"])
def test_the_worked_soup(accept: str) -> None:
    run = played(greedy(accept=accept), soup)
    assert asked(run) == [
        [Candidate(("A",)), Candidate(("B",)), Candidate(("C",))],
        [Candidate(("A", "B"))],
        [Candidate(("A", "B", "C"))],
    ]
    means = [[answer.mean for answer in round.answers if isinstance(answer, Score)] for round in run.rounds]
    assert means[0] == pytest.approx([-0.565685, -0.848528, -3.394113], abs=1e-6)
    assert means[1:] == [pytest.approx([-0.141421], abs=1e-6), pytest.approx([-1.03709], abs=1e-6)]
    assert run.best == Candidate(("A", "B")) and not run.trouble


def test_a_soup_that_changes_nothing_is_taken_by_the_paper_and_not_by_the_code() -> None:
    """D is a copy of B: A + B + D is worse; of A alone a copy leaves the score as it is."""
    twins = ground(("A1", "A2"))
    assert played(greedy(accept="at_least"), soup, twins).best == Candidate(("A1", "A2"))
    assert played(greedy(accept="above"), soup, twins).best == Candidate(("A1",))


def test_experts_that_score_alike_join_by_id_however_the_spec_lists_them() -> None:
    ids = {"x": "3", "y": "1", "z": "2"}
    for order in itertools.permutations(ids):
        run = played(greedy(), lambda candidate: scored(0.5), ground(order, ids))
        joined = [set(round[0].experts) for round in asked(run)[1:]]
        assert joined == [{"y", "z"}, {"x", "y", "z"}]
        # Values of one per expert stand in the order of the spec, so the experts of a candidate do too.
        assert run.best == Candidate(order)


@pytest.mark.parametrize("seed", range(20))
def test_a_soup_is_never_worse_than_the_best_expert_and_asks_for_no_more_than_it_says(seed: int) -> None:
    draw, known = random.Random(seed), dict[tuple[str, ...], float]()
    experts = ground([f"e{number}" for number in range(6)])

    def any_score(candidate: Candidate) -> Score:
        return scored(known.setdefault(candidate.experts, draw.choice([0.1, 0.2, 0.3, 0.4])))

    for accept in ("at_least", "above"):
        run = played(greedy(accept=accept), any_score, experts)
        assert run.best is not None
        kept = [known[round.best.experts] for round in run.rounds if round.best]
        assert kept == sorted(kept) and kept[-1] == known[run.best.experts]
        assert known[run.best.experts] >= max(known[(name,)] for name in experts.experts)
        assert len(list(run.candidates)) == greedy().most(experts) == 11


def test_what_cannot_be_measured_does_not_join_and_the_soup_goes_on() -> None:
    def without(*lost: tuple[str, ...]) -> Formula:
        return lambda candidate: NoScore("disk full") if candidate.experts in lost else scored(0.5)

    run = played(greedy(), without(("B",)))
    assert run.best == Candidate(("A", "C")) and ("A", "B") not in [candidate.experts for candidate in run.candidates]
    assert played(greedy(), without(("A", "B"))).best == Candidate(("A", "C"))
    nothing = played(greedy(), without(("A",), ("B",), ("C",)))
    assert nothing.best is None and nothing.trouble == "no candidate could be measured"


def test_one_expert_is_refused() -> None:
    with pytest.raises(SpecError, match="one expert has nothing to choose"):
        greedy().check(ground(("A",)))


# --- values from a list -----------------------------------------------------------------------------------------------


def values_of(candidate: Candidate | None) -> dict[str, Any]:
    assert candidate is not None
    return dict(candidate.values)


def test_all_values_are_asked_for_in_one_round_and_the_first_of_equals_wins() -> None:
    search = grid(
        over=[{"parameter": "scale", "values": [0.1, 0.3, 0.5]}, {"parameter": "density", "values": [0.2, 1]}]
    )
    run = played(search, lambda candidate: scored(1 - abs(values_of(candidate)["scale"] - 0.4)))
    assert len(run.rounds) == 1 and len(run.rounds[0].candidates) == search.most(ground()) == 6
    assert values_of(run.best) == {"scale": 0.3, "density": 0.2}


def of_each(best: Mapping[str, float]) -> Formula:
    """A task is the better the nearer its own expert's λ is to what suits it."""

    def formula(candidate: Candidate) -> Score:
        scales = values_of(candidate)["mask_scale"]
        each = scales if isinstance(scales, tuple) else (scales,) * len(candidate.experts)
        tasks = {name: 1 - abs(value - best[name]) for name, value in zip(candidate.experts, each, strict=True)}
        return scored(sum(tasks.values()) / len(tasks), tasks)

    return formula


def test_each_expert_gets_the_value_that_is_best_on_its_own_tasks() -> None:
    search = grid(over=[{"parameter": "mask_scale", "values": [0.2, 0.4, 0.6]}], choose="for_each")
    run = played(search, of_each({"A": 0.6, "B": 0.2, "C": 0.45}))
    assert [len(round) for round in asked(run)] == [3, 1] and len(list(run.candidates)) == search.most(ground())
    assert values_of(run.best) == {"mask_scale": (0.6, 0.2, 0.4)}
    two = of_each({"A": 0.4, "B": 0.25, "C": 0.0})

    def careless(candidate: Candidate) -> Score:
        pair = two(candidate)
        assert isinstance(pair, Score)
        tasks = {**pair.tasks, "C": 0.5}
        return scored(sum(tasks.values()) / 3, tasks)

    assert values_of(played(search, careless).best) == {"mask_scale": (0.4, 0.2, 0.4)}, "C keeps what is best for all"
    # All the same: that is the value for all, which is measured already.
    alike = played(search, of_each({"A": 0.2, "B": 0.2, "C": 0.2}))
    assert len(alike.rounds) == 1 and values_of(alike.best) == {"mask_scale": 0.2}


def test_where_values_of_each_are_worse_together_the_value_for_all_stays() -> None:
    apart = of_each({"A": 0.6, "B": 0.2, "C": 0.4})

    def together(candidate: Candidate) -> Answer:
        return scored(0.0) if isinstance(values_of(candidate)["mask_scale"], tuple) else apart(candidate)

    search = grid(over=[{"parameter": "mask_scale", "values": [0.2, 0.4, 0.6]}], choose="for_each")
    run = played(search, together)
    assert len(run.rounds) == 2 and values_of(run.best) == {"mask_scale": 0.4}


def test_experts_without_tasks_of_their_own_cannot_choose() -> None:
    search = grid(over=[{"parameter": "mask_scale", "values": [0.2]}], choose="for_each")
    with pytest.raises(SpecError, match="'B' has none"):
        search.check(Ground({"A": "1", "B": "2"}, {"A": ("a",), "B": ()}))


# --- nevergrad --------------------------------------------------------------------------------------------------------

SCALES = [{"parameter": "scale", "low": 0.8, "high": 1.3, "start": 1.0, "per": "expert"}]


def bowl(candidate: Candidate) -> Score:
    """Highest at (1.2, 0.9, 1.0)."""
    return scored(-sum((x - y) ** 2 for x, y in zip(values_of(candidate)["scale"], (1.2, 0.9, 1.0), strict=True)))


@pytest.mark.parametrize("optimizer", ["cma", "one_plus_one", "two_points_de", "ngopt"])
def test_planted_coefficients_are_found_within_bounds_and_budget(optimizer: str) -> None:
    search = optimised(over=SCALES, budget=60, optimizer=optimizer)
    run = played(search, bowl)
    tried = [values_of(candidate)["scale"] for candidate in run.candidates]
    assert len(tried) == 60 and tried[0] == (1.0, 1.0, 1.0)
    assert all(0.8 <= value <= 1.3 for point in tried for value in point)
    assert bowl(run.best).mean > -0.005 > bowl(Candidate(("A", "B", "C"), (("scale", tried[0]),))).mean  # type: ignore[arg-type]
    again = played(optimised(over=SCALES, budget=60, optimizer=optimizer), bowl)
    assert asked(again) == asked(run)


def test_the_seed_counts_and_rounds_are_as_large_as_asked() -> None:
    runs = [played(optimised(over=SCALES, budget=11, seed=seed, at_once=4), bowl) for seed in (0, 1)]
    assert [len(round) for round in asked(runs[0])] == [4, 4, 3]
    assert asked(runs[0])[0][0] == asked(runs[1])[0][0] and asked(runs[0])[1:] != asked(runs[1])[1:]
    assert len(list(played(optimised(over=SCALES, budget=1), bowl).candidates)) == 1


def test_one_number_for_the_merge_beside_one_for_each_and_whole_numbers() -> None:
    over = [{"parameter": "minimum_tasks", "low": 0, "high": 4, "numbers": "whole"}, *SCALES]
    run = played(optimised(over=over, budget=20), lambda candidate: scored(values_of(candidate)["minimum_tasks"]))
    for candidate in run.candidates:
        values = values_of(candidate)
        assert isinstance(values["minimum_tasks"], int) and len(values["scale"]) == 3
    assert values_of(run.best)["minimum_tasks"] >= 3


def test_what_fails_is_the_worst_so_far_to_the_optimiser_and_a_hopeless_search_ends() -> None:
    def half(candidate: Candidate) -> Answer:
        return NoScore("NaN") if values_of(candidate)["scale"][0] > 1.1 else bowl(candidate)

    run = played(optimised(over=SCALES, budget=40), half)
    assert len(list(run.candidates)) == 40 and run.best is not None and values_of(run.best)["scale"][0] <= 1.1
    hopeless = played(optimised(over=SCALES, budget=40), lambda candidate: NoScore("NaN"))
    assert len(list(hopeless.candidates)) == FRUITLESS and hopeless.best is None
    assert hopeless.trouble == f"none of the first {FRUITLESS} candidates could be measured"


def test_an_optimiser_that_cannot_be_replayed_is_refused() -> None:
    search = optimised(over=[{"parameter": "scale", "low": 0, "high": 1}], budget=100, optimizer="ngopt")
    with pytest.raises(SpecError, match=r"does not propose the same twice.*take 'cma'"):
        search.check(ground())


# --- killed and resumed -----------------------------------------------------------------------------------------------

ALL: dict[str, Callable[[], tuple[Search, Formula]]] = {
    "greedy": lambda: (greedy(), soup),
    "for_each": lambda: (
        grid(over=[{"parameter": "mask_scale", "values": [0.2, 0.4, 0.6]}], choose="for_each"),
        of_each({"A": 0.6, "B": 0.2, "C": 0.45}),
    ),
    "nevergrad": lambda: (optimised(over=SCALES, budget=9, at_once=2), bowl),
}


@pytest.mark.parametrize("kind", list(ALL))
def test_killed_after_any_score_a_search_goes_on_to_the_same_end(kind: str) -> None:
    search, formula = ALL[kind]()
    whole = played(search, formula)
    known: dict[Candidate, Score] = {}
    live, steps = SearchState(search, ground()), 0
    while True:
        anew = SearchState(search, ground())  # as a new process would begin: with nothing but the scores
        for run in (anew, live):
            run.advance(known.get)
        assert (anew.rounds, anew.waiting, anew.best, anew.ended) == (live.rounds, live.waiting, live.best, live.ended)
        if anew.ended:
            break
        missing = next(candidate for candidate in anew.waiting if candidate not in known)
        known[missing], steps = formula(missing), steps + 1  # type: ignore[assignment]
    assert anew.rounds == whole.rounds and anew.best == whole.best
    assert steps == len(set(whole.candidates)), "nothing is asked for twice"


def test_a_failure_that_is_forgiven_is_played_again() -> None:
    lost = {("A",)}
    run = SearchState(greedy(), ground())
    formula: Formula = lambda candidate: NoScore("killed") if candidate.experts in lost else soup(candidate)  # noqa: E731
    run.advance(formula)
    assert run.best == Candidate(("B",))
    lost.clear()
    run.advance(formula)
    assert run.best == Candidate(("A", "B")) and run.rounds == played(greedy(), soup).rounds
