"""Coefficients as a table: a row for each group of tensors, in it one number for each expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from mergecore.checkpoints.architectures import LAYER
from mergecore.errors import SpecError, nearest
from mergecore.identity.numbers import Numbers
from mergecore.plugins.per_expert import EACH, check_each, moved
from mergecore.plugins.per_tensor import PerTensor
from mergecore.tensors.dtypes import MERGED
from mergecore.tensors.source import TensorInfo

Row = tuple[float, ...]
_NORM = re.compile(r"(?:^|[._])(?:\w*norm\w*|ln(?:_?\w+)?)$", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|feed_?forward|ffn|denserelu|moe|experts?\.|intermediate|(?:^|\.)(?:fc\d|lin\d|output)\.", re.IGNORECASE
)


class Groups(Numbers):
    """Which tensors have the same coefficients."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    by: Annotated[
        Literal["model", "layers", "tensor"],
        Field(
            description="'tensor', each by itself (what papers call layer-wise); 'layers', those of `every` "
            "neighbouring layers; 'model', all together (task-wise)"
        ),
    ] = "tensor"
    every: Annotated[int, Field(ge=1, description="number of neighbouring layers in a group, for by 'layers'")] = 1
    parts: Annotated[
        bool, Field(description="whether attention, MLP and the rest of a layer are groups of their own")
    ] = False

    @model_validator(mode="after")
    def _used(self) -> Groups:
        if self.every != 1 and self.by != "layers":
            raise ValueError(f"every: counts layers, and the groups are by '{self.by}'; leave it out, or by: layers")
        if self.parts and self.by == "tensor":
            raise ValueError("parts: every tensor is a group by itself; leave it out, or write by: layers or model")
        return self

    def of(self, tensor: str) -> str:
        """Return the name of a tensor's group.

        It is the tensor's own; of layers 4 to 7 'model.layers.4-7', of what is in no layer 'others'; of a whole model
        'all'. With parts ' attention', ' mlp' or ' rest' follows, but for 'others'.
        """
        if self.by == "tensor":
            return tensor
        number = LAYER.search(tensor)
        if self.by == "model":
            return f"all {part_of(tensor)}" if self.parts else "all"
        if number is None:
            return "others"
        first = int(number[1]) // self.every * self.every
        stem = f"{tensor[: number.start(1)]}{first}"
        stem += f"-{first + self.every - 1}" if self.every > 1 else ""
        return f"{stem} {part_of(tensor)}" if self.parts else stem

    def rows(self, tensors: Iterable[str]) -> tuple[str, ...]:
        """Return the groups of these tensors, each once, in the order of the tensors' names."""
        return tuple(dict.fromkeys(map(self.of, sorted(tensors))))


def part_of(tensor: str) -> Literal["attention", "mlp", "rest"]:
    """Return the part of a layer that a tensor belongs to, by its name. Norms belong to the rest."""
    number = LAYER.search(tensor)
    within = tensor[number.end() :] if number else tensor
    if _NORM.search(within.rpartition(".")[0]):
        return "rest"
    if _ATTENTION.search(within):
        return "attention"
    return "mlp" if _MLP.search(within) else "rest"


class Table(PerTensor):
    """λ of every group of tensors and expert. What AdaMerging has learned is such a table.

    A row for a group that the model does not have is refused, and so is a tensor without a row, unless `others` says
    what it gets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    groups: Annotated[Groups, Field(description="which tensors share a row")] = Groups()
    rows: Annotated[
        Mapping[str, Row],
        Field(min_length=1, description="{group: one number per expert in the order of the recipe}"),
    ]
    others: Annotated[
        Row | None, Field(description="of tensors whose group has no row; none: every tensor must have one")
    ] = None

    @field_validator("rows", mode="before")
    @classmethod
    def _no_truth(cls, rows: Any) -> Any:
        if isinstance(rows, Mapping):
            for group, row in rows.items():
                if isinstance(row, Sequence) and any(isinstance(value, bool) for value in row):
                    raise ValueError(f"'{group}': must be numbers, not true or false")
        return rows

    def fitted(self, tensors: Mapping[str, TensorInfo], where: str) -> Table:
        """Return it as it is. Raise SpecError where rows and tensors do not fit each other."""
        known = {self.groups.of(name): name for name, info in tensors.items() if info.dtype in MERGED}
        for group in self.rows:
            if group not in known:
                raise SpecError(f"{where}.rows: the base has no group '{group}'; {nearest(group, known)}")
        if self.others is None:
            for group, name in known.items():
                if group not in self.rows:
                    raise SpecError(
                        f"{where}.rows: tensor '{name}' is of the group '{group}', which has no row; add it, or "
                        "`others: [..]` for all that have none"
                    )
        return self

    def at(self, name: str) -> Row:
        """Return the tensor's number of each expert."""
        row = self.rows.get(self.groups.of(name), self.others)
        if row is None:
            raise SpecError(f"tensor '{name}' has no coefficients: its group '{self.groups.of(name)}' has no row")
        return row

    def check(self, name: str, count: int) -> None:
        """Raise SpecError where a row has not one number per expert. name: of the field."""
        for group, row in [*self.rows.items(), *([] if self.others is None else [("others", self.others)])]:
            if len(row) != count:
                raise SpecError(f"{name}: the row '{group}' has {len(row)} numbers for {count} experts; give each one")

    def bound(self, order: Sequence[int]) -> Table:
        """Return the table with its columns in the new order of the experts."""

        def in_order(row: Row) -> Row:
            return tuple(row[position] for position in order)

        rows = {group: in_order(row) for group, row in self.rows.items()}
        return self.model_copy(update={"rows": rows, "others": None if self.others is None else in_order(self.others)})


def _is_table(value: Any) -> bool:
    return isinstance(value, Table) or (isinstance(value, Mapping) and set(value) != {"grid"})


if TYPE_CHECKING:
    Weights = Row  # `Method.of_tensor` puts the tensor's numbers in the place of a table
else:
    Weights = Annotated[
        Annotated[Row, EACH] | Annotated[Table, Tag("(table)")],
        Discriminator(lambda value: "(table)" if _is_table(value) else "(each)"),
    ]


def bound_weights(weights: Row | Table | None, order: Sequence[int]) -> Any:
    """Return weights, or a table of them, in the order in which experts are folded."""
    return weights.bound(order) if isinstance(weights, Table) else moved(weights, order)


def check_count(name: str, weights: Row | Table | None, count: int) -> None:
    """Raise SpecError where weights, or a table of them, are not one for each of `count` experts."""
    if isinstance(weights, Table):
        weights.check(name, count)
    else:
        check_each(name, weights, count)
