"""Counter-based random draws: a function of (seed, expert, tensor, index)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mergecore.identity.keys import canonical

# --- random numbers as a function -----------------------------------------------------------------------------------


def random_key(seed: int, expert: str, tensor: str) -> tuple[int, int]:
    """Return two 32-bit words that stand for (seed, expert id, tensor name) in `random_words`."""
    state = hashlib.sha256(canonical([seed, expert, tensor])).digest()
    return int.from_bytes(state[:4], "big"), int.from_bytes(state[4:8], "big")


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift int32 words to the right and fill with zeros; torch's own shift keeps the sign."""
    return (words >> bits) & ((1 << (32 - bits)) - 1)


def random_words(key: tuple[int, int], start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return uniform int32 words for the flat indices start … start+count−1, shape (count,).

    They depend on key and index only, so they are the same for any window, order, worker or device.
    """
    high = start >> 32
    if (start + count - 1) >> 32 != high and count > 0:
        cut = ((high + 1) << 32) - start
        return torch.cat([random_words(key, start, cut, device), random_words(key, start + cut, count - cut, device)])
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return words_at(index, *word_key(key, start))


def word_key(key: tuple[int, int], start: int) -> tuple[int, int]:
    """Return the two int32 numbers that `words_at` takes for indices from `start` to the next multiple of 2^32.

    Indices beyond 2^32 enter through their high word, which is folded into the key.
    """
    return _signed(key[0] ^ ((start >> 32) * 0x9E3779B9)), _signed(key[1])


def words_at(index: Tensor, first: int, second: int) -> Tensor:
    """Return uniform int32 words for int64 flat indices: two keyed rounds of a 32-bit avalanche hash."""
    words = index.to(torch.int32) ^ first
    for salt, (first_factor, second_factor) in ((second, (0x7FEB352D, 0x846CA68B)), (None, (0x21F0AAAD, 0xD35A2D97))):
        words = words ^ _shifted(words, 16)
        words = words * _signed(first_factor)
        words = words ^ _shifted(words, 15)
        words = words * _signed(second_factor)
        words = words ^ _shifted(words, 16)
        if salt is not None:
            words = words + salt
    return words


def drop_limit(rate: float) -> int:
    """Return the int32 limit L with P(word < L) = rate, to 2^-32. Integers are compared, never floats."""
    return _signed_limit(round(rate * (1 << 32)))


def _signed_limit(unsigned: int) -> int:
    return min(max(unsigned, 0), (1 << 32) - 1) - (1 << 31)
