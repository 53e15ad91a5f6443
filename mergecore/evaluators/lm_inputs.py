"""Items of an lm-eval task without their answers: for statistics that learn from inputs alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergecore.errors import EvaluationError, SpecError
from mergecore.evaluators.lm_loglikelihood import forward_options
from mergecore.evaluators.lm_prepared import (
    Prompt,
    answer_of,
    document_digest,
    drawn_documents,
    encoded,
    gold_of,
    requests_of,
)
from mergecore.evaluators.lm_tasks import quiet
from mergecore.plugins.model_statistic import LABELS_NOT_USED, TaskInputs

Tokens = tuple[int, ...]
Option = tuple[Tokens, Tokens]
"""What stands before an answer, and the answer; only the options of a closed task ever enter a model."""

IMPOSSIBLE = -1e9
"""Stands for an option that an item does not have, where items have different numbers of options: p is 0 then."""


class LanguageInputs(TaskInputs):
    """Items as token ids: contexts, and the options that all stand on an equal footing.

    options: per item those of a closed task; of an open one the context with its first answer token, which is looked at
    as a label alone. right: number of the right option, or token.
    """

    def __init__(
        self,
        task: str,
        documents: Sequence[str],
        options: Sequence[Sequence[Option]],
        right: Sequence[int],
        closed: bool,
        labels: bool,
    ) -> None:
        self.task, self.documents = task, tuple(documents)
        self.classes = max(map(len, options)) if closed else None
        self._options, self._right, self._labels = [tuple(own) for own in options], list(right), labels

    def logits(self, model: nn.Module, items: Sequence[int]) -> Tensor:
        """Closed: Σ log p(option | context); open: logits of the answer's first token."""
        if self.classes is None:
            contexts = [self._options[item][0][0] for item in items]
            if not all(contexts):
                raise EvaluationError(f"task '{self.task}' scores whole texts: it has no answers to be unsure of")
            known = _last_logits(model, contexts, [1] * len(contexts))
            return torch.stack([known[context, 1][0] for context in contexts])
        asked = [option for item in items for option in self._options[item]]
        inputs = [context + answer[:-1] for context, answer in asked]
        known = _last_logits(model, inputs, [len(answer) for _, answer in asked])
        sums = iter(
            known[tokens, len(answer)].log_softmax(-1).gather(-1, _column(answer, known[tokens, len(answer)])).sum()
            for tokens, (_, answer) in zip(inputs, asked, strict=True)
        )
        rows = []
        for item in items:
            own = [next(sums) for _ in self._options[item]]
            rows.append(torch.stack([*own, *[own[0].new_tensor(IMPOSSIBLE)] * (self.classes - len(own))]))
        return torch.stack(rows)

    def run(self, model: nn.Module, items: Sequence[int]) -> None:
        """Run the model on the contexts. Where options differ in what stands before the answer, on each of these."""
        contexts = [context or answer for item in items for context, answer in dict(self._options[item]).items()]
        _last_logits(model, contexts, [1] * len(contexts))

    def labels(self, items: Sequence[int]) -> Tensor:
        """Number of the right option; of open tasks the first token of the right answer."""
        if not self._labels:
            raise SpecError(LABELS_NOT_USED)
        return torch.tensor([self._right[item] for item in items])


def _column(answer: Tokens, like: Tensor) -> Tensor:
    return torch.tensor(answer, device=like.device)[:, None]


def _last_logits(
    model: nn.Module, sequences: Sequence[Tokens], widths: Sequence[int]
) -> dict[tuple[Tokens, int], Tensor]:
    """Logits (width, vocabulary), float32, of the last places of each sequence. Equal sequences share a pass.

    Sequences of equal length share a batch and nothing is padded. Their order is that of their first appearance.
    """
    options, device = forward_options(model), next(model.parameters()).device
    wanted: dict[int, dict[Tokens, set[int]]] = {}
    for tokens, width in zip(sequences, widths, strict=True):
        wanted.setdefault(len(tokens), {}).setdefault(tokens, set()).add(width)
    known: dict[tuple[Tokens, int], Tensor] = {}
    for group in wanted.values():
        most = max(max(own) for own in group.values())
        logits = model(torch.tensor(list(group), device=device), **options(most)).logits
        for row, (tokens, own) in enumerate(group.items()):
            known |= {(tokens, width): logits[row, -width:].float() for width in own}
    return known


def task_inputs(
    name: str, task: Any, documents: Any, lm: Any, prompt: Prompt, items: int, seed: int, labels: bool
) -> LanguageInputs:
    """`items` documents with the lowest hash(seed, document), without examples in the prompt.

    Raises EvaluationError where there are none, and for a closed task with one option.
    """
    drawn = drawn_documents(documents, items, seed)
    if not drawn:
        raise EvaluationError(f"task '{name}' has no items to look at: give it some, or more `items` to be shared out")
    closed = task.OUTPUT_TYPE == "multiple_choice"
    with quiet():
        pairs = [_pairs(task, item, document, prompt(task, document, 0), closed) for item, document in drawn]
    tokens = iter(encoded(lm, [pair for own in pairs for pair in own]))
    options = [[_cut(next(tokens), lm.max_length, task) for _ in own] for own in pairs]
    if closed and any(len(own) < 2 for own in options):
        raise EvaluationError(f"task '{name}' has an item with one option: there is nothing to be unsure of")
    right = [
        _right(task, document) if closed else own[0][1][0] for (_, document), own in zip(drawn, options, strict=True)
    ]
    return LanguageInputs(name, [document_digest(document) for _, document in drawn], options, right, closed, labels)


def _pairs(task: Any, item: int, document: Any, context: tuple[Any, bool], closed: bool) -> list[tuple[str, str]]:
    if closed:
        asked = requests_of(task, item, document, *context)
        return [tuple(request.args[:2]) for request in asked[: len(_choices(task, document))]]
    return [answer_of(task, item, document, context)]


def _choices(task: Any, document: Any) -> Sequence[Any]:
    """The options; where the prompts differ instead of the answers, the prompts."""
    choices: Sequence[Any] = task.doc_to_choice(document)
    return choices


def _right(task: Any, document: Any) -> int:
    gold = gold_of(task, document)
    gold = gold[0] if isinstance(gold, list) else gold
    return gold if isinstance(gold, int) else list(task.doc_to_choice(document)).index(gold)


def _cut(request: tuple[Any, list[int], list[int]], most: int, task: Any) -> Option:
    """Context and answer, whose beginning is lost where both are longer than the model takes, as in lm-eval."""
    (_, text), context, answer = request
    if not answer:
        raise EvaluationError(f"task '{task.config.task}': the answer {text!r} has no token of its own")
    return tuple(context[-(most + 1 - len(answer)) :]), tuple(answer)
