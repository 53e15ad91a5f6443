"""What transformers makes of a config.json: a model without weights, and the names that its tensors have in memory.

Files and models name the same tensor differently: transformers renames while it loads (its conversion mappings, the
prefix of the base model, `gamma` and `beta` of old files). The tables and the rules are its own; none is copied here.
The code of a checkpoint is never run: a model type that transformers does not bring itself has no blueprint.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

MANY = 4096
"""A config that asks for more layers or blocks than this is not built: its loops would take minutes."""
REPEATED = re.compile(r"^(?:num_.*)?(?:n_layers?|layers|depth|blocks|stages)$|_(?:layers|blocks|depth)$")
"""Keys of a config that say how often something is repeated."""

WITHOUT = frozenset({"quantization_config", "auto_map", "_attn_implementation", "attn_implementation"})
"""Keys of a config that change no name, and may need code or a device that is not here."""


@final
@dataclass(frozen=True)
class Blueprint:
    """A model of one configuration, on no device.

    name: of its class. shapes: of its parameters and persistent buffers, by name in memory.
    modules: names of all modules. linear: of these the linear layers; True for those that keep (in, out).
    tied: {name: owner} of the names that the class and the configuration tie.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    modules: frozenset[str]
    linear: Mapping[str, bool]
    tied: Mapping[str, str]
    model: Any = field(repr=False, compare=False)

    def in_memory(self, names: Iterable[str]) -> dict[str, str]:
        """Return {name: name in memory} of a file's tensors, as transformers renames them when it loads the file.

        A tensor that is converted on the way (stacked with others, cut in parts) has no counterpart in memory. It
        keeps its name as it is just before that.
        """
        return {name: new for name, new, _ in self._loaded(names)}

    def converted(self, names: Iterable[str]) -> dict[str, str]:
        """Return {name: a tensor in memory that is made of it} of the tensors that are converted when they are
        loaded.
        """
        return {name: result for name, _, result in self._loaded(names) if result is not None}

    def moved(self, names: Iterable[str]) -> dict[str, str]:
        """Return {name: another name} of names in memory that the renamings change once more.

        transformers sees that such a name is right already. PEFT does not, when it loads an adapter.
        """
        return {name: new for name, new, _ in self._loaded(names, known_stay=False) if new != name}

    def _loaded(self, names: Iterable[str], known_stay: bool = True) -> Iterator[tuple[str, str, str | None]]:
        """Yield (name, renamed, what is made of it where it is converted) as transformers does it.

        known_stay: a name in memory stays where its new name is none.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            apply_converters,
            apply_renamings,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(self.model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        prefix, known = self.model.base_model_prefix, dict.fromkeys(self.shapes, True)
        for name in sorted(names, key=dot_natural_key):  # the order matters to some of the renamings
            new, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if known_stay and new not in known and name in known:
                new, pattern = rename_source_key(name, [], [], prefix, known)
            if pattern is None:
                yield name, new, None
            else:
                plain = apply_renamings(name, renamings)
                yield name, _with_prefix_of(new, apply_converters(plain, converters)[0], plain), new


def blueprint_of(config: Mapping[str, Any]) -> Blueprint | None:
    """Return the blueprint of a configuration; None where transformers itself brings no such model."""
    return _built(_text(config))[0]


def why_unknown(config: Mapping[str, Any]) -> str:
    """Return why a configuration has no blueprint."""
    return _built(_text(config))[1]


def in_memory(config: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, str]:
    """Return {name: name in memory}. Names stay as they are where the configuration has no blueprint."""
    return _renamed(_text(config), tuple(sorted(names)))


@functools.lru_cache(maxsize=64)
def _renamed(text: str, names: tuple[str, ...]) -> Mapping[str, str]:
    blueprint, _ = _built(text)
    return {name: name for name in names} if blueprint is None else blueprint.in_memory(names)


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True, default=str)


def _with_prefix_of(prefixed: str, bare: str, name: str) -> str:
    """Return `name` with the prefix that `prefixed` has more, or less, than `bare`."""
    if prefixed.endswith(bare):
        return prefixed.removesuffix(bare) + name
    return name.removeprefix(bare.removesuffix(prefixed)) if bare.endswith(prefixed) else name


@functools.lru_cache(maxsize=16)
def _built(text: str) -> tuple[Blueprint | None, str]:
    """Return the blueprint and '', or None and the reason. text: config.json, its keys sorted."""
    config = json.loads(text)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        return None, "its config.json names no model type"
    if repeated := _too_many(config):
        return None, f"its config.json asks for {repeated}"
    with _quiet():
        try:
            model = _model(config, kind)
            blueprint = None if model is None else _blueprint(model)
        except Exception as error:  # whatever a class of transformers makes of values that it was not written for
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return None, f"transformers cannot build a '{kind}' from its config.json ({said})"
    return blueprint, "" if blueprint else f"transformers brings no model of type '{kind}'"


def _too_many(config: Mapping[str, Any]) -> str:
    """Return the key and value of what is repeated too often; '' where nothing is."""
    for key, value in config.items():
        if isinstance(value, Mapping) and (inner := _too_many(value)):
            return inner
        if isinstance(value, int | float) and value > MANY and REPEATED.search(key):
            return f"{key} = {value}"
    return ""


def _model(config: Mapping[str, Any], kind: str) -> Any:
    """Return the model on the meta device; None where transformers does not know the type."""
    import torch
    import transformers
    from transformers import initialization
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return None
    built = CONFIG_MAPPING[kind].from_dict(_plain(config))
    architecture = next(iter(config.get("architectures") or []), None)
    model_class = _class(transformers, architecture, built)
    if model_class is None:
        return None
    safe = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
    with torch.device("meta"), initialization.no_init_weights(), safe():
        return model_class(built)


def _plain(value: Any) -> Any:
    """Return a configuration without what needs other code or hardware, at any depth.

    Floats that transformers writes as {"__float__": "Infinity"} are floats again.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(inner) for key, inner in value.items() if key not in WITHOUT}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _class(transformers: Any, architecture: Any, config: Any) -> Any:
    """Return the class that config.json names; else what AutoModel takes, or a class with a head; None: neither."""
    named: Any = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    auto = transformers.models.auto.modeling_auto
    mappings = [value for name, value in vars(auto).items() if re.fullmatch(r"MODEL_(?:FOR_\w+_)?MAPPING", name)]
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    # A class may serve several kinds of configuration; then only these tables know.
    if is_model and (named.config_class is type(config) or any(named in _classes(each, config) for each in mappings)):
        return named
    for mapping in (auto.MODEL_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_PRETRAINING_MAPPING):
        for model_class in _classes(mapping, config):
            return model_class
    return None


def _classes(mapping: Any, config: Any) -> tuple[Any, ...]:
    """Return the classes that a table of transformers has for a configuration."""
    if type(config) not in mapping:
        return ()
    chosen = mapping[type(config)]
    return tuple(chosen) if isinstance(chosen, tuple | list) else (chosen,)


def _blueprint(model: Any) -> Blueprint:
    """Return what is to be known of a model."""
    from torch import nn
    from transformers.core_model_loading import apply_converters  # noqa: F401 (an older transformers has no such rules)
    from transformers.pytorch_utils import Conv1D

    linear = {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "weight" in module._parameters
    }
    return Blueprint(
        type(model).__name__,
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        frozenset(name for name, _ in model.named_modules() if name),
        linear,
        dict(model.get_expanded_tied_weights_keys(all_submodels=True)),
        model,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what classes of transformers say while they are built."""
    from transformers.utils import logging as says

    level = says.get_verbosity()
    says.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        says.set_verbosity(level)
