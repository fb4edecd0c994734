"""Rows of which each fault is known: what a check finds in them is compared with what was put there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


def _listed(words: str) -> list[str]:
    return words.split()


_ADJECTIVES = _listed(
    "old young broken quiet wooden small heavy bright narrow empty famous gentle hidden honest lonely modern patient "
    "rusty silver tired wide yellow careful distant early foreign golden hungry local proud"
)
_NOUNS = _listed(
    "teacher doctor captain baker farmer driver station river library bridge village garden letter bottle clock map "
    "gate box window market castle painter soldier island kitchen mountain forest singer ladder blanket mirror basket "
    "engine bell candle carpet harbour hotel journal lamp"
)
_VERBS = _listed(
    "found sold painted repaired described opened counted carried followed forgot borrowed cleaned visited noticed "
    "measured ignored defended replaced admired moved"
)
_WHERE = _listed("behind near under above beside inside beyond outside")
_WHEN = [
    "before breakfast",
    "on a cold morning",
    "after the storm",
    "in the middle of winter",
    "without a word",
]
_GERMAN = (
    "Der alte Lehrer hat gestern die kaputte Uhr repariert, weil niemand sonst es machen wollte, und danach ist er {} "
    "nach Hause gegangen und hat {} Briefe an seine Freunde geschrieben."
)


@dataclass
class Planted:
    train: list[bytes] = field(default_factory=list)
    eval: list[bytes] = field(default_factory=list)
    expected: set[tuple[str, int]] = field(default_factory=set)
    """(Kind of finding, line of the train file)."""

    def write(self, folder: Path) -> tuple[Path, Path]:
        files = folder / "train.jsonl", folder / "eval.jsonl"
        for file, lines in zip(files, (self.train, self.eval), strict=True):
            file.write_bytes(b"".join(line + b"\n" for line in lines))
        return files


class _Words:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def sentence(self) -> str:
        things = [f"the {self.rng.choice(_ADJECTIVES)} {self.rng.choice(_NOUNS)}" for _ in range(3)]
        return (
            f"{things[0].capitalize()} {self.rng.choice(_VERBS)} {things[1]} {self.rng.choice(_WHERE)} {things[2]} "
            f"{self.rng.choice(_WHEN)}."
        )

    def question(self) -> str:
        return "Why is it so? " + " ".join(self.sentence() for _ in range(3))

    def answer(self) -> str:
        return " ".join(self.sentence() for _ in range(self.rng.randint(4, 6)))


def chat(question: str, answer: str) -> bytes:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False).encode()


def with_a_word_changed(text: str) -> str:
    words = text.split()
    words[len(words) // 2] = "purple"
    return " ".join(words)


Fault = Callable[[_Words, "Planted"], tuple[bytes, tuple[str, ...]]]


def _in_answer(make: Callable[[_Words], str], *kinds: str) -> Fault:
    def fault(words: _Words, _: Planted) -> tuple[bytes, tuple[str, ...]]:
        sentences = [words.sentence() for _ in range(4)]
        sentences.insert(2, make(words))
        return chat(words.question(), " ".join(sentences)), kinds

    return fault


def _answer(make: Callable[[_Words], str], *kinds: str) -> Fault:
    return lambda words, _: (chat(words.question(), make(words)), kinds)


def _raw(make: Callable[[_Words], bytes], *kinds: str) -> Fault:
    return lambda words, _: (make(words), kinds)


def _roles(roles: list[str], *kinds: str) -> Fault:
    def fault(words: _Words, _: Planted) -> tuple[bytes, tuple[str, ...]]:
        turns = [{"role": role, "content": words.answer()} for role in roles]
        return json.dumps({"messages": turns}).encode(), kinds

    return fault


def _as(split: str, question: str, answer: str, *kinds: str) -> Fault:
    """A row like another, which it appends first: `same`, `near` or `new` question and answer."""

    def fault(words: _Words, planted: Planted) -> tuple[bytes, tuple[str, ...]]:
        first = words.question(), words.answer()
        getattr(planted, split).append(chat(*first))
        made = []
        for how, text, new in zip(
            (question, answer), first, (words.question(), words.answer()), strict=True
        ):
            made.append({"same": text, "near": with_a_word_changed(text), "new": new}[how])
        return chat(*made), kinds

    return fault


def _key(
    length: int, alphabet: str = "abcdefghijkmnopqrstuvwxyz0123456789"
) -> Callable[[_Words], str]:
    return lambda words: "".join(words.rng.choices(alphabet, k=length))


def _garbled(words: _Words) -> str:
    return f"Das Café {words.rng.randint(1, 9999)} hört früh auf.".encode().decode("cp1252")


# Put together here, so that no scanner of this repository takes them for keys.
FAULTS: dict[str, Fault] = {
    "broken JSON": _raw(lambda words: chat(words.question(), words.answer())[:-9], "unreadable_row"),
    "no messages": _raw(lambda words: json.dumps({"turns": words.answer()}).encode(), "unreadable_row"),
    "not UTF-8": _raw(
        lambda words: chat(words.question(), words.answer()).replace(b"Why", b"W\xffy"), "unreadable_bytes"
    ),
    "half a pair": _raw(
        lambda words: chat(words.question(), words.answer()).replace(b"Why", b"W\\ud83dy"), "unreadable_bytes"
    ),
    "empty answer": _answer(lambda _: "", "empty_turn"),
    "blank answer": _answer(lambda _: " \n\t ", "empty_turn"),
    "unknown role": _roles(["user", "narrator", "assistant"], "role_unknown"),
    "answer first": _roles(["assistant", "user", "assistant"], "role_order"),
    "two questions": _roles(["user", "user", "assistant"], "role_order"),
    "late system": _roles(["user", "assistant", "system", "user", "assistant"], "role_order"),
    "ends with a question": _roles(["user", "assistant", "user"], "role_order"),
    "ChatML": _in_answer(lambda _: "<|im_start|>assistant", "template_token"),
    "Llama 2": _in_answer(lambda _: "[INST] Go on. [/INST]", "template_token"),
    "Llama 3": _in_answer(lambda _: "<|eot_id|>", "template_token"),
    "Gemma": _in_answer(lambda _: "<start_of_turn>model", "template_token"),
    "Alpaca": _in_answer(lambda _: "\n### Instruction:\nGo on.", "template_token"),
    "its own": _in_answer(lambda _: "<|bos|>", "template_token"),
    "control": _in_answer(lambda _: "a\x00b", "text_control"),
    "escape": _in_answer(lambda _: "\x1b[31mred", "text_control"),
    "lost character": _in_answer(lambda _: "caf\ufffd", "text_replacement"),
    "mojibake": _in_answer(_garbled, "text_mojibake"),
    "AWS key": _in_answer(lambda words: "AK" + "IA" + _key(16)(words).upper(), "secret"),
    "GitHub token": _in_answer(lambda words: "gh" + "p_" + _key(36)(words), "secret"),
    "private key": _in_answer(lambda words: "-----BEGIN RSA " + "PRIVATE KEY-----", "secret"),
    "Hub token": _in_answer(lambda words: "h" + "f_" + _key(34, "abcdefghij")(words), "secret"),
    "password": _in_answer(lambda words: f"postgres://ann:{_key(9)(words)}@db.local/x", "secret"),
    "email": _in_answer(lambda words: f"Write to ann.{_key(6)(words)}@posteo.de soon.", "email"),
    "duplicate": _as("train", "same", "same", "duplicate_pair"),
    "near duplicate": _as("train", "same", "near", "near_pair"),
    "nearly all the same": _as("train", "near", "near", "near_pair"),
    "answered differently": _as("train", "same", "new", "duplicate_prompt"),
    "nearly asked before": _as("train", "near", "new", "near_prompt"),
    "answer again": _as("train", "new", "same", "duplicate_answer"),
    "answer nearly again": _as("train", "new", "near", "near_answer"),
    "leak": _as("eval", "same", "same", "leakage_pair"),
    "near leak": _as("eval", "near", "near", "leakage_near_pair"),
    "leaked question": _as("eval", "same", "new", "leakage_prompt"),
    "nearly leaked question": _as("eval", "near", "new", "leakage_near_prompt"),
    "JSON": _answer(lambda words: json.dumps({"answer": words.answer()}), "drift_json"),
    "broken object": _answer(lambda words: json.dumps({"answer": words.answer()})[:-1], "drift_broken_json"),
    "German": _answer(
        lambda words: _GERMAN.format(words.rng.randint(2, 9999), words.rng.randint(2, 9999)), "drift_language"
    ),
    "short": _answer(lambda words: f"No, {words.rng.randint(2, 999)}.", "drift_length", "answer_short"),
    "long": _answer(
        lambda words: " ".join(words.answer() for _ in range(14)),
        "drift_length", "answer_long", "truncated_answer",
    ),
    "long question": lambda words, _: (
        chat(" ".join(words.question() for _ in range(24)), words.answer()), ("truncated_all",)
    ),
}  # fmt: skip
LIMITS = {"min_answer_chars": 20, "max_answer_chars": 2500}
SEQ_LEN_TOKENS = 3200  # of about a character each


def clean(rows: int, seed: int = 0) -> Planted:
    words, planted = _Words(seed), Planted()
    planted.train = [chat(words.question(), words.answer()) for _ in range(rows)]
    planted.eval = [chat(words.question(), words.answer()) for _ in range(rows // 20)]
    return planted


def with_faults(rows: int, each: int, seed: int = 0) -> Planted:
    """`rows` rows to train on, with `each` of every fault."""
    words, planted = _Words(seed), clean(0)
    faults = [fault for fault in FAULTS.values() for _ in range(each)]
    words.rng.shuffle(faults)
    for place, fault in enumerate(faults):
        row, kinds = fault(words, planted)
        planted.train.append(row)
        planted.expected |= {(kind, len(planted.train)) for kind in kinds}
        good = (rows - len(planted.train)) // (len(faults) - place)
        planted.train += [
            chat(words.question(), words.answer()) for _ in range(max(0, min(good, 99)))
        ]
    planted.eval += [chat(words.question(), words.answer()) for _ in range(20)]
    return planted
