"""Language models scored by lm-eval's tasks (EleutherAI, 0.4.13): its prompts, requests and metrics, one resident
model.

Item for item the numbers of `lm_eval.simple_evaluate` in a fresh process. Tasks are YAML files in a folder (lm-eval's
include path; data files relative to the YAML) or, for a name that is not there, lm-eval's own.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from mergecore.errors import EvaluationError, nearest
from mergecore.evaluators.lm_groups import tasks_of
from mergecore.evaluators.lm_inputs import LanguageInputs, task_inputs
from mergecore.evaluators.lm_loglikelihood import Encoded, Likelihood, batches, likelihoods
from mergecore.evaluators.lm_prepared import (
    LanguageItems,
    Prepared,
    document_digest,
    drawn_documents,
    prepare,
    training_items,
)
from mergecore.evaluators.lm_results import results_json, scored_table
from mergecore.evaluators.lm_shell import check_scorable, renamed, shell, slots_of
from mergecore.evaluators.lm_tasks import TaskFile, build, documents_digest, find_task, lm_eval_version, quiet, tasks_in
from mergecore.evaluators.weights import blank, check_fit, fill, mismatches
from mergecore.events import Event, Report
from mergecore.plugins.evaluator import Evaluator, Resident, Split, TaskIdentity, shared_out
from mergecore.plugins.model_statistic import Seen, Slot
from mergecore.tensors.dtypes import Dtype
from mergecore.tensors.source import TensorInfo, TensorSource

__all__ = ["LmEval", "results_json"]


class LmEval(Evaluator):
    """lm-eval on a resident causal language model.

    limit: the first so many items of a split (None: all). batch_size: prompts in one pass. dtype: of the weights and of
    the arithmetic. num_fewshot: examples in a prompt (None: what the task says; a task that says 0 keeps 0).
    apply_chat_template: prompts as turns of the tokenizer's chat template. system_instruction: put before every prompt.
    seed: of lm-eval's four generators (the examples in the prompt, and sampling where a task samples).
    logits_cache: one pass for requests that differ in the last token only; changes numbers by rounding at most (other
    neighbours in a batch, other padding), and makes options of one token several times faster. primary: task → the
    metric that counts, 'acc_norm', or with the filter it is taken from, 'exact_match,flexible-extract'.
    """

    name: ClassVar[str] = "lm_eval"

    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    dtype: Dtype = "float32"
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    logits_cache: bool = True
    primary: Mapping[str, str] = {}

    def parameters(self) -> dict[str, Any]:
        """All fields but `primary`, which enters the keys of its tasks alone."""
        return {name: value for name, value in super().parameters().items() if name != "primary"}

    def resolve(self, tasks: Sequence[str], split: Split, folder: Path | None) -> dict[str, TaskIdentity]:
        """What each task is: configuration and SHA-256 of the data, from the files alone.

        Data of a hub, filtered documents and formats other than JSON lines and Parquet are loaded to be counted (and,
        where they are no local files, hashed). Code that a `!function` module imports is hashed where it lies in the
        spec's folder, and nowhere else.
        Raises EvaluationError: unknown task (nearest name), no such split, unreadable file, no such metric or filter.
        """
        local = _local(folder)
        if split == "test" and (strangers := sorted(self.primary.keys() - set(tasks))):  # all tasks have test items
            raise EvaluationError(f"evaluate.primary: no task here is '{strangers[0]}'; {nearest(strangers[0], tasks)}")
        return {name: self._resolved(find_task(name, local), split) for name in tasks}

    def members(self, names: Sequence[str], folder: Path | None) -> Mapping[str, tuple[str, ...]]:
        """The tasks of groups and tags. Raises EvaluationError for a group that changes settings of its tasks."""
        local = _local(folder)
        return {name: tasks_of(name, local) for name in names}

    @property
    def factories(self) -> tuple[str, ...]:
        """No field names a function: a system instruction is text."""
        return ()

    def check(self, config: Mapping[str, Any], files: Collection[str], chat_template: str | None) -> None:
        """Check that there is a causal language model with a tokenizer, and a chat template where prompts need one."""
        check_scorable(config, files)
        if self.apply_chat_template and chat_template is None:
            raise EvaluationError(
                "evaluate.apply_chat_template is set, and there is no chat template: put chat_template.jinja beside "
                "the checkpoint, take an expert's tokenizer and template (`tokenizer: NAME`), or leave "
                "apply_chat_template out"
            )

    def documents(self, task: TaskIdentity, folder: Path | None) -> frozenset[str] | None:
        """lm-eval's doc_hash of each item that is scored."""
        file = find_task(task.task, _local(folder))
        return frozenset(map(document_digest, _documents_of(file, task.split)[: task.items]))

    def drawn(
        self, tasks: Sequence[str], inputs: Seen, items: int, seed: int, folder: Path | None
    ) -> frozenset[str] | None:
        """lm-eval's doc_hash of each item that `Resident.inputs` or `Resident.calibration` draws."""
        local, digests = _local(folder), set[str]()
        for name, count in zip(tasks, shared_out(items, len(tasks)), strict=True):
            documents = _documents_of(find_task(name, local), inputs)
            digests.update(document_digest(document) for _, document in drawn_documents(documents, count, seed))
        return frozenset(digests)

    def training_identity(self, tasks: Sequence[str], folder: Path | None) -> dict[str, Any]:
        """What `Resident.calibration` draws from, as plain JSON for a statistic's key: configurations and data
        digests.
        """
        local, identities = _local(folder), {}
        for name in tasks:
            file = find_task(name, local)
            split = file.config.get("training_split")
            if not isinstance(split, str):
                raise EvaluationError(f"task '{name}' has no training split to take items from")
            data = file.digests(split)
            if data is None:
                data = [documents_digest(_load(file).training_docs())]
            identities[name] = {"config": file.plain, "data": data}
        prompt = {"apply_chat_template": self.apply_chat_template, "system_instruction": self.system_instruction}
        return {"tasks": identities, "lm_eval": lm_eval_version(), **prompt}

    def open(self, companions: Path, folder: Path | None) -> Resident:
        """A model of the config in `companions`, in `dtype`, on the CPU; `.model.to(device)` moves it."""
        return _LmResident(self, companions, folder)

    def _resolved(self, file: TaskFile, split: Split) -> TaskIdentity:
        evaluated, examples = file.split_name(split), file.fewshot_count(self.num_fewshot)
        data: dict[str, Any] = {"evaluated": file.digests(evaluated)}
        fewshot = file.fewshot_split(evaluated)
        count = file.count(evaluated)
        task = None
        if data["evaluated"] is None or count is None:
            task = _load(file, split)
            documents = task.eval_docs
            count = len(documents)
            data["evaluated"] = data["evaluated"] or [documents_digest(documents)]
        if examples:
            data["examples"] = file.digests(fewshot) or [documents_digest((task or _load(file, split)).fewshot_docs())]
        identity = {
            "config": {**file.plain, "num_fewshot": examples},
            "data": data,
            "documents": count,
            "lm_eval": lm_eval_version(),
            "evaluator": self.parameters(),
        }
        metric, scale = file.primary(self.primary.get(file.name))
        if file.name in self.primary or "," in metric:
            identity["primary"] = metric
        if file.is_weighted(metric):
            identity["weights"] = "of all items"  # before, each item counted the same
        items = min(count, self.limit or count)
        return TaskIdentity(file.name, split, items, metric, identity, scale)


class _LmResident(Resident):
    """A causal language model whose weights are swapped in place."""

    def __init__(self, evaluator: LmEval, companions: Path, folder: Path | None) -> None:
        from lm_eval.models.huggingface import HFLM

        self._evaluator, self._folder = evaluator, folder
        self._model, tokenizer = shell(companions, getattr(torch, evaluator.dtype))
        blank(self._model)
        self._filled = False
        self._prepared: dict[tuple[str, Split], tuple[TaskIdentity, Prepared]] = {}
        with quiet():
            self._lm: Any = HFLM(
                pretrained=self._model,
                tokenizer=tokenizer,
                batch_size=evaluator.batch_size,
                logits_cache=evaluator.logits_cache,
            )
        self._lm._loglikelihood_tokens = self._answers

    @property
    def model(self) -> torch.nn.Module:
        """The module, in eval mode."""
        module: torch.nn.Module = self._model
        return module

    def swap(self, weights: TensorSource) -> None:
        """Put these weights in, cast to the evaluator's dtype; NaN everywhere first.

        Names are those of the module, or those of the family's checkpoints (transformers then renames and fuses them,
        which takes a second copy in memory). Raises MismatchError, NonFiniteError.
        """
        self._filled = False
        if mismatches(self._model, weights):
            weights = renamed(self._model, weights)
        check_fit(self._model, weights)
        blank(self._model)
        fill(self._model, weights)
        self._model.eval()
        self._filled = True

    def score(self, task: TaskIdentity, report: Report) -> pa.Table:
        """One row per item, and one more float64 column for every other metric that has a number per item.

        loglikelihoods: of the task's options (nats), null for generated text. Raises EvaluationError where the task's
        files are no longer what was resolved, or no weights are in; NonFiniteError where a log-likelihood is NaN.
        """
        if not self._filled:
            raise EvaluationError("the evaluator holds no weights: swap a model in before scoring")
        prepared = self._ready(task)
        instances = prepared.instances()
        with quiet(), _seeded(self._evaluator.seed):
            self._respond(prepared, list(chain.from_iterable(instances)), task, report)
            requests = list(chain.from_iterable(instances))
            for ensemble in prepared.task._filters:
                ensemble.apply(requests)
            return scored_table(prepared.task, prepared.documents, instances, task)

    def calibration(self, tasks: Sequence[str], items: int, seed: int) -> LanguageItems:
        """Training items with their right answers, in the evaluator's prompt format without examples.

        The answer is the right option or the target text; logits are over the whole vocabulary.
        """
        local, share = _local(self._folder), divmod(items, max(len(tasks), 1))
        drawn = []
        for position, name in enumerate(tasks):
            file = find_task(name, local)
            count = share[0] + (position < share[1])
            drawn.append(training_items(_load(file), self._lm, self._prompt, count, seed))
        return LanguageItems(
            tuple(chain.from_iterable(drawn_from.sequences for drawn_from in drawn)),
            tuple(chain.from_iterable(drawn_from.answers for drawn_from in drawn)),
            tuple(chain.from_iterable(drawn_from.documents for drawn_from in drawn)),
        )

    def inputs(self, tasks: Sequence[str], inputs: Seen, items: int, seed: int, labels: bool) -> list[LanguageInputs]:
        """Items without their answers, in the evaluator's prompt format without examples."""
        local = _local(self._folder)
        drawn = []
        for name, count in zip(tasks, shared_out(items, len(tasks)), strict=True):
            task, documents = _loaded(find_task(name, local), inputs)
            drawn.append(task_inputs(name, task, documents, self._lm, self._prompt, count, seed, labels))
        return drawn

    def slots(self, tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> Mapping[str, Slot]:
        """Where tensors lie, also where transformers renames a family's tensors or fuses its experts."""
        if set(names) <= set(self._model.state_dict(keep_vars=True)):
            return super().slots(tensors, names)
        return slots_of(self._model, tensors, names)

    def _prompt(self, task: Any, document: Any, examples: int) -> tuple[Any, bool]:
        chat = self._evaluator.apply_chat_template
        context = task.fewshot_context(
            document,
            num_fewshot=examples,
            system_instruction=self._evaluator.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,  # the default of simple_evaluate
            chat_template=self._lm.apply_chat_template if chat else None,
            gen_prefix=task.doc_to_prefix(document),
        )
        return context, chat

    def _ready(self, task: TaskIdentity) -> Prepared:
        prepared = self._prepared.get((task.task, task.split))
        if prepared is not None and prepared[0] == task:
            return prepared[1]
        file = find_task(task.task, _local(self._folder))
        # One resident serves validation and test items, whose limits may differ: the task says which holds.
        limit = task.identity["evaluator"]["limit"]
        if self._evaluator.model_copy(update={"limit": limit})._resolved(file, task.split) != task:
            raise EvaluationError(f"task '{task.task}' is not what it was when it was resolved; plan again")
        built = _load(file, task.split)
        built.set_config(key="num_fewshot", value=file.fewshot_count(self._evaluator.num_fewshot))
        built.set_fewshot_seed(seed=self._evaluator.seed)
        ready = prepare(built, self._lm, self._prompt, limit, self._evaluator.logits_cache)
        self._prepared[task.task, task.split] = (task, ready)
        return ready

    def _respond(self, prepared: Prepared, instances: list[Any], task: TaskIdentity, report: Report) -> None:
        """Put the model's responses into the Instances."""
        self._lm._device = next(self._model.parameters()).device
        what = f"evaluate {task.task}"
        if prepared.batches:
            count = len(instances)

            def done(requests: int) -> None:
                report(Event(what, task.items * requests / count, task.items, "items"))

            for instance, answer in zip(instances, likelihoods(self._model, prepared.batches, done), strict=True):
                instance.resps.extend([answer] * instance.repeats)
            return
        repeated = [instance for instance in instances for _ in range(instance.repeats)]
        with torch.no_grad():
            responses = getattr(self._lm, repeated[0].request_type)(repeated, disable_tqdm=True)
        for instance, response in zip(repeated, responses, strict=True):
            instance.resps.append(response)
        report(Event(what, task.items, task.items, "items"))

    def _answers(self, requests: Sequence[Encoded], **_: Any) -> list[Likelihood]:
        """What lm-eval's own code asks for (rolling log-likelihoods), by way of our batches."""
        share = self._evaluator.logits_cache
        packed = batches(requests, self._evaluator.batch_size, self._lm.max_length, share)
        return likelihoods(self._model, packed, lambda _: None)


def _local(folder: Path | None) -> Mapping[str, TaskFile]:
    if folder is not None and not folder.is_dir():
        raise EvaluationError(f"the folder of task files {folder} is not there")
    return tasks_in(folder) if folder is not None else {}


def _load(file: TaskFile, split: Split | None = None) -> Any:
    """lm-eval's task object with its documents in memory."""
    chosen: Split = split or ("test" if file.config.get("test_split") else "validation")
    with tempfile.TemporaryDirectory(prefix="mergeloom-") as cache:
        return build(file, chosen, Path(cache))


def _loaded(file: TaskFile, inputs: Seen) -> tuple[Any, Any]:
    """lm-eval's task object and the documents of a split. Raises EvaluationError where it has no such split."""
    if inputs != "training":
        task = _load(file, inputs)
        return task, task.eval_docs
    task = _load(file)
    if not task.has_training_docs():
        raise EvaluationError(f"task '{file.name}' has no training split to take items from")
    return task, task.training_docs()


def _documents_of(file: TaskFile, inputs: Seen) -> Any:
    """The documents of a split: from the file where that is the same, else as lm-eval loads them."""
    name = file.config.get("training_split") if inputs == "training" else file.split_name(inputs)
    known = file.documents(name) if isinstance(name, str) else None
    return _loaded(file, inputs)[1] if known is None else known


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """lm-eval's three global generators set to `seed`, and left as they were found."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
