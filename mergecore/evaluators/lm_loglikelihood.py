"""Log-likelihoods of continuations in lm-eval's own order and batches, prepared once and run for many models.

The numbers are lm-eval's (`HFLM._loglikelihood_tokens`): the same requests in the same padded batches. What is spared
is what does not change them: tokenising and sorting again for every model, the vocabulary's logits and log-softmax at
places nobody reads, the key-value cache, one transfer from the device per request.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Encoded = tuple[Any, list[int], list[int]]
"""lm-eval's request: (its strings, tokens of the context, tokens of the continuation)."""

Likelihood = tuple[float, bool]
"""Sum of log-probabilities in nats, and whether every token is the likeliest."""


@dataclass(frozen=True)
class _Answer:
    """Where a request's numbers lie: `request` is its index, tokens start at `token`; rows as in `_Batch.rows`."""

    request: int
    token: int
    count: int


@dataclass(frozen=True)
class _Batch:
    """One forward pass: inputs (rows, length), and which of its positions are read for which tokens.

    rows, positions: (places,) where logits are read. row_of, greedy_of, tokens: (tokens,) the place whose
    log-probability is read for a token, the place whose argmax is compared with it, and the token.
    """

    inputs: Tensor
    keep: int
    rows: Tensor
    positions: Tensor
    row_of: Tensor
    greedy_of: Tensor
    tokens: Tensor
    answers: tuple[_Answer, ...]


def batches(requests: Sequence[Encoded], batch_size: int, max_length: int, share: bool) -> list[_Batch]:
    """The forward passes for `requests`. share: one pass for all requests with the same context + continuation[:-1].

    max_length: in tokens; longer inputs lose their beginning, as in lm-eval.
    """
    groups: dict[Any, list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        groups.setdefault(tuple(context + continuation[:-1]) if share else index, []).append(index)
    leaders = {max(members, key=lambda index: len(requests[index][2])): members for members in groups.values()}

    def order(leader: int) -> tuple[int, tuple[int, ...]]:
        tokens = requests[leader][1] + requests[leader][2]
        return -len(tokens), tuple(tokens)

    ordered = sorted(leaders, key=order)
    chunks = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return [_batch(requests, [(leader, leaders[leader]) for leader in chunk], max_length) for chunk in chunks]


def _batch(requests: Sequence[Encoded], chunk: Sequence[tuple[int, list[int]]], max_length: int) -> _Batch:
    inputs = [(requests[leader][1] + requests[leader][2])[-(max_length + 1) :][:-1] for leader, _ in chunk]
    length = max(len(tokens) for tokens in inputs)
    padded = torch.zeros(len(inputs), length, dtype=torch.int64)
    rows: list[int] = []
    positions: list[int] = []
    row_of: list[int] = []
    greedy_of: list[int] = []
    tokens: list[int] = []
    answers: list[_Answer] = []
    for row, (leader, members) in enumerate(chunk):
        padded[row, : len(inputs[row])] = torch.tensor(inputs[row])
        width, first = len(requests[leader][2]), len(rows)
        rows += [row] * width
        positions += range(len(inputs[row]) - width, len(inputs[row]))
        for index in members:
            continuation = requests[index][2]
            count = len(continuation)
            answers.append(_Answer(index, len(tokens), count))
            tokens += continuation
            row_of += range(first, first + count)  # from the front, as lm-eval gathers; equal lengths but for oddities
            greedy_of += range(first + width - count, first + width)
    return _Batch(
        inputs=padded,
        keep=length - min(positions),
        rows=torch.tensor(rows),
        positions=torch.tensor(positions),
        row_of=torch.tensor(row_of),
        greedy_of=torch.tensor(greedy_of),
        tokens=torch.tensor(tokens),
        answers=tuple(answers),
    )


def forward_options(model: nn.Module) -> Callable[[int], dict[str, Any]]:
    """Keyword arguments that spare work without changing a logit, where the model's `forward` knows them."""
    known = inspect.signature(model.forward).parameters

    def options(keep: int) -> dict[str, Any]:
        wanted = {"use_cache": False, "logits_to_keep": keep}
        return {name: value for name, value in wanted.items() if name in known}

    return options


def likelihoods(model: nn.Module, prepared: Sequence[_Batch], done: Callable[[int], None]) -> list[Likelihood]:
    """One answer per request, in the order of the requests. done: told the number of requests after every batch."""
    device = next(model.parameters()).device
    options = forward_options(model)
    likelihoods_by_item: dict[int, Likelihood] = {}
    for batch in prepared:
        with torch.no_grad():  # not inference_mode: what a model keeps from it could not be differentiated later
            logits = model(batch.inputs.to(device), **options(batch.keep)).logits
            shift = batch.inputs.shape[1] - logits.shape[1]  # 0 where the model gave all positions
            picked = logits[batch.rows.to(device), (batch.positions - shift).to(device)]
            scores = torch.log_softmax(picked, dim=-1)
            tokens = batch.tokens.to(device)
            values = scores[batch.row_of.to(device), tokens].cpu()
            greedy = (scores.argmax(dim=-1)[batch.greedy_of.to(device)] == tokens).tolist()
        single = values.tolist()
        for answer in batch.answers:
            stop = answer.token + answer.count
            total = single[answer.token] if answer.count == 1 else float(values[answer.token : stop].sum())
            likelihoods_by_item[answer.request] = (total, all(greedy[answer.token : stop]))
        done(len(likelihoods_by_item))
    return [likelihoods_by_item[index] for index in range(len(likelihoods_by_item))]
