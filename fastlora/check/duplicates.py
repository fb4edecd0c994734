"""Rows that say again what another row says: within a split a duplicate, across the two a leak.

A row is its question (all before the first answer) and its rest. Exact means: but for whitespace. Each is compared
with the rows before it that stay, so that of duplicates the first stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from fastlora.check.findings import Findings
from fastlora.check.near import near_pairs
from fastlora.check.rows import Row, Rows

_MIN_ANSWER_WORDS = 8
"""Shorter answers (yes; a label; a number) repeat in good data."""


def find_duplicates(
    rows: Rows, near_in: Sequence[int], threshold: float, findings: Findings
) -> None:
    """Exact ones among all good rows, near ones among the places `near_in` of them."""
    prompts = _Texts([(place, rows.all[place].prompt) for place in rows.good])
    rests = _Texts([(place, rows.all[place].rest) for place in rows.good])
    prompts.find_near(near_in, threshold, instructed=True)
    rests.find_near(near_in, threshold, instructed=False)
    train = [place for place in rows.good if place not in rows.held_out]
    held_out = [place for place in rows.good if place in rows.held_out]
    for split in (train, held_out):
        seen = _Seen(prompts, rests)
        for place in split:
            _within(place, seen, rows, findings)
    asked = _Seen(prompts, rests)
    for place in held_out:
        asked.add(place)
    for place in train if held_out else []:
        _across(place, asked, rows, findings)


class _Texts:
    """One text of each row, known by the first row that says it."""

    def __init__(self, texts: Sequence[tuple[int, str]]) -> None:
        first: dict[bytes, int] = {}
        self.same: dict[int, int] = {}
        self.near: dict[int, list[int]] = {}
        for place, text in texts:
            key = hashlib.blake2b(
                " ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16
            )
            self.same[place] = first.setdefault(key.digest(), place)
        self._texts = dict(texts)

    def find_near(self, among: Sequence[int], threshold: float, *, instructed: bool) -> None:
        """Fill `near`: the first row that says a text -> those that say nearly the same, in both directions."""
        distinct = sorted({self.same[place] for place in among})
        texts = [self._texts[place] for place in distinct]
        pairs = near_pairs(texts, threshold, instructed=instructed)
        for later, earlier in pairs.items():
            for one in earlier:
                self.near.setdefault(distinct[later], []).append(distinct[one])
                self.near.setdefault(distinct[one], []).append(distinct[later])

    def alike(self, place: int) -> list[int]:
        return self.near.get(self.same[place], [])


class _Seen:
    """Rows that others are compared with."""

    def __init__(self, prompts: _Texts, rests: _Texts) -> None:
        self.prompts, self.rests = prompts, rests
        self.by_pair: dict[tuple[int, int], int] = {}
        self.by_prompt: dict[int, int] = {}
        self.by_rest: dict[int, int] = {}

    def add(self, place: int) -> None:
        prompt, rest = self.prompts.same[place], self.rests.same[place]
        self.by_pair.setdefault((prompt, rest), place)
        self.by_prompt.setdefault(prompt, place)
        self.by_rest.setdefault(rest, place)

    def pair(self, place: int) -> tuple[int, bool] | None:
        """A row with the same question and rest, and whether both are exactly so."""
        prompt, rest = self.prompts.same[place], self.rests.same[place]
        if (found := self.by_pair.get((prompt, rest))) is not None:
            return found, True
        for one in (prompt, *self.prompts.alike(place)):
            for other in (rest, *self.rests.alike(place)):
                if (found := self.by_pair.get((one, other))) is not None:
                    return found, False
        return None

    def prompt(self, place: int) -> tuple[int, bool] | None:
        return _first(self.by_prompt, self.prompts.same[place], self.prompts.alike(place))

    def rest(self, place: int) -> tuple[int, bool] | None:
        return _first(self.by_rest, self.rests.same[place], self.rests.alike(place))


def _first(seen: dict[int, int], same: int, alike: Sequence[int]) -> tuple[int, bool] | None:
    for key in (same, *alike):
        if (found := seen.get(key)) is not None:
            return found, key == same
    return None


def _within(place: int, seen: _Seen, rows: Rows, findings: Findings) -> None:
    row = rows.all[place]
    found = seen.pair(place)
    if found is not None:
        earlier, exact = found
        code = "duplicate_pair" if exact else "near_pair"
        findings.add(code, place, f"as {rows.where(earlier)}", _both(row))
        return
    if row.prompt and (found := seen.prompt(place)):
        earlier, exact = found
        code = "duplicate_prompt" if exact else "near_prompt"
        example = f"{row.prompt} -> {rows.all[earlier].rest[:60]!r} and {row.rest[:60]!r}"
        findings.add(code, place, f"as {rows.where(earlier)}", example)
    if row.prompt and len(row.rest.split()) >= _MIN_ANSWER_WORDS and (found := seen.rest(place)):
        earlier, exact = found
        code = "duplicate_answer" if exact else "near_answer"
        findings.add(code, place, f"as {rows.where(earlier)}", row.rest)
    seen.add(place)


def _across(place: int, held_out: _Seen, rows: Rows, findings: Findings) -> None:
    """A row that is trained on, against those that are held out. Leaks are the trained row's: it is the one to go."""
    row = rows.all[place]
    for code, found in _leaks(place, held_out, bool(row.prompt)):
        findings.add(code, place, f"held out as {rows.where(found)}", _both(row))


def _leaks(place: int, held_out: _Seen, has_prompt: bool) -> Iterator[tuple[str, int]]:
    if found := held_out.pair(place):
        yield "leakage_pair" if found[1] else "leakage_near_pair", found[0]
    elif has_prompt and (found := held_out.prompt(place)):
        yield "leakage_prompt" if found[1] else "leakage_near_prompt", found[0]


def _both(row: Row) -> str:
    return f"{row.prompt[:100]} -> {row.rest[:100]}" if row.prompt else row.rest
