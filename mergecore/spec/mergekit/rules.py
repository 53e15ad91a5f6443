"""From what is to be done with every single tensor to a few rules of `select` that say the same."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergecore.checkpoints.architectures import layer_of
from mergecore.checkpoints.select import SelectRule

Payload = dict[str, Any]
"""What a rule says besides names and layers."""
GLOB = re.compile(r"[*?\[\]/]")


@dataclass(frozen=True)
class Condition:
    """Alternatives of which the first that matches a tensor's name holds, the last resort being none of them.

    alternatives: (text that is part of the name, '') or ('', regular expression).
    """

    alternatives: tuple[tuple[str, str], ...]

    def holding(self, name: str) -> int:
        """The position of the alternative that holds; their number where none does."""
        for number, (text, expression) in enumerate(self.alternatives):
            if (text in name) if text else re.search(expression, name):
                return number
        return len(self.alternatives)


def rules_for(payloads: Mapping[str, Payload], conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Rules under which each tensor gets its payload. conditions: what the payloads may depend on besides the layer."""
    groups: dict[tuple[int, ...], dict[str, Payload]] = {}
    for name, payload in payloads.items():
        groups.setdefault(tuple(condition.holding(name) for condition in conditions), {})[name] = payload
    rules = [
        {**names, **rule}
        for combination in sorted(groups)
        for names in [_names(combination, conditions)]
        for rule in _by_layer(groups[combination])
    ]
    return [*_exceptions(payloads, rules), *rules]


def _names(combination: tuple[int, ...], conditions: Sequence[Condition]) -> dict[str, str]:
    """The pattern for tensors that match the chosen alternative of every condition (others were met by earlier
    rules).
    """
    chosen = list(
        dict.fromkeys(
            condition.alternatives[number]
            for number, condition in zip(combination, conditions, strict=True)
            if number < len(condition.alternatives)
        )
    )
    if not chosen:
        return {}
    text, expression = chosen[0]
    if len(chosen) == 1:
        return {"names": f"*{text}*" if text and not GLOB.search(text) else f"/{re.escape(text) or expression}/"}
    return {"names": f"/^{''.join(_ahead(text, expression) for text, expression in chosen)}/"}


def _ahead(text: str, expression: str) -> str:
    """What must lie ahead of a name's beginning for the alternative to hold."""
    if text:
        return f"(?=.*{re.escape(text)})"
    return f"(?={expression[1:]})" if expression.startswith("^") else f"(?=.*{expression})"


def _by_layer(payloads: Mapping[str, Payload]) -> Iterator[dict[str, Any]]:
    """Rules for tensors that only their layer tells apart."""
    layered: dict[int, Payload] = {}
    others: list[Payload] = []
    for name, payload in payloads.items():
        layer = layer_of(name)
        if layer is None:
            others.append(payload)
        else:
            layered.setdefault(layer, payload)
    distinct = [payload for number, payload in enumerate(others) if payload not in others[:number]]
    runs = list(_runs(layered))
    if len(runs) == 1 and (not distinct or distinct == [runs[0][2]]):
        yield runs[0][2]
        return
    for first, last, payload in runs:
        yield {"layers": [first, last], **payload}
    if distinct:
        yield max(distinct, key=others.count)


def _runs(layered: Mapping[int, Payload]) -> Iterator[tuple[int, int, Payload]]:
    first: int | None = None
    last = -1
    payload: Payload = {}
    for layer in sorted(layered):
        if first is not None and layered[layer] != payload:
            yield first, last, payload
            first = None
        if first is None:
            first, payload = layer, layered[layer]
        last = layer
    if first is not None:
        yield first, last, payload


def _exceptions(payloads: Mapping[str, Payload], rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rules by whole name for tensors that the others would treat otherwise."""
    known = [
        (SelectRule(**{key: rule[key] for key in ("names", "layers") if key in rule}), _payload(rule)) for rule in rules
    ]
    exceptions: list[dict[str, Any]] = []
    for name, payload in payloads.items():
        said = next((other for matcher, other in known if matcher.matches(name)), None)
        if said != payload:
            exceptions.append({"names": "".join(f"[{c}]" if c in "*?[" else c for c in name), **payload})
            assert fnmatch.fnmatchcase(name, exceptions[-1]["names"])
    return exceptions


def _payload(rule: Mapping[str, Any]) -> Payload:
    return {key: value for key, value in rule.items() if key not in ("names", "layers")}
