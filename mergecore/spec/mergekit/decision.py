"""What is to be done with one tensor: mergekit's settings resolved, then said as values of one of our methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergecore.errors import SpecError, close_to, nearest
from mergecore.spec.mergekit.document import Document, Inputs, OutputSlice, Parameters
from mergecore.spec.mergekit.layers import OutputTensor
from mergecore.spec.mergekit.methods import ELSEWHERE, MergekitMethod, Parameter, Values
from mergecore.spec.mergekit.reference import Reference
from mergecore.spec.mergekit.setting import Scalar, Settings, setting_from, value_for


@dataclass(frozen=True)
class Decision:
    """How a tensor comes about. method: ours with its values, None for a copy of the one expert.

    base: the model changes are counted from, None where the method takes no notice of it.
    """

    method: Mapping[str, Any] | None
    experts: tuple[Reference, ...]
    base: Reference | None


class Resolver:
    """Finds the value of each parameter for each tensor, as mergekit does: the nearest place that says it wins.

    The places, nearest first: the source, its slice, its module, the document. Raises SpecError for parameters that no
    method has; `notes` collects those that this method has no use for.
    """

    def __init__(self, document: Document, method: MergekitMethod, where: str) -> None:
        self.document, self.method, self.where = document, method, where
        self.notes: list[str] = []
        self._known: dict[int, Settings] = {}
        self._held: list[Any] = []

    def decision(self, tensor: OutputTensor) -> Decision:
        """What is to be done with a tensor."""
        base = tensor.out.base_model or self.document.base_model
        sources = [source.model for source in tensor.out.sources]
        place = f"{self.where}: '{tensor.name}'"
        needed = self.method.base == "required" or (self.method.base == "optional" and base is not None)
        if needed and base not in sources:
            raise SpecError(
                f"{self.where}: '{self.method.name}' needs a base among its models; "
                + (f"add '{base}' to the sources of the slice" if base else "say base_model")
            )
        alone = self.method.base == "input"
        experts = [number for number, model in enumerate(sources) if alone or model != base]
        self.method.check_count(len(experts), place)
        chosen = None if alone else base
        if not experts:
            return Decision(None, (sources[0],), None)
        shared = {
            parameter.name: self._value(parameter, self._shared(tensor), tensor.name, tensor.depth, place)
            for parameter in self.method.parameters
            if parameter.per == "merge"
        }
        each = {
            parameter.name: [
                self._value(
                    parameter,
                    self._of(tensor, number),
                    tensor.names[number],
                    tensor.depth,
                    f"{place} of '{sources[number]}'",
                )
                for number in experts
            ]
            for parameter in self.method.parameters
            if parameter.per != "merge"
        }
        values = Values(shared, each, self.document.random_seed, chosen is not None)
        ours = self.method.ours(values)
        self.note(f"{self.where}: {note}" for note in values.notes)
        return Decision(ours, tuple(sources[number] for number in experts), chosen)

    def note(self, notes: Iterable[str]) -> None:
        """Keep what is to be said aloud, each once."""
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]

    def check(self, parameters: Parameters, where: str) -> None:
        """Raise SpecError for parameters that cannot be read, here or anywhere."""
        self._settings(parameters, where)

    def _value(
        self, parameter: Parameter, sources: Iterator[Settings], tensor: str, depth: float, place: str
    ) -> Scalar | None:
        value = value_for(sources, parameter.name, tensor, depth)
        if value is None and parameter.required:
            raise SpecError(f"{place}: no value for '{parameter.name}', which '{self.method.name}' needs")
        return parameter.default if value is None else value

    def _shared(self, tensor: OutputTensor) -> Iterator[Settings]:
        yield self._settings(tensor.out.parameters, f"{self.where}.slices.parameters")
        yield from self._outer(tensor.inputs)

    def _of(self, tensor: OutputTensor, number: int) -> Iterator[Settings]:
        source = tensor.out.sources[number]
        yield self._settings(source.parameters, f"{self.where}, '{source.model}'.parameters")
        yield from self._shared(tensor)

    def _outer(self, inputs: Inputs) -> Iterator[Settings]:
        if inputs is not self.document:
            yield self._settings(inputs.parameters, f"{self.where}.modules.parameters")
        yield self._settings(self.document.parameters, f"{self.where}.parameters")

    def _settings(self, parameters: Parameters, where: str) -> Settings:
        if id(parameters) not in self._known:
            self._held.append(parameters)  # kept alive, so that no other mapping gets its id
            self._known[id(parameters)] = {
                name: setting_from(value, parameter.read, f"{where}.{name}")
                for name, value in parameters.items()
                if value is not None and (parameter := self._parameter(name, where)) is not None
            }
        return self._known[id(parameters)]

    def _parameter(self, name: str, where: str) -> Parameter | None:
        parameter = self.method.parameter(name)
        if parameter is None and name not in ELSEWHERE:
            own = [parameter.name for parameter in self.method.parameters]
            if close_to(name, own):
                raise SpecError(f"{where}.{name}: '{self.method.name}' has no such parameter; {nearest(name, own)}")
        if parameter is None:
            note = f"{where}.{name}: has no effect with '{self.method.name}', in mergekit neither"
            self.note([note])
        return parameter


def all_parameters(document: Document) -> Iterator[tuple[str, Parameters]]:
    """Every mapping of parameters of a document with its place, so that all of them are checked."""
    yield "parameters", document.parameters
    for module, inputs in document.inputs.items():
        where = f"modules.{module}." if module else ""
        if inputs is not document:
            yield f"{where}parameters", inputs.parameters
        for number, model in enumerate(inputs.models or ()):
            yield f"{where}models[{number}].parameters", model.parameters
        for number, out in enumerate(inputs.slices or ()):
            yield from _of_slice(out, f"{where}slices[{number}]")


def _of_slice(out: OutputSlice, where: str) -> Iterator[tuple[str, Parameters]]:
    yield f"{where}.parameters", out.parameters
    for number, source in enumerate(out.sources):
        yield f"{where}.sources[{number}].parameters", source.parameters
