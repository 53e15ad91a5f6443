"""One document of mergekit's as a recipe of ours: the same model, said in our words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergecore.checkpoints.layout import tied_names
from mergecore.checkpoints.stack import BASE
from mergecore.errors import SpecError, nearest
from mergecore.spec.mergekit.chat import chat_template
from mergecore.spec.mergekit.decision import Decision, Resolver, all_parameters
from mergecore.spec.mergekit.document import Document, ModelToken, NoToken, TokenEntry, TokenizerRule
from mergecore.spec.mergekit.layers import (
    MODULES,
    Level,
    Lookup,
    depth_of,
    levels,
    made_tensors,
    module_tensors,
    slices_of,
    stacks_of,
)
from mergecore.spec.mergekit.methods import mergekit_method
from mergecore.spec.mergekit.reference import ModelPath, Reference
from mergecore.spec.mergekit.rules import Condition, rules_for
from mergecore.spec.mergekit.setting import filters_of, setting_from
from mergecore.tensors.dtypes import CONFIG_DTYPE, MERGED
from mergecore.tensors.torch_dtypes import DTYPE_NAMES, DTYPES


@dataclass(frozen=True)
class Translation:
    """A recipe as plain values, ready to be parsed or printed, and what is to be said aloud about it."""

    recipe: dict[str, Any]
    notes: tuple[str, ...]


def recipe_from(document: Document, lookup: Lookup, where: str) -> Translation:
    """The recipe that makes what mergekit would make of the document. lookup: headers of a model, without its adapter.

    Raises SpecError for what cannot be meant or has no counterpart, naming the place.
    """
    method = mergekit_method(document.merge_method, where)
    resolver = Resolver(document, method, where)
    for place, parameters in all_parameters(document):
        resolver.check(parameters, f"{where}.{place}")
    cast = Cast(document, lookup, where)
    decisions: dict[str, Decision] = {}
    piles: dict[str, tuple[Level, ...]] = {}
    for module, inputs in document.inputs.items():
        slices = slices_of(document, module, lookup, where)
        kind = str(cast.ground.config.get("model_type"))
        mine = module_tensors(module, kind, cast.tensors(), where)
        decisions |= {tensor.name: resolver.decision(tensor) for tensor in made_tensors(slices, inputs, mine, kind)}
        piles[module] = levels(slices)
    cast.settle(decisions)
    head = cast.head(decisions)
    stack = _stack(piles, cast, where)
    payloads = {name: cast.payload(decision) for name, decision in decisions.items()}
    select = _rules(payloads, _conditions(document, cast), list(stacks_of(cast.ground)))
    recipe = {
        **head,
        "base": cast.entry(cast.base),
        "experts": [{"name": name, **cast.entry(model)} for model, name in cast.names.items()],
        **({"dtype": dtype} if (dtype := _dtype(document, cast)) else {}),
        **({"stack": stack} if stack else {}),
        **({"select": select} if select != [{}] else {}),
        **_tokenizer(document, cast, where),
    }
    return Translation(recipe, tuple(resolver.notes))


def _rules(payloads: Mapping[str, Any], conditions: Sequence[Condition], stems: Sequence[str]) -> list[dict[str, Any]]:
    """The fewest rules that say it: told apart by stack where layers of one number are not merged alike in all."""
    plain = rules_for(payloads, conditions)
    if len(stems) < 2:
        return plain
    by_stack = Condition(tuple(("", f"^{re.escape(stem)}") for stem in stems))
    return min(plain, rules_for(payloads, [by_stack, *conditions]), key=len)


class Cast:
    """Who takes part: our base, and the experts under names of their own."""

    def __init__(self, document: Document, lookup: Lookup, where: str) -> None:
        self.document, self.lookup, self.where = document, lookup, where
        self.models = document.references()
        self.base = self._base()
        self.ground = lookup(self.base)
        self.names: dict[Reference, str] = {}
        self._default: Decision | None = None

    def _base(self) -> Reference:
        """The base of the document, else its first model, or the deepest where layers are taken from several.

        Where that one is an adapter on a model, the model: the adapter then is an expert.
        """
        if self.document.base_model is not None:
            return self.document.base_model
        deepest = max(depth_of(self.lookup(model)) for model in self.models)
        return next(Reference(model=model.model) for model in self.models if depth_of(self.lookup(model)) == deepest)

    def tensors(self) -> list[str]:
        """Names of the base's tensors, tied ones once."""
        tied = tied_names(self.ground.tensors, self.ground.config)
        return [name for name in self.ground.tensors if name not in tied]

    def is_base(self, model: Reference | None) -> bool:
        """Whether a model is our base itself."""
        return model == self.base

    def settle(self, decisions: Mapping[str, Decision]) -> None:
        """Give every model that is merged, copied from or counted from a name, in the order of the document."""
        used = {
            model
            for decision in decisions.values()
            for model in (*decision.experts, *([decision.base] if decision.base else []))
            if not self.is_base(model) or (decision.method is not None and model in decision.experts)
        }
        chosen = [model for model in self.models if model in used] or [self.base]
        taken = {BASE}
        for model in chosen:
            stem = Path((model.lora or model.model).path).name
            name = next(
                candidate
                for candidate in (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
                if candidate not in taken
            )
            taken.add(name)
            self.names[model] = name

    def head(self, decisions: Mapping[str, Decision]) -> dict[str, Any]:
        """The method that most tensors are merged by, which the rules then only amend."""
        chosen = [decision for decision in decisions.values() if decision.method is not None]
        if not chosen:
            return {"method": "average"}
        self._default = max(chosen, key=chosen.count)
        assert self._default.method is not None
        return dict(self._default.method)

    def payload(self, decision: Decision) -> dict[str, Any]:
        """What a rule says of a tensor, besides what the recipe says already."""
        if decision.method is None:
            source = decision.experts[0]
            return {"take": "copy", **({"of": self.names[source]} if source in self.names else {})}
        said: dict[str, Any] = {}
        default = self._default.method if self._default and self._default.method else {}
        if decision.method != default:
            same = default.get("method") == decision.method["method"] and set(default) <= set(decision.method)
            said = {k: v for k, v in decision.method.items() if not same or default.get(k) != v}
        experts = [self.names[model] for model in decision.experts]
        if experts != list(self.names.values()):
            said["experts"] = experts
        if decision.base is not None and not self.is_base(decision.base):
            said["base"] = self.names[decision.base]
        return said

    def entry(self, model: Reference) -> dict[str, Any]:
        """Where a model comes from: an adapter on our base is an expert as it is, on another model it is folded in."""
        if model.lora is None:
            return _place(model.model)
        if self.base.lora is None and model.model == self.base.model:
            return _place(model.lora)
        return {**_place(model.model), "adapter": _place(model.lora)}


def _place(place: ModelPath) -> dict[str, Any]:
    return {"source": place.path, **({"revision": place.revision} if place.revision else {})}


def _conditions(document: Document, cast: Cast) -> list[Condition]:
    """What may tell tensors of one layer apart: modules, and the filters of each parameter."""
    ranges = []
    modules = MODULES.get(str(cast.ground.config.get("model_type")), {})
    if any(module in modules for module in document.inputs):
        ranges.append(Condition(tuple(("", modules[module]) for module in document.inputs if module in modules)))
    for _, parameters in all_parameters(document):
        for name, value in parameters.items():
            setting = setting_from(value, lambda scalar: scalar, name) if value is not None else ()
            filters = tuple(dict.fromkeys(filters_of({name: setting})))
            if filters:
                ranges.append(Condition(tuple((text, "") for text in filters)))
    return ranges


def _stack(piles: Mapping[str, tuple[Level, ...]], cast: Cast, where: str) -> list[dict[str, Any]]:
    """The result's layers by the inputs' numbers; nothing where every layer stays where it is."""
    moved = [module for module, pile in piles.items() if not _as_they_are(pile, module, cast)]
    if not moved:
        return []
    if len(piles) > 1 or len(stacks_of(cast.ground)) > 1:
        raise SpecError(
            f"{where}.modules.{moved[0]}: layers of a model with several modules cannot change place or number; "
            "give every layer of the module, each where it is"
        )
    ((module, pile),) = piles.items()
    depths = {model: depth_of(cast.lookup(model), module) for model in cast.models}
    base = depth_of(cast.ground, module)
    rules: list[dict[str, Any]] = []
    for first, last, level in _level_runs(pile, base):
        length = last - first
        runs = {cast.names[model]: [at, at + length] for model, at in level.layers.items() if model in cast.names}
        ours = next((at for model, at in level.layers.items() if cast.is_base(model)), None)
        near = next(iter(level.layers.values()))
        # Where the base has no part in a layer it only lends shapes: the layer of the same number if it has one.
        at = ours if ours is not None else near if near + length < base else 0
        runs = {BASE: [at, at + length], **runs}
        deep = all(depth > runs[BASE][1] for depth in depths.values())
        same = deep and len({tuple(run) for run in runs.values()}) == 1
        rules.append({"layers": runs[BASE] if same else runs})
    return rules


def _as_they_are(pile: Sequence[Level], module: str, cast: Cast) -> bool:
    """Whether every layer of a module stays where it is, in models of one depth."""
    depths = {depth_of(cast.lookup(model), module) for model in cast.models}
    still = all(set(level.layers.values()) == {number} for number, level in enumerate(pile))
    return still and depths == {len(pile)}


def _level_runs(pile: Sequence[Level], longest: int) -> list[tuple[int, int, Level]]:
    """(first layer of the result, last, what the first is): layers that follow each other in every model they are
    of.
    """
    levels: list[tuple[int, int, Level]] = []
    for number, level in enumerate(pile):
        if levels:
            first, _, start = levels[-1]
            follows = {model: at + number - first for model, at in start.layers.items()}
            if follows == dict(level.layers) and number - first < longest:
                levels[-1] = (first, number, start)
                continue
        levels.append((number, number, level))
    return levels


def _dtype(document: Document, cast: Cast) -> str | None:
    """The dtype of the files: as written, else where the models differ the one that holds them all."""
    if document.out_dtype or document.dtype:
        return document.out_dtype or document.dtype
    dtypes = {i.dtype for model in cast.models for i in cast.lookup(model).tensors.values() if i.dtype in MERGED}
    if len(dtypes) < 2:
        return None
    joined = None
    for name in sorted(dtypes):
        joined = DTYPES[name] if joined is None else torch.promote_types(joined, DTYPES[name])
    assert joined is not None
    return CONFIG_DTYPE.get(DTYPE_NAMES[joined])


def _tokenizer(document: Document, cast: Cast, where: str) -> dict[str, Any]:
    """The vocabulary, and which chat template the result gets."""
    keys: dict[str, Any] = {}
    rules = document.tokenizer or TokenizerRule(source=document.tokenizer_source or "base")
    if document.tokenizer is not None or document.tokenizer_source is not None:
        if rules.source == "base" and document.base_model is None:
            raise SpecError(f"{where}: the tokenizer is to be the base's; say base_model")
        source = (
            rules.source if isinstance(rules.source, str) else _named(rules.source, cast, f"{where}: the tokenizer")
        )
        tokens = {token: _token_rule(rule, cast, f"{where}.tokenizer.tokens") for token, rule in rules.tokens.items()}
        keys["tokenizer"] = {
            "source": source,
            **({"missing": "mean"} if document.base_model is None else {}),
            "conflicts": "first",
            **({"pad_to_multiple_of": rules.pad_to_multiple_of} if rules.pad_to_multiple_of else {}),
            **({"tokens": tokens} if tokens else {}),
        }
    if document.chat_template is not None:
        text = chat_template(document.chat_template, [cast.lookup(model) for model in cast.models], where)
        keys |= {"chat_template": text} if text is not None else {}
    return keys


def _named(model: Reference, cast: Cast, what: str) -> str:
    """What a model is called in our recipe. An adapter on the base has the base's tokens."""
    if cast.is_base(model):
        return BASE
    if model not in cast.names:
        known = ["union", BASE, *map(str, cast.names)]
        raise SpecError(
            f"{what} is to be that of '{model}', which is not among the models; {nearest(str(model), known)}"
        )
    return BASE if model.lora is not None and "adapter" not in cast.entry(model) else cast.names[model]


def _token_rule(rule: TokenEntry, cast: Cast, where: str) -> dict[str, Any]:
    """Where a token's row comes from, in our words."""
    source: Any = rule.source
    if isinstance(source, NoToken):
        source = {"kind": "zero"}
    elif isinstance(source, ModelToken):
        said = {"token_id": source.token_id} if source.token is None else {"token": source.token}
        source = {"model": _named(source.model, cast, f"{where}: a row"), **said}
    elif source is not None:
        source = _named(source, cast, f"{where}: a row")
    return {**({"source": source} if source is not None else {}), **({"to": "all"} if rule.force else {})}
