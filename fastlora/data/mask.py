"""Token ids and labels: which tokens the model is taught to produce.

Chat rows are laid out by the tokenizer's own template. Few templates mark the assistant's tokens
({% generation %}), and those that do often leave out the token that ends the turn, so the spans are
found from renderings alone, which works for every template:

- a turn's supervised span starts where the conversation before it, with its generation prompt, ends
  (at inference the model continues from exactly there);
- it ends where the conversation up to it ends, whitespace behind the closing left off. The closing is
  supervised too, or the model would never learn to stop, and so are the turn's tool calls;
- where a template lays out earlier turns anew, it ends where a rendering with the turn's words
  replaced goes on as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlora.data.format import BadRow, Chat, Message, Plain
from fastlora.data.template import STAND_IN, ChatTemplate
from fastlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


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
        self.template = ChatTemplate(tokenizer, template)

    def require_template(self) -> None:
        """Raises DataError when chats are to be laid out and there is no template, or a broken one."""
        self.template.require()

    def render(self, example: Chat | Plain) -> Rendered:
        """Lay out one example. Raises BadRow when the template refuses it or drops a part of it."""
        if isinstance(example, Plain):
            text = _encodable(example.prompt + example.completion)
            start = 0 if self.supervise == "all" else len(example.prompt)
            return Rendered(text, [(start, len(text))], True, True)
        full = _encodable(self.template.apply(example.messages, example.tools))
        turns = [
            place
            for place, message in enumerate(example.messages)
            if message["role"] == "assistant" and place not in example.given
        ]
        spans = [self._turn_span(full, example, place) for place in turns]
        # A template that closes turns with plain text, or nothing, leaves EOS to us.
        append_eos = turns[-1] == len(example.messages) - 1 and self.template.stop_token_id is None
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
                return_special_tokens_mask=True,
                return_attention_mask=False,
                verbose=False,
            )
            for place, ids, offsets, added in zip(
                places,
                batch["input_ids"],
                batch["offset_mapping"],
                batch["special_tokens_mask"],
                strict=True,
            ):
                encoded[place] = self._masked(examples[place], list(ids), offsets, added)
        return [one for one in encoded if one is not None]

    def _masked(self, example: Rendered, ids: list[int], offsets: Any, added: Any) -> Encoded:
        """`added` is 1 where the tokenizer put a token in that is not in the text, such as BOS."""
        eos = self.tokenizer.eos_token_id
        bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = bounds[:, 0], bounds[:, 1]
        # Some byte-level tokenizers trim spaces off their offsets: a token of spaces alone then has no
        # width and lies at its end. It starts where the tokens before it end.
        reached = np.maximum.accumulate(np.concatenate(([0], ends)))[:-1]
        starts = np.where(ends > starts, starts, reached)
        supervised = np.zeros(len(ids), dtype=bool)
        for start, end in example.spans:
            supervised |= (starts >= start) & (starts < end) & (np.asarray(added) == 0)
        labels = np.where(supervised, np.asarray(ids, dtype=np.int64), IGNORED).tolist()
        if example.append_eos:
            if ids and ids[-1] == eos:  # the tokenizer itself adds EOS
                labels[-1] = eos
            else:
                ids, labels = [*ids, eos], [*labels, eos]
        return Encoded(ids, labels)

    def ask(self, example: Chat | Plain) -> list[int]:
        """Token ids up to where the model is to answer: all of a conversation, or the prompt of a Plain.

        Raises BadRow when the template refuses it.
        """
        templated = isinstance(example, Chat)
        text = (
            self.template.apply(example.messages, example.tools, ask=True)
            if isinstance(example, Chat)
            else example.prompt
        )
        told = self.tokenizer(_encodable(text), add_special_tokens=not templated, verbose=False)
        ids = list(told["input_ids"])
        # Where the tokenizer itself adds EOS, nothing could come after it.
        if not templated and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    @property
    def stop_token_id(self) -> int:
        """The token that ends an answer: EOS, or the one with which the template closes a turn."""
        closing = self.template.stop_token_id
        return int(self.tokenizer.eos_token_id) if closing is None else closing

    def _turn_span(self, full: str, example: Chat, place: int) -> tuple[int, int]:
        """What the assistant says at `place`: its [start, end) in the whole conversation's text."""
        start, end = self._said_span(full, example, place)
        calls = example.messages[place].get("tool_calls") or []
        for number in range(len(calls)):
            # A template that knows no calls leaves them out without a word.
            altered = self.template.apply(
                _replaced(example, place, tool_calls=_with_name_replaced(calls, number)),
                example.tools,
            )
            pairs = zip(full, altered, strict=False)
            differs = next((at for at, (a, b) in enumerate(pairs) if a != b), len(full))
            if not start <= differs < end:
                raise BadRow(
                    f"the chat template drops tool call {number + 1} of message {place + 1}; "
                    "set data.template to one that lays calls out"
                )
        return start, end

    def _said_span(self, full: str, example: Chat, place: int) -> tuple[int, int]:
        asked = self._attempt(example, example.messages[:place], ask=True) if place else None
        start = len(asked) if asked is not None and full.startswith(asked) else None
        said = self._attempt(example, example.messages[: place + 1])
        if said is not None and start is not None:
            said = self.template.without_space_behind(said)
            if full.startswith(said) and start < len(said):
                return start, len(said)
        # Templates that lay out earlier turns anew: a system prompt moved to the last question, thoughts left out.
        replaced = _replaced(example, place, content=STAND_IN, tool_calls=None)
        before, found, after = (self._attempt(example, replaced) or "").partition(STAND_IN)
        if not found or not full.endswith(after):
            raise BadRow(f"the chat template does not lay out message {place + 1} as it stands")
        content_end = len(full) - len(after)
        end = content_end + self.template.closed(after)
        if start is not None and start <= content_end:
            return start, end
        if not full.startswith(before):
            raise BadRow(
                f"the chat template lays out message {place + 1} differently with its content; cannot be masked"
            )
        return len(before), end

    def _attempt(
        self, example: Chat, messages: Sequence[Message], *, ask: bool = False
    ) -> str | None:
        """None where the template refuses: it may refuse a part of a conversation that it takes whole."""
        try:
            return self.template.apply(messages, example.tools, ask=ask)
        except BadRow:
            return None


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise BadRow(f"holds {half!r}, half of a surrogate pair, which is no character") from None
    return text


def _replaced(example: Chat, place: int, **fields: Any) -> list[Message]:
    """The messages with one's fields replaced, and left out where None."""
    message = {
        key: value
        for key, value in {**example.messages[place], **fields}.items()
        if value is not None
    }
    return [*example.messages[:place], message, *example.messages[place + 1 :]]


def _with_name_replaced(calls: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    call = calls[number]
    function = call.get("function")
    altered = (
        {**call, "name": STAND_IN}
        if function is None
        else {**call, "function": {**function, "name": STAND_IN}}
    )
    return [*calls[:number], altered, *calls[number + 1 :]]
