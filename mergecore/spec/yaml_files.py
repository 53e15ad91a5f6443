"""Reads and writes YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mergecore.errors import SpecError
from mergecore.plugins.bounded_yaml import BoundedConstructor, read_text


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds. Raises SpecError with line and column where it is not YAML."""
    documents = read_documents(path)
    if len(documents) > 1:
        raise SpecError(
            f"{path} holds {len(documents)} documents (between lines of ---); only mergekit's form may have several"
        )
    return documents[0]


def read_documents(path: Path) -> tuple[dict[str, Any], ...]:
    """The mappings of a YAML file's documents, at least one. Raises SpecError with line and column."""
    try:
        loaded = list(yaml.load_all(read_text(path), Loader=_Loader))
    except FileNotFoundError:
        beside = sorted(other.name for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise SpecError(f"{path} does not exist" + (f"; there is {', '.join(beside[:5])}" if beside else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{path}{place}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise SpecError(f"{path} is not valid YAML: it is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # a date like 2026-99-99 is a ValueError
        raise SpecError(f"{path} is not valid YAML: {error}") from None
    documents = [document for document in loaded if document is not None]  # a file may begin or end with ---
    for document in documents or [None]:
        if not isinstance(document, dict):
            kind = "is empty" if document is None else f"holds a {type(document).__name__}"
            raise SpecError(f"{path} {kind}; a spec or recipe is a mapping of keys, as in `method: average`")
    return tuple(documents)


class _Loader(BoundedConstructor, yaml.SafeLoader):
    """YAML where a key that stands twice is an error: the first would be ignored without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def as_yaml(value: Any) -> str:
    """YAML text of plain values, keys in the order given."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
