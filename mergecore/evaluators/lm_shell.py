"""A causal language model without weights, from its config; and its family's names for weights turned into the
module's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from mergecore.checkpoints.vocabulary.tokenizer import SLOW
from mergecore.errors import EvaluationError
from mergecore.evaluators.lm_tasks import quiet
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.source import TensorSource

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


def renamed(model: Any, weights: TensorSource) -> TensorSource:
    """The weights under the module's names, where the family's checkpoints use others (prefixes, fused experts).

    What transformers cannot place either stays as it was, so that the refusal speaks of the checkpoint's names.
    """
    state = {name: weights.read(name).view(info.shape) for name, info in weights.tensors.items()}
    try:
        with quiet():
            loaded, report = type(model).from_pretrained(
                None, config=model.config, state_dict=state, dtype=model.dtype, output_loading_info=True
            )
    except RuntimeError:  # shapes that do not fit, named by `check_fit`
        return weights
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return weights
    return MemoryTensors(dict(loaded.state_dict()))
