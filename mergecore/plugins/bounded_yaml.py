"""YAML that others wrote, read with bounds: the kind and size of the file, the values it stands for, its numbers."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from yaml.constructor import ConstructorError

from mergecore.errors import SpecError

LARGEST = 1 << 22
"""Bytes of a file at most."""
MOST_VALUES = 1_000_000
"""Values that a document may stand for at most, aliases counted as often as they are used."""
DEEPEST = 200
"""Collections inside each other at most."""
BITS = 64
"""Bits of a whole number at most."""


def check_ordinary(path: Path) -> None:
    """Raise SpecError where a path leads to a device, a pipe or a file too large. Raises OSError where to nothing."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise SpecError(f"{path} is no ordinary file, and it is read more than once; write its content to a file first")
    if status.st_size > LARGEST:
        raise SpecError(f"{path} has {status.st_size:,} bytes; a file of settings has {LARGEST:,} at most")


def read_text(path: Path) -> str:
    """Return the text of a file that a person wrote. Raises SpecError as above, OSError and UnicodeDecodeError."""
    check_ordinary(path)
    return path.read_text(encoding="utf-8")


def check_depth(stream: BinaryIO, loader: Any) -> None:
    """Raise ConstructorError where a document is nested too deep. libyaml would end the process."""
    depth = 0
    for event in yaml.parse(stream, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConstructorError(None, None, "it is nested too deep")


class BoundedConstructor(yaml.constructor.SafeConstructor):
    """Constructs values that take no more memory than a file can. It stands before a loader of PyYAML.

    Nine lines of aliases can stand for a thousand million values; so each use of an alias counts.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        """Construct a document. Raises ConstructorError where it stands for too many values, or holds itself."""
        _size(node, {})
        return super().construct_document(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Construct a whole number. Raises ConstructorError where it is none, or one of too many bits."""
        try:
            number = int(super().construct_yaml_int(node))
        except ValueError:
            number = 1 << BITS
        if abs(number) >= 1 << BITS:
            raise ConstructorError(None, None, f"not a number of {BITS} bits at most", node.start_mark)
        return number

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """Construct a text. Raises ConstructorError where no file could hold it: half of a surrogate pair."""
        text = str(super().construct_yaml_str(node))
        if not text.isascii() and any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
            raise ConstructorError(None, None, "a text that is no Unicode", node.start_mark)
        return text


BoundedConstructor.add_constructor("tag:yaml.org,2002:str", BoundedConstructor.construct_yaml_str)  # type: ignore[type-var]
BoundedConstructor.add_constructor("tag:yaml.org,2002:int", BoundedConstructor.construct_yaml_int)  # type: ignore[type-var]


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node stands for. known: of the nodes that were seen; 0 for those that are under way."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ConstructorError(None, None, "an alias stands inside what it stands for", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        total += sum(_size(key, known) + _size(value, known) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_size(item, known) for item in node.value)
    if total > MOST_VALUES:
        raise ConstructorError(None, None, f"it stands for more than {MOST_VALUES:,} values", node.start_mark)
    known[id(node)] = total
    return total
