"""A configuration as transformers reads it, with the defaults of its class."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a configuration as transformers reads it, with the defaults of its class; None where it cannot."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # takes seconds, and is needed rarely

    model_type = str(config.get("model_type"))
    with _hushed():
        try:
            read = CONFIG_MAPPING[model_type].from_dict(_decoded(copy.deepcopy(dict(config))))
            whole: dict[str, Any] = read.to_dict()
        except Exception:  # a class may raise anything at values it does not know; then the files are compared
            return None
    return whole


def _decoded(value: Any) -> Any:
    """Return plain values with transformers' spelling of infinities and NaN, which JSON lacks, as numbers."""
    if isinstance(value, dict):
        number = value.get("__float__")
        return float(number) if len(value) == 1 and number else {key: _decoded(entry) for key, entry in value.items()}
    return [_decoded(entry) for entry in value] if isinstance(value, list) else value


@contextmanager
def _hushed() -> Iterator[None]:
    """Hold back what transformers logs of values that it does not know."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
