"""Gives a model another model's tokenizer: rows of tokens that it lacks are put together of tokens that both have.

The rows are approximated in the donor's embedding space and the coefficients are used in the model's (Goddard and
Fernandes Neto 2025, Training-free tokenizer transplantation via orthogonal matching pursuit, arXiv:2506.06607). How
rows are combined was checked against mergekit's `tokensurgeon`; which tokens are the same is decided by rules of our
own (`vocabulary/spelling.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergecore.arithmetic.approximation import Metric, Weighting, matching_pursuit, neighbours
from mergecore.checkpoints.architectures import PER_LAYER_TOKENS, outside
from mergecore.checkpoints.layout import tied_names
from mergecore.checkpoints.snapshot import Snapshot, read_snapshot
from mergecore.checkpoints.ties import check_fetched, differing
from mergecore.checkpoints.vocabulary.companions import CONFIG, files_of_tokenizer
from mergecore.checkpoints.vocabulary.configuration import config_with, counts_in, ids_in, with_count
from mergecore.checkpoints.vocabulary.shared import over_vocabulary
from mergecore.checkpoints.vocabulary.spelling import matches
from mergecore.checkpoints.vocabulary.tokenizer import ROLES, Tokenizer, few, read_tokenizer
from mergecore.engine.executor import Executor
from mergecore.errors import MismatchError, SourceError, SpecError
from mergecore.events import Event, Report, silent
from mergecore.formats.companions import write_companions
from mergecore.formats.weights import WeightsWriter, grid_blocks
from mergecore.formats.whole_directory import whole_directory
from mergecore.spec.sources import Resolver, SourceSpec
from mergecore.spec.yaml_files import as_yaml
from mergecore.tensors.dtypes import MERGED
from mergecore.tensors.finite import check_finite
from mergecore.tensors.source import TensorInfo, TensorSource
from mergecore.tensors.torch_dtypes import DTYPES

RECORD = "transplant.json"
BATCH = 64
"""Tokens that are approximated at a time: the same for any number of workers."""
Approximation = Literal["omp", "nearest", "mean", "zero"]


@dataclass(frozen=True)
class Rules:
    """How missing rows are made.

    method: 'omp' a combination of `count` shared tokens chosen one after another, 'nearest' of the `count` nearest,
    'mean' the mean of the model's tokens, 'zero'. metric, weighting: of 'nearest'. multiple: of it is the number of
    rows.
    """

    method: Approximation = "omp"
    count: int = 64
    metric: Metric = "euclidean"
    weighting: Weighting = "distance"
    multiple: int = 1


@dataclass(frozen=True)
class Transplanted:
    """A written model. shared: tokens that both have. approximated: those that the model lacked. rows: of its
    embedding. errors: by tensor, the mean relative error of the approximations in the donor's space.
    """

    folder: Path
    digest: str
    size: int
    shared: int
    approximated: int
    rows: int
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Party:
    """The model or the donor: its checkpoint, its tokenizer, and its tensors over the vocabulary."""

    called: str
    snapshot: Snapshot
    tokenizer: Tokenizer
    tables: tuple[str, ...]

    def table(self, head: bool) -> str:
        """Return the embedding, or the head; the embedding too where the head is tied to it."""
        wide = [name for name in self.tables if len(self.snapshot.tensors[name].shape) == 2]
        own = [name for name in wide if is_head(name) == head]
        return (own or wide)[0]


@dataclass(frozen=True)
class Rows:
    """Where the rows of the result come from: `ours` stand at `theirs`; at `lacking` stands what is approximated."""

    theirs: Tensor
    ours: Tensor
    lacking: Tensor
    count: int


@dataclass(frozen=True)
class Shared:
    """What the approximation of every batch shares. points: donor's rows of shared tokens, (N, D) float32."""

    rules: Rules
    points: Tensor
    donor: TensorSource
    table: str
    width: int


def transplant_tokenizer(
    model: SourceSpec,
    donor: SourceSpec,
    out: Path,
    resolve: Resolver,
    executor: Executor,
    report: Report,
    rules: Rules | None = None,
    *,
    shard_size: int = 5 * 10**9,
    durable: bool = False,
) -> Transplanted:
    """Write the model with the donor's tokenizer into the new folder `out`.

    Rows of tokens that both have are the model's, byte for byte. Everything but embeddings, heads and the files that
    refer to tokens stays as it is. Raise SourceError, SpecError or MismatchError for what cannot be done, before
    anything is written.
    """
    rules = rules or Rules()
    receiver, giver = _party("the model", model, resolve), _party("the donor", donor, resolve)
    rows = _rows(receiver, giver, rules)
    config = _config(receiver, giver, rows.count)
    snapshot = receiver.snapshot
    tied = tied_names(snapshot.tensors, snapshot.config)
    infos = {
        name: TensorInfo(info.dtype, (rows.count, *info.shape[1:])) if name in receiver.tables else info
        for name, info in sorted(snapshot.tensors.items())
        if name not in tied
    }
    with whole_directory(out, durable) as draft:
        ours, theirs = (party.snapshot.open(party.snapshot.source.fetch(report)) for party in (receiver, giver))
        for party in (receiver, giver):
            check_fetched(party.snapshot)
        writer = WeightsWriter(draft, infos, shard_size)
        known: dict[str, tuple[Combination, float]] = {}
        errors = {}
        for done, name in enumerate(infos):
            report(Event(f"writing: {name}", done, len(infos), "tensors"))
            if name in receiver.tables:
                table = giver.table(is_head(name))
                if table not in known:
                    known[table] = _combination(theirs, table, rows, rules, executor, report)
                combination, errors[name] = known[table]
                writer.write(name, [_new_table(ours, name, rows, combination, rules)])
            else:
                writer.write(name, grid_blocks(ours, name))
        _write_files(draft, receiver, giver, config)
        result = Transplanted(out, writer.digest, writer.size, len(rows.ours), len(rows.lacking), rows.count, errors)
        record = {**_record(result, receiver, giver), "rules": asdict(rules)}
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        (draft / "README.md").write_text(_card(result, receiver, giver, rules))
    return result


def is_head(name: str) -> bool:
    """Return whether a tensor over the vocabulary is a head, or its bias."""
    return outside(name) != "embeddings"


# --- what is there ----------------------------------------------------------------------------------------------------


def _party(called: str, spec: SourceSpec, resolve: Resolver) -> Party:
    snapshot = read_snapshot(resolve(spec))
    where = f"{called} ({snapshot.source.uri})"
    if snapshot.kind == "adapter" or spec.adapter is not None:
        raise MismatchError(f"{where} is or has an adapter; fold it in first, as a recipe with one expert does")
    for name, owner in differing(snapshot).items():
        raise MismatchError(
            f"{where}: its config.json ties '{name}' to '{owner}', and the two differ in its files; write "
            "tie_word_embeddings: false into it, or leave one of them out"
        )
    tied = tied_names(snapshot.tensors, snapshot.config)
    tables = {n: info for n, info in snapshot.tensors.items() if over_vocabulary(n, info) and n not in tied}
    if not any(len(info.shape) == 2 for info in tables.values()):
        raise MismatchError(f"{where} has no embedding that is known by its name (embed_tokens, wte, lm_head …)")
    for name, info in snapshot.tensors.items():
        if PER_LAYER_TOKENS.search(name):
            raise MismatchError(f"{where}: '{name}' has rows for some of the tokens; that cannot be transplanted")
        if name in tables and info.dtype not in MERGED:
            raise MismatchError(f"{where}: '{name}' is {info.dtype}, which is no floating-point number; dequantize it")
    sizes = {info.shape[0] for info in tables.values()} | set(counts_in(snapshot.config).values())
    if len(sizes) > 1:
        said = ", ".join(map(str, sorted(sizes)))
        raise MismatchError(f"{where}: config.json and its tables over the vocabulary have {said} rows; repair it")
    tokenizer = read_tokenizer(snapshot, sizes.pop(), called, {})
    if tokenizer is None:
        raise SourceError(f"{where} has no tokenizer beside its weights; save one there with transformers")
    return Party(called, snapshot, tokenizer, tuple(sorted(tables)))


def _rows(receiver: Party, giver: Party, rules: Rules) -> Rows:
    """Return where every row comes from. Raise MismatchError where too few tokens are shared."""
    if giver.tokenizer.beyond:
        beyond = few(sorted(giver.tokenizer.beyond))
        raise MismatchError(f"the donor ({giver.snapshot.source.uri}) has no row for {beyond}, which its tokenizer has")
    shared = matches(giver.tokenizer, receiver.tokenizer)
    ids = sorted(giver.tokenizer.tokens.values())
    lacking = [number for number in ids if number not in shared]
    asked = {"omp": rules.count, "nearest": rules.count}.get(rules.method, 0)
    if lacking and asked > len(shared):
        raise SpecError(
            f"{rules.method} of {asked} tokens: the two tokenizers share {len(shared)} of the donor's {len(ids)} "
            f"tokens; choose at most {len(shared)}" + ("" if shared else ", as 'mean' or 'zero' do")
        )
    count = -(-(max(ids) + 1) // rules.multiple) * rules.multiple
    theirs, ours, others = (torch.tensor(list(n), dtype=torch.int64) for n in (shared, shared.values(), lacking))
    return Rows(theirs, ours, others, count)


def _config(receiver: Party, giver: Party, count: int) -> dict[str, Any]:
    """Return the model's configuration with the donor's number of rows and special tokens."""
    known = set(giver.tokenizer.tokens.values())
    for key, number in ids_in(giver.snapshot.config):
        if number not in known:
            raise MismatchError(
                f"the donor ({giver.snapshot.source.uri}): config.json says {key} {number}, which is no token of its "
                "tokenizer; correct the file"
            )
    plain = {role + "_id" for role in ROLES}
    said = {key for key, _ in ids_in(giver.snapshot.config)}
    for key, number in ids_in(receiver.snapshot.config):
        if key.rpartition(".")[2] not in plain and key not in said:
            raise MismatchError(
                f"the model ({receiver.snapshot.source.uri}): config.json says {key} {number}, and the donor's says "
                "nothing of such a token; take a donor of the model's kind"
            )
    config = config_with(receiver.snapshot.config, giver.snapshot.config)
    return with_count(config, count) or config


# --- rows -------------------------------------------------------------------------------------------------------------

Combination = tuple[Tensor, Tensor] | None
"""For each missing token the places of shared tokens and their coefficients; None where there is nothing to combine."""


def _combination(
    donor: TensorSource, table: str, rows: Rows, rules: Rules, executor: Executor, report: Report
) -> tuple[Combination, float]:
    """Return what missing rows are made of, and the mean relative error of that in the donor's space."""
    if not len(rows.lacking) or rules.method in ("mean", "zero"):
        return None, 0.0
    width = donor.tensors[table].shape[1]
    whole = donor.read(table).to(torch.float32).reshape(-1, width)
    check_finite(whole, table, "the donor", "choose another donor, or repair it")
    shared = Shared(rules, whole[rows.theirs], donor, table, width)
    batches = [whole[rows.lacking[at : at + BATCH]] for at in range(0, len(rows.lacking), BATCH)]
    parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    threads = torch.get_num_threads()
    try:
        for done, (place, part) in enumerate(executor.each(approximated, shared, batches), 1):
            report(Event(f"approximating: {table}", done, len(batches), "batches"))
            parts[place] = part
    finally:
        torch.set_num_threads(threads)
    indices, weights, errors = (torch.cat([parts[place][which] for place in range(len(batches))]) for which in range(3))
    return (indices, weights), float(errors.mean())


def approximated(shared: Shared, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return places of shared tokens, coefficients and relative errors for a batch of the donor's rows."""
    torch.set_num_threads(1)  # products over two threads differ from products over one in the last bits
    rules = shared.rules
    if rules.method == "omp":
        indices, weights = matching_pursuit(targets, shared.points, rules.count)
    else:
        indices, weights = neighbours(targets, shared.points, rules.count, rules.metric, rules.weighting)
    met = combined_rows(shared.points, indices, weights)
    wanted = targets.to(torch.float64)
    return indices, weights, (met - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)


def combined_rows(points: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_j weights[b, j] · points[indices[b, j]], float64."""
    total = torch.zeros(len(indices), *points.shape[1:], dtype=torch.float64)
    for place in range(indices.shape[1]):
        part = points[indices[:, place]].to(torch.float64)
        total += part * weights[:, place].reshape(-1, *(1,) * (part.dim() - 1))
    return total


def _new_table(model: TensorSource, name: str, rows: Rows, combination: Combination, rules: Rules) -> Tensor:
    """Return an embedding, a head or its bias with the donor's rows. Rows for no token are 0."""
    info = model.tensors[name]
    before = model.read(name).reshape(info.shape)
    table = before.new_zeros((rows.count, *info.shape[1:]))
    table[rows.theirs] = before[rows.ours]
    if combination is not None:
        points = before[rows.ours].to(torch.float32)
        check_finite(points, name, "the model", "repair it")
        made_up = combined_rows(points, *combination)
        table[rows.lacking] = made_up.to(DTYPES[info.dtype])
        check_finite(table, name, "the model with the donor's tokens", "choose fewer tokens, or another method")
    elif len(rows.lacking) and rules.method == "mean":
        table[rows.lacking] = before.to(torch.float64).mean(0).to(DTYPES[info.dtype])
    return table.reshape(-1)


# --- files ------------------------------------------------------------------------------------------------------------


def _write_files(draft: Path, receiver: Party, giver: Party, config: Mapping[str, Any]) -> None:
    """Write the model's small files, the donor's of the tokenizer, and the configuration."""
    snapshot = receiver.snapshot
    write_companions(draft, snapshot, snapshot.source.fetch(silent), ())
    for name, content in files_of_tokenizer(snapshot, giver.snapshot).items():
        path = draft / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (draft / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")


def _record(result: Transplanted, receiver: Party, giver: Party) -> dict[str, Any]:
    parties: Sequence[tuple[str, Party]] = (("model", receiver), ("donor", giver))
    return {
        **{key: {"source": p.snapshot.source.uri, "weights": p.snapshot.weights} for key, p in parties},
        "digest": result.digest,
        "rows": result.rows,
        "shared": result.shared,
        "approximated": result.approximated,
        "errors": dict(result.errors),
    }


def _card(result: Transplanted, receiver: Party, giver: Party, rules: Rules) -> str:
    head = {"base_model": [party.snapshot.source.uri for party in (receiver, giver)], "tags": ["merge", "mergeloom"]}
    how = {
        "omp": f"combinations of {rules.count} shared tokens, by orthogonal matching pursuit (arXiv:2506.06607)",
        "nearest": f"combinations of the {rules.count} nearest shared tokens ({rules.metric}, {rules.weighting})",
        "mean": "the mean of the model's rows",
        "zero": "rows of zeros",
    }[rules.method]
    lines = ["---", as_yaml(head).strip(), "---", "", "# A model with another model's tokenizer", ""]
    lines += [
        f"Made with Mergeloom: {receiver.snapshot.source.uri} (`{receiver.snapshot.weights}`) with the tokenizer of "
        f"{giver.snapshot.source.uri} (`{giver.snapshot.weights}`).",
        "",
        f"{result.shared} tokens have the model's own rows; {result.approximated} have {how}. Nothing was trained.",
        "",
        *(f"Mean relative error for `{name}`: {error:.4%}." for name, error in result.errors.items()),
    ]
    return "\n".join(lines) + "\n"
