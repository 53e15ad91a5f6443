"""The model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergecore.spec.yaml_files import as_yaml

DRAWN = {
    "tensors": "Random masks were drawn with these ids (`ids: tensors`): digests of the experts' tensors, however they "
    "lie in files.",
    "files": "Random masks were drawn with these ids (`ids: files`): digests of the experts' files. In other files the "
    "same tensors get other masks.",
}
"""What the card says of random masks, by the kind of id."""


def model_card(
    recipe: Mapping[str, Any],
    origin: Mapping[str, Any],
    scores: Mapping[str, float] | None = None,
    of_product: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """Return README.md of a merged model: its inputs with their digests, and the recipe as it can be run again.

    of_product: lines on what the product is, where it is no dense model. warnings: what is to be known of the inputs.
    """
    base = origin["base"]["source"]
    head = {"base_model": [base, *(expert["source"] for expert in origin["experts"])], "tags": ["merge", "mergeloom"]}
    lines = [
        "---",
        as_yaml(head).strip(),
        "---",
        "",
        f"# Merge of {len(origin['experts'])} experts by {recipe['method']}",
        "",
    ]
    lines += [
        "Made with Mergeloom. The recipe, as `mergeloom merge` takes it:",
        "",
        "```yaml",
        as_yaml(dict(recipe)).strip(),
        "```",
    ]
    lines += ["", "| input | source | SHA-256 of its weights |", "|---|---|---|"]
    lines += [f"| base | {base} | `{origin['base']['weights']}` |"]
    lines += [f"| {expert['name']} | {expert['source']} | `{expert['weights']}` |" for expert in origin["experts"]]
    if origin.get("looked_at"):
        lines += ["", f"Items that the merge was made with: {'; '.join(origin['looked_at'])}."]
        if any(" test items" in use for use in origin["looked_at"]):
            lines += ["It saw test items (*transductive*); compare it only with merges that say so."]
    if origin.get("kept_density"):
        kept = ", ".join(f"{name} {share:.4%}" for name, share in origin["kept_density"].items())
        lines += ["", f"Share of each task vector that the threshold kept: {kept}."]
    if origin.get("learned"):
        lines += ["", "Learned, with the experts in the order of the recipe:", ""]
        lines += ["```yaml", as_yaml(dict(origin["learned"])).strip(), "```"]
    for kind, ids in origin.get("drawn_with", {}).items():
        lines += ["", DRAWN[kind], "", "| expert | id |", "|---|---|"]
        named = [expert["name"] for expert in origin["experts"] if expert["name"] in ids]
        lines += [f"| {name} | `{ids[name]}` |" for name in named]
    lines += ["", *of_product] if of_product else []
    if warnings:
        lines += ["", "To be known of its inputs:", "", *(f"- {warning}" for warning in warnings)]
    if scores:
        lines += ["", "| score | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in scores.items()]
    return "\n".join(lines) + "\n"
