"""Task files of lm-eval as plain data: where they lie, what they say, and the digests of the data they read.

Nothing here imports lm-eval (a second), torch models or datasets unless a task is one of lm-eval's own.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from mergecore.checkpoints.sources.digests import file_sha256
from mergecore.errors import EvaluationError, SpecError, nearest
from mergecore.plugins.bounded_yaml import BoundedConstructor, check_depth, check_ordinary
from mergecore.plugins.evaluator import Split
from mergecore.plugins.own_code import imported_by
from mergecore.reporting.scales import Scale

_DATE = re.compile(r"\s*\d{1,4}[-/.:]\d")
"""What the data reader may take for a date."""
READERS = ("json", "parquet", "csv", "text")
"""Values of `dataset_path` that read local files; their digests stand for the data."""

_STRUCTURE = ("tag", "group", "task_list", "task_alias")
"""Keys that place a task in lists and tables and cannot change a number."""

_DEFAULT_METRICS = {
    "multiple_choice": "acc",
    "generate_until": "exact_match",
    "loglikelihood": "perplexity",
    "loglikelihood_rolling": "word_perplexity",
}
"""lm-eval's first metric per output type, for a task that lists none."""

_AGGREGATIONS = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}
"""lm-eval's aggregations of its own metrics, where they are no means."""

_SCALES: dict[str, Scale] = {"perplexity": "perplexity", "weighted_perplexity": "perplexity", "bits_per_byte": "bits"}


class _Loader(BoundedConstructor, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML whose `!function module.name` becomes the name and the digest of the module beside the file."""


def _function(loader: Any, node: Any) -> dict[str, Any]:
    name = str(loader.construct_scalar(node))
    module = Path(node.start_mark.name).parent / (name.rpartition(".")[0].replace(".", "/") + ".py")
    if not module.is_file():
        return {"function": name}
    imported = imported_by(module, str(module.with_suffix("")))  # lm-eval's name of it
    return {"function": name, "sha256": file_sha256(module), **({"imports": imported} if imported else {})}


_Loader.add_constructor("!function", _function)


def read_yaml(path: Path, seen: frozenset[Path] = frozenset()) -> dict[str, Any]:
    """A task file with its includes merged as lm-eval merges them; functions become plain data.

    Raises EvaluationError where the file cannot be read, is no mapping or includes itself.
    """
    path = path.resolve()
    if path in seen:
        raise EvaluationError(f"{path.name} includes itself")
    try:
        check_ordinary(path)
        with path.open("rb") as file:
            check_depth(file, _Loader)
            file.seek(0)
            config = yaml.load(file, Loader=_Loader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError, SpecError) as error:
        raise EvaluationError(f"the task file {path.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise EvaluationError(f"the task file {path.name} holds no mapping")
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        merged.update(read_yaml(path.parent / include, seen | {path}))
        merged.pop("task_list", None)
    return {**merged, **config}


@dataclass(frozen=True)
class TaskFile:
    """One task as its YAML file says it."""

    name: str
    path: Path
    config: Mapping[str, Any]

    def split_name(self, split: Split) -> str:
        """The name the task gives to `split`. Raises EvaluationError where it has none."""
        name = self.config.get(f"{split}_split")
        if not isinstance(name, str):
            other = [known for known in ("training", "validation", "test") if self.config.get(f"{known}_split")]
            raise EvaluationError(f"task '{self.name}' has no {split} split; it has: {', '.join(other) or 'none'}")
        return name

    def fewshot_count(self, asked: int | None) -> int:
        """Examples in the prompt, as lm-eval decides: a task that says 0 keeps 0."""
        own = self.config.get("num_fewshot")
        return asked if asked is not None and own != 0 else int(own or 0)

    def fewshot_split(self, evaluated: str) -> str:
        """The split the examples in the prompt are drawn from."""
        nested = self.config.get("fewshot_config") or {}
        named = nested.get("split") or self.config.get("fewshot_split")
        return str(named or self.config.get("training_split") or self.config.get("validation_split") or evaluated)

    @property
    def data_files(self) -> dict[str, tuple[Path, ...]] | None:
        """Local files by split, found relative to the YAML file's own folder; None where the data come from a hub."""
        data_files = (self.config.get("dataset_kwargs") or {}).get("data_files")
        if self.config.get("dataset_path") not in READERS or not data_files:
            return None
        by_split = data_files if isinstance(data_files, Mapping) else {"train": data_files}
        return {split: tuple(self._paths(files)) for split, files in by_split.items()}

    def _paths(self, files: Any) -> Iterator[Path]:
        for name in [files] if isinstance(files, str) else files:
            paths = sorted(self.path.parent.glob(name)) if "*" in name else [self.path.parent / name]
            for path in paths:
                if not path.is_file():
                    raise EvaluationError(
                        f"task '{self.name}' reads {name}, which is not there; paths are relative to its YAML"
                    )
                yield path

    def digests(self, split: str) -> list[str] | None:
        """SHA-256 of every file of a split; None where the data are not local files."""
        files = self.data_files
        if files is None:
            return None
        if split not in files:
            raise EvaluationError(
                f"task '{self.name}' has no data_files for its split '{split}'; known: {', '.join(files)}"
            )
        return [file_sha256(path) for path in files[split]]

    def count(self, split: str) -> int | None:
        """Documents of a split, or None where only lm-eval can tell (filters, other formats, a hub)."""
        files = self.data_files
        nested = "field" in (self.config.get("dataset_kwargs") or {})
        if files is None or self.config.get("process_docs") is not None or nested:
            return None
        if self.config["dataset_path"] == "json":
            counts = [_json_lines(path) for path in files[split]]
            return None if None in counts else sum(count or 0 for count in counts)
        if self.config["dataset_path"] == "parquet":
            return sum(int(pq.ParquetFile(path).metadata.num_rows) for path in files[split])
        return None

    def documents(self, split: str) -> list[dict[str, Any]] | None:
        """The documents of a split as the data reader gives them; None where only the reader itself can tell."""
        files = self.data_files
        if self.count(split) is None or files is None or self.config["dataset_path"] != "json":
            return None
        lines = [line for path in files[split] for line in path.read_bytes().splitlines() if line.strip()]
        return _as_read([json.loads(line) for line in lines])

    @property
    def plain(self) -> dict[str, Any]:
        """The configuration without paths, split names and list keeping: what can change a number besides the data."""
        left_out = {*_STRUCTURE, "task", "training_split", "validation_split", "test_split", "num_fewshot"}
        config = {key: value for key, value in self.config.items() if key not in left_out}
        if (keywords := config.get("dataset_kwargs")) is not None:
            config["dataset_kwargs"] = {key: keywords[key] for key in keywords if key not in ("data_files", "data_dir")}
        return config

    def primary(self, chosen: str | None) -> tuple[str, Scale]:
        """Return the primary metric as 'metric' or 'metric,filter', and how the mean over items is shown.

        It is `chosen` (by the spec), else `metadata.primary_metric` with `metadata.primary_filter`, else the first that
        is listed, else lm-eval's first of the kind. Without a filter it is the first one's.

        Raises EvaluationError for a metric or a filter that the task does not have.
        """
        metadata = self.config.get("metadata")
        metadata = metadata if isinstance(metadata, Mapping) else {}
        named, _, filtered = (chosen or str(metadata.get("primary_metric") or "")).partition(",")
        filtered = filtered.strip() or ("" if chosen else str(metadata.get("primary_filter") or ""))
        listed = [entry for entry in self.config.get("metric_list") or [] if isinstance(entry, Mapping)]
        names = [_called(entry.get("metric")) for entry in listed]
        metric = named.strip() or (names[0] if names else _DEFAULT_METRICS[self.output_type])
        if chosen and names and metric not in names and self.config.get("process_results") is None:
            raise EvaluationError(f"task '{self.name}' has no metric '{metric}'; {nearest(metric, names)}")
        filters = [str(entry.get("name")) for entry in self.config.get("filter_list") or [{"name": "none"}]]
        if filtered and filtered not in filters:
            raise EvaluationError(f"task '{self.name}' has no filter '{filtered}'; {nearest(filtered, filters)}")
        scale = _SCALES.get(self._aggregation(metric))
        if scale is None:
            scale = "error" if self._entry(metric).get("higher_is_better") is False else "mean"
        return (f"{metric},{filtered}" if filtered else metric), scale

    def is_weighted(self, metric: str) -> bool:
        """Return whether a metric weighs items by their words or bytes."""
        return self._aggregation(metric.partition(",")[0]) in ("weighted_perplexity", "bits_per_byte")

    @property
    def output_type(self) -> str:
        """The kind of request that the task makes."""
        return str(self.config.get("output_type", "generate_until"))

    def _entry(self, metric: str) -> Mapping[str, Any]:
        entries = (entry for entry in self.config.get("metric_list") or [] if isinstance(entry, Mapping))
        return next((entry for entry in entries if _called(entry.get("metric")) == metric), {})

    def _aggregation(self, metric: str) -> str:
        """Return the name of a metric's aggregation; of lm-eval's own metrics where the task does not say it."""
        return _called(self._entry(metric).get("aggregation") or _AGGREGATIONS.get(metric, "mean"))


def _called(metric: Any) -> str:
    """The name of a metric or an aggregation; a function's for one of the task's own."""
    return str(metric["function"] if isinstance(metric, Mapping) else metric)


def _as_read(documents: list[Any]) -> list[dict[str, Any]] | None:
    """Documents with the fields of all, None where one has not its own. None for values that the reader may change:
    nested ones, mixed types, and texts that look like dates.
    """
    kinds: dict[str, set[type]] = {}
    for document in documents:
        if not isinstance(document, dict):
            return None
        for key, value in document.items():
            values = value if isinstance(value, list) else [value]
            if any(isinstance(part, dict | list) or (isinstance(part, str) and _DATE.match(part)) for part in values):
                return None
            kinds.setdefault(key, set()).update({list} if isinstance(value, list) else set())
            kinds[key].update(type(part) for part in values if part is not None)
    if any(len(own - {list}) > 1 or (list in own and len(own) == 1) for own in kinds.values()):
        return None
    mixed = any(
        isinstance(document.get(key), list) != (list in own) and document.get(key) is not None
        for document in documents
        for key, own in kinds.items()
    )
    return None if mixed else [{key: document.get(key) for key in kinds} for document in documents]


def _json_lines(path: Path) -> int | None:
    """Documents in a JSON-lines file; None for another kind of JSON file."""
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return None
        file.seek(0)
        return sum(1 for line in file if line.strip())


def tasks_in(folder: Path) -> dict[str, TaskFile]:
    """Every file of a task or of a group under `folder`, by name. Other files are passed over; twins are refused."""
    files: dict[str, TaskFile] = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            config = read_yaml(path)
        except EvaluationError:
            continue  # lm-eval passes over it too: a folder may hold other YAML files
        name = config.get("task")
        if "group" in config:
            name = config["group"] if isinstance(name, list) else None
        if not isinstance(name, str):
            continue
        if name in files:
            raise EvaluationError(f"task '{name}' is in both {files[name].path.name} and {path.name}; rename one")
        files[name] = TaskFile(name, path.resolve(), config)
    return files


@functools.cache
def own_index() -> dict[str, tuple[str, Path | None]]:
    """lm-eval's own names with kind and file: 6.5 s, so only for a name that the folder does not have."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_defaults=True).task_index
    return {name: (entry.kind.name, entry.yaml_path) for name, entry in index.items()}


def find_task(name: str, local: Mapping[str, TaskFile]) -> TaskFile:
    """The task called `name`, from the folder or else from lm-eval's own. Raises EvaluationError with the nearest
    name.
    """
    if name in local:
        if "group" in local[name].config:
            entries = local[name].config["task"]
            inner = [str(entry.get("task")) if isinstance(entry, Mapping) else str(entry) for entry in entries]
            raise EvaluationError(
                f"'{name}' is a group of {', '.join(inner)}; name its tasks one by one, the means are taken here"
            )
        return local[name]
    kind, path = own_index().get(name, ("", None))
    if kind in ("GROUP", "TAG"):
        raise EvaluationError(
            f"'{name}' is a group of lm-eval tasks; name its tasks one by one, the means are taken here"
        )
    if kind != "TASK" or path is None:
        own = {known for known, (kind, _) in own_index().items() if kind == "TASK"}
        offers = [nearest(name, local), nearest(name, own)]  # lm-eval has thousands of names: offered, never listed
        close = [offer for offer in offers if offer.startswith("did you mean")]
        raise EvaluationError(f"there is no task '{name}': {(close or offers)[0]}")
    return TaskFile(name, path, read_yaml(path))


def lm_eval_version() -> str:
    """The installed version, without importing it."""
    return importlib.metadata.version("lm_eval")


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings and progress bars of lm-eval, transformers and the data reader held back: nothing in mergecore
    prints.
    """
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    reading, loading = not are_progress_bars_disabled(), bars.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    disable_progress_bars()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if reading:
            enable_progress_bars()
        if loading:
            bars.enable_progress_bar()


def build(file: TaskFile, split: Split, cache: Path) -> Any:
    """lm-eval's own task object, with `split` in the place of its test split. cache: a folder for the data reader.

    The reader's own cache is keyed by path and time, not by content, hence an empty folder for local files.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = {key: value for key, value in load_yaml(file.path).items() if key not in _STRUCTURE}
    if "class" in config:
        raise EvaluationError(
            f"task '{file.name}' is written in Python; only tasks that are YAML alone can be scored here"
        )
    config["test_split"] = file.split_name(split)
    if (files := file.data_files) is not None:
        named = {split: [str(path) for path in paths] for split, paths in files.items()}
        keywords = {**(config.get("dataset_kwargs") or {}), "data_files": named}
        config["dataset_kwargs"] = {**keywords, "cache_dir": str(cache), "keep_in_memory": True}
    try:
        with quiet():
            return ConfigurableTask(config=config)
    except Exception as error:  # lm-eval and datasets raise anything from KeyError to a hub's own errors
        raise EvaluationError(f"task '{file.name}' cannot be loaded: {type(error).__name__}: {error}") from error


def document_text(document: Any) -> str:
    """A document as the JSON that lm-eval hashes."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)


def documents_digest(documents: Any) -> str:
    """SHA-256 over the documents of a split, for data that are no local files."""
    state = hashlib.sha256()
    for document in documents:
        state.update(hashlib.sha256(document_text(document).encode()).digest())
    return state.hexdigest()
