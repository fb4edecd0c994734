"""The chat template: it lays a conversation out as text, and ends an answer in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.data.format import BadRow, Message
from fastlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAND_IN = "\ue000fastlora\ue001"  # private-use characters: in no data, altered by no template


class ChatTemplate:
    """`choice` is data.template: "tokenizer", "none" or a .jinja file. Raises DataError for anything else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, choice: str) -> None:
        self.tokenizer = tokenizer
        self.name = "the tokenizer's chat template" if choice == "tokenizer" else choice
        self.source: str | None = None
        if choice.endswith((".jinja", ".j2")):
            try:
                self.source = Path(choice).read_text(encoding="utf-8")
            except OSError as error:
                raise DataError(
                    f"data.template: {choice} cannot be read: {error.strerror}"
                ) from None
            except UnicodeDecodeError as error:
                raise DataError(
                    f"data.template: {choice}: not UTF-8 at byte {error.start}; save it as UTF-8"
                ) from None
        elif choice == "tokenizer":
            self.source = (
                tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
            )
            if self.source is None and tokenizer.chat_template:
                self.source = tokenizer.get_chat_template()
        elif choice != "none":
            raise DataError(
                f'data.template: {choice!r} is neither "tokenizer", "none" nor a .jinja file'
            )

    def require(self) -> None:
        """Raises DataError when chats are to be laid out and there is no template, or a broken one."""
        if self.source is None:
            name = self.tokenizer.name_or_path or "the tokenizer"
            raise DataError(
                f"{name}: the tokenizer has no chat template. Use the instruct variant of the model, or set "
                'data.template to a .jinja file, or, for prompts and completions as they stand, to "none".'
            )
        _ = self._ending  # a template that fails on any chat is one error, not one for every row

    def apply(
        self, messages: Sequence[Message], tools: list[Any] | None, *, ask: bool = False
    ) -> str:
        """The messages as text; with `ask`, up to where the model is to answer. Raises BadRow when refused."""
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=ask,
                tokenize=False,
            )
            return text
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"data.template: {self.name}: line {error.lineno}: {error.message}"
            ) from None
        except Exception as error:  # a template is a program, which may fail in any way
            raise BadRow(
                f"the chat template refuses it: {str(error) or type(error).__name__}"
            ) from None

    @cached_property
    def _ending(self) -> tuple[str, str]:
        """What is written after an assistant's content: the closing, and the whitespace behind it."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": STAND_IN}]
        try:
            text = self.apply(chat, None)
        except BadRow as error:
            try:  # some templates want a system prompt
                text = self.apply([{"role": "system", "content": "a"}, *chat], None)
            except BadRow:
                raise DataError(
                    f"data.template: {self.name} fails on one plain question and its answer: {error}"
                ) from None
        _, found, after = text.partition(STAND_IN)
        if not found:
            raise DataError(
                f"data.template: {self.name} drops what the assistant says and must be mended"
            )
        closing = after.rstrip()
        return closing, after[len(closing) :]

    @property
    def closing(self) -> str:
        """What closes an assistant's turn, whitespace at the end left off."""
        return self._ending[0]

    def closed(self, after: str) -> int:
        """How many characters of `after`, the text behind an assistant's content, close the turn.

        All of the closing, or its beginning up to a special token: Phi-3 ends each turn with one, and the
        last with one more.
        """
        if after.startswith(self.closing):
            return len(self.closing)
        told = self.tokenizer(
            self.closing, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        pairs = zip(told["input_ids"], told["offset_mapping"], strict=True)
        ends = [end for token, (_, end) in pairs if token in self._special]
        return max((end for end in ends if after.startswith(self.closing[:end])), default=0)

    def without_space_behind(self, text: str) -> str:
        """`text`, which ends with an assistant's turn, up to the turn's closing."""
        closing, space = self._ending
        # Where nothing closes a turn, whitespace before that space is the answer's own.
        return text.rstrip() if closing else text.removesuffix(space)

    @cached_property
    def stop_token_id(self) -> int | None:
        """The special token with which a turn is closed; None where it is plain text or nothing."""
        if self.source is None or not self.closing:
            return None
        last = int(self.tokenizer(self.closing, add_special_tokens=False)["input_ids"][-1])
        return last if last in self._special else None

    @cached_property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
