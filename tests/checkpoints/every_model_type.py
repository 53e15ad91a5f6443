"""Every model type of transformers, tiny: saved, merged, folded, extracted, loaded again. `make every-model-type`.

    python -m tests.checkpoints.every_model_type [--table FILE] [TYPE …]

A type passes where every step gives what transformers and PEFT make of it. It is refused where Mergeloom says, by name, what it
cannot do. It cannot be built here where no tiny configuration is found, or a library that it needs is not installed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from mergecore.engine.executor import InProcess
from mergecore.errors import MergeloomError, SpecError
from mergecore.events import silent
from mergecore.recipes.extract_lora import extract_lora
from mergecore.spec.sources import BaseSpec, ExpertSpec
from tests.checkpoints.tiny_configs import LARGEST, tiny_config
from tests.recipe_files import find, merge_into

CLASSES = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING, modeling_auto.MODEL_FOR_CTC_MAPPING,
    modeling_auto.MODEL_FOR_PRETRAINING_MAPPING, modeling_auto.MODEL_MAPPING,
)  # fmt: skip
STACKED = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""PEFT takes these for the experts of a mixture, which transformers keeps as one tensor: chosen last."""
PART_ONLY = "transformers has no model of this type alone"
STEPS = ("merged", "in memory", "folded", "extracted")
PASSES, REFUSED, FAILS, NOT_BUILT, NONE = "passes", "refused", "fails", "not built", "nothing to do"


class NotBuiltError(Exception):
    """A type that has no tiny model here."""


class WrongError(Exception):
    """A step that gave something else than transformers or PEFT."""


class NothingToDoError(Exception):
    """A step that has no meaning for a model."""


@dataclass(frozen=True)
class Row:
    """What came of one model type. why: of the steps that do not pass."""

    kind: str
    name: str
    steps: dict[str, str]
    why: str

    @property
    def outcome(self) -> str:
        """The worst of the steps."""
        return next((bad for bad in (FAILS, NOT_BUILT, REFUSED) if bad in self.steps.values()), PASSES)


@dataclass(frozen=True)
class Case:
    """A base and two experts in files."""

    folder: Path
    shape: Any

    def path(self, name: str) -> Path:
        return self.folder / name

    def loaded(self, name: str) -> nn.Module:
        """The model as transformers loads it; nothing is missing."""
        model, report = self.shape.from_pretrained(self.path(name), output_loading_info=True)
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if report[problem]:
                raise WrongError(f"{name}: {problem}: {sorted(map(str, report[problem]))[:4]}")
        return model

    def merge(self, experts: list[str], out: str) -> None:
        named = [{"source": str(self.path(expert)), "name": expert} for expert in experts]
        merge_into({"method": "average", "base": self.path("base"), "experts": named}, self.path(out))


def class_of(config: Any) -> Any:
    """The first class that transformers has for a configuration, those with heads before the trunk."""
    for mapping in CLASSES:
        if type(config) in mapping:
            chosen = mapping[type(config)]
            return chosen[0] if isinstance(chosen, tuple | list) else chosen
    raise NotBuiltError(PART_ONLY)


def build(kind: str) -> nn.Module:
    """A tiny model of a type, its values drawn by seed 0."""
    try:
        config = tiny_config(CONFIG_MAPPING[kind])
        shape = class_of(config)
        with torch.device("meta"):
            elements = sum(value.numel() for value in shape(config).parameters())
        if elements > LARGEST:
            raise NotBuiltError(f"{elements:,} elements with a small configuration")
        torch.manual_seed(0)
        return shape(config)
    except NotBuiltError:
        raise
    except Exception as error:  # whatever a class makes of a configuration that nobody wrote for it
        first = next(iter(str(error).strip().splitlines()), "")
        raise NotBuiltError(f"{type(error).__name__}: {re.sub('/[^ ]*/site-packages/', '', first)[:120]}") from error


def move(model: nn.Module, seed: int) -> None:
    """Change every parameter a little; tied ones once."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.is_floating_point():
                value.copy_(torch.nan_to_num(value) + torch.randn(value.shape, generator=draw) * 0.05)


def compare(actual: dict[str, Tensor], wanted: dict[str, Tensor], told: str) -> None:
    if actual.keys() != wanted.keys():
        raise WrongError(f"{told}: other names: {sorted(actual.keys() ^ wanted.keys())[:4]}")
    for name, value in wanted.items():
        if value.is_floating_point() and not torch.allclose(
            actual[name].float(), value.float(), rtol=1e-4, atol=1e-5, equal_nan=True
        ):
            raise WrongError(f"{told}: '{name}' differs by {(actual[name].float() - value.float()).abs().max():.3g}")


def mean(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (first[name] + second[name]) / 2 if first[name].is_floating_point() else first[name] for name in first
    }


# --- steps --------------------------------------------------------------------------------------------------------


def merged(case: Case) -> None:
    """The average of two experts is the mean of what transformers loads of them."""
    case.merge(["a", "b"], "merged")
    wanted = mean(case.loaded("a").state_dict(), case.loaded("b").state_dict())
    compare(case.loaded("merged").state_dict(), wanted, "merged")


def in_memory(case: Case) -> None:
    """An expert whose file has the names in memory, as the state dict stands there, is the same expert."""
    model = case.loaded("a")
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    folder = case.path("memory")
    folder.mkdir()
    (folder / "config.json").write_bytes((case.path("a") / "config.json").read_bytes())
    from safetensors.torch import save_file

    save_file({name: value.clone().contiguous() for name, value in state.items()}, folder / "model.safetensors")
    case.merge(["memory", "b"], "merged-memory")
    wanted = mean(case.loaded("a").state_dict(), case.loaded("b").state_dict())
    compare(case.loaded("merged-memory").state_dict(), wanted, "in memory")


def folded(case: Case) -> None:
    """A LoRA adapter on some of the linear layers is folded as PEFT folds it."""
    model = case.loaded("base")
    leaves = linear_leaves(model)
    if not leaves:
        raise NothingToDoError("no linear layer that PEFT can be pointed at")
    wrapped = adapted(model, leaves[:3])
    wrapped.save_pretrained(case.path("lora"), save_embedding_layers=False)
    case.merge(["lora"], "folded")
    compare(case.loaded("folded").state_dict(), wrapped.merge_and_unload().state_dict(), "folded")


def adapted(model: nn.Module, leaves: list[str]) -> PeftModel:
    """The model with random factors on these layers; of some models PEFT makes none."""
    torch.manual_seed(1)
    try:
        return get_peft_model(model, LoraConfig(r=2, target_modules=leaves, init_lora_weights=False))
    except (NotImplementedError, ValueError) as error:
        raise NothingToDoError(f"PEFT takes no such model: {error}") from error


def linear_leaves(model: nn.Module) -> list[str]:
    """Last parts of the names of linear layers that no other module shares, and that are not tied."""
    tied = {
        name.removesuffix(".weight")
        for pair in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        for name in pair
    }
    plain = {name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)} - tied
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in plain}
    leaves = Counter(leaf for name in plain if (leaf := name.rpartition(".")[2]) not in others and not leaf.isdigit())
    return [leaf for leaf, _ in sorted(leaves.items(), key=lambda item: (item[0] in STACKED, -item[1], item[0]))]


def extracted(case: Case) -> None:
    """An adapter of full rank gives every linear layer the expert's weights, by PEFT, and by us."""
    adapted(case.loaded("base"), linear_leaves(case.loaded("base"))[:1])
    source = ExpertSpec(source=str(case.path("a")), name="a")
    base = BaseSpec(source=str(case.path("base")))
    try:
        extraction = extract_lora(source, base, case.path("xl"), find, InProcess(), silent, rank=10_000)
    except SpecError as error:
        raise NothingToDoError(str(error)) from error
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(case.loaded("base"), str(case.path("xl"))).merge_and_unload()
    if missed := [
        str(warning.message)
        for warning in said
        if re.search(r"missing adapter keys|did not match", str(warning.message))
    ]:
        raise WrongError(f"extracted: PEFT says: {missed[0][:200]}")
    after, before, actual = case.loaded("a").state_dict(), case.loaded("base").state_dict(), model.state_dict()
    changed = {name for name in before if not torch.equal(actual[name], before[name])}
    compare({name: actual[name] for name in changed}, {name: after[name] for name in changed}, "extracted")
    if len(changed) < len(extraction.rows):
        raise WrongError(f"extracted: PEFT changed {len(changed)} of {len(extraction.rows)} layers")
    case.merge(["xl"], "again")
    compare(case.loaded("again").state_dict(), actual, "extracted and folded again")


CHECKS: dict[str, Callable[[Case], None]] = dict(zip(STEPS, (merged, in_memory, folded, extracted), strict=True))


def check(kind: str) -> Row:
    """Do all steps for one model type."""
    with tempfile.TemporaryDirectory() as place, quiet():
        try:
            model = build(kind)
            name = type(model).__name__
            case = Case(Path(place), type(model))
            for seed, member in enumerate(("base", "a", "b"), 1):
                move(model, seed)
                model.save_pretrained(case.path(member))
            case.loaded("a")
        except NotBuiltError as error:
            return Row(kind, "", {"built": NOT_BUILT}, str(error))
        except Exception as error:  # transformers cannot save or load what it has built
            return Row(
                kind,
                "",
                {"built": NOT_BUILT},
                f"is not loaded as it was saved: {type(error).__name__}: {str(error)[:160]}",
            )
        steps, why = dict[str, str](), []
        for step, run in CHECKS.items():
            steps[step], told = outcome(run, case)
            why += [f"{step}: {told}"] if steps[step] in (REFUSED, FAILS) else []
        return Row(kind, name, steps, "; ".join(why))


def outcome(run: Callable[[Case], None], case: Case) -> tuple[str, str]:
    try:
        run(case)
    except NothingToDoError as error:
        return NONE, str(error)
    except MergeloomError as error:
        return REFUSED, str(error).replace(f"{case.folder}/", "")
    except WrongError as error:
        return FAILS, str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return FAILS, f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    return PASSES, ""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' remarks and progress."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def table(rows: list[Row]) -> str:
    """The rows as a page: a summary, then one line for each type."""
    counts = Counter(row.outcome for row in rows)
    lines = [
        "# Model types",
        "",
        "`make every-model-type` goes over every model type of transformers, with a tiny model and random weights. It merges two",
        "experts, merges one whose file has the names in memory, folds a LoRA adapter of PEFT, and extracts an adapter. Each result",
        "is loaded by transformers or PEFT and compared with what they make of it. *Refused* means that an error names what cannot",
        "be done, and what to do. *Not built* means that no tiny configuration was found, or that a library is missing.",
        "",
        f"transformers {transformers.__version__}: {len(rows)} model types; "
        + ", ".join(f"{counts[name]} {name}" for name in (PASSES, REFUSED, FAILS, NOT_BUILT)),
        "",
        f"| type | class | {' | '.join(STEPS)} | why |",
        "|---" * (len(STEPS) + 3) + "|",
    ]
    alone = [row.kind for row in rows if row.why == PART_ONLY]
    for row in sorted(rows, key=lambda row: (row.outcome == NOT_BUILT, row.kind)):
        if row.kind not in alone:
            cells = [row.steps.get(step, "") or row.outcome for step in STEPS]
            why = textwrap.shorten(row.why.replace("|", "/"), 400, placeholder=" …")
            lines.append(f"| {row.kind} | {row.name} | {' | '.join(cells)} | {why} |")
    lines += ["", f"{PART_ONLY.capitalize()} ({len(alone)}): {', '.join(sorted(alone))}."] if alone else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Print the table. Return 1 where a type fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoints.every_model_type")
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="none: all")
    parser.add_argument("--table", type=Path, help="write the table to this file as well")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for kind in chosen.kinds or list(CONFIG_MAPPING):
        rows.append(check(kind))
        print(f"{kind}: {rows[-1].outcome} {rows[-1].why[:300]}", file=sys.stderr, flush=True)
        if chosen.table:
            chosen.table.write_text(table(rows))
    print(table(rows))
    return int(any(row.outcome == FAILS for row in rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
