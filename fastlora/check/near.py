"""Near duplicates among many texts: MinHash finds candidates, and each is then compared for what it is.

Two texts are near duplicates when the Jaccard similarity of their pieces, runs of three words, is at least the
threshold. Texts of under ten words are none: two short ones that differ in a word ask different things.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]

# Scripts that write no spaces between words: each character stands for one.
_WORD = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|"
    "[^\\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)
_RUN_WORDS = 3
_MIN_PIECES = 8
# 21 bands of 6: a pair of similarity 0.8 shares a band with a chance of 99.8%, one of 0.5 with 28%.
_BANDS, _BAND_ROWS = 21, 6
_PERMUTATIONS = 128
_CHUNK = 2000
_EARLIER = 16
"""Candidates per text and band: the texts before it that share the band."""
_SAMPLE = 2000
_BOILERPLATE_SHARE, _BOILERPLATE_TEXTS = 0.1, 10

_SEED = 1


def near_pairs(texts: Sequence[str], threshold: float) -> dict[int, list[int]]:
    """Place of a text -> places of the texts before it that are its near duplicates, the most similar first."""
    pieces = _Pieces(texts)
    signatures = np.empty((len(texts), _BANDS * _BAND_ROWS), dtype=np.uint32)
    enough = np.zeros(len(texts), dtype=bool)
    for start in range(0, len(texts), _CHUNK):
        chunk = pieces.of(texts[start : start + _CHUNK])
        enough[start : start + len(chunk)] = [len(one) >= _MIN_PIECES for one in chunk]
        signatures[start : start + len(chunk)] = _signatures(chunk)
    places = np.flatnonzero(enough)
    found: dict[int, list[int]] = {}
    first, second = _candidates(signatures[places])
    # What differs this much in the signatures (0.12 is 3.4 of their standard deviations) is not worth the comparison.
    alike = np.empty(len(first))
    for start in range(0, len(first), 100_000):
        part = slice(start, start + 100_000)
        alike[part] = (signatures[places[first[part]]] == signatures[places[second[part]]]).mean(1)
    wanted = alike >= threshold - 0.12
    one_text = lru_cache(maxsize=4096)(lambda place: set(pieces.of([texts[place]])[0].tolist()))
    similar: dict[int, list[tuple[float, int]]] = {}
    for earlier, later in zip(places[first[wanted]], places[second[wanted]], strict=True):
        a, b = one_text(int(earlier)), one_text(int(later))
        similarity = len(a & b) / len(a | b)
        if similarity >= threshold:
            similar.setdefault(int(later), []).append((-similarity, int(earlier)))
    for later, ranked in similar.items():
        found[later] = [earlier for _, earlier in sorted(ranked)]
    return found


class _Pieces:
    """The hashed pieces of texts, without those of an instruction that many share: it would make all rows of a
    task alike. A text that has nothing else is compared whole."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._boilerplate = np.empty(0, dtype=np.uint64)
        size = min(len(texts), _SAMPLE)
        chosen = sorted(random.Random(_SEED).sample(range(len(texts)), size))
        sample = _pieces([texts[place] for place in chosen])
        if sample:
            hashes, counts = np.unique(np.concatenate(sample), return_counts=True)
            many = max(_BOILERPLATE_TEXTS, _BOILERPLATE_SHARE * size)
            self._boilerplate = hashes[counts >= many]

    def of(self, texts: Sequence[str]) -> list[Hashes]:
        found = _pieces(texts)
        if not len(self._boilerplate):
            return found
        own = [one[~np.isin(one, self._boilerplate)] for one in found]
        return [some if len(some) else one for some, one in zip(own, found, strict=True)]


def _pieces(texts: Sequence[str]) -> list[Hashes]:
    """The hashes of each text's runs of words, each once."""
    from rensa import RMinHash

    words = RMinHash.hash_token_sets([_WORD.findall(text.casefold()) for text in texts])
    found = []
    for hashes in words:
        run = np.array(hashes, dtype=np.uint64)
        length = max(0, len(run) - _RUN_WORDS + 1)
        mixed = np.zeros(length, dtype=np.uint64)
        for offset in range(_RUN_WORDS):
            mixed = (mixed ^ run[offset : offset + length]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        found.append(np.unique(mixed))
    return found


def _signatures(pieces: Sequence[Hashes]) -> NDArray[np.uint32]:
    from rensa import RMinHash

    offsets = np.concatenate(([0], np.cumsum([len(one) for one in pieces]))).astype(np.uint64)
    flat = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, _PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)[:, : _BANDS * _BAND_ROWS]


def _candidates(signatures: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (earlier, later) of rows that agree in a band, each once."""
    pairs = [np.empty(0, dtype=np.int64)]
    count = len(signatures)
    for band in range(_BANDS):
        key = np.zeros(count, dtype=np.uint64)
        for column in signatures[:, band * _BAND_ROWS : (band + 1) * _BAND_ROWS].T:
            key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(31)
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        for back in range(1, min(_EARLIER, count - 1) + 1):
            same = np.flatnonzero(ordered[back:] == ordered[:-back])
            if not len(same):
                break
            pairs.append(order[same] * count + order[same + back])
    unique = np.unique(np.concatenate(pairs))
    return unique // max(1, count), unique % max(1, count)
