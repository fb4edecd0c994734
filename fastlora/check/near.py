"""Near duplicates among many texts: MinHash finds candidates, and each is then compared for what it is.

Two texts are near duplicates when the Jaccard similarity of their pieces, runs of three words, is at least the
threshold. Texts of under ten words are none: two short ones that differ in a word ask different things.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint32]

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
_EARLIER = 4
"""Candidates per text and band: the first that shares the band, and so many before the text."""
_COMPARED = 8
"""Candidates per text that are compared for what they are: those of the most similar signatures."""
_SAMPLE = 2000
_SHARED_SHARE, _SHARED_TEXTS = 0.1, 10

_SEED = 1


def near_pairs(texts: Sequence[str], threshold: float, *, instructed: bool) -> dict[int, list[int]]:
    """Place of a text -> places of the texts before it that are its near duplicates, the most similar first.

    Of many that are alike, each is compared with the first and some others. `instructed`: the texts may hold an
    instruction that many share, which is then not counted.
    """
    pieces, signatures = _digest(texts, _shared_pieces(texts) if instructed else None)
    places = np.array([at for at, one in enumerate(pieces) if len(one) >= _MIN_PIECES], dtype=int)
    first, second = _candidates(signatures[places])
    first, second = places[first], places[second]
    alike = np.empty(len(first), dtype=np.float32)
    for start in range(0, len(first), _CHUNK * 50):
        part = slice(start, start + _CHUNK * 50)
        alike[part] = (signatures[first[part]] == signatures[second[part]]).mean(1)
    # What differs so much in the signatures (0.12 is 3.4 of their standard deviations) is not worth the comparison.
    wanted = np.flatnonzero(alike >= threshold - 0.12)
    wanted = wanted[np.lexsort((-alike[wanted], second[wanted]))]
    later = second[wanted]
    rank = np.arange(len(later)) - np.searchsorted(later, later)
    wanted = wanted[rank < _COMPARED]
    similar: dict[int, list[tuple[float, int]]] = {}
    for at in wanted.tolist():
        a, b = pieces[first[at]], pieces[second[at]]
        shared = len(np.intersect1d(a, b, assume_unique=True))
        similarity = shared / (len(a) + len(b) - shared)
        if similarity >= threshold:
            similar.setdefault(int(second[at]), []).append((-similarity, int(first[at])))
    return {one: [earlier for _, earlier in sorted(ranked)] for one, ranked in similar.items()}


def _digest(texts: Sequence[str], shared: Hashes | None) -> tuple[list[Hashes], NDArray[np.uint32]]:
    """Each text's pieces and signature."""
    pieces: list[Hashes] = []
    signatures = np.empty((len(texts), _BANDS * _BAND_ROWS), dtype=np.uint32)
    for start in range(0, len(texts), _CHUNK):
        chunk = _pieces(texts[start : start + _CHUNK])
        if shared is not None and len(shared):
            own = [one[~np.isin(one, shared)] for one in chunk]
            # A text that has nothing of its own is compared whole.
            chunk = [some if len(some) else one for some, one in zip(own, chunk, strict=True)]
        signatures[start : start + len(chunk)] = _signatures(chunk)
        pieces += chunk
    return pieces, signatures


def _shared_pieces(texts: Sequence[str]) -> Hashes:
    """Those of an instruction that many texts hold: it would make all rows of a task alike."""
    size = min(len(texts), _SAMPLE)
    chosen = sorted(random.Random(_SEED).sample(range(len(texts)), size))
    sample = _pieces([texts[place] for place in chosen])
    if not sample:
        return np.empty(0, dtype=np.uint32)
    hashes, counts = np.unique(np.concatenate(sample), return_counts=True)
    return hashes[counts >= max(_SHARED_TEXTS, _SHARED_SHARE * size)]


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
        found.append(np.unique((mixed >> np.uint64(32)).astype(np.uint32)))
    return found


def _signatures(pieces: Sequence[Hashes]) -> NDArray[np.uint32]:
    from rensa import RMinHash

    offsets = np.concatenate(([0], np.cumsum([len(one) for one in pieces]))).astype(np.uint64)
    flat = np.concatenate(pieces).astype(np.uint64)
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
        begins = np.concatenate(([True], ordered[1:] != ordered[:-1]))[:count]
        head = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
        behind = np.flatnonzero(~begins)
        pairs.append(order[head[behind]] * count + order[behind])
        for back in range(1, min(_EARLIER, count - 1) + 1):
            same = np.flatnonzero(ordered[back:] == ordered[:-back])
            if not len(same):
                break
            pairs.append(order[same] * count + order[same + back])
    unique = np.unique(np.concatenate(pairs))
    return unique // max(1, count), unique % max(1, count)
