"""What of an lm-eval task is the same for every model: documents, prompts, token ids, targets; and its training items.

Kept once per process. lm-eval's `Instance`s are made anew for every model: they collect responses, and a kept one
would hand the second model the first one's answers.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mergecore.errors import EvaluationError
from mergecore.evaluators.lm_loglikelihood import Encoded, batches, forward_options
from mergecore.evaluators.lm_tasks import document_text, quiet
from mergecore.identity.keys import digest

Prompt = Callable[[Any, Any, int], tuple[Any, bool]]
"""(lm-eval task, document, number of examples) → the prompt as lm-eval builds it, and whether it is a chat turn."""


@dataclass(frozen=True)
class PreparedDocument:
    """One item: its number in the split, lm-eval's doc_hash, its target as text, and its requests as plain tuples."""

    item: int
    document: Any
    digest: str
    target: str
    choices: tuple[str, ...]
    requests: tuple[tuple[str, Any, int, Any], ...]


@dataclass(frozen=True)
class Prepared:
    """A task ready for any model. batches: forward passes of log-likelihood requests, empty for other kinds."""

    task: Any
    documents: tuple[PreparedDocument, ...]
    batches: tuple[Any, ...]

    def instances(self) -> list[list[Any]]:
        """New lm-eval Instances, per document."""
        from lm_eval.api.instance import Instance

        def new(document: PreparedDocument, request: tuple[str, Any, int, Any]) -> Any:
            kind, arguments, index, metadata = request
            key = copy.deepcopy(arguments) if kind == "generate_until" else arguments  # holds a dict that is written to
            return Instance(request_type=kind, doc=document.document, arguments=key, idx=index, metadata=metadata)

        return [[new(document, request) for request in document.requests] for document in self.documents]


def encoded(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
    """Token ids of (context, continuation) pairs, from lm-eval's own encoding."""
    from lm_eval.api.instance import Instance

    encoded: list[Encoded] = []

    def keep(requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        encoded.extend(requests)
        return [(0.0, False)] * len(requests)

    scorer = lm._loglikelihood_tokens
    lm._loglikelihood_tokens = keep
    try:
        lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    finally:
        lm._loglikelihood_tokens = scorer
    return encoded


def prepare(task: Any, lm: Any, prompt: Prompt, limit: int | None, share: bool) -> Prepared:
    """Documents, requests and forward passes of a task. share: as in `lm_loglikelihood.batches`."""
    examples = int(task.config.num_fewshot or 0)
    with quiet():
        listed = list(islice(enumerate(task.eval_docs), limit))
        documents = tuple(
            _document(task, item, document, prompt(task, document, examples)) for item, document in listed
        )
    pairs = [request[1] for document in documents for request in document.requests if request[0] == "loglikelihood"]
    passes = batches(encoded(lm, pairs), lm.batch_size, lm.max_length, share) if pairs else []
    return Prepared(task, documents, tuple(passes))


def requests_of(task: Any, item: int, document: Any, context: Any, chat: bool) -> list[Any]:
    """lm-eval's requests for a document, as a list."""
    requests = task.construct_requests(
        doc=document, ctx=context, metadata=(task.config.task, item, task.config.repeats), apply_chat_template=chat
    )
    return requests if isinstance(requests, list) else [requests]


def _document(task: Any, item: int, document: Any, context: tuple[Any, bool]) -> PreparedDocument:
    instances = requests_of(task, item, document, *context)
    choices = tuple(task.doc_to_choice(document)) if task.config.doc_to_choice is not None else ()
    requests = tuple(
        (instance.request_type, instance.arguments, instance.idx, instance.metadata) for instance in instances
    )
    return PreparedDocument(
        item, document, document_digest(document), _target(task, document, choices), choices, requests
    )


def gold_of(task: Any, document: Any) -> Any:
    """What is right: an index, a string or a list of either; where the prompts differ instead, the index of the
    prompt.
    """
    return task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)


def _target(task: Any, document: Any, choices: Sequence[str]) -> str:
    gold = gold_of(task, document)
    named = [
        choices[answer] if isinstance(answer, int) and choices else str(answer)
        for answer in (gold if isinstance(gold, list) else [gold])
    ]
    return " | ".join(named)


# --- training items ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageItems:
    """Training items as token ids, for statistics that need the model's own predictions (a `Calibration`).

    sequences: the prompt's and the right answer's tokens; answers: how many of the last tokens are the answer;
    documents: digest of each item. Logits are those of the places that predict the answer, over the whole vocabulary.
    """

    sequences: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]
    documents: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sequences)

    def logits(self, model: nn.Module, items: Sequence[int]) -> list[Tensor]:
        """Per item (answer tokens, vocabulary), float32, differentiable.

        Items of equal length share a pass and nothing is ever padded, so hooks on the model see the items' tokens
        alone.
        """
        options, device = forward_options(model), next(model.parameters()).device
        by_length: dict[int, list[int]] = {}
        for position, item in enumerate(items):
            by_length.setdefault(len(self.sequences[item]), []).append(position)
        logits_by_item: dict[int, Tensor] = {}
        for positions in by_length.values():
            inputs = torch.tensor([self.sequences[items[position]][:-1] for position in positions], device=device)
            widths = [self.answers[items[position]] for position in positions]
            logits = model(inputs, **options(max(widths))).logits
            logits_by_item.update(
                (position, logits[row, -width:].float())
                for row, (position, width) in enumerate(zip(positions, widths, strict=True))
            )
        return [logits_by_item[position] for position in range(len(items))]

    def labels(self, items: Sequence[int]) -> list[Tensor]:
        """Per item the right answer's tokens, int64, shape (answer tokens,)."""
        return [torch.tensor(self.sequences[item][-self.answers[item] :]) for item in items]


def drawn_documents(documents: Any, items: int, seed: int) -> list[tuple[int, Any]]:
    """Number and document of the `items` with the lowest hash(seed, document)."""
    drawn = sorted((digest([seed, document_text(document)]), item) for item, document in enumerate(documents))
    return [(item, documents[item]) for _, item in drawn[:items]]


def document_digest(document: Any) -> str:
    """The digest by which a document is known to every reader; lm-eval's own doc_hash."""
    return hashlib.sha256(document_text(document).encode()).hexdigest()


def training_items(task: Any, lm: Any, prompt: Prompt, items: int, seed: int) -> LanguageItems:
    """`items` training documents with the lowest hash(seed, document), each with its right answer and no examples.

    Fewer where the split has fewer. Raises EvaluationError for a task without a training split.
    """
    if not task.has_training_docs():
        raise EvaluationError(f"task '{task.config.task}' has no training split to take items from")
    documents = drawn_documents(task.training_docs(), items, seed)
    with quiet():
        pairs = [answer_of(task, item, document, prompt(task, document, 0)) for item, document in documents]
    sequences = [(tuple(context + answer), len(answer)) for _, context, answer in _answer_tokens(task, lm, pairs)]
    kept = [(tokens[-(lm.max_length + 1) :], count) for tokens, count in sequences]
    names = tuple(document_digest(document) for _, document in documents)
    return LanguageItems(tuple(tokens for tokens, _ in kept), tuple(count for _, count in kept), names)


def answer_of(task: Any, item: int, document: Any, context: tuple[Any, bool]) -> tuple[str, str]:
    """The prompt and the right continuation of a training document."""
    requests = requests_of(task, item, document, *context)
    gold = gold_of(task, document)
    gold = gold[0] if isinstance(gold, list) else gold
    if task.OUTPUT_TYPE == "multiple_choice":
        right = gold if isinstance(gold, int) else list(task.doc_to_choice(document)).index(gold)
        return tuple(requests[right].args[:2])
    if task.OUTPUT_TYPE == "generate_until":
        text = task.doc_to_choice(document)[gold] if task.config.doc_to_choice is not None else str(gold)
        return context[0], ("" if context[1] else task.config.target_delimiter) + text
    return ("", requests[0].args[0]) if task.OUTPUT_TYPE == "loglikelihood_rolling" else requests[0].args


def _answer_tokens(task: Any, lm: Any, pairs: Sequence[tuple[str, str]]) -> Iterator[Encoded]:
    for encoding, pair in zip(encoded(lm, pairs), pairs, strict=True):
        if not encoding[2]:
            raise EvaluationError(f"task '{task.config.task}': the right answer {pair[1]!r} has no token of its own")
        yield encoding
