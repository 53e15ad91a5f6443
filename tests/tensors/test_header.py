"""Headers of safetensors files: what the library refuses is refused, in words that name the tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergecore.checkpoints.snapshot import read_snapshot
from mergecore.checkpoints.sources.local import LocalSource
from mergecore.errors import SourceError
from mergecore.tensors.header import parse_header

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {**F32, "data_offsets": [8, 16]}


def file_of(header: Any, data: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * data


def parsed(content: bytes) -> dict[str, Any]:
    return parse_header(lambda start, size: content[start : start + size], len(content), "file")


REFUSED: dict[str, tuple[Any, int, str]] = {
    "overlapping": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, 12, "tensors 'a' and 'b' overlap by 4 bytes"),
    "the same bytes": ({"a": F32, "b": F32}, 8, "tensors 'a' and 'b' overlap by 8 bytes"),
    "a gap": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, 20, "4 bytes between tensors 'a' and 'b' that belong"),
    "a gap before": ({"a": NEXT}, 16, "8 bytes before tensor 'a' that belong to none"),
    "trailing bytes": ({"a": F32}, 9, "1 bytes after its last tensor 'a' that belong to none"),
    "bytes and no tensor": ({}, 3, "3 bytes and no tensor"),
    "too short": ({"a": F32}, 7, "is truncated: tensor 'a' ends after"),
    "a name twice": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[0],'
                     b'"data_offsets":[0,0]}}', 8, r"\('a' stands there twice\)"),
    "a key twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "'dtype' stands there tw"),
    "a fractional offset": ({"a": {**F32, "data_offsets": [0.0, 8]}}, 8, r"'a' has data_offsets \[0.0, 8\]: whole numb"),
    "a fractional shape": ({"a": {**F32, "shape": [2.0]}}, 8, r"'a' has shape \[2.0\]: whole numbers"),
    "a Boolean shape": ({"a": {**F32, "shape": [2, True]}}, 8, r"'a' has shape \[2, True\]: whole numbers"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 8, 8]}}, 8, r"data_offsets \[0, 8, 8\]: first and last byte"),
    "offsets backwards": ({"a": {**F32, "data_offsets": [8, 0]}}, 8, r"data_offsets \[8, 0\]: first and last byte"),
    "UTF-16": (json.dumps({"a": F32}).encode("utf-16"), 8, "it does not begin with '{'"),
    "Latin-1": (b'{"\xe4":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "can't decode byte 0xe4"),
    "Infinity": (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', 8, "Infinity is no number"),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8, "NaN is no number"),
    "a giant number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', 8, "Exceeds the limit"),
    "a product beyond any file": ({"a": {**F32, "shape": [2**40, 2**40]}}, 8, r"8 bytes for shape"),
    "many dimensions": ({"a": {**F32, "shape": [1] * 65}}, 8, "65 dimensions"),
    "a list": (b"[1]", 0, "does not begin with '{'"),
    "blanks first": (b'  {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "does not begin with '{'"),
    "an entry that is a list": ({"a": [1]}, 0, "tensor 'a' is no mapping"),
    "a dtype that is a list": ({"a": {**F32, "dtype": ["F32"]}}, 8, "has dtype .'F32'., which cannot be read"),
    "metadata that is no text": ({"a": F32, "__metadata__": {"x": 1}}, 8, "__metadata__ must be a mapping of text"),
    "nested": (b'{"a":' + b"[" * 200_000, 0, "it is nested too deep"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    header, data, said = REFUSED[case]
    content = file_of(header, data)
    with pytest.raises(SourceError, match=said) as raised:
        parsed(content)
    assert str(raised.value).startswith("file")
    assert len(str(raised.value)) < 400
    stricter = {"a name twice", "a key twice", "many dimensions", "blanks first"}
    (tmp_path / "file").write_bytes(content)
    if case not in stricter:
        with pytest.raises((SafetensorError, RecursionError)), safe_open(tmp_path / "file", "pt"):
            pass


def test_order_names_and_empty_tensors_are_free() -> None:
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [8, 8]}
    scalar = {"dtype": "I64", "shape": [], "data_offsets": [16, 24]}
    tensors = parsed(file_of({"z": F32, "s": scalar, "e": empty, "a": NEXT, "__metadata__": {"format": "pt"}}, 24))
    start = tensors["z"][1]
    assert {name: offset - start for name, (_, offset) in tensors.items()} == {"z": 0, "e": 8, "a": 8, "s": 16}


# --- indexes and the files that they name -------------------------------------------------------------------------


def checkpoint(folder: Path, weight_map: Any = None, single: bool = False) -> LocalSource:
    """Two shards with an index, and perhaps a single file beside them."""
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    if single:
        save_file({"a": torch.full((2,), 7.0)}, folder / "model.safetensors")
    if weight_map is not None:
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return LocalSource(folder)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_an_index_names_what_its_shards_hold(tmp_path: Path) -> None:
    assert set(read_snapshot(checkpoint(tmp_path / "good", {"a": FIRST, "b": SECOND})).tensors) == {"a", "b"}
    with pytest.raises(
        SourceError, match=r"names 1 tensors that the shards do not hold, the first being 'c' in .*: no"
    ):
        read_snapshot(checkpoint(tmp_path / "more", {"a": FIRST, "b": SECOND, "c": SECOND}))
    with pytest.raises(SourceError, match=r"the first being 'a' in model-00002.*: no file that it names holds it"):
        read_snapshot(checkpoint(tmp_path / "astray", {"a": SECOND, "b": SECOND}))


@pytest.mark.parametrize(
    "index", ["[" * 100_000, '{"weight_map": {"a": {"b": "c"}}}', '{"weight_map": {"a": [1]}}', '{"weight_map": "x"}',
              '{"weight_map": {"a": 1}}', "[]", '{"weight_map": ' + "9" * 5000 + "}"]
)  # fmt: skip
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"index\.json is not an index: .*fetch it again"):
        checkpoint(tmp_path / "model", index)


def test_a_single_file_beside_an_index_is_what_transformers_reads(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", {"a": FIRST, "b": SECOND}, single=True)
    assert set(source.files) == {"model.safetensors"}
    assert set(read_snapshot(source).tensors) == {"a"}
