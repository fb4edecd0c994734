"""What is wrong with the words of one row, whatever the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from fastlora.data.format import Chat, Plain

if TYPE_CHECKING:
    from detect_secrets.plugins.base import RegexBasedDetector

# What templates write around turns, by family. In the words of a chat it teaches the model to say its own markup.
_MARKERS = {
    "ChatML": ("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    "Llama 3": (
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
        "<|python_tag|>",
    ),
    "Llama 4": ("<|header_start|>", "<|header_end|>", "<|eot|>"),
    "Llama 2 or Mistral": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    "Mistral": (
        "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
    ),
    "Gemma": ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),
    "Phi or Zephyr": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "GPT": ("<|endoftext|>",),
    "gpt-oss": ("<|start|>", "<|channel|>", "<|message|>", "<|return|>"),
    "OpenChat": ("<|end_of_turn|>",),
    "Command R": ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "DeepSeek": (
        "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
}  # fmt: skip
_FAMILY = {marker: family for family, markers in _MARKERS.items() for marker in markers}
_MARKER = re.compile("|".join(map(re.escape, sorted(_FAMILY, key=len, reverse=True))))
# Also written by people: <s> is struck-out text in HTML, except where a whole text stands between them.
_MARKED_LINES = re.compile(
    r"(?P<Alpaca>^\#\#\# (?:Instruction|Input|Response):)|(?P<Vicuna>^(?:USER|ASSISTANT): )|"
    r"(?P<Llama>\A\s*<s>|</s>\s*\Z)",
    re.MULTILINE,
)

_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
    "\u202a-\u202e\u2066-\u2069"  # they turn the direction of what is shown
    "\ufeff\ufffe\uffff]"
)
_EMAIL = re.compile(r"(?<![\w.+-])[\w+-][\w.+-]{0,63}@((?:[a-zA-Z0-9-]{1,63}\.)+[a-zA-Z]{2,24})\b")
# Set aside for examples (RFC 2606).
_NOBODY = re.compile(r"(?:^|\.)example\.(?:com|net|org)$|\.(?:example|invalid|test)$", re.I)
_MORE_KEYS = re.compile(
    r"\b(?:sk-(?:proj|ant|svcacct|or)-[\w-]{20,}|sk-[A-Za-z0-9]{48}\b|hf_[A-Za-z]{34}\b|AIza[\w-]{35}\b"
    r"|github_pat_\w{22,}|(?:r|s)k_(?:live|test)_[0-9a-zA-Z]{24,}|dop_v1_[0-9a-f]{64}\b)"
)
_LONG_RUN = re.compile(r"\S{16}")
# Of detect-secrets' plugins those whose keys have a form of their own: the others take words and numbers for keys.
_DETECTORS = (
    ("aws", "AWSKeyDetector"), ("azure_storage_key", "AzureStorageKeyDetector"),
    ("basic_auth", "BasicAuthDetector"), ("discord", "DiscordBotTokenDetector"),
    ("github_token", "GitHubTokenDetector"), ("gitlab_token", "GitLabTokenDetector"), ("jwt", "JwtTokenDetector"),
    ("npm", "NpmDetector"), ("openai", "OpenAIDetector"), ("private_key", "PrivateKeyDetector"),
    ("pypi_token", "PypiTokenDetector"), ("sendgrid", "SendGridDetector"), ("slack", "SlackDetector"),
    ("square_oauth", "SquareOAuthDetector"), ("stripe", "StripeDetector"),
    ("telegram_token", "TelegramBotTokenDetector"), ("twilio", "TwilioKeyDetector"),
)  # fmt: skip

Found = tuple[str, str, str]
"""Kind of finding, what was found, the words around it."""


def text_findings(text: str, example: Chat | Plain, own_tokens: frozenset[str]) -> Iterator[Found]:
    """`own_tokens` are the special tokens of the model's tokenizer: in the words of a chat they are markup as well,
    while a text that no template touches may be laid out with them."""
    yield from _markup(text, isinstance(example, Chat), own_tokens)
    if found := _CONTROL.search(text):
        yield "text_control", f"U+{ord(found[0]):04X}", around(text, found)
    if not text.isascii():
        yield from _badly_decoded(text)
    for what, found in _secrets(text):
        yield (
            "secret", f"{what}: {_hint(found)}", text[max(0, found.start() - 40) : found.start()] + _hint(found)
        )  # fmt: skip
    for found in _EMAIL.finditer(text):
        word = text[text.rfind(" ", 0, found.start()) + 1 : found.start()]
        if not _NOBODY.search(found[1]) and "://" not in word:
            yield "email", found[0], around(text, found)
            break


def masked(text: str) -> str:
    """Keys and passwords shortened beyond use: what is printed ends up in logs and in questions to others."""
    shown = ""
    while found := next((found for _, found in _secrets(text)), None):
        shown += text[: found.start()] + _hint(found)
        # The pattern of a private key is its first line.
        text = "" if "PRIVATE KEY" in found[0] else text[found.end() :]
    return shown + text


def _hint(found: re.Match[str]) -> str:
    return f"{found[0][:4]}… ({len(found[0])} characters)"


def _markup(text: str, is_chat: bool, own_tokens: frozenset[str]) -> Iterator[Found]:
    for found in _MARKER.finditer(text):
        if is_chat or found[0] not in own_tokens:
            yield "template_token", f"{found[0]} ({_FAMILY[found[0]]})", around(text, found)
            return
    if not is_chat:
        return
    if written := _MARKED_LINES.search(text):
        detail = f"{written[0].strip()} ({written.lastgroup})"
        yield "template_token", detail, around(text, written)
    elif own_tokens and (own := _any_of(own_tokens).search(text)):
        yield "template_token", f"{own[0]} (the model's own)", around(text, own)


@cache
def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _badly_decoded(text: str) -> Iterator[Found]:
    from ftfy import fix_encoding
    from ftfy.badness import BADNESS_RE

    if "\ufffd" in text:
        found = re.search("\ufffd", text)
        assert found is not None
        yield "text_replacement", f"{text.count(found[0])} of them", around(text, found)
    found = BADNESS_RE.search(text)
    if found is not None and (mended := fix_encoding(text)) != text:
        at = next((n for n, (a, b) in enumerate(zip(text, mended, strict=False)) if a != b), 0)
        yield (
            "text_mojibake",
            f"{text[at : at + 12]!r}, meant {mended[at : at + 12]!r}",
            around(text, found),
        )


def _secrets(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    # No key is shorter, but for these two; twenty patterns over every word would take a third of the whole check.
    if not (_LONG_RUN.search(text) or "://" in text or "PRIVATE KEY" in text):
        return
    if found := _MORE_KEYS.search(text):
        yield "API key", found
        return
    for detector in _detectors():
        # It looks closer than its patterns do, and yields parts of them.
        if any(detector.analyze_string(text)):
            places = (pattern.search(text) for pattern in detector.denylist)
            yield detector.secret_type, next(filter(None, places))
            return


@cache
def _detectors() -> tuple[RegexBasedDetector, ...]:
    from importlib import import_module

    return tuple(
        getattr(import_module(f"detect_secrets.plugins.{module}"), name)()
        for module, name in _DETECTORS
    )


def around(text: str, found: re.Match[str]) -> str:
    return text[max(0, found.start() - 40) : found.end() + 40]
