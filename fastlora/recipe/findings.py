"""Every kind of finding of `fastlora check`: its name, how bad it is, and what it says.

An error is a row that would teach something wrong, or cannot be read: `--write-clean` removes it. A warning is to be
looked at, and its row stays. A gate names a kind (`duplicate_pair`) or all that begin with a word (`duplicate`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]


class Kind(NamedTuple):
    severity: Severity
    says: str
    needs_tokenizer: bool = False


KINDS: dict[str, Kind] = {
    "unreadable_row": Kind("error", "cannot be read as a row of its format"),
    "unreadable_bytes": Kind("error", "bytes that are not UTF-8, or half of a surrogate pair"),
    "mix_refused": Kind("error", "a run cannot draw its training and held-out rows from these"),
    "empty_turn": Kind("error", "a turn or field of nothing, or of whitespace alone"),
    "role_unknown": Kind("error", "a role that no chat has"),
    "role_order": Kind("error", "turns in an order that no chat has"),
    "template_unusable": Kind("error", "the model's tokenizer or template cannot lay out these rows", True),
    "template_refused": Kind("error", "the chat template refuses the row or drops a part of it", True),
    "template_token": Kind("error", "special tokens or markers of a chat template in the text itself"),
    "template_bos": Kind("error", "begins with two BOS tokens", True),
    "template_stop": Kind("error", "the last answer is not followed by a token that ends it", True),
    "leakage_pair": Kind("error", "question and answer are in the held-out rows as well"),
    "leakage_near_pair": Kind("error", "question and answer are nearly those of a held-out row"),
    "leakage_prompt": Kind("error", "the question is in the held-out rows as well, with another answer"),
    "leakage_near_prompt": Kind("error", "the question is nearly that of a held-out row"),
    "secret": Kind("error", "a password, key or token"),
    "text_control": Kind("error", "control characters"),
    "text_replacement": Kind("error", "U+FFFD, which stands where a character was lost"),
    "text_mojibake": Kind("error", "text that was decoded with the wrong encoding"),
    "duplicate_pair": Kind("error", "question and answer of an earlier row"),
    "near_pair": Kind("error", "question and answer nearly those of an earlier row"),
    "answer_short": Kind("error", "an answer shorter than the recipe allows"),
    "answer_long": Kind("error", "an answer longer than the recipe allows"),
    "truncated_all": Kind("error", "no token of the answer is left at model.seq_len_tokens", True),
    "token_lost": Kind("warning", "characters without a token, dropped or made unknown by the tokenizer", True),
    "truncated_answer": Kind("warning", "the answer is cut at model.seq_len_tokens", True),
    "duplicate_prompt": Kind("warning", "the question of an earlier row, answered differently"),
    "near_prompt": Kind("warning", "nearly the question of an earlier row, answered differently"),
    "duplicate_answer": Kind("warning", "the answer of an earlier row, to another question"),
    "near_answer": Kind("warning", "nearly the answer of an earlier row, to another question"),
    "drift_json": Kind("warning", "JSON where most answers are not, or no JSON where most are"),
    "drift_broken_json": Kind("warning", "an answer that begins as JSON does and is none"),
    "drift_language": Kind("warning", "an answer in another language than nearly all"),
    "drift_length": Kind("warning", "an answer far shorter or longer than nearly all"),
    "email": Kind("warning", "an e-mail address"),
    "tokenizer_missing": Kind("warning", "without the model's tokenizer nothing is known of tokens and template"),
}  # fmt: skip


def selected(name: str) -> list[str]:
    """The kinds that a gate's name stands for; none if it is unknown."""
    return [kind for kind in KINDS if kind == name or kind.startswith(f"{name}_")]
