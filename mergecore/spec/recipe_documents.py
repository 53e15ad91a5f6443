"""A recipe file in our form or in mergekit's: one model, or several of which later ones are made of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot, read_snapshot
from mergecore.checkpoints.stack import BASE, StackRule, stacked
from mergecore.errors import SpecError
from mergecore.spec.mergekit.document import document_from, is_mergekit
from mergecore.spec.mergekit.layers import Lookup
from mergecore.spec.mergekit.reference import Reference, model_and_lora
from mergecore.spec.mergekit.strangers import known_keys
from mergecore.spec.mergekit.translate import Translation, recipe_from
from mergecore.spec.recipe import Recipe, parse_recipe
from mergecore.spec.sources import Resolver, SourceSpec
from mergecore.spec.yaml_files import read_documents

MODELS = ("model", "base_model", "tokenizer_source", "source")
"""Keys of mergekit's form behind which a model may stand."""


@dataclass(frozen=True)
class RecipeDocument:
    """One model that a file asks for. name: what other documents call it; '' for the one that is the file's result."""

    name: str
    where: str
    document: Mapping[str, Any]
    needs: frozenset[str] = frozenset()


def read_orders(path: Path) -> tuple[RecipeDocument, ...]:
    """What a recipe file asks for, each after what it is made of; all of it checked as far as the file alone allows.

    Raises SpecError.
    """
    documents = read_documents(path)
    named = len(documents) > 1
    orders: dict[str, RecipeDocument] = {}
    for number, document in enumerate(documents):
        where = f"{path.name}[{number}]" if named else path.name
        if named and not is_mergekit(document) and "modules" not in document:
            raise SpecError(f"{where}: several documents in one file are mergekit's form; this one is not")
        name = str(document.get("name") or "") if named else ""
        if name in (".", "..") or "/" in name:
            raise SpecError(f"{where}.name: '{name}' is to be the name of a folder; write it without slashes")
        if name in orders:
            what = f"two documents are called '{name}'" if name else "two documents have no name"
            raise SpecError(f"{where}: {what}; only the result of the file may go without")
        if not is_mergekit(document):
            parse_recipe(document, where)
        else:
            document_from(known_keys(document, where)[0], where)
        orders[name] = RecipeDocument(name, where, document)
    known = frozenset(orders) - {""}
    linked = {
        name: RecipeDocument(name, order.where, order.document, frozenset(_names(order.document, known)))
        for name, order in orders.items()
    }
    return tuple(_in_order(linked))


def _names(value: Any, known: frozenset[str]) -> Iterator[str]:
    """Yield the names of other documents that stand where a model stands."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in MODELS and (name := _named(inner)) in known:
                yield name
            yield from _names(inner, known)
    elif isinstance(value, list):
        for item in value:
            yield from _names(item, known)


def _named(value: Any) -> str:
    """The path of the model a value stands for, '' where it stands for none."""
    if isinstance(value, str) and value not in ("union", "base"):
        return _split(value)[0]
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return str(value["path"])
    return ""


def _split(text: str) -> tuple[str, str]:
    """`model_and_lora`; the whole text where that is not clear, which the schema then refuses."""
    try:
        return model_and_lora(text)
    except ValueError:
        return text, ""


def _in_order(orders: Mapping[str, RecipeDocument]) -> Iterator[RecipeDocument]:
    done: set[str] = set()
    waiting = dict(orders)
    while waiting:
        ready = [order for order in waiting.values() if order.needs <= done]
        if not ready:
            raise SpecError(f"documents {', '.join(sorted(waiting))} are made of each other; none can be the first")
        for order in ready:
            done.add(order.name)
            yield waiting.pop(order.name)


def placed(value: Any, folders: Mapping[str, Path]) -> Any:
    """The document with the folders of earlier results in place of their names."""
    if isinstance(value, list):
        return [placed(item, folders) for item in value]
    if not isinstance(value, Mapping):
        return value
    mapping = {key: placed(inner, folders) for key, inner in value.items()}
    for key in MODELS:
        name = _named(value.get(key))
        if name and name in folders:
            place = {"path": str(folders[name])}
            if isinstance(value[key], str):
                lora = _split(value[key])[1]
                mapping[key] = {"model": place, **({"lora": lora} if lora else {})}
            else:
                mapping[key] = {**value[key], **place}
    return mapping


class Translator:
    """Turns orders into recipes. Models are looked up once; those that are still to be made are known by their
    shape.
    """

    def __init__(self, resolve: Resolver) -> None:
        self._read = cache(
            lambda source, revision: read_snapshot(resolve(SourceSpec(source=source, revision=revision)))
        )
        self._shapes: dict[str, Snapshot] = {}

    def translation(self, order: RecipeDocument, folders: Mapping[str, Path]) -> Translation:
        """The recipe as plain values. folders: where results of other documents lie, or will lie."""
        if not is_mergekit(order.document):
            return Translation(dict(order.document), ())
        known, notes = known_keys(order.document, order.where)
        document = document_from(placed(known, folders), order.where)
        for model in document.references():
            self._check_adapter(model, order.where)
        translation = recipe_from(document, self.lookup, order.where)
        translation = replace(translation, notes=(*notes, *translation.notes))
        if order.name:
            stack = [StackRule(**rule) for rule in translation.recipe.get("stack", ())]
            base = translation.recipe["base"]
            ground = self._shapes.get(base["source"]) or self._read(base["source"], base.get("revision"))
            self._shapes[str(folders[order.name])] = stacked({BASE: ground}, stack)[BASE]
        return translation

    def _check_adapter(self, model: Reference, where: str) -> None:
        """Raise SpecError where a full checkpoint stands behind a '+'."""
        if model.lora is not None and self._read(model.lora.path, model.lora.revision).kind != "adapter":
            raise SpecError(
                f"{where}: '{model}': '{model.lora}' is a full checkpoint, and behind a '+' stands a LoRA adapter; "
                "list it as a model of its own"
            )

    def recipe(self, order: RecipeDocument, folders: Mapping[str, Path]) -> tuple[Recipe, tuple[str, ...]]:
        """The checked recipe, and what is to be said aloud about it."""
        translation = self.translation(order, folders)
        return parse_recipe(translation.recipe, order.where), translation.notes

    @property
    def lookup(self) -> Lookup:
        """Headers and configuration of a model, without its adapter."""

        def header_of(model: Reference) -> Snapshot:
            path = model.model.path
            if path in self._shapes and not Path(path).exists():
                return self._shapes[path]
            snapshot = self._read(path, model.model.revision)
            if snapshot.kind != "full":
                raise SpecError(f"'{path}' is an adapter; write model+adapter, as in base-model+{path}")
            return snapshot

        return header_of
