"""Keeps what the sweeps behind docs/which-method.md have found, and makes the tables and figures of that page from it.

    python examples/which_method.py --keep    # after the sweeps: docs/which-method/*.csv anew from the store
    python examples/which_method.py           # the tables of the page, and docs/images/which-method-*.png, anew from
    those

The page holds each table between two comments that name it; what is outside of them is written by hand.
"""

import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent
DOCS = EXAMPLES.parent / "docs"
PAGE = DOCS / "which-method.md"
KEPT = DOCS / "which-method"
SWEEPS = ("methods", "digits", "digits_as_merged")
"""The specs in examples/, and the files in docs/which-method/ that their results are kept in."""
MEASURES = ("held_in_normalised", "held_out_normalised", "held_in_raw", "held_out_raw")
SHORT = {measure: measure.replace("_normalised", "") for measure in MEASURES}
COUNTS = (2, 4, 8)
UNSEEN = {
    "methods": ("held_out", "held-out", "score on held-out tasks ÷ score of the base"),
    "digits": ("upright", "upright", "share of upright digits that is read right: what the base knew"),
}
"""What is shown beside the held-in score: the column, its name in tables and in figures."""
COLOURS = {2: "#0072B2", 4: "#E69F00", 8: "#D55E00"}
MARKERS = {2: "o", 4: "s", 8: "D"}
REFERENCES = {"base": ":", "multitask": "--"}
MODEL = {
    "base": "base",
    "multitask": "one model trained on all tasks",
    "mean expert": "the experts, each on its own task",
}

Row = Mapping[str, str]


# --- from the store to a small file -----------------------------------------------------------------------------------


def kept_rows(spec: Path) -> list[dict[str, str]]:
    """A row for every point and baseline of a sweep, on test items: scores with 95 % intervals, the difference to the
    best method of that count, the factors chosen, and the score on each task, a mean over the draws that have it.

    Products have no model for held-out tasks. Cells that are not done yet are left out.
    """
    from flows.session.session import open_session
    from mergecore.reporting.averages import SplitScores
    from mergecore.reporting.curves import Sampled, points
    from mergecore.reporting.summary import DRAWS, NO_CHANCE, summarise
    from mergecore.sweeps.measured import collect

    sweep = collect(open_session(spec).frontier)
    tried = Counter((cell.method, cell.count) for cell in sweep.cells if cell.kind == "merge")
    failed = Counter((cell.method, cell.count) for cell in sweep.cells if cell.status == "failed")
    places = {(cell.method, cell.count, cell.subset) for cell in sweep.cells if cell.kind == "merge"}
    subsets = Counter((method, count) for method, count, _ in places)
    summary = summarise(sweep, "test")
    scores = SplitScores(sweep, "test", NO_CHANCE)
    averages = {cell.cell: scores.average(cell) for cell in sweep.cells}
    curve = {(point.method, point.count): point for point in points(sweep.cells, lambda cell: True)}
    sampled = Sampled(list(sweep.cells), scores, averages, DRAWS)
    tasks = [name.removeprefix("score/") for name in summary.cells.column_names if name.startswith("score/")]
    rows = summary.curve.to_pylist()
    best = {}
    for row in rows:
        if averages[row["cells"][0]].held_out.measured:  # a product is no rival of a model
            best[row["count"]] = max(
                best.get(row["count"], row), row, key=lambda candidate: candidate["held_in_normalised"]
            )
    rows_found = []
    for row in (*summary.baselines.to_pylist(), *rows):
        kind, place = row.get("kind", "merge"), (row.get("method"), row.get("count"))
        kept = {"method": row.get("method") or row["name"], "kind": kind, "count": str(row.get("count", ""))}
        kept["chosen"] = _chosen(json.loads(row["values"])) if tried[place] > subsets[place] else ""
        kept["tried"], kept["failed"] = (str(tried[place]), str(failed[place])) if kind == "merge" else ("", "")
        for measure in MEASURES:
            for end in ("", "_low", "_high"):
                kept[SHORT[measure] + end] = _number(row[measure + end])
        behind: Mapping[str, Any] = {}
        if row.get("count") in best:
            first = best[row["count"]]
            behind = sampled.difference(curve[place], curve[first["method"], first["count"]], DRAWS)
        for end in ("", "_low", "_high"):
            kept[f"behind_best{end}"] = _number(behind.get(f"held_in_normalised_difference_to_average{end}"))
        for task in tasks:
            means = [value for cell in row["cells"] if (value := scores.mean(cell, task)) is not None]
            kept[task] = _number(sum(means) / len(means)) if means else ""
        rows_found.append(kept)
    return rows_found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".rstrip("0").rstrip(".")


def _chosen(values: Sequence[Mapping[str, Any]]) -> str:
    """The factor that validation items chose, of each subset: '0.5' or '0.3–0.5'; '' where the method has none."""
    names = [name for name in ("scale", "learning_rate", "t") if name in values[0]]
    factors = sorted({value[names[0]] for value in values}) if names else []
    return "–".join(f"{value:g}" for value in dict.fromkeys([*factors[:1], *factors[-1:]]))


def keep(names: Iterable[str]) -> None:
    KEPT.mkdir(exist_ok=True)
    for name in names:
        rows = kept_rows(EXAMPLES / f"{name}.yaml")
        with (KEPT / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


# --- tables -----------------------------------------------------------------------------------------------------------


def read(name: str) -> list[Row]:
    """The rows that were kept of a sweep."""
    with (KEPT / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merges(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """Method → number of experts → row, the best method of the largest pools first; products after models."""
    merged_rows: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["kind"] == "merge":
            merged_rows.setdefault(row["method"], {})[int(row["count"])] = row
    return dict(sorted(merged_rows.items(), key=lambda item: _place(item[1])))


def _place(by_count: Mapping[int, Row]) -> tuple[Any, ...]:
    largest = max(by_count)
    shown = [float(by_count[count]["held_in"]) for count in COUNTS if count in by_count] or [0.0]
    return is_product(by_count), -largest, -sum(shown) / len(shown)


def is_product(by_count: Mapping[int, Row]) -> bool:
    """Whether what is made is a model for each task."""
    return not any(row["held_out"] for row in by_count.values())


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def score_table(name: str) -> str:
    """Methods by number of experts: held-in and held-out; bold where the best is ahead by no more than chance."""
    by_method = merges(read(name))
    chosen = (
        ["factor at 2, 4, 8"]
        if any(row["chosen"] for by_count in by_method.values() for row in by_count.values())
        else []
    )
    side, said, _ = UNSEEN[name]
    sides = [f"{side}, {count}" for side in ("held-in", said) for count in COUNTS]
    rows = []
    for method, by_count in by_method.items():
        if max(by_count) == 1:
            continue
        cells = [_held_in(by_count.get(count), is_product(by_count)) for count in COUNTS]
        cells += [_two(by_count[count][side]) if count in by_count else "" for count in COUNTS]
        factors = ", ".join(
            by_count[count]["chosen"] for count in COUNTS if count in by_count and by_count[count]["chosen"]
        )
        rows.append([method + (" (product)" if is_product(by_count) else ""), *cells, *([factors] if chosen else [])])
    return grid(["method", *sides, *chosen], rows)


def unmeasured(name: str) -> str:
    """Which merges of the spec have no score yet, as a sentence."""
    from mergecore.spec.sweep import parse_spec
    from mergecore.spec.yaml_files import read_yaml

    variants = parse_spec(read_yaml(EXAMPLES / f"{name}.yaml"), name).variants
    known = merges(read(name))
    left = {
        variant.label: [count for count in variant.counts if count not in known.get(variant.label, {})]
        for variant in variants
    }
    said = [f"`{label}` with {' and '.join(map(str, counts))}" for label, counts in left.items() if counts]
    total = sum(len(variant.counts) for variant in variants)
    if not said:
        return f"All {total} merges of the spec are measured."
    missing = sum(map(len, left.values()))
    measured = f"{total - missing} of the spec's {total} merges are measured"
    return f"{measured}; the same command goes on with: {', '.join(said)}."


def _held_in(row: Row | None, product: bool) -> str:
    if row is None:
        return ""
    near = not product and float(row["behind_best_high"] or "-1") >= 0
    return f"**{_two(row['held_in'])}**" if near else _two(row["held_in"])


def _two(text: str) -> str:
    return f"{float(text):.2f}" if text else "–"


def reference_table(name: str) -> str:
    """Base, multitask model and experts, as they stand; and what one expert and the base alone make."""
    side, said, _ = UNSEEN[name]
    rows = []
    for row in read(name):
        if row["kind"] in MODEL or (row["kind"] == "merge" and row["count"] == "1"):
            model = MODEL.get(row["kind"]) or f"{row['method']}: base and one expert"
            rows.append([model, *(_two(row[key]) for key in ("held_in_raw", "held_in", side))])
    return grid(["", "share right on its experts' tasks", "÷ the own experts' shares", said], rows)


def task_table(name: str) -> str:
    """The score on each task of every merge of the most experts, and of base, multitask model and experts."""
    rows = read(name)
    tasks = [key for key in rows[0] if key not in _columns()]
    wanted = [row for row in rows if row["kind"] in ("base", "multitask")]
    table = [[MODEL.get(row["kind"], row["method"]), *(_two(row[task]) for task in tasks)] for row in wanted]
    own = [next((row[task] for row in rows if row["kind"] == "expert" and row["method"] == task), "") for task in tasks]
    table.append(["its own expert", *map(_two, own)])
    for method, by_count in merges(rows).items():
        if max(COUNTS) in by_count:
            table.append([method, *(_two(by_count[max(COUNTS)][task]) for task in tasks)])
    return grid(["", *tasks], table)


def _columns() -> set[str]:
    ends = ("", "_low", "_high")
    measures = (*SHORT.values(), "behind_best")
    return {
        "method",
        "kind",
        "count",
        "chosen",
        "tried",
        "failed",
        *(measure + end for measure in measures for end in ends),
    }


def recalibration_table() -> str:
    """The digits with BatchNorm statistics worked out anew, and as they were merged."""
    anew, merged = merges(read("digits")), merges(read("digits_as_merged"))
    rows = []
    for method, by_count in anew.items():
        if method in merged:
            pairs = [(by_count.get(count), merged[method].get(count)) for count in COUNTS]
            rows.append(
                [method, *(text for pair in pairs for text in (_two(pair[0]["held_in"]), _or_nothing(pair[1])))]
            )
    return grid(["method", *(f"{count}, {how}" for count in COUNTS for how in ("anew", "as merged"))], rows)


def _or_nothing(row: Row | None) -> str:
    if row is None:
        return "NaN"
    return _two(row["held_in"]) + (f" ({row['failed']} of {row['tried']} NaN)" if row["failed"] != "0" else "")


FIGURES = {
    "methods": "SmolLM2-135M-Instruct, LoRA experts of rank 4, 100 test items a task, one draw of experts",
    "digits": "A network of 68,000 parameters with BatchNorm, full fine-tunes, 500 test items a task, "
    "three draws of experts",
}
TABLES = {
    "methods scores": lambda: score_table("methods"),
    "methods unmeasured": lambda: unmeasured("methods"),
    "methods references": lambda: reference_table("methods"),
    "methods tasks": lambda: task_table("methods"),
    "digits scores": lambda: score_table("digits"),
    "digits references": lambda: reference_table("digits"),
    "digits recalibration": recalibration_table,
}


def page(text: str) -> str:
    """The page with every table made anew. Raises KeyError for a table that nobody makes."""
    return re.sub(
        r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(name: str, title: str, path: Path) -> None:
    """A row for each method, a mark for each number of experts: held-in on the left, held-out on the right."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(name)
    lines = {method: by_count for method, by_count in merges(rows).items() if max(by_count) > 1}
    with matplotlib.style.context(["default", {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}]):
        figure = Figure(figsize=(9.6, 1.5 + 0.235 * len(lines)))
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        unseen, _, said = UNSEEN[name]
        labels = {"held_in": "score on the experts' tasks ÷ score of the own expert", unseen: said}
        for panel, (side, label) in zip(panels, labels.items(), strict=True):
            for place, by_count in enumerate(lines.values()):
                panel.axhline(place, color="#eeeeee", linewidth=0.8, zorder=0)
                for count in (count for count in COUNTS if count in by_count and by_count[count][side]):
                    value = float(by_count[count][side])
                    low, high = (float(by_count[count].get(side + end, value)) for end in ("_low", "_high"))
                    spot = place + {2: -0.22, 4: 0.0, 8: 0.22}[count]
                    panel.plot([low, high], [spot, spot], color=COLOURS[count], linewidth=1, alpha=0.6)
                    panel.plot(value, spot, MARKERS[count], color=COLOURS[count], markersize=4.5)
            for row in (row for row in rows if row["kind"] in REFERENCES and row[side]):
                panel.axvline(float(row[side]), color="#555555", linestyle=REFERENCES[row["kind"]], linewidth=1)
            panel.set(xlabel=label, ylim=(len(lines) - 0.5, -0.5))
        panels[0].set_yticks(range(len(lines)), list(lines))
        panels[0].tick_params(axis="y", length=0)
        handles = [panels[0].plot([], [], MARKERS[n], color=COLOURS[n], label=f"{n} experts")[0] for n in COUNTS]
        for kind, line in REFERENCES.items():
            if any(row["kind"] == kind for row in rows):
                handles += panels[0].plot([], [], line, color="#555555", label=MODEL[kind])
        figure.suptitle(title, x=0.01, y=0.995, ha="left", va="top", fontsize=10)
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=8.5)
        figure.tight_layout(rect=(0, 0.035, 1, 0.99))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", action="store_true", help="first read the finished sweeps anew from their store")
    if parser.parse_args().keep:
        keep(SWEEPS)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name, title in FIGURES.items():
        draw(name, title, DOCS / "images" / f"which-method-{name}.png")


if __name__ == "__main__":
    main()
