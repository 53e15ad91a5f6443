"""mergekit's `chat_template`: Jinja text, a known name, or 'auto', the one that most of the models have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.vocabulary.tokenizer import template_of
from mergecore.errors import SpecError, nearest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "alpaca": ALPACA, "llama3": LLAMA3}
"""Templates by name, written from the formats' descriptions."""
NOT_HERE = ("exaone", "mistral")
"""Names that mergekit has besides; their formats differ between versions, so that the text has to be given."""


def chat_template(setting: str, models: Sequence[Snapshot], where: str) -> str | None:
    """The template's text, None where it is 'auto' and no model has one. Raises SpecError for what is no template."""
    if setting == "auto":
        templates = [text.strip() for text in map(template_of, models) if text]
        return Counter(templates).most_common(1)[0][0] if templates else None
    if setting in TEMPLATES:
        return TEMPLATES[setting]
    if setting in NOT_HERE:
        raise SpecError(
            f"{where}.chat_template: '{setting}' has more than one form; give the template's text, or 'auto'"
        )
    if "{" not in setting:
        raise SpecError(
            f"{where}.chat_template: '{setting}' is neither a template (Jinja) nor a name; "
            f"{nearest(setting, [*TEMPLATES, 'auto'])}"
        )
    return setting
