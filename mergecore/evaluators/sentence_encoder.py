"""Modules for sentence encoders: token ids in, one embedding of length 1 for each text out.

Named in a spec as `model: mergecore.evaluators.sentence_encoder:mean_pooled`. With a head in the file of a task, whose
rows are label embeddings times a temperature, the logits are temperature × cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from mergecore.errors import SpecError

STEP = 16
"""Texts of a batch are cut behind the longest one, at a multiple of this: other lengths are slow on many processors."""


def mean_pooled(config: Mapping[str, Any]) -> nn.Module:
    """Return an encoder whose embedding is the mean over the tokens of a text."""
    return SentenceEncoder(config, _mean)


def first_token(config: Mapping[str, Any]) -> nn.Module:
    """Return an encoder whose embedding is the state of the first token ([CLS])."""
    return SentenceEncoder(config, lambda states, present: states[:, 0])


def _mean(states: Tensor, present: Tensor) -> Tensor:
    weights = present[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


@final
class SentenceEncoder(nn.Module):
    """An encoder of transformers, under the names that its checkpoints have. A pooler of its own is not run.

    Takes ids (texts, tokens), int64, filled up with the config's pad_token_id; gives (texts, width) of length 1.
    """

    def __init__(self, config: Mapping[str, Any], pool: Callable[[Tensor, Tensor], Tensor]) -> None:
        from transformers import AutoConfig, AutoModel

        super().__init__()
        own = dict(config)
        if own.get("pad_token_id") is None or "model_type" not in own:
            raise SpecError("its config.json must name model_type and pad_token_id")
        untyped: Any = AutoModel  # transformers leaves its factories without types
        inner = untyped.from_config(AutoConfig.for_model(own.pop("model_type"), **own))
        for name, child in inner.named_children():
            self.add_module(name, child)
        self._inner = (inner.eval(),)  # in a tuple: it is no part, so that its parts keep their own names
        self._padding, self._pool = int(config["pad_token_id"]), pool

    def forward(self, ids: Tensor) -> Tensor:
        """Return an embedding of length 1 for each row of ids."""
        present = ids != self._padding
        longest = int(present.sum(1).max()) if len(ids) else 0
        stop = min(-(-max(longest, 1) // STEP) * STEP, ids.shape[1])
        present = present[:, :stop]
        states = self._inner[0](input_ids=ids[:, :stop], attention_mask=present.to(torch.int64)).last_hidden_state
        return nn.functional.normalize(self._pool(states, present), dim=-1)
