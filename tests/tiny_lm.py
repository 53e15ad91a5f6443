"""A tiny language model, its experts and two lm-eval tasks, made on the spot: seeded, offline, a megabyte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WORDS = ("apple", "bread", "chair", "dog", "eagle", "fork", "glass", "horse", "iron", "jacket", "kite", "lamp")
KINDS = {"animal": ("dog", "eagle", "horse"), "thing": ("chair", "fork", "glass", "iron", "jacket", "kite", "lamp")}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with a few merges (so that words are not all single bytes) and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"the {word} is a kind of {word}" for word in WORDS], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def write_base(folder: Path, seed: int = 0, tied: bool = True, **changes: Any) -> Path:
    """A Llama of some 0.2 M random parameters with tokenizer, as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(values | changes)))
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_expert(base: Path, folder: Path, seed: int, size: float = 0.1) -> Path:
    """The base with seeded normal noise, `size` times each tensor's own standard deviation, added to its matrices."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        if tensors[name].dim() == 2:
            noise = torch.randn(tensors[name].shape, generator=draw)
            tensors[name] = tensors[name] + size * tensors[name].std() * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(base: Path, folder: Path, seed: int, rank: int = 2, alpha: float = 4.0) -> Path:
    """A LoRA adapter in PEFT's format on every attention and feed-forward matrix of the base; both factors nonzero."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(base / "model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    targets = [name for name in sorted(tensors) if name.endswith("_proj.weight")]
    for name in targets:
        rows, columns = tensors[name].shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=draw) / columns**0.5
        factors[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=draw) * 0.05
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": sorted({name.split(".")[-2] for name in targets}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_experts(base: Path, folder: Path, count: int) -> list[Path]:
    """`count` experts: the last is a LoRA adapter, the others full checkpoints."""
    full = [write_expert(base, folder / f"expert-{number}", seed=number + 1) for number in range(count - 1)]
    return [*full, write_adapter(base, folder / f"expert-{count - 1}", seed=count)]


# --- tasks ------------------------------------------------------------------------------------------------------------

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {train: data/choice.train.jsonl, validation: data/choice.validation.jsonl, test: data/choice.test.jsonl}
training_split: train
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""

WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs:
  data_files: {train: data/write.train.jsonl, validation: data/write.validation.jsonl, test: data/write.test.jsonl}
training_split: train
validation_split: validation
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""


def write_tasks(folder: Path, items: int = 40) -> Path:
    """Two lm-eval tasks of `items` items a split: `tiny_choice` (options of several and of one token), `tiny_write`."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "tiny_choice.yaml").write_text(CHOICE.lstrip())
    (folder / "tiny_write.yaml").write_text(WRITE.lstrip())
    for offset, split in enumerate(("train", "validation", "test")):
        choice, write = [], []
        for item in range(items):
            number = offset * items + item
            word, other = WORDS[number % 12], WORDS[(number * 7 + 5) % 12]
            options = [other, word, "q", "the " + WORDS[(number * 5 + 3) % 12]][: 3 + number % 2]
            question = f"{number}: here are {other} and {word}. The last is"
            choice.append({"question": question, "options": options, "answer": 1})
            write.append({"question": f"Say {word} and {other} {number}:", "answer": f"{word}, {other}"})
        for kind, documents in (("choice", choice), ("write", write)):
            text = "".join(json.dumps(document) + "\n" for document in documents)
            (folder / "data" / f"{kind}.{split}.jsonl").write_text(text)
    return folder
