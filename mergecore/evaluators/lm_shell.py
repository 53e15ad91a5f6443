"""A causal language model without weights, from its config; and its family's names for weights turned into the
module's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergecore.checkpoints.vocabulary.tokenizer import SLOW
from mergecore.errors import EvaluationError, MismatchError
from mergecore.evaluators.lm_tasks import quiet
from mergecore.plugins.model_statistic import Slot
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.source import TensorInfo, TensorSource

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the classes of causal language models end."""


def shell(companions: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model without weights and its tokenizer. Buffers that no checkpoint holds are as the config says."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.initialization import no_init_weights

    if not (companions / "config.json").is_file():
        raise EvaluationError(f"{companions} holds no config.json: there is no model to score")
    config = AutoConfig.from_pretrained(companions, local_files_only=True)
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()
    if (companions / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(companions, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(companions, local_files_only=True)


def check_scorable(config: Mapping[str, Any], files: Collection[str]) -> None:
    """Raise EvaluationError where `shell` would find no causal language model, or no tokenizer. files: beside it."""
    if "config.json" not in files:
        raise EvaluationError("there is no config.json, so there is no model to score")
    if not any("token" in name or name in SLOW or name.endswith((".model", ".tiktoken")) for name in files):
        raise EvaluationError("there is no tokenizer (tokenizer.json and the like); put its files beside config.json")
    kind, named = str(config.get("model_type")), ", ".join(map(str, config.get("architectures") or ()))
    if not config.get("is_encoder_decoder") and named.endswith(CAUSAL):
        return  # so most say it, and transformers takes seconds to import
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = kind in CONFIG_MAPPING
    default = getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False) if known else False
    if config.get("is_encoder_decoder", default) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = " (it has code of its own, which is not run here)" if not known and config.get("auto_map") else ""
        raise EvaluationError(
            f"config.json says model_type '{kind}' ({named or 'no architectures'}){own}: lm_eval scores causal "
            "language models only (transformers' AutoModelForCausalLM); use an evaluator of your own, "
            "or merge without scores (`mergeloom merge`)"
        )


def renamed(model: Any, weights: TensorSource, dtype: torch.dtype | None = None) -> TensorSource:
    """The weights under the module's names, where the family's checkpoints use others (prefixes, fused experts).

    What transformers cannot place either stays as it was, so that the refusal speaks of the checkpoint's names.
    """
    state = {name: weights.read(name).view(info.shape) for name, info in weights.tensors.items()}
    try:
        with quiet():
            loaded, report = type(model).from_pretrained(
                None, config=model.config, state_dict=state, dtype=dtype or model.dtype, output_loading_info=True
            )
    except RuntimeError:  # shapes that do not fit, named by `check_fit`
        return weights
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return weights
    return MemoryTensors(dict(loaded.state_dict()))


def slots_of(model: Any, tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, Slot]:
    """Where the tensors of a checkpoint lie in the module, found by loading element numbers in place of weights.

    It takes 16 bytes of memory an element for a moment. Raises MismatchError for a tensor that lies nowhere as a slice.
    """
    starts, count = dict[str, int](), 0
    for name, info in tensors.items():
        starts[name], count = count, count + info.count
    numbered = {
        name: torch.arange(start, start + tensors[name].count, dtype=torch.float64).view(tensors[name].shape)
        for name, start in starts.items()
    }
    placed = renamed(model, MemoryTensors(numbered), torch.float64)
    slots: dict[str, Slot] = {}
    if all(info.dtype == "F64" for info in placed.tensors.values()):
        owners, firsts = list(starts), torch.tensor(list(starts.values()), dtype=torch.float64)
        for parameter, info in placed.tensors.items():
            values = placed.read(parameter).view(info.shape)
            whose = torch.bucketize(values, firsts, right=True) - 1
            for number in torch.unique(whose).tolist():
                slot = _slot(parameter, values, whose == number, numbered[owners[number]])
                if slot is not None:
                    slots.setdefault(owners[number], slot)
    for name in names:
        if name not in slots:
            raise MismatchError(f"tensor '{name}' is no parameter of this {type(model).__name__}, and no slice of one")
    return {name: slots[name] for name in names}


def _slot(parameter: str, values: Tensor, ours: Tensor, numbered: Tensor) -> Slot | None:
    """The slice of a parameter that holds a tensor's elements in their order; None where there is none."""
    if bool(ours.all()) and values.shape == numbered.shape and torch.equal(values, numbered):
        return Slot(parameter)
    places = ours.nonzero()
    first, last = places.min(0).values.tolist(), places.max(0).values.tolist()
    extra = values.dim() - numbered.dim()
    index = tuple(
        low if axis < extra and low == high else slice(low, high + 1)
        for axis, (low, high) in enumerate(zip(first, last, strict=True))
    )
    for transposed in (False, True):
        slot = Slot(parameter, index, transposed)
        view = values[index].mT if transposed and values[index].dim() > 1 else values[index]
        if view.shape == numbered.shape and torch.equal(view, numbered):
            return slot
    return None
