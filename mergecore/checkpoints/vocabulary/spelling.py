"""What tokens of different tokenizers have in common: the bytes that they stand for, or their role."""

from __future__ import annotations

import re

from mergecore.checkpoints.vocabulary.tokenizer import ROLES, Tokenizer

Meaning = tuple[str, str | bytes]
"""('role', bos_token), ('special', its name) or ('text', its bytes)."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte as sentencepiece spells it."""


def _byte_of_sign() -> dict[str, int]:
    """Return {sign: byte} of byte-level encodings: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF_SIGN = _byte_of_sign()


def meanings(tokenizer: Tokenizer) -> dict[str, tuple[Meaning, ...]]:
    """Return what each token stands for, the most telling first: its roles, its name or its text.

    A pad token is mostly another token as well: that role counts where a token has no other.
    """
    roles, added, kind = tokenizer.roles, tokenizer.added, tokenizer.kind
    actual: dict[str, tuple[Meaning, ...]] = {}
    for token in tokenizer.tokens:
        own = [role for role in ROLES if role in roles.get(token, ())]
        own = [role for role in own if role != "pad_token"] or own
        special = token in added and bool(added[token].get("special"))
        last: Meaning = ("special", token) if special or own else ("text", _text(token, kind, token in added))
        actual[token] = (*(("role", role) for role in own), last)
    return actual


def _text(token: str, kind: tuple[str, str], added: bool) -> bytes:
    """Return the bytes that a token stands for. kind: of its tokenizer. added: it is looked for as it is written."""
    name, spelling = kind
    if added:
        return token.encode()
    if spelling == "bytes":
        if all(sign in BYTE_OF_SIGN for sign in token):
            return bytes(BYTE_OF_SIGN[sign] for sign in token)
        return token.encode()
    if byte := BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    if name == "WordPiece":
        prefix = spelling.removesuffix("…")
        return token.removeprefix(prefix).encode() if prefix and token.startswith(prefix) else f" {token}".encode()
    return token.replace("▁", " ").encode() if spelling.startswith("▁") else token.encode()


def by_meaning(tokenizer: Tokenizer) -> dict[Meaning, int]:
    """Return the id of each meaning. Where several tokens mean the same, the one that is no spelled byte has it, and
    of these the first.
    """
    ids: dict[Meaning, int] = {}
    tokens = tokenizer.tokens
    every = meanings(tokenizer)
    for token in sorted(tokens, key=lambda token: (BYTE.fullmatch(token) is not None, tokens[token])):
        for meaning in every[token]:
            ids.setdefault(meaning, tokens[token])
    return ids


def matches(donor: Tokenizer, model: Tokenizer) -> dict[int, int]:
    """Return {id in the donor: id in the model} of the tokens that mean the same in both."""
    known, every, shared = by_meaning(model), meanings(donor), dict[int, int]()
    for token, number in sorted(donor.tokens.items(), key=lambda entry: entry[1]):
        same = next((known[meaning] for meaning in every[token] if meaning in known), None)
        if same is not None:
            shared[number] = same
    return shared
