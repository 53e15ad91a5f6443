"""What a configuration says of single layers, and the same for the layers of a stack.

A configuration says it in four ways: a list with an entry per layer, a list of numbers of layers, a string with a
letter per layer, or a rule ('every sixth', 'the first three'). All of them are turned into one value per layer, moved
with the layers, and turned back. What cannot be turned back is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergecore.checkpoints.config_classes import with_defaults
from mergecore.errors import MismatchError

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What config.json calls the number of layers."""
TEXT = "text_config"

LISTS = (
    "layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "attn_layers", "layers_block_type",
    "activation_sparsity_pattern", "intermediate_size", "num_attention_heads_per_layer", "num_heads_per_layer",
    "num_key_value_heads_per_layer", "layer_rope_theta", "indexer_types", "sliding_windows", "block_configs",
    "num_attention_heads", "num_key_value_heads", "num_experts", "hybrid_override_pattern", "moe_layer_freq",
    "dilations", "window_sizes", "hidden_sizes", "attn_types", "rope_layers",
)  # fmt: skip
"""Keys that may hold an entry per layer: a list, or a string with a letter for each."""
INDICES = (
    "mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs", "moe_layers",
    "local_layer_ids", "ple_layer_ids", "window_block_indexes", "window_block_indices", "rope_scaling_layers",
    "subsample_layers", "global_attention_blocks", "fullatt_block_indexes", "residual_block_indices",
    "global_attn_indexes", "look_ahead_layers", "look_backward_layers",
)  # fmt: skip
"""Keys that hold the numbers of some layers."""
PER_LAYER = "per_layer_config"
"""The key that maps numbers of layers to settings which differ there (transformers 5, of any model type)."""
OF_DEPTH = (
    "num_kv_shared_layers", "kv_source_layers", "hybrid_layer_ids", "num_mem_blocks", "cross_layer_interval",
    "scale_attn_by_inverse_layer_idx", "n_layers_per_attn_res_block", "cross_attention_frequency", "n_mem_layers",
    "target_layer_ids", "backbone_out_indices", "deepstack_visual_indexes", "intermediate_layers_indices",
    "intermediate_hidden_state_indices",
)  # fmt: skip
"""Keys that tie layers to each other, or to where they stand: with another order they compute something else."""
BY_NUMBER = ("diffllama",)
"""Model types in which a layer computes with its own number."""

Said = Callable[[int, Any, Mapping[str, Any]], Any]
RULES: Mapping[str, tuple[Said, str]] = {
    "first_k_dense_replace": (lambda layer, k, _: layer < k, "mlp_layer_types"),
    "num_dense_layers": (lambda layer, k, _: layer < k, "mlp_layer_types"),
    "max_window_layers": (lambda layer, k, c: bool(c.get("use_sliding_window")) and layer >= k, "layer_types"),
    "decoder_sparse_step": (lambda layer, step, _: step > 0 and (layer + 1) % step == 0, "mlp_layer_types"),
    "moe_layer_freq": (lambda layer, step, _: layer % step == 0, "mlp_layer_types"),
    "moe_layer_interval": (
        lambda layer, step, c: (
            c.get("moe_layer_start_index", 0) <= layer <= _last(c, layer) and (layer + 1) % step == 0
        ),
        "mlp_layer_types",
    ),
    "interleave_moe_layer_step": (lambda layer, step, _: (layer + 1) % step == 0, "moe_layers"),
    "attn_layer_period": (lambda layer, p, c: layer % p == c.get("attn_layer_offset", 0), "layers_block_type"),
    "expert_layer_period": (lambda layer, p, c: layer % p == c.get("expert_layer_offset", 0), "mlp_layer_types"),
    "no_rope_layer_interval": (lambda layer, n, _: (layer + 1) % n == 0, "no_rope_layers"),
    "sliding_window_pattern": (lambda layer, n, _: _of_pattern(layer, n), "layer_types"),
    "_sliding_window_pattern": (lambda layer, n, _: _of_pattern(layer, n), "layer_types"),
    "global_attn_every_n_layers": (lambda layer, n, _: layer % n, "layer_types"),
    "full_attention_interval": (lambda layer, n, _: (layer + 1) % n == 0, "layer_types"),
    "layer_group_size": (lambda layer, n, _: layer % n, "layer_types"),
    "prefix_dense_sliding_window_pattern": (lambda layer, n, _: _of_pattern(layer, n), "layer_types"),
    "block_types": (lambda layer, kinds, _: kinds[layer % len(kinds)], "layers_block_type"),
}
"""{key: (what it says of a layer, the list that says the same and wins where a class has it)}."""
PREFIXES = {"first_k_dense_replace": True, "num_dense_layers": True, "max_window_layers": False}
"""{rule whose value is how many layers at the beginning are alike: what it says of these}."""


@dataclass(frozen=True)
class Settings:
    """The part of a configuration that counts a stack's layers.

    raw: as the file has it. whole: with the defaults of its class, or the same as raw. known: whether there is a class.
    """

    nested: bool
    raw: Mapping[str, Any]
    whole: Mapping[str, Any]
    known: bool
    count: str

    @property
    def depth(self) -> int:
        """The number of layers."""
        return int(self.raw[self.count])

    def lists(self) -> dict[str, Sequence[Any]]:
        """Return {key: an entry for each layer}."""
        return {
            key: value
            for key, value in self.whole.items()
            if key not in INDICES and isinstance(value, list | tuple | str) and len(value) == self.depth
            and (key in LISTS or (isinstance(value, list | tuple) and key in self._of_class))
        }  # fmt: skip

    @property
    def _of_class(self) -> frozenset[str]:
        """The keys whose lists grow with the number of layers where the class fills them."""
        if not self.known:
            return frozenset()
        sizes = []
        for depth in (self.depth, self.depth + 1):
            filled = with_defaults({"model_type": self.raw.get("model_type"), self.count: depth}) or {}
            sizes.append({key for key, value in filled.items() if isinstance(value, list) and len(value) == depth})
        return frozenset(sizes[0] & sizes[1])

    def indices(self) -> dict[str, list[bool]]:
        """Return {key: for each layer whether its number is listed}."""
        listed = {key: self.whole[key] for key in INDICES if isinstance(self.whole.get(key), list | tuple)}
        return {key: [layer in value for layer in range(self.depth)] for key, value in listed.items()}

    def overrides(self) -> list[Any]:
        """Return for each layer what PER_LAYER says of it; None where it says nothing. Empty where there is no such
        key.
        """
        by_layer = {int(layer): values for layer, values in (self.whole.get(PER_LAYER) or {}).items()}
        return [by_layer.get(layer) for layer in range(self.depth)] if by_layer else []

    def rules(self) -> dict[str, list[Any]]:
        """Return {key: what its rule says of each layer}."""
        values = {key: self.whole.get(key) for key in RULES}
        return {
            key: [RULES[key][0](layer, value, self.whole) for layer in range(self.depth)]
            for key, value in values.items()
            if value and (isinstance(value, int | str) or key == "block_types")
        }


def settings_of(config: Mapping[str, Any]) -> Settings | None:
    """Return the part of a configuration that counts layers; None where none does."""
    for nested, part in ((False, config), (True, config.get(TEXT))):
        if isinstance(part, Mapping):
            count = next((key for key in COUNTS if isinstance(part.get(key), int)), None)
            if count is not None:
                whole = _as_class(part)
                return Settings(nested, part, part if whole is None else whole, whole is not None, count)
    return None


@dataclass(frozen=True)
class _Said:
    """What the settings of one model say of each of its layers, by key."""

    lists: Mapping[str, Sequence[Any]]
    indices: Mapping[str, Sequence[Any]]
    overrides: Sequence[Any]
    rules: Mapping[str, Sequence[Any]]


def _as_class(part: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a part of a configuration as its class reads it; None where there is none. A class that takes other
    values amiss is asked for what it says of layers alone.
    """
    whole = with_defaults(part)
    if whole is None:
        keys = {"model_type", "use_sliding_window", "attention_types", PER_LAYER, *COUNTS, *LISTS, *INDICES, *RULES}
        said = with_defaults({key: value for key, value in part.items() if key in keys or "_layer" in key})
        whole = None if said is None else {**{key: said[key] for key in keys & said.keys()}, **part}
    return whole


def stacked_config(config: Mapping[str, Any], sources: Sequence[tuple[Settings, int]], where: str) -> dict[str, Any]:
    """Return a configuration for other layers. sources: for each layer of the result whose layer it is, and which.

    Raises MismatchError where a setting ties layers to their places, or no value of it says the same of the new ones.
    """
    own = settings_of(config)
    if own is None:
        return dict(config)
    told: dict[int, _Said] = {}
    for settings in (own, *(settings for settings, _ in sources)):
        if id(settings) not in told:
            _refuse_bound(settings, where)
            told[id(settings)] = _Said(settings.lists(), settings.indices(), settings.overrides(), settings.rules())
    mine = told[id(own)]
    moved = [(told[id(settings)], layer) for settings, layer in sources]
    changed: dict[str, Any] = {own.count: len(sources)}
    changed |= {key: len(sources) for key in COUNTS if own.raw.get(key) == own.depth}
    for key in mine.lists:
        values = [_value(said.lists, key, layer, where) for said, layer in moved]
        changed[key] = "".join(values) if isinstance(own.whole[key], str) else values
    for key in mine.indices:
        flags = [_value(said.indices, key, layer, where) for said, layer in moved]
        changed[key] = [number for number, flag in enumerate(flags) if flag]
    if any(said.overrides for said, _ in moved):
        values = [said.overrides[layer] if said.overrides else None for said, layer in moved]
        changed[PER_LAYER] = {str(number): value for number, value in enumerate(values) if value is not None}
    if "attention_layers" in changed and "attention_types" in own.whole:
        changed["attention_types"] = [[changed["attention_layers"], 1]]
    for key in mine.rules:
        changed |= _ruled(key, [_value(said.rules, key, layer, where) for said, layer in moved], own, changed, where)
    return _written(config, own, changed, where)


def _ruled(key: str, wanted: Sequence[Any], own: Settings, changed: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values with which a rule says of each layer what is wanted; none where a list says it anyway."""

    def reached(values: Mapping[str, Any]) -> bool:
        new = {**own.whole, **changed, **values}
        return [RULES[key][0](layer, new[key], new) for layer in range(len(wanted))] == list(wanted)

    tried: list[dict[str, Any]] = [{}]
    if key in PREFIXES:
        tried.append({key: next((n for n, flag in enumerate(wanted) if flag != PREFIXES[key]), len(wanted))})
    if key == "block_types":
        tried.append({key: list(wanted)})
    if key == "moe_layer_interval" and any(wanted):
        places = [number for number, flag in enumerate(wanted) if flag]
        tried.append({"moe_layer_start_index": places[0], "moe_layer_end_index": places[-1]})
    fitting = next((values for values in tried if reached(values)), None)
    if fitting is None and RULES[key][1] not in changed:
        raise MismatchError(
            f"stack: {where}: its config.json says {key} {own.whole[key]}, and no value of it says the same of the "
            f"result's layers (it would have to hold for {_numbers(wanted)}); choose layers that keep the pattern"
        )
    return fitting or {}


def _written(config: Mapping[str, Any], own: Settings, changed: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the configuration with what its file or its class would not say by itself."""
    kept = {key: value for key, value in changed.items() if key in own.raw or key == own.count}
    part = {**own.raw, **kept}
    if own.known:
        whole = _as_class(part) or {}
        missing = {key: value for key, value in changed.items() if key not in kept and _plain(whole.get(key)) != value}
        part |= missing
        whole = _as_class(part) or {}
        lost = next((key for key in changed if key in whole and _plain(whole[key]) != changed[key]), None)
        if not whole or lost is not None:
            said = f"does not take {lost} {changed[lost]}" if whole and lost else "cannot read it"
            raise MismatchError(
                f"stack: {where}: transformers {said} in the configuration of the result; choose other layers"
            )
    return {**config, TEXT: part} if own.nested else part


def _refuse_bound(settings: Settings, where: str) -> None:
    if settings.raw.get("model_type") in BY_NUMBER:
        raise MismatchError(f"stack: {where}: a layer of '{settings.raw['model_type']}' computes with its own number")
    bound = next((key for key in OF_DEPTH if settings.whole.get(key)), None)
    unknown = next(
        (
            key
            for key, value in settings.raw.items()
            if "layer" in key and isinstance(value, list) and value and key not in (*LISTS, *INDICES, *OF_DEPTH)
            and key not in settings.lists()
        ),
        None,
    )  # fmt: skip
    if bound or unknown:
        why = "ties layers to their places" if bound else "may speak of single layers, and nobody knows how"
        raise MismatchError(
            f"stack: {where}: its config.json says {bound or unknown} {settings.whole.get(bound or unknown or '')}, "
            f"which {why}; a stack of it would compute something else"
        )


def _value(values: Mapping[str, Sequence[Any]], key: str, layer: int, where: str) -> Any:
    if key not in values or layer >= len(values[key]):
        raise MismatchError(f"stack: {where}: one of its models says nothing of '{key}' for layer {layer}; add the key")
    return values[key][layer]


def _plain(value: Any) -> Any:
    """Return a value as it is compared: lists for tuples, numbers of layers as such."""
    if isinstance(value, Mapping) and all(str(key).isdigit() for key in value):
        return {str(int(key)): entry for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _numbers(flags: Sequence[Any]) -> str:
    return "layers " + ", ".join(str(number) for number, flag in enumerate(flags) if flag)


def _last(config: Mapping[str, Any], layer: int) -> int:
    end = config.get("moe_layer_end_index")
    return layer if end is None or end < 0 else int(end)


def _of_pattern(layer: int, pattern: int | str) -> Any:
    return pattern[layer % len(pattern)] if isinstance(pattern, str) else (layer + 1) % pattern == 0
