"""Trains the LoRA experts of the examples: one per held-in task, and `mixture`, which learned all of them at once.

    python examples/make_base.py && python examples/make_tasks.py
    python examples/train_experts.py                    # all nine, about half an hour on one idle core
    python examples/train_experts.py --only counting    # one of them, two to three minutes

Each expert becomes `experts/<name>/`: a PEFT adapter in bfloat16 (`adapter_model.safetensors`, `adapter_config.json`)
and `scores.json`, its accuracy beside the base's. The base's own scores, held-out tasks included, go into
`experts/base.json` and are taken from there next time.

The loss is the cross-entropy of the answer's token after the prompt, nothing else. Scores are those of a dense bfloat16
model: the adapter is merged into the weights in float32 and the sum rounded, as a merge with a single expert does it.
"""

import argparse
import hashlib
import json
import os
import random
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: everything is local

import peft
import safetensors.torch
import torch
import transformers
from make_tasks import DATA_SHA256, HELD_IN, HELD_OUT

HERE = Path(__file__).parent
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELD_IN_NAMES, HELD_OUT_NAMES = [task.__name__ for task in HELD_IN], [task.__name__ for task in HELD_OUT]
STEPS, MIXTURE_STEPS, BATCH, LEARNING_RATE, RANK, SEED = 100, 400, 8, 2e-3, 4, 0
SCORED_ITEMS = {"validation": 200, "test": 300}


def task_items(task: str, split: str) -> list[dict]:
    path = HERE / "tasks" / "data" / f"{task}.{split}.jsonl"
    if not path.is_file():
        raise SystemExit(f"train_experts: {path} is missing; run make_tasks.py first.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_logits(model: torch.nn.Module, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Logits (prompts, vocabulary) of the token that follows each prompt; the head runs on that one position only."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    hidden = model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[torch.arange(len(prompts)), batch.attention_mask.sum(1) - 1])


def option_tokens(tokenizer, options: list[str]) -> list[int]:
    tokens = tokenizer([f" {option}" for option in options]).input_ids
    if any(len(token) != 1 for token in tokens):
        raise SystemExit(
            "train_experts: options must be one token each with a space before them, got "
            f"{dict(zip(options, tokens, strict=True))}."
        )
    return [token[0] for token in tokens]


@torch.inference_mode()
def accuracy(model: torch.nn.Module, tokenizer, task: str, split: str) -> float:
    """The share of items whose right option has the highest logit of its options."""
    items = sorted(task_items(task, split)[: SCORED_ITEMS[split]], key=lambda item: len(item["prompt"]))
    right = 0
    for start in range(0, len(items), 20):
        batch = items[start : start + 20]
        for item, logits in zip(
            batch, answer_logits(model, tokenizer, [item["prompt"] for item in batch]), strict=True
        ):
            right += int(logits[option_tokens(tokenizer, item["options"])].argmax()) == item["answer"]
    return round(right / len(items), 4)


def scores_of(model: torch.nn.Module, tokenizer, tasks: list[str]) -> dict[str, dict[str, float]]:
    model.eval()
    return {task: {split: accuracy(model, tokenizer, task, split) for split in SCORED_ITEMS} for task in tasks}


def train(model: torch.nn.Module, tokenizer, items: list[dict], steps: int) -> None:
    """AdamW with a linear warm-up over a twelfth of the steps and a linear decay to zero; gradients clipped to norm
    1.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    warm_up = max(1, steps // 12)

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, (steps - step) / (steps - warm_up))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    shuffled = random.Random(SEED)
    queue: list[dict] = []
    for step in range(steps):
        if len(queue) < BATCH:
            queue = shuffled.sample(items, len(items))
        batch, queue = queue[:BATCH], queue[BATCH:]
        targets = torch.tensor([option_tokens(tokenizer, [item["options"][item["answer"]]])[0] for item in batch])
        loss = torch.nn.functional.cross_entropy(
            answer_logits(model, tokenizer, [item["prompt"] for item in batch]), targets
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"  step {step + 1:4d} of {steps}   loss {loss.item():.3f}", flush=True)


def save_adapter(wrapped: peft.PeftModel, folder: Path) -> None:
    """Rounds the adapter to bfloat16, in the model too (what is scored is what is saved), and writes PEFT's two
    files.
    """
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16).float()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in peft.get_peft_model_state_dict(wrapped).items()
    }
    weights = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # some versions of safetensors leave a file that only its owner can read
    config = wrapped.peft_config["default"]
    config.base_model_name_or_path = HUB_NAME
    config.inference_mode = True
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    written["target_modules"] = sorted(
        written["target_modules"]
    )  # a set inside PEFT: its order changes from run to run
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def loaded_base(dtype: torch.dtype) -> torch.nn.Module:
    if not (HERE / "base" / "config.json").is_file():
        raise SystemExit("train_experts: examples/base is missing; run make_base.py first.")
    return transformers.AutoModelForCausalLM.from_pretrained(HERE / "base", dtype=dtype)


def base_scores(tokenizer, base_sha256: str) -> dict[str, dict[str, float]]:
    """The base's accuracy on all tasks, from experts/base.json where that was measured on these weights and items."""
    path = HERE / "experts" / "base.json"
    identity = {"base_sha256": base_sha256, "data_sha256": DATA_SHA256, "items": SCORED_ITEMS}
    if (
        path.is_file()
        and {key: value for key, value in json.loads(path.read_text()).items() if key != "tasks"} == identity
    ):
        return json.loads(path.read_text())["tasks"]
    print("scoring the base", flush=True)
    scores = scores_of(loaded_base(torch.bfloat16), tokenizer, HELD_IN_NAMES + HELD_OUT_NAMES)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**identity, "tasks": scores}, indent=2) + "\n")
    return scores


def make_expert(name: str, steps: int, tokenizer, base_sha256: str) -> None:
    tasks = HELD_IN_NAMES if name == "mixture" else [name]
    print(f"{name}: {steps} steps of {BATCH} items", flush=True)
    began = time.monotonic()
    torch.manual_seed(SEED)
    configuration = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    wrapped = peft.get_peft_model(loaded_base(torch.float32), configuration)  # bfloat16 trains more slowly on a CPU
    train(wrapped.get_base_model(), tokenizer, [item for task in tasks for item in task_items(task, "train")], steps)
    seconds = round(time.monotonic() - began, 1)
    folder = HERE / "experts" / name
    save_adapter(wrapped, folder)
    base = base_scores(tokenizer, base_sha256)
    expert = scores_of(wrapped.merge_and_unload().to(torch.bfloat16), tokenizer, tasks)
    scores = {
        task: {split: {"base": base[task][split], "expert": expert[task][split]} for split in SCORED_ITEMS}
        for task in tasks
    }
    record = {
        "name": name,
        "tasks": scores,
        "items": SCORED_ITEMS,
        "seed": SEED,
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "rank": RANK,
        "training_seconds": seconds,
        "base_sha256": base_sha256,
        "data_sha256": DATA_SHA256,
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    (folder / "scores.json").write_text(json.dumps(record, indent=2) + "\n")
    for task in tasks:
        print(
            f"  {task}: test {scores[task]['test']['base']:.3f} -> {scores[task]['test']['expert']:.3f}   "
            f"({seconds:.0f} s)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        metavar="NAME",
        choices=[*HELD_IN_NAMES, "mixture"],
        help=f"train one expert: {', '.join(HELD_IN_NAMES)} or mixture",
    )
    parser.add_argument(
        "--steps", type=int, help=f"steps of {BATCH} items (default: {STEPS}, for mixture {MIXTURE_STEPS})"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine, and no slower where cores are shared
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "base")
    with (HERE / "base" / "model.safetensors").open("rb") as file:
        base_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    for name in [options.only] if options.only else [*HELD_IN_NAMES, "mixture"]:
        make_expert(name, options.steps or (MIXTURE_STEPS if name == "mixture" else STEPS), tokenizer, base_sha256)


if __name__ == "__main__":
    main()
