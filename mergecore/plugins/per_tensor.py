"""A value of a method that is another one for every tensor: a factor that goes by layer, a table of coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from mergecore.identity.numbers import Numbers
from mergecore.tensors.source import TensorInfo


class PerTensor(Numbers, ABC):
    """Stands in a field of a method. `Method.of_tensor` puts the tensor's own value in its place."""

    @abstractmethod
    def fitted(self, tensors: Mapping[str, TensorInfo], where: str) -> Self:
        """Return it with what it takes from the base's tensors. Raise SpecError where it does not fit them."""

    @abstractmethod
    def at(self, name: str) -> Any:
        """Return the value of a tensor."""
