"""The checkpoints of a sweep or recipe, resolved and checked against each other before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mergecore.checkpoints.architectures import at_layer, at_layers, layer_of
from mergecore.checkpoints.experts import AdapterExpert, Expert, Factor, FullExpert, adapter_factors
from mergecore.checkpoints.fit import check_fit
from mergecore.checkpoints.folded import folded
from mergecore.checkpoints.naming import under_base_names
from mergecore.checkpoints.select import SelectRule, check_left_out
from mergecore.checkpoints.snapshot import Snapshot, read_json, read_snapshot
from mergecore.checkpoints.sources import Source
from mergecore.checkpoints.stack import BASE, StackRule, layers_of, stacked
from mergecore.checkpoints.ties import untied
from mergecore.checkpoints.vocabulary.companions import marker_warnings, markers
from mergecore.checkpoints.vocabulary.rows import Rows
from mergecore.checkpoints.vocabulary.rules import TokenizerRules
from mergecore.checkpoints.vocabulary.shared import over_vocabulary, shared_vocabulary, updated
from mergecore.checkpoints.vocabulary.tokenizer import TOKENIZER
from mergecore.errors import MismatchError, SpecError, masked
from mergecore.events import Event, Report
from mergecore.identity.keys import Step, digest
from mergecore.planning.compatibility import (
    VOCABULARIES,
    _refuse_quantized,
    _same_base,
    _sizes,
    _vocabulary,
    float64_warnings,
    tokenizer_warnings,
)
from mergecore.planning.computation import check_computation
from mergecore.planning.side_files import side_file_warnings
from mergecore.spec.sources import BaseSpec, ExpertSpec, Resolver, SourceSpec
from mergecore.tensors.source import TensorInfo, TensorSource


@dataclass(frozen=True)
class Member:
    """One expert: its snapshot, and for an adapter its low-rank factors by base tensor."""

    name: str
    tasks: tuple[str, ...]
    snapshot: Snapshot
    factors: Mapping[str, Factor] | None

    @property
    def id(self) -> str:
        """The digest of its weights: who the expert is, whatever it is called and wherever it lies."""
        return self.snapshot.weights

    def carried(self) -> frozenset[str]:
        """The base tensors that its own files hold."""
        return frozenset(self.snapshot.tensors if self.factors is None else self.factors)

    def open(self, folder: Path, base: Mapping[str, TensorInfo]) -> Expert:
        """The expert as the engine reads it, from the folder its files lie in."""
        if self.factors is None:
            return FullExpert(self.id, self.name, self.snapshot.open(folder))
        return self.adapter(folder, base)

    def adapter(self, folder: Path, base: Mapping[str, TensorInfo]) -> AdapterExpert:
        """An adapter likewise; of a folder that has yet to be filled only headers can be asked for."""
        assert self.factors is not None
        shapes = {name: (base[name].shape[0], base[name].shape[1]) for name in self.factors}
        return AdapterExpert(self.id, self.name, self.snapshot.open(folder), dict(self.factors), shapes)


Value = TypeVar("Value")


@dataclass(frozen=True)
class Pool:
    """Base, experts by name and the multitask model; `warnings` are to be said aloud."""

    base: Snapshot
    experts: Mapping[str, Member]
    multitask: Member | None
    warnings: tuple[str, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        """Experts, then the multitask model."""
        return (*self.experts.values(), *([self.multitask] if self.multitask else []))

    def by_name(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return values that are by expert id by the experts' names."""
        names = {member.id: member.name for member in self.members}
        return {names.get(expert, expert): value for expert, value in values.items()}


def snapshot_step(snapshot: Snapshot) -> Step:
    """The step that pins a checkpoint."""
    return Step("snapshot", snapshot.kind, 1, {}, {"weights": snapshot.weights, "companions": snapshot.companions})


def read_source(source: SourceSpec, resolve: Resolver, where: str) -> Snapshot:
    """The checkpoint or adapter that a spec names, with an adapter folded in where it says so."""
    snapshot = read_snapshot(resolve(SourceSpec(source=source.source, revision=source.revision)))
    return snapshot if source.adapter is None else folded(snapshot, read_snapshot(resolve(source.adapter)), where)


HASHED_AT_ONCE = 4
"""Checkpoints whose files are hashed side by side."""


def _ahead(resolve: Resolver, wanted: Sequence[SourceSpec]) -> Resolver:
    """The same resolver, with all of these found and their files hashed side by side."""

    sources = {_place(spec): resolve(SourceSpec(source=spec.source, revision=spec.revision)) for spec in wanted}
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        list(pool.map(lambda source: source.files, sources.values()))

    def known_source(spec: SourceSpec) -> Source:
        return sources.get(_place(spec)) or resolve(spec)

    return known_source


def _place(spec: SourceSpec) -> tuple[str, str | None]:
    return spec.source, spec.revision


def resolve_pool(
    base: BaseSpec,
    experts: Sequence[ExpertSpec],
    multitask: SourceSpec | None,
    resolve: Resolver,
    report: Report,
    select: Sequence[SelectRule] = (),
    stack: Sequence[StackRule] = (),
    tokenizer: TokenizerRules | None = None,
    chat_template: str | None = None,
) -> Pool:
    """Resolve and check every checkpoint; reads headers and small files only. What `select` drops need not fit.
    stack: the layers of the result. tokenizer: its vocabulary, where the checkpoints' differ.

    Raises SourceError for what cannot be had and MismatchError for what does not fit the base: architecture, shapes,
    vocabulary.
    """
    resolve = _ahead(resolve, [base, *experts, *([multitask] if multitask else [])])
    read_base, notes = untied(read_source(base, resolve, "base"))
    report(Event(f"base {read_base.source.uri}"))
    if read_base.kind != "full":
        raise SpecError(f"base: {read_base.source.uri} is an adapter; give the checkpoint it was trained on")
    _refuse_quantized(read_base, "base")
    warnings, members = list(notes), dict[str, Member]()
    taken, told = _read_experts(experts, read_base, resolve, report)
    warnings += told
    checkpoints = {BASE: read_base, **{name: model for name, model in taken.items() if model.kind == "full"}}
    with_layers = stacked(checkpoints, stack)
    ground, taken = with_layers.pop(BASE), {**taken, **with_layers}
    rows, computing = None, dict[str, list[str]]()
    if tokenizer is not None:
        shared = shared_vocabulary(ground, taken, tokenizer, chat_template)
        ground, taken, rows = shared.base, dict(shared.experts), shared.adapters
        warnings += shared.warnings
    elif chat_template is not None and TOKENIZER in ground.source.files:
        tokens = _vocabulary(read_json(ground.source, TOKENIZER), f"{ground.source.uri}/{TOKENIZER}")
        warnings += marker_warnings(markers(chat_template), tokens)
    for expert in experts:
        member = _stacked(expert, taken[expert.name], read_base, ground, select, stack)
        if tokenizer is None:
            warnings += tokenizer_warnings(member.snapshot, ground, _called(member.name, member.snapshot))
        if member.factors is None:
            said = check_computation(ground.config, member.snapshot.config, _called(member.name, member.snapshot))
            computing.setdefault(said, []).append(_called(member.name, member.snapshot))
        if rows is not None and member.factors is not None:
            member = _updated(member, ground, rows)
        same = next((other.name for other in members.values() if other.id == member.id), None)
        if same is not None:
            raise SpecError(f"experts: '{expert.name}' and '{same}' have the same weights; list each checkpoint once")
        members[expert.name] = member
    check_left_out(select, [ground.tensors, *(member.snapshot.tensors for member in members.values())])
    several = None
    if multitask is not None:
        several = _multitask(read_snapshot(resolve(multitask)), ground, rows)
        if tokenizer is None:
            warnings += tokenizer_warnings(several.snapshot, ground, _called(several.name, several.snapshot))
    full = {"base": ground, **{_called(m.name, m.snapshot): m.snapshot for m in members.values() if m.factors is None}}
    warnings += float64_warnings(full)
    warnings += _base_warnings([*members.values(), *([several] if several else [])], ground, base)
    warnings += [f"{', '.join(names)}: {said}" for said, names in computing.items() if said]
    called = {_called(member.name, member.snapshot): member.snapshot for member in members.values()}
    warnings += side_file_warnings(called, ground, tokenizer is not None, chat_template)
    return Pool(ground, members, several, tuple(warnings))


def _base_warnings(members: Sequence[Member], ground: Snapshot, base: BaseSpec) -> list[str]:
    """Name the adapters that record another base than the pool's: one sentence per recorded base."""
    trained_on: dict[str, list[str]] = {}
    for member in members:
        recorded = masked(str(member.snapshot.config.get("base_model_name_or_path") or ""))
        if member.factors is not None and recorded and not _same_base(recorded, ground, base):
            trained_on.setdefault(recorded, []).append(member.name)
    return [
        f"trained on '{recorded}' by their own record, while the base is '{base.source}': {', '.join(names)} "
        "(if it is a copy of that, say so with `base: {source: …, known_as: …}`)"
        for recorded, names in trained_on.items()
    ]


def _read_experts(
    experts: Sequence[ExpertSpec], base: Snapshot, resolve: Resolver, report: Report
) -> tuple[dict[str, Snapshot], list[str]]:
    """The experts by name, full ones under the base's names, and what is to be said.

    base: as it lies in its files.
    """
    snapshots, warnings = dict[str, Snapshot](), list[str]()
    for position, expert in enumerate(experts):
        report(Event(f"experts: {expert.name}", position + 1, len(experts), "experts"))
        if expert.name in snapshots:
            raise SpecError(f"experts: two are called '{expert.name}'; give each its own name")
        snapshot = read_source(expert, resolve, f"expert '{expert.name}'")
        if snapshot.kind == "full":
            where = _called(expert.name, snapshot)
            _refuse_quantized(snapshot, where)
            snapshot, notes = under_base_names(base, snapshot, where)
            warnings += notes
        snapshots[expert.name] = snapshot
    return snapshots, warnings


def _multitask(snapshot: Snapshot, ground: Snapshot, rows: Rows | None) -> Member:
    """A full one is measured as it lies, with its own tokenizer; an adapter is on the base as it is read here."""
    if snapshot.kind == "full":
        snapshot, _ = under_base_names(ground.as_stored, snapshot, _called("multitask", snapshot))
    member = _member("multitask", (), snapshot, ground.as_stored)
    return _updated(member, ground, rows) if rows is not None and member.factors is not None else member


def _stacked(
    expert: ExpertSpec,
    snapshot: Snapshot,
    base: Snapshot,
    ground: Snapshot,
    select: Sequence[SelectRule],
    stack: Sequence[StackRule],
) -> Member:
    """The expert as the result's layers have it; held: a checkpoint with these layers, an adapter as it lies.

    base: as it lies in its files; ground: with the result's layers.
    """
    if snapshot.kind == "full":
        if stack:  # it may have no part in some of the layers
            present = {None, *map(layer_of, snapshot.tensors)}
            tensors = {tensor: info for tensor, info in ground.tensors.items() if layer_of(tensor) in present}
            ground = dataclasses.replace(ground, tensors=tensors)
        return _member(expert.name, expert.tasks, snapshot, ground, select)
    member = _member(expert.name, expert.tasks, snapshot, base)
    if not stack or member.factors is None:
        return member
    layers = layers_of(stack, expert.name)
    snapshot = dataclasses.replace(snapshot, weights=digest(["stack", snapshot.weights, layers]))
    factors = {target: _at_layer_of(target, factor) for target, factor in at_layers(member.factors, layers).items()}
    return dataclasses.replace(member, snapshot=snapshot, factors=factors)


def _at_layer_of(target: str, factor: Factor) -> Factor:
    layer = layer_of(target)
    # A module has no dot behind its last part, which a layer's number needs.
    module = factor.module if layer is None else at_layer(f"{factor.module}.", layer).removesuffix(".")
    return dataclasses.replace(factor, module=module)


def _updated(member: Member, ground: Snapshot, rows: Rows) -> Member:
    """An adapter whose update of an embedding or head has a row for each token of the result."""
    assert member.factors is not None
    targets = [target for target in member.factors if over_vocabulary(target, ground.tensors[target])]
    if not targets:
        return member
    for target in targets:
        if member.factors[target].transposed:
            raise MismatchError(
                f"expert '{member.name}' changes '{target}' as (in, out): rows of tokens cannot be told; fold it into "
                f"its base"
            )
    snapshot = updated(member.snapshot, [member.factors[target].up for target in targets], rows)
    return dataclasses.replace(member, snapshot=snapshot)


def _member(
    name: str,
    tasks: tuple[str, ...],
    snapshot: Snapshot,
    base: Snapshot,
    select: Sequence[SelectRule] = (),
) -> Member:
    """Check one expert against the base. Raises MismatchError where it does not fit."""
    where = _called(name, snapshot)
    if snapshot.kind == "adapter":
        factors = adapter_factors(snapshot.tensors, snapshot.config, base.tensors, where, base.config)
        return Member(name, tasks, snapshot, factors)
    _refuse_quantized(snapshot, where)
    ours, theirs = (_sizes(checkpoint.config) for checkpoint in (base, snapshot))
    for key in (key for key in ours if key in theirs and ours[key] != theirs[key]):
        hint = f" ({VOCABULARIES})" if key.endswith("vocab_size") else ""
        raise MismatchError(
            f"{where} has {key} {theirs[key]}, the base has {ours[key]}: they are no versions of one model{hint}"
        )
    check_fit(base.tensors, snapshot.tensors, where, base.config, select)
    return Member(name, tasks, snapshot, None)


def _called(name: str, snapshot: Snapshot) -> str:
    """How messages call an expert."""
    return f"expert '{name}' ({snapshot.source.uri})"


def opened(pool: Pool, folders: Mapping[str, Path]) -> tuple[TensorSource, dict[str, Expert]]:
    """The base and the experts (by id) as the engine reads them. folders: weights digest → where the files lie."""
    base = pool.base.open(folders[pool.base.weights])
    experts = {
        member.id: member.open(folders[member.id], pool.base.tensors) for member in pool.members if member.id in folders
    }
    return base, experts
