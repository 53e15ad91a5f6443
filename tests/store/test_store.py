"""The store when things go wrong: killed, raced for, truncated, full, dropped and asked for again."""

from __future__ import annotations

import dataclasses
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import mergecore.engine.pass_plan as passes
import mergecore.engine.span as span_module
from mergecore.engine.journal import read_journal, write_journal
from mergecore.errors import CapacityError, MergeloomError, StoreError
from mergecore.events import Event
from mergecore.execution.lanes import run_works
from mergecore.execution.outcome import Done
from mergecore.execution.passes import _parts, _writing
from mergecore.identity.keys import Step
from mergecore.planning.work import MergeWork
from mergecore.store.store import RECORD, State, Store, write_json
from tests.processes import CONTEXT, Started, kill_at, killed_here, ran, was_killed
from tests.small_pool import files_below, merge_plan, open_pool, place_in, write_pool

STEP = Step("statistic", "counted", 1, {"n": 1})
OTHER = Step("statistic", "counted", 1, {"n": 2})


def put(store: Store, step: Step = STEP, text: str = "four", digest: str = "d") -> None:
    with store.draft(step) as draft:
        (draft.path / "found.txt").write_text(text)
        store.commit(draft, digest, {"n": 4}, {})


def left(store: Store) -> list[str]:
    """What lies about that is no result: drafts, graves, temporary files."""
    drafts = list((store.root / "drafts").glob("*"))
    return sorted(str(path) for path in [*drafts, *store.root.rglob(".*.json.*")])


# --- killed ---------------------------------------------------------------------------------------------------------


def write(root: Path, place: str, call: int, after: bool = False) -> None:
    kill_at(place, call, after)
    put(Store(root))


def test_killed_before_the_record_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for place in ("mergecore.store.store:Store.commit", "os:replace"):
        was_killed(write, tmp_path, place, 1)
        assert store.state(STEP) is State.MISSING and not store.folder(STEP).exists()
    with store.draft(STEP) as draft:
        assert not list(draft.path.iterdir()), "what the killed process had begun is gone"
    assert not left(store)


def test_killed_between_write_and_rename_is_taken_over(tmp_path: Path) -> None:
    store = Store(tmp_path)
    was_killed(write, tmp_path, "os:rename", 1)
    assert store.state(STEP) is State.MISSING, "only the rename makes it done"
    with store.draft(STEP):
        assert store.state(STEP) is State.PRESENT, "nothing is done twice"
    assert files_below(store.folder(STEP))["found.txt"] == b"four"
    assert not left(store)


def test_killed_while_a_broken_result_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store)
    (store.folder(STEP) / "found.txt").write_text("fo")
    was_killed(write, tmp_path, "os:rename", 1, True)  # the old one is away, the new one not yet there
    assert store.state(STEP) is State.MISSING
    with store.draft(STEP):
        assert store.state(STEP) is State.PRESENT
    assert store.clean() == 1 and not left(store), "the old one's grave"


def drop(root: Path, place: str) -> None:
    kill_at(place, 1)
    Store(root).drop(STEP)


def test_killed_while_dropping(tmp_path: Path) -> None:
    for place, state in (("os:replace", State.PRESENT), ("pathlib:Path.unlink", State.DROPPED)):
        store = Store(tmp_path / place.replace(":", "-"))
        put(store)
        was_killed(drop, store.root, place)
        assert store.state(STEP) is state
        if state is State.DROPPED:
            store.drop(STEP)  # what the killed one had not got round to
        store.clean()
        assert not left(store) and store.state(STEP) is state
        assert ((store.folder(STEP) / "found.txt").exists()) is (state is State.PRESENT)


def fail(root: Path, event: Any) -> None:
    """Record a failure; stop for ever, or be killed, when the reason is written and not yet in its place."""

    def instead(*_: object) -> None:
        if event is None:
            killed_here()
        event.set()
        time.sleep(600)

    os.replace = instead  # type: ignore[assignment]
    Store(root).fail(STEP, "second")


def test_a_temporary_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.fail(STEP, "why")
    was_killed(fail, tmp_path, None)
    assert store.failures() == {STEP.key: "why"} and len(left(store)) == 1
    event = CONTEXT.Event()
    living = Started(fail, tmp_path, event)
    assert event.wait(60) and len(left(store)) == 2
    store.clean()
    assert len(left(store)) == 1, "the dead one's is gone, the living one's is not"
    living.kill()
    store.clean()
    assert not left(store)


# --- several writers --------------------------------------------------------------------------------------------------


def race(root: Path, barrier: Any) -> bool:
    """Whether this process did the work."""
    store = Store(root)
    barrier.wait(60)
    with store.draft(STEP) as draft:
        if store.is_done(STEP):
            return False
        (draft.path / "found.txt").write_text("four")
        time.sleep(0.3)
        store.commit(draft, "d", {}, {})
    return True


def test_two_processes_race_for_one_step(tmp_path: Path) -> None:
    barrier = CONTEXT.Barrier(2)
    racers = [Started(race, tmp_path, barrier) for _ in range(2)]
    assert sorted(racer.result() for racer in racers) == [False, True], "done once, and both have it"
    assert Store(tmp_path).state(STEP) is State.PRESENT and not left(Store(tmp_path))


def test_threads_wait_for_each_other_and_other_steps_do_not(tmp_path: Path) -> None:
    store, inside, most = Store(tmp_path), [0], [0]

    def work() -> None:
        with store.draft(STEP):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    with store.draft(OTHER):
        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
    assert most == [1] and inside == [0] and not left(store)


def test_a_lock_removed_while_another_waits_for_it_still_excludes(tmp_path: Path) -> None:
    store, order = Store(tmp_path), list[str]()

    def second() -> None:
        with store.lock(STEP.key):
            order.append("second in")
            time.sleep(0.2)
            order.append("second out")

    with store.lock(STEP.key):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        (tmp_path / "locks" / STEP.key).unlink()  # as `clean` does, holding it
    while not order:
        time.sleep(0.005)
    with store.lock(STEP.key):
        order.append("third in")
    thread.join()
    assert order == ["second in", "second out", "third in"]


def die_in_draft(root: Path) -> None:
    with Store(root).draft(OTHER):
        killed_here()


def test_cleaning_leaves_what_a_living_process_holds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    was_killed(die_in_draft, tmp_path)
    with store.draft(STEP) as draft:
        (draft.path / "found.txt").write_text("four")
        assert store.clean() == 1
        store.commit(draft, "d", {}, {})
    assert store.state(STEP) is State.PRESENT
    assert store.clean() == 0 and not list((tmp_path / "locks").iterdir())


def test_an_error_or_nothing_to_commit_leaves_no_draft(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.draft(STEP):
        pass
    with pytest.raises(MergeloomError), store.draft(STEP, resume=True):
        raise MergeloomError("ours to report")
    with pytest.raises(KeyError), store.draft(STEP):
        raise KeyError
    assert not left(store)
    with pytest.raises(KeyboardInterrupt), store.draft(STEP, resume=True) as draft:
        (draft.path / "half").touch()
        raise KeyboardInterrupt
    with store.draft(STEP, resume=True) as draft:
        assert (draft.path / "half").exists(), "interrupted work goes on"


# --- what is in the store is not what it was --------------------------------------------------------------------------


def test_truncated_missing_and_unreadable_are_broken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store)
    assert store.state(STEP) is State.PRESENT
    (store.folder(STEP) / "found.txt").write_text("fou")
    assert store.state(STEP) is State.BROKEN and not store.is_done(STEP)
    (store.folder(STEP) / "found.txt").unlink()
    assert store.state(STEP) is State.BROKEN
    put(store)
    assert store.state(STEP) is State.PRESENT
    for text in ("{", "{}", '{"key": 1}', "[]"):
        (store.folder(STEP) / RECORD).write_text(text)
        assert store.state(STEP) is State.BROKEN and store.record(STEP) is None
    put(store)
    store.drop(STEP)
    assert store.state(STEP) is State.DROPPED
    assert store.is_done(STEP) and not store.is_done(STEP, bytes_needed=True)
    store.remove(STEP)
    assert store.state(STEP) is State.MISSING and not left(store)


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    pool = open_pool(write_pool(tmp_path / "pool"))
    before = os.umask(0o027)
    try:
        place, plan = place_in(tmp_path / "store", pool), merge_plan(pool, "ties", density=0.3)
        completed(place, plan)
    finally:
        os.umask(before)
    for path in (tmp_path / "store").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


# --- a merge in the store ---------------------------------------------------------------------------------------------


def completed(place: object, plan: MergeWork) -> Done:
    """The merge and what it must know beforehand."""
    from mergecore.recipes.merge_recipe import run_for

    return run_for(place, plan)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def undisturbed(pool_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The model's files as a run that nobody disturbs writes them, and its digest as 'digest'."""
    pool = open_pool(pool_folder)
    place, plan = place_in(tmp_path_factory.mktemp("store"), pool), merge_plan(pool, "ties", density=0.3)
    assert not completed(place, plan).failures
    return model(place.store, plan)


def model(store: Store, plan: MergeWork) -> dict[str, bytes]:
    record = store.record(plan.step)
    assert record is not None and store.state(plan.step) is State.PRESENT
    files = files_below(store.folder(plan.step))
    del files[RECORD]
    return {**files, "digest": record.digest.encode()}


def test_a_truncated_model_is_made_again(pool_folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    pool = open_pool(pool_folder)
    place, plan = place_in(tmp_path, pool), merge_plan(pool, "ties", density=0.3)
    completed(place, plan)
    os.truncate(place.store.folder(plan.step) / "model-00003-of-00004.safetensors", 100)
    assert place.store.state(plan.step) is State.BROKEN
    assert completed(place, plan).steps == [plan.step.name]
    assert model(place.store, plan) == undisturbed and not left(place.store)


def test_dropped_and_asked_for_again(pool_folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    said: list[Event] = []
    pool = open_pool(pool_folder)
    place, plan = place_in(tmp_path, pool, said.append), merge_plan(pool, "ties", density=0.3)
    completed(place, plan)
    place.store.drop(plan.step)
    assert [path.name for path in place.store.folder(plan.step).iterdir()] == [RECORD]
    assert completed(place, plan).steps == [plan.step.name]
    assert model(place.store, plan) == undisturbed
    record = place.store.record(plan.step)
    assert record is not None and "differs_from" not in record.provenance
    assert not any("differs" in event.activity for event in said)


def test_a_model_made_again_with_another_digest_is_said_aloud(pool_folder: Path, tmp_path: Path) -> None:
    said: list[Event] = []
    pool = open_pool(pool_folder)
    place, plan = place_in(tmp_path, pool, said.append), merge_plan(pool)
    completed(place, plan)
    place.store.drop(plan.step)
    record = place.store.record(plan.step)
    assert record is not None
    write_json(place.store.folder(plan.step) / RECORD, {**record.as_json(), "digest": "f" * 64})
    completed(place, plan)
    again = place.store.record(plan.step)
    assert again is not None and again.digest == record.digest and again.provenance["differs_from"] == "f" * 64
    assert any(plan.step.name in event.activity and "differs" in event.activity for event in said)


def merge_in_spans(folder: Path, root: Path, place: str = "", call: int = 0, after: bool = False) -> tuple[int, int]:
    """Merge in eight spans, killed at a moment. Gives how many spans were done, and how many steps failed."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(passes.plan_spans, "__defaults__", (4000,))
    pool, spans = open_pool(folder), []
    at = place_in(root, pool)
    if place:
        kill_at(place, call, after)
    original = span_module.write_journal
    monkeypatch.setattr(span_module, "write_journal", lambda *arguments: (spans.append(1), original(*arguments)))
    done = completed(at, merge_plan(pool, "ties", density=0.3))
    return len(spans), len(done.failures)


@pytest.mark.parametrize(
    ("place", "call", "when", "spans"),
    [
        ("mergecore.engine.span:write_journal", 4, "before", 5),  # three of eight spans are journalled
        ("mergecore.engine.span:write_journal", 7, "after", 1),
        ("os:posix_fallocate", 2, "before", 8),
        ("os:posix_fallocate", 3, "after", 8),
        ("os:posix_fallocate", 4, "after", 8),
        ("os:pwrite", 4, "after", 8),  # all headers are there, one file has not its size yet
        ("mergecore.store.store:Store.commit", 4, "before", 8),  # the journal is gone: trusted no more
        ("os:replace", 9, "before", 8),  # while the record is written
        ("os:rename", 4, "before", 0),
        ("os:rename", 4, "after", 0),
    ],
)
def test_a_killed_merge_goes_on(
    pool_folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], place: str, call: int, when: str, spans: int
) -> None:
    store = Store(tmp_path)
    plan = merge_plan(open_pool(pool_folder), "ties", density=0.3)
    if place in ("os:rename", "mergecore.store.store:Store.commit"):
        call = statistics_of(plan) + 1  # those of the statistics come first
    if place == "os:replace":
        call += statistics_of(plan)
    was_killed(merge_in_spans, pool_folder, tmp_path, place, call, when == "after")
    if (place, when) != ("os:rename", "after"):
        assert store.state(plan.step) is State.MISSING and not store.folder(plan.step).exists()
    assert ran(merge_in_spans, pool_folder, tmp_path) == (spans, 0)
    assert model(store, plan) == undisturbed and not left(store)
    assert set(load_file(store.folder(plan.step) / "model-00001-of-00004.safetensors")) == {"layer.0", "layer.1"}


def test_a_killed_merge_goes_on_with_files_of_another_size(
    pool_folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    was_killed(merge_in_spans, pool_folder, tmp_path, "mergecore.engine.span:write_journal", 4)
    pool = open_pool(pool_folder)
    place, plan = place_in(tmp_path, pool), merge_plan(pool, "ties", density=0.3)
    completed(dataclasses.replace(place, shard_size=1_000_000), plan)
    assert set(model(place.store, plan)) == {"model.safetensors", "digest", "digests.json"}
    assert model(place.store, plan)["digest"] == undisturbed["digest"]


def statistics_of(plan: MergeWork) -> int:
    """How many statistics are committed before the merge."""
    return len({work.step.key for plans in plan.inputs.values() for group in plans for work in group.with_inputs()})


def test_a_worker_of_a_pass_that_was_called_off_cannot_speak_for_the_next(pool_folder: Path, tmp_path: Path) -> None:
    pool = open_pool(pool_folder)
    place, plan = place_in(tmp_path, pool), merge_plan(pool)
    span = passes.plan_spans(plan.layout.merged, plan.method.per)[0]
    with pytest.raises(MergeloomError), place.store.draft(plan.step, resume=True) as draft:
        old = _writing(place, _parts(place, plan, draft)).merges[0]
        raise MergeloomError("an expert holds a NaN, say")
    with place.store.draft(plan.step, resume=True) as draft:
        new = _writing(place, _parts(place, plan, draft)).merges[0]
        with pytest.raises(FileNotFoundError):
            write_journal(old, span, {})
        assert read_journal(new, span) is None


# --- full disk --------------------------------------------------------------------------------------------------------


def merge_within(folder: Path, root: Path, limit: int, method: str) -> str:
    """Why a merge failed in a process that may not write files of more than `limit` bytes."""
    pool = open_pool(folder)
    place, plan = place_in(root, pool), merge_plan(pool, method)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        return next(iter(completed(place, plan).failures.values()), "no failure")
    except Exception as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize(
    ("limit", "method", "said"),
    [
        (4000, "average", "cannot write 8,"),  # the model does not fit
        (1000, "ties", "cannot write"),  # not even the record of a statistic
    ],
)
def test_a_full_disk_leaves_nothing_and_is_forgiven(
    pool_folder: Path, tmp_path: Path, limit: int, method: str, said: str
) -> None:
    out = ran(merge_within, pool_folder, tmp_path, limit, method)
    assert said in out and "free disk space" in out
    store, pool = Store(tmp_path), open_pool(pool_folder)
    plan = merge_plan(pool, method)
    assert store.state(plan.step) is State.MISSING and not left(store)
    assert list(store.failures()), "the reason is on record, so other cells go on"
    assert store.forgive() == (1 if method == "average" else 3), "the merge, or the statistics of three experts"
    assert not completed(place_in(tmp_path, pool), plan).failures
    assert store.state(plan.step) is State.PRESENT


def test_a_disk_without_room_for_a_reason(pool_folder: Path, tmp_path: Path) -> None:
    out = ran(merge_within, pool_folder, tmp_path, 10, "average")
    assert out.startswith("StoreError") and "failed" in out and "cannot be written" in out
    assert not left(Store(tmp_path))


def test_full_is_told_from_other_errors_of_the_system(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(CapacityError, match="free disk space"), store.draft(STEP):
        raise OSError(28, "No space left on device")
    with pytest.raises(PermissionError), store.draft(STEP):
        raise PermissionError(13, "no")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"), Store(tmp_path / "file").draft(STEP):
        pass


def test_a_statistic_is_made_once_for_several_merges(pool_folder: Path, tmp_path: Path) -> None:
    pool = open_pool(pool_folder)
    place = place_in(tmp_path, pool)
    first, second = merge_plan(pool, "ties", density=0.3), merge_plan(pool, "ties", density=0.3, scale=0.5)
    completed(place, first)
    profiles = [work for plans in first.inputs.values() for group in plans for work in group.with_inputs()]
    stamps = {work.step.key: (place.store.folder(work.step) / RECORD).stat().st_mtime_ns for work in profiles}
    assert run_works(place, list({work.step.key: work for work in profiles}.values())).failures == {}
    assert run_works(place, [first, second]).failures == {}
    assert stamps == {work.step.key: (place.store.folder(work.step) / RECORD).stat().st_mtime_ns for work in profiles}
