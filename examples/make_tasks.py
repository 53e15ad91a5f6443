"""Generates the tasks of the examples: eight that experts were trained on and five that none of them saw.

    python examples/make_tasks.py                # two seconds, no network, standard library only

Each task becomes `tasks/<task>.yaml`, a task file of lm-evaluation-harness, and `tasks/data/<task>.<split>.jsonl`, whose lines hold
`prompt`, `options` (words) and `answer` (the index of the right one). Prompts are plain text to be continued by one option; every
option is one token of SmolLM2 with a space before it, so numbers are written as words.

Held-in tasks have 2000 training, 200 validation and 500 test items, held-out ones only the latter two. No prompt is in two splits; the
words of category, sentiment, category_new and mood and the numerals of roman are divided among the splits too, so a test item is about a
word that was never trained on. Right answers are spread evenly over the classes and over the places in the list of options.

The items are a function of this file alone: random choices are SHA-256 digests of (task, split, counter), which no Python version changes.
"""

# ruff: noqa: SIM905 (word lists are read and extended more easily as running text)
import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

DATA_SHA256 = "075c325227eb3dc9124363635be9a8c51db5c70bd0ec2b471291d9665469430c"  # over all data files in the order of their names: what the scores in experts/ were measured on
SIZES = {"train": 2000, "validation": 200, "test": 500}

PEOPLE = """Anna Ben Carl Diana Emma Frank Grace Henry Irene Jack Kate Leo Mary Nina Oscar Paul Rachel Sam Tina Victor Wendy Adam Bella
Clara David Ella Fred Gina Hugo Ivan Julia Karen Lucas Martin Nora Oliver Peter Rose Simon Thomas""".split()
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty""".split()
COLORS = "red blue green yellow white black brown pink orange purple gray gold".split()
COUNTABLES = (
    "coins books keys pens stones apples cards shells stamps balls cups rings boxes clocks hats marbles".split()
)
OBJECTS = "cup ring lamp book ball hat box bag pen chair bottle key clock shirt bowl phone car coat kite plate".split()
INSTRUMENTS = "violin piano guitar trumpet flute drum cello clarinet harp banjo trombone saxophone".split()
REVIEWED = """show movie book hotel meal concert play restaurant phone game trip lecture album camera museum tour party lesson novel
laptop cruise dinner garden song""".split()
NOUNS = """table river house dog car tree road fish bird lamp stone chair door glass horse cloud bread field paper king ship ring star
moon wall train bridge garden clock window bottle sheep box hat snow rain school church apple rose mountain island coat knife wheel""".split()

CATEGORIES = {
    "tool": """hammer pliers wrench screwdriver chisel saw drill axe shovel rake hoe crowbar mallet clamp sander sickle trowel spade
        hatchet ladder vise anvil pickaxe scythe spanner hacksaw tongs awl jigsaw grinder sledgehammer wheelbarrow scissors pitchfork
        toolbox plunger""",
    "food": """bread cheese pasta rice soup pizza sandwich pancake sausage noodles salad cake cookie butter yogurt omelette burrito
        lasagna waffle muffin bagel porridge stew dumpling pie croissant taco pudding cereal bacon pretzel donut hamburger risotto
        meatball brownie""",
    "animal": """dog cat horse tiger lion elephant rabbit giraffe zebra wolf fox bear deer otter camel kangaroo monkey goat sheep pig cow
        squirrel hedgehog beaver panda leopard donkey raccoon moose gorilla badger hamster crocodile penguin dolphin owl""",
    "clothing": """shirt sweater jacket trousers skirt dress coat hat scarf gloves socks jeans blouse vest hoodie shorts cardigan pajamas
        tuxedo mittens raincoat cape kimono leggings swimsuit necktie sweatshirt overalls gown beanie poncho blazer stockings robe apron
        sandals""",
}
NEW_CATEGORIES = {
    "vehicle": """car truck bus train bicycle motorcycle tram van taxi scooter ambulance tractor helicopter airplane ship ferry yacht
        canoe submarine limousine minivan jeep sailboat kayak""",
    "instrument": """violin piano guitar trumpet flute drum cello clarinet harp saxophone trombone banjo tuba oboe accordion mandolin
        ukulele xylophone bassoon harmonica viola tambourine lute bugle""",
    "furniture": """chair table sofa bed desk wardrobe bookshelf dresser couch armchair stool bench cupboard nightstand recliner ottoman
        bookcase sideboard cabinet loveseat footstool futon crib hammock""",
    "sport": """tennis football basketball hockey golf rugby cricket baseball volleyball badminton boxing wrestling fencing swimming skiing
        surfing cycling rowing archery judo karate handball gymnastics squash""",
}
REVIEW_WORDS = {
    "good": """fantastic wonderful excellent great lovely superb amazing brilliant delightful charming enjoyable splendid terrific pleasant
        marvelous outstanding impressive fabulous magnificent perfect beautiful exciting refreshing awesome stunning engaging satisfying
        remarkable thrilling exquisite""",
    "bad": """nasty awful terrible horrible dreadful boring disappointing ugly poor lousy unpleasant disgusting annoying dull tedious
        atrocious pathetic horrid appalling bland frustrating shoddy dismal mediocre messy painful weak clumsy dirty ridiculous""",
}
FEELINGS = {
    "good": "happy glad joyful cheerful pleased delighted content excited hopeful relaxed proud grateful thrilled merry peaceful calm",
    "bad": "unhappy sad angry gloomy upset anxious lonely worried afraid hurt depressed bitter jealous ashamed furious miserable",
}

Value = TypeVar("Value")
Item = tuple[str, list[str], str]  # prompt, options, the right option


class Draws:
    """A stream of random choices that depends on its name alone."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def below(self, bound: int) -> int:
        self.count += 1
        return int.from_bytes(hashlib.sha256(f"{self.name}/{self.count}".encode()).digest()[:8], "big") % bound

    def pick(self, values: Sequence[Value]) -> Value:
        return values[self.below(len(values))]

    def some(self, values: Sequence[Value], number: int) -> list[Value]:
        """`number` different values in random order."""
        rest = list(values)
        return [rest.pop(self.below(len(rest))) for _ in range(number)]


def share(words: str, split: str, key: str, held_out: bool) -> list[str]:
    """The words of one split: 60, 15 and 25 % for training, validation and test; 30 and 70 % where there is no training."""
    names = words.split()
    shuffled = Draws(f"share/{key}").some(names, len(names))
    first, second = (0, round(len(names) * 0.30)) if held_out else (round(len(names) * 0.60), round(len(names) * 0.75))
    return {"train": shuffled[:first], "validation": shuffled[first:second], "test": shuffled[second:]}[split]


def near(draws: Draws, answer: int, low: int, high: int) -> list[str]:
    """Four neighbouring number words around the answer, all between `low` and `high`."""
    start = answer - draws.below(4)
    start = min(max(start, low), high - 3)
    return draws.some(NUMBERS[start : start + 4], 4)


# One function per task. `turn` counts the items and picks the class of each, so that the classes come out even.


def classified(draws: Draws, classes: dict[str, str], turn: int, share_of: Callable[[str, str], list[str]]) -> Item:
    options = list(classes)
    answer = options[turn % len(options)]
    return f"{draws.pick(PEOPLE)} wrote {draws.pick(share_of(classes[answer], answer))} in the column", options, answer


def category(draws: Draws, split: str, turn: int) -> Item:
    return classified(draws, CATEGORIES, turn, lambda words, key: share(words, split, key, held_out=False))


def category_new(draws: Draws, split: str, turn: int) -> Item:
    return classified(draws, NEW_CATEGORIES, turn, lambda words, key: share(words, split, key, held_out=True))


def judged(draws: Draws, good: list[str], bad: list[str], turn: int) -> tuple[str, list[str], str]:
    """Two adjectives that agree or not, the options, and the verdict on them."""
    options = ["good", "bad", "mixed"]
    answer = options[turn % 3]
    if answer == "mixed":
        pair = draws.some([draws.pick(good), draws.pick(bad)], 2)
    else:
        pair = draws.some(good if answer == "good" else bad, 2)
    return " and ".join(pair), options, answer


def sentiment(draws: Draws, split: str, turn: int) -> Item:
    good, bad = (share(REVIEW_WORDS[side], split, f"review/{side}", held_out=False) for side in ("good", "bad"))
    pair, options, answer = judged(draws, good, bad, turn)
    return f"The {draws.pick(REVIEWED)} was {pair}. The review is", options, answer


def mood(draws: Draws, split: str, turn: int) -> Item:
    good, bad = (share(FEELINGS[side], split, f"feeling/{side}", held_out=True) for side in ("good", "bad"))
    pair, options, answer = judged(draws, good, bad, turn)
    return f"{draws.pick(PEOPLE)} felt {pair}. The mood is", options, answer


def addends(draws: Draws, turn: int) -> tuple[int, int]:
    """Two numbers from two to nine whose sum goes round from four to eighteen."""
    total = 4 + turn % 15
    low, high = max(2, total - 9), min(9, total - 2)
    first = low + draws.below(high - low + 1)
    return first, total - first


def addition(draws: Draws, split: str, turn: int) -> Item:
    first, second = addends(draws, turn)
    name, things = draws.pick(PEOPLE), draws.pick(COUNTABLES)
    prompt = f"{name} has {NUMBERS[first]} {things} and gets {NUMBERS[second]} more. Now {name} has"
    return prompt, near(draws, first + second, 4, 18), NUMBERS[first + second]


def together(draws: Draws, split: str, turn: int) -> Item:
    first, second = addends(draws, turn)
    (person, other), things = draws.some(PEOPLE, 2), draws.pick(COUNTABLES)
    prompt = f"{person} has {NUMBERS[first]} {things}. {other} has {NUMBERS[second]} {things}. Together they have"
    return prompt, near(draws, first + second, 4, 18), NUMBERS[first + second]


def roman(draws: Draws, split: str, turn: int) -> Item:
    tens = 1 + turn % 9
    units = {"train": "0124579", "validation": "3", "test": "68"}[split]
    numeral = ["", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC"][tens]
    numeral += ["", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"][int(draws.pick(units))]
    prompt = f"{draws.pick(PEOPLE)} reads the Roman numeral {numeral}. As a number its first digit is"
    others = draws.some([word for word in NUMBERS[1:10] if word != NUMBERS[tens]], 3)
    return prompt, draws.some([NUMBERS[tens], *others], 4), NUMBERS[tens]


def owners(draws: Draws, things: list[str]) -> tuple[str, list[str]]:
    """A sentence in which four people each have a coloured thing, and the colours in that order."""
    people, colors = draws.some(PEOPLE, 4), draws.some(COLORS, 4)
    clauses = [
        f"{name} has {'an' if color == 'orange' else 'a'} {color} {thing}"
        for name, color, thing in zip(people, colors, things, strict=True)
    ]
    return "; ".join(clauses) + ".", colors


def lookup(draws: Draws, split: str, turn: int) -> Item:
    things = draws.some(OBJECTS, 4)
    story, colors = owners(draws, things)
    return f"{story} The color of the {things[turn % 4]} is", draws.some(colors, 4), colors[turn % 4]


def instrument_colour(draws: Draws, split: str, turn: int) -> Item:
    things = draws.some(OBJECTS, 4)
    things[turn % 4] = draws.pick(INSTRUMENTS)
    story, colors = owners(draws, things)
    return f"{story} The color of the instrument is", draws.some(colors, 4), colors[turn % 4]


def counting(draws: Draws, split: str, turn: int) -> Item:
    number = 4 + turn % 4
    return f"List: {', '.join(draws.some(NOUNS, number))}. The number of words is", NUMBERS[4:8], NUMBERS[number]


def count_names(draws: Draws, split: str, turn: int) -> Item:
    number = 4 + turn % 4
    return f"Guests: {', '.join(draws.some(PEOPLE, number))}. The number of guests is", NUMBERS[4:8], NUMBERS[number]


def largest(draws: Draws, split: str, turn: int) -> Item:
    top = 4 + turn % 17
    words = draws.some([*draws.some(NUMBERS[1:top], 3), NUMBERS[top]], 4)
    return f"{draws.pick(PEOPLE)} writes {', '.join(words)}. The largest number is", draws.some(words, 4), NUMBERS[top]


def position(draws: Draws, split: str, turn: int) -> Item:
    words = draws.some(NOUNS, 4)
    which = turn % 4
    ordinal = ["first", "second", "third", "last"][which]
    return f"Words: {', '.join(words)}. The {ordinal} word is", draws.some(words, 4), words[which]


# What each task asks, for the head of its YAML file.
HELD_IN: dict[Callable[[Draws, str, int], Item], str] = {
    category: "which of four columns, named for classes of things, a word belongs in",
    sentiment: "whether a review with two adjectives is good, bad or mixed",
    addition: "the sum of two numbers of a short story",
    roman: "the first digit of a Roman numeral between ten and ninety-nine",
    lookup: "the color of one of four things that were named before",
    counting: "how many words a list has",
    largest: "the largest of four number words",
    position: "the first, second, third or last word of a list",
}
HELD_OUT: dict[Callable[[Draws, str, int], Item], str] = {
    category_new: "category with four classes that no expert saw",
    mood: "sentiment for what a person feels instead of a review",
    count_names: "counting for people instead of things",
    instrument_colour: "lookup where the thing is named by its category: needs two skills at once",
    together: "addition told of two people: shows how experts get in each other's way",
}


def items(task: Callable[[Draws, str, int], Item], split: str, taken: set[str]) -> Iterator[dict]:
    """The items of one split, none of whose prompts is in `taken`; adds its own there."""
    draws = Draws(f"{task.__name__}/{split}")
    items = []
    for turn in range(SIZES[split]):
        for _ in range(1000):
            prompt, options, answer = task(draws, split, turn)
            if prompt not in taken:
                break
        else:
            raise AssertionError(f"{task.__name__}.{split}: fewer than {SIZES[split]} different prompts")
        taken.add(prompt)
        items.append({"prompt": prompt, "options": options, "answer": options.index(answer)})
    # A limit takes the first items: in random order, or it would see the classes in turn and nothing else.
    yield from (items[index] for index in Draws(f"order/{task.__name__}/{split}").some(range(len(items)), len(items)))


def task_yaml(name: str, about: str, splits: list[str]) -> str:
    files = "\n".join(f"    {split}: data/{name}.{split}.jsonl" for split in splits)
    named = "\n".join(f"{'training' if split == 'train' else split}_split: {split}" for split in splits)
    return f"""# {name}: {about}. Written by make_tasks.py; paths are relative to this file.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
{files}
{named}
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def write_if_changed(path: Path, text: str) -> None:
    """Leaves a file that is already right untouched, so that digests remembered by its modification time stay good."""
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "tasks",
        help="folder to write (default: tasks/ beside this file)",
    )
    out = parser.parse_args().out
    texts: dict[str, str] = {}
    for task, about in {**HELD_IN, **HELD_OUT}.items():
        name = task.__name__
        taken: set[str] = set()
        splits = ["train", "validation", "test"] if task in HELD_IN else ["validation", "test"]
        write_if_changed(out / f"{name}.yaml", task_yaml(name, about, splits))
        for split in splits:
            before = len(taken)
            texts[f"{name}.{split}.jsonl"] = "".join(json.dumps(item) + "\n" for item in items(task, split, taken))
            assert len(taken) == before + SIZES[split]
    for name, text in texts.items():
        write_if_changed(out / "data" / name, text)
    digest = hashlib.sha256("".join(texts[name] for name in sorted(texts)).encode()).hexdigest()
    print(
        f"{out}: {len(HELD_IN)} held-in and {len(HELD_OUT)} held-out tasks, {sum(map(len, map(str.splitlines, texts.values())))} items, sha256 {digest}"
    )
    assert digest == DATA_SHA256, (
        "the items are not those the experts were trained on: train them again and record the digest"
    )


if __name__ == "__main__":
    main()
