"""What a merge gives: a dense model, an adapter, masks. A product knows how it is written, published, loaded and
scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mergecore.tensors.source import TensorInfo, TensorSource


@dataclass(frozen=True)
class FinishedMerge:
    """A finished merge as its product sees it.

    method, values: the method's name and parameters. experts: {id: name} in fold order. model: the tensors of a dense
    model of it, as they are given out. base: the base's tensors; base_source: where the base comes from. folder, files:
    where the written tensors lie. digest, size: of what was written. numbers: what its record says. stem: how weight
    files are called that a loader of the base's finds.
    """

    method: str
    values: Mapping[str, Any]
    experts: Mapping[str, str]
    model: Mapping[str, TensorInfo]
    base: Mapping[str, TensorInfo]
    base_source: str
    folder: Path
    files: Sequence[str]
    digest: str
    size: int
    numbers: Mapping[str, Any]
    stem: str = "model"


@dataclass(frozen=True)
class Published:
    """A published product: digest and bytes of its tensors, what its card says of it, and what is said aloud."""

    digest: str
    size: int
    card: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class Product(ABC):
    """A kind of result. One object of each kind is registered under its name; a method names the one that it makes."""

    name: ClassVar[str]
    noun: ClassVar[str]
    """With its article, as in 'makes an adapter'."""
    of: ClassVar[str] = "models"
    """What it is made of."""
    described: ClassVar[str] = ""
    """A sentence for docs/methods.md."""
    ground: ClassVar[str] = ""
    """What a method that makes it works on, where that is not weights or changes of experts."""
    by_tensor: ClassVar[bool] = True
    """Whether single tensors of a model can be made by a method that makes it."""
    in_memory: ClassVar[bool] = True
    """Whether `mergecore.merge` can return it as a mapping of tensors."""
    tokenizer_in_recipe: ClassVar[bool] = True
    """Whether a recipe for it may ask for a vocabulary (`tokenizer`)."""
    pool_vocabulary: ClassVar[bool] = True
    """Whether its vocabulary is that of the whole pool, so that a recipe that makes it again names all of the pool."""
    dtype_in_recipe: ClassVar[bool] = True
    """Whether the dtype of a sweep's models is that of the product."""
    published_input: ClassVar[str] = ""
    """Name of the input whose result is published in place of the model; '' where the model itself is."""
    companions: ClassVar[bool] = True
    """Whether config, tokenizer and the like of the base lie beside it."""
    reads_base: ClassVar[bool] = True
    """Whether publishing it alone reads more of the base than its headers."""
    as_lora: ClassVar[bool] = False
    """Whether a recipe may ask for an adapter of it in its place (`lora`)."""
    registered_as: ClassVar[str] = "model"
    """What it is called in the key of its registration."""

    def stored(self, tensors: Mapping[str, TensorInfo], dtype: str | None) -> Mapping[str, TensorInfo]:
        """Return the tensors as they are written where models are asked for in `dtype` (safetensors' name)."""
        return tensors

    def loads(self, tasks: Mapping[str, Sequence[str]]) -> Mapping[str, str]:
        """Return {task: id of the expert whose model is loaded for it}; empty where one model is for all tasks.

        tasks: the tasks of each expert, by id, ascending. Raises SpecError where nothing can be measured.
        """
        return {}

    def load(self, contents: FinishedMerge, tensors: TensorSource, expert: str) -> TensorSource:
        """Return the model that is loaded for the tasks of an expert (id)."""
        return tensors

    @abstractmethod
    def publish(self, contents: FinishedMerge, folder: Path, dtype: str | None) -> Published:
        """Write the product's own files into `folder`; companions, card and recipe are written by others.

        dtype: safetensors' name of the dtype that a recipe asks for; None: as it was written. Files are linked where
        they can be.
        """

    def card_lines(self, card: Mapping[str, Any]) -> list[str]:
        """Return what the model card says of this product, from what `publish` left for it."""
        return []
