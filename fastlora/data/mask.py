"""Token ids and labels: which tokens the model is taught to produce.

Chat rows are laid out by the tokenizer's own template. Few templates mark the assistant's tokens
({% generation %}), and those that do often leave out the token that ends the turn, so the spans are
found from renderings alone, which works for every template:

- a turn's supervised span starts where the conversation before it, with its generation prompt, ends
  (at inference the model continues from exactly there);
- the turn's content ends where a rendering with that content replaced goes on as before;
- the text with which the template closes an assistant turn, whitespace at its end left off, is
  supervised too, or the model would never learn to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlora.data.format import BadRow, Chat, Message, Plain
from fastlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
_STAND_IN = "\ue000fastlora\ue001"  # private-use characters: in no data, altered by no template


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    spans: list[tuple[int, int]]
    """Supervised [start, end) in characters."""
    special_tokens: bool
    """The tokenizer is to add BOS; False where the template has written it."""
    append_eos: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    input_ids: list[int]
    labels: list[int]
    """input_ids where supervised, else IGNORED."""


class Encoder:
    """Encodes examples for one tokenizer, template and supervision.

    Raises DataError when made: a slow tokenizer, no chat template, or no token to end an answer with.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, template: str, supervise: str
    ) -> None:
        self.tokenizer, self.supervise = tokenizer, supervise
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.is_fast:
            raise DataError(
                f"{name}: a slow tokenizer, which cannot say where its tokens lie in the text; "
                "convert it with AutoTokenizer.from_pretrained(..., use_fast=True) and save it"
            )
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{name}: has no EOS token, so no answer could end; set eos_token in tokenizer_config.json"
            )
        self.templated = template != "none"
        self.template: str | None = None
        if template.endswith((".jinja", ".j2")):
            try:
                self.template = Path(template).read_text(encoding="utf-8")
            except OSError as error:
                raise DataError(
                    f"data.template: {template} cannot be read: {error.strerror}"
                ) from None
        elif template == "tokenizer":
            self.template = (
                tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
            )
            if self.template is None and tokenizer.chat_template:
                self.template = tokenizer.get_chat_template()
        elif template != "none":
            raise DataError(
                f'data.template: {template!r} is neither "tokenizer", "none" nor a .jinja file'
            )

    def require_template(self) -> None:
        """Raises DataError when chats are to be laid out and there is no template."""
        if self.template is None:
            name = self.tokenizer.name_or_path or "the tokenizer"
            raise DataError(
                f"{name}: the tokenizer has no chat template. Use the instruct variant of the model, or set "
                'data.template to a .jinja file, or, for prompts and completions as they stand, to "none".'
            )

    def render(self, example: Chat | Plain) -> Rendered:
        """Lay out one example. Raises BadRow when the template refuses or drops a turn."""
        if isinstance(example, Plain):
            text = example.prompt + example.completion
            start = 0 if self.supervise == "all" else len(example.prompt)
            return Rendered(text, [(start, len(text))], True, True)
        full = self._apply(example.messages, example)
        turns = [
            place
            for place, message in enumerate(example.messages)
            if message["role"] == "assistant" and place not in example.given
        ]
        spans = [self._turn_span(full, example, place) for place in turns]
        # A template that closes turns with plain text, or nothing, leaves EOS to us.
        append_eos = turns[-1] == len(example.messages) - 1 and not self._closing_is_special
        if append_eos:
            full = full[: spans[-1][1]]
        if self.supervise == "all":
            spans = [(0, len(full))]
        return Rendered(full, spans, False, append_eos)

    def encode(self, examples: Sequence[Rendered]) -> list[Encoded]:
        """Tokenize and mask; a token is supervised when it starts in a span."""
        encoded: list[Encoded | None] = [None] * len(examples)
        for special in (True, False):
            places = [
                place for place, example in enumerate(examples) if example.special_tokens is special
            ]
            if not places:
                continue
            batch = self.tokenizer(
                [examples[place].text for place in places],
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for place, ids, offsets in zip(
                places, batch["input_ids"], batch["offset_mapping"], strict=True
            ):
                encoded[place] = self._masked(examples[place], list(ids), offsets)
        return [one for one in encoded if one is not None]

    def _masked(self, example: Rendered, ids: list[int], offsets: Any) -> Encoded:
        eos = self.tokenizer.eos_token_id
        bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = bounds[:, 0], bounds[:, 1]
        supervised = np.zeros(len(ids), dtype=bool)
        for start, end in example.spans:
            supervised |= (starts >= start) & (starts < end) & (ends > starts)
        labels = np.where(supervised, np.asarray(ids, dtype=np.int64), IGNORED).tolist()
        if example.append_eos:
            if ids and ids[-1] == eos:  # the tokenizer itself adds EOS
                labels[-1] = eos
            else:
                ids, labels = [*ids, eos], [*labels, eos]
        return Encoded(ids, labels)

    @cached_property
    def closing(self) -> str:
        """What the template writes after an assistant's content, whitespace at the end left off."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _STAND_IN}]
        text = self._apply(messages, Chat(messages))
        _, found, after = text.partition(_STAND_IN)
        if not found:
            raise DataError(
                "the chat template drops what the assistant says; data.template must be mended"
            )
        return after.rstrip()

    @cached_property
    def _closing_is_special(self) -> bool:
        ids = (
            self.tokenizer(self.closing, add_special_tokens=False)["input_ids"]
            if self.closing
            else []
        )
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return bool(ids) and ids[-1] in special

    @property
    def stop_token_id(self) -> int:
        """The token that ends an answer: EOS, or the one with which the template closes a turn."""
        if self.template is not None and self._closing_is_special:
            return int(self.tokenizer(self.closing, add_special_tokens=False)["input_ids"][-1])
        return int(self.tokenizer.eos_token_id)

    def _turn_span(self, full: str, example: Chat, place: int) -> tuple[int, int]:
        replaced = [dict(message) for message in example.messages]
        replaced[place]["content"] = _STAND_IN
        before, found, after = self._apply(replaced, example).partition(_STAND_IN)
        if not found or not full.endswith(after):
            raise BadRow(f"the chat template does not lay out message {place + 1} as it stands")
        content_end = len(full) - len(after)
        end = content_end + len(self.closing) if after.startswith(self.closing) else content_end
        prompt = self._generation_prompt(example, place)
        if prompt is not None and full.startswith(prompt) and len(prompt) <= content_end:
            return len(prompt), end
        # Templates that lay out earlier turns anew (a system prompt moved to the last question): the
        # content itself then marks the start.
        if not full.startswith(before):
            raise BadRow(
                f"the chat template lays out message {place + 1} differently with its content; cannot be masked"
            )
        return len(before), end

    def _generation_prompt(self, example: Chat, place: int) -> str | None:
        if place == 0:
            return None
        try:
            return self._apply(example.messages[:place], example, add_generation_prompt=True)
        except BadRow:
            return None  # a template may refuse a conversation that ends here

    def _apply(
        self, messages: list[Message], example: Chat, add_generation_prompt: bool = False
    ) -> str:
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=example.tools,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
            return text
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise BadRow(f"the chat template refuses it: {error}") from None
