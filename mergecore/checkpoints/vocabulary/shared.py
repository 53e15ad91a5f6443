"""One vocabulary for models that have several: what `resolve_pool` does where a recipe says `tokenizer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergecore.checkpoints.architectures import PER_LAYER_TOKENS, VOCABULARY
from mergecore.checkpoints.layout import tied_names
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.vocabulary.companions import (
    changed_files,
    check_ids,
    end_warnings,
    files_of_tokenizer,
    splitting_warnings,
    template_warnings,
    token_warnings,
)
from mergecore.checkpoints.vocabulary.configuration import config_with, counts_in, with_count
from mergecore.checkpoints.vocabulary.index import Indices, Vocabulary, adapter_rows, chosen_rows, model_rows
from mergecore.checkpoints.vocabulary.result import ResultTokenizer, result_tokenizer
from mergecore.checkpoints.vocabulary.rows import Rows
from mergecore.checkpoints.vocabulary.rules import BASE, UNION, TokenizerRules
from mergecore.checkpoints.vocabulary.snapshot import with_companions, with_rows
from mergecore.checkpoints.vocabulary.tokenizer import (
    TOKENIZER,
    Known,
    Tokenizer,
    check_kinds,
    check_meanings,
    few,
    read_tokenizer,
    refuse,
    template_of,
)
from mergecore.errors import MismatchError, SpecError, nearest
from mergecore.tensors.source import TensorInfo

REMEDY = (
    "Choose models of one family, or take over what the first says (the base, then the experts in order) with "
    "`tokenizer: {conflicts: first}`"
)


@dataclass(frozen=True)
class Shared:
    """The pool's checkpoints as they open with one vocabulary.

    adapters: rows for updates of the head; None where the vocabulary is unchanged.
    """

    base: Snapshot
    experts: Mapping[str, Snapshot]
    adapters: Rows | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Model:
    """One checkpoint. names: its tensors over the vocabulary, each under its own name. rows: of its embedding."""

    name: str
    snapshot: Snapshot
    names: Mapping[str, str]
    rows: int

    @property
    def owner(self) -> str:
        """The model's name in messages."""
        return "the base" if self.name == BASE else f"expert '{self.name}'"


def shared_vocabulary(
    base: Snapshot, experts: Mapping[str, Snapshot], rules: TokenizerRules, chat_template: str | None
) -> Shared:
    """Return the checkpoints with the vocabulary that the rules choose. experts: full checkpoints and adapters, by
    name.

    Raises SpecError for rules without a meaning, MismatchError and SourceError for models that cannot be brought
    together.
    """
    adapters = tuple(name for name, snapshot in experts.items() if snapshot.kind == "adapter")
    _check_source(rules, experts, adapters)
    models = [_model(name, snapshot) for name, snapshot in {BASE: base, **experts}.items() if name not in adapters]
    owner = models[0] if rules.source in (UNION, BASE) else next(m for m in models[1:] if m.name == rules.source)
    tokenizers, warnings = _tokenizers(models)
    if not tokenizers:  # then nothing can be said of tokens; the owner's other files still count
        _check_alike(models, rules)
        return Shared(_accompanied(models[0], base, owner, {}), dict(experts), None, tuple(warnings))
    result, reasons = result_tokenizer(tokenizers[owner.name], tokenizers, rules, rules.source == UNION)
    reasons = [*check_kinds(tokenizers.values()), *check_meanings(tokenizers.values(), result.tokens), *reasons]
    if rules.conflicts == "refuse":
        refuse(list(dict.fromkeys(reasons)), REMEDY)
    check_ids(result, owner.snapshot)
    warnings += [f"{reason}; the first holds" for reason in dict.fromkeys(reasons)]
    warnings += [
        f"{tokenizer.owner}: its model has no row for {few(sorted(tokenizer.beyond))}"
        for tokenizer in tokenizers.values()
        if tokenizer.beyond
    ]
    warnings += end_warnings(result, owner.snapshot, [(tokenizers[model.name], model.snapshot) for model in models[1:]])
    warnings += token_warnings(result, [tokenizers[model.name] for model in models[1:]])
    warnings += splitting_warnings(result, list(tokenizers.values()))
    text = template_of(owner.snapshot) if chat_template is None else chat_template
    warnings += template_warnings(text, chat_template, result, list(tokenizers.values()))
    ordered = [models[0], *sorted(models[1:], key=lambda model: model.snapshot.weights)]
    indices = Indices(
        tuple(_vocabulary(model, tokenizers, adapters) for model in ordered), result.tokens, _count(result, rules)
    )
    chosen = chosen_rows(indices, rules)
    rows = {model.name: model_rows(indices, number, rules, chosen) for number, model in enumerate(ordered)}
    same = all(rows[model.name].is_identity(model.rows) for model in models)
    opened = {model.name: model.snapshot if same else _gathered(model, rows[model.name], ordered) for model in models}
    ground = _accompanied(models[0], opened[BASE], owner, changed_files(result, base, owner.snapshot))
    opened_experts = {name: opened.get(name, snapshot) for name, snapshot in experts.items()}
    return Shared(ground, opened_experts, None if same else adapter_rows(indices, chosen), tuple(warnings))


def updated(adapter: Snapshot, names: Sequence[str], rows: Rows) -> Snapshot:
    """Return an adapter with the rows of the result. names: its factors that have a row for each token."""
    return with_rows(adapter, rows, [(adapter, {name: name for name in names})])


def over_vocabulary(name: str, info: TensorInfo) -> bool:
    """Return whether a tensor has a row for each token."""
    return VOCABULARY.search(name) is not None and len(info.shape) > 0


# --- the models ---------------------------------------------------------------------------------------------------


def _check_source(rules: TokenizerRules, experts: Mapping[str, Snapshot], adapters: Sequence[str]) -> None:
    if rules.source in adapters:
        raise SpecError(
            f"tokenizer.source: '{rules.source}' is an adapter, whose vocabulary is the base's; say tokenizer: "
            f"{{source: base}}"
        )
    if rules.source not in (UNION, BASE, *experts):
        raise SpecError(
            f"tokenizer.source: no expert is called '{rules.source}'; {nearest(rules.source, [UNION, BASE, *experts])}"
        )


def _model(name: str, snapshot: Snapshot) -> _Model:
    """Return the checkpoint with its tensors over the vocabulary.

    Raises MismatchError where these differ in their number of rows, where there are none, or where the config differs.
    """
    counts = {tensor: info.shape[0] for tensor, info in snapshot.tensors.items() if over_vocabulary(tensor, info)}
    model = _Model(name, snapshot, {tensor: tensor for tensor in counts}, next(iter(counts.values()), 0))
    where = f"{model.owner} ({snapshot.source.uri})"
    if not counts:
        raise MismatchError(
            f"{where} has no tensor that is known to have a row for each token (embed_tokens, wte, word_embeddings, "
            "lm_head …): its vocabulary cannot be changed; leave `tokenizer` out"
        )
    differing = [f"'{tensor}' {rows}" for tensor, rows in counts.items() if rows != model.rows]
    if differing:
        raise MismatchError(
            f"{where}: {', '.join(differing)} rows, '{next(iter(counts))}' {model.rows}: of which tokens are they?"
        )
    for key, count in counts_in(snapshot.config).items():
        if count != model.rows:
            raise MismatchError(
                f"{where}: config.json says {key} {count}, '{next(iter(counts))}' has {model.rows} rows"
            )
    return model


def _tokenizers(models: Sequence[_Model]) -> tuple[dict[str, Tokenizer], list[str]]:
    """Return every model's tokenizer, and warnings. A model without one has the base's; all is empty where nobody has
    one.

    Raises MismatchError where a model without a tokenizer has another number of rows, or the base has none.
    """
    known: Known = {}
    read = {model.name: read_tokenizer(model.snapshot, model.rows, model.owner, known) for model in models}
    warnings: list[str] = []
    if all(tokenizer is None for tokenizer in read.values()):
        return {}, warnings
    base, tokenizers = read[BASE], dict[str, Tokenizer]()
    for model in models:
        tokenizer = read[model.name]
        if tokenizer is None and (base is None or model.rows != models[0].rows):
            raise MismatchError(
                f"{model.owner} ({model.snapshot.source.uri}) has no {TOKENIZER} beside it, and {model.rows} rows: "
                "which token has which row? Put the tokenizer there"
            )
        if tokenizer is None:
            assert base is not None
            tokenizer = dataclasses.replace(base, owner=model.owner)
            warnings.append(f"{model.owner} has no tokenizer beside it; the base's is taken to be its own")
        tokenizers[model.name] = tokenizer
    return tokenizers, warnings


def _check_alike(models: Sequence[_Model], rules: TokenizerRules) -> None:
    """Raise MismatchError where rules speak of tokens and no model has a tokenizer."""
    if len({model.rows for model in models}) > 1 or rules.tokens or rules.pad_to_multiple_of:
        raise MismatchError(
            f"tokenizer: no model has a {TOKENIZER} beside it, so nobody knows which token has which row"
        )


def _vocabulary(model: _Model, tokenizers: Mapping[str, Tokenizer], adapters: Sequence[str]) -> Vocabulary:
    copies = tuple(adapters) if model.name == BASE else ()
    return Vocabulary(model.name, model.rows, tokenizers[model.name].tokens, copies)


def _count(result: ResultTokenizer, rules: TokenizerRules) -> int:
    """Return the number of rows: one for each id, rounded up as the rules say."""
    ids, multiple = max(result.tokens.values()) + 1, rules.pad_to_multiple_of or 1
    return -(-ids // multiple) * multiple


# --- as they open -------------------------------------------------------------------------------------------------


def _gathered(model: _Model, rows: Rows, ordered: Sequence[_Model]) -> Snapshot:
    """Return the checkpoint with these rows, and with a configuration that states their number."""
    if rows.is_identity(model.rows):
        return model.snapshot
    config = with_count(model.snapshot.config, rows.count)
    if config is None:
        raise MismatchError(
            f"{model.owner} ({model.snapshot.source.uri}): its config.json says vocab_size neither at its top nor in a "
            "text_config, where another number of rows could be written"
        )
    other = next(filter(PER_LAYER_TOKENS.search, model.snapshot.tensors), None)
    if other is not None:
        raise MismatchError(
            f"{model.owner} ({model.snapshot.source.uri}): '{other}' has rows for some of the tokens only, so its "
            "vocabulary cannot be changed; leave `tokenizer` out"
        )
    sources = [(model.snapshot, model.names), *((other.snapshot, _called(model, other)) for other in ordered)]
    gathered = with_rows(model.snapshot, rows, sources)
    return dataclasses.replace(gathered, config=config)


def _called(model: _Model, other: _Model) -> dict[str, str]:
    """Return the names that the tensors of a model have in another. A head that the other ties is its embedding.

    Where the other has no such tensor the name stays, and the checkpoints do not fit.
    """
    tied = tied_names(other.snapshot.tensors, other.snapshot.config)
    return {name: name if name in other.snapshot.tensors else tied.get(name, name) for name in model.names}


def _accompanied(base: _Model, ground: Snapshot, owner: _Model, changed: Mapping[str, bytes | None]) -> Snapshot:
    """Return the base with the companions of the result: the owner's tokenizer and special tokens."""
    files = dict(changed)
    if owner is not base and not files:
        files = files_of_tokenizer(base.snapshot, owner.snapshot)
    config = dict(ground.config) if owner is base else config_with(ground.config, owner.snapshot.config)
    if not files and config == base.snapshot.config:
        return ground
    return with_companions(ground, files, config)
