"""A conversation with the model of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fastlora.data.format import BadRow, Chat, Message, Plain
from fastlora.engines.memory import is_out_of_memory
from fastlora.errors import DataError, EngineError
from fastlora.export.answers import generation_config
from fastlora.export.load import Tuned, Who

if TYPE_CHECKING:
    from transformers.generation.streamers import TextStreamer

Write = Callable[[str], None]


class Conversation:
    """Turns so far, laid out as the run was trained. Without a template each line is a prompt of its own."""

    def __init__(self, tuned: Tuned, **sampling: Any) -> None:
        """`sampling`: max_new_tokens, and temperature and top_p, as for `generation_config`."""
        self.tuned, self.sampling = tuned, sampling
        self.messages: list[Message] = []

    def reset(self, system: str | None = None) -> None:
        """Begin anew, keeping what the system says unless it is given: "" says nothing any more.

        Raises DataError: the template takes no system turn.
        """
        kept = [turn for turn in self.messages if turn["role"] == "system"]
        if system is not None:
            kept = [{"role": "system", "content": system}] if system else []
        if system:
            self._ids([*kept, {"role": "user", "content": "a"}])
        self.messages = kept

    def ask(self, text: str, who: Iterable[Who], write: Callable[[Who], Write]) -> tuple[str, bool]:
        """Every one of `who` answers, piece by piece through `write(who)`; the last one's answer stays in the
        conversation, unless it is empty. KeyboardInterrupt ends the answer where it is, and those of the others.
        Returns the last answer, and whether nobody stopped it.

        Raises DataError: the template refuses the conversation, or it is too long; EngineError: the
        GPU is out of memory. The conversation then stays as it was.
        """
        turns: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(turns)
        answer, whole = "", True
        for one in who:
            answer, whole = self._answer(ids, one, write(one))
            if not whole:
                break
        if answer.strip():
            self.messages = [*turns, {"role": "assistant", "content": answer}]
        return answer, whole

    def _ids(self, turns: list[Message]) -> list[int]:
        encoder, room = self.tuned.encoder, self.tuned.context_tokens
        example: Chat | Plain = Chat(turns)
        if not encoder.templated:
            if turns[0]["role"] == "system":
                raise DataError(
                    'the run was trained with data.template = "none": nothing lays out a system turn'
                )
            example = Plain("", turns[-1]["content"])
        try:
            ids = encoder.ask(example)
        except BadRow as problem:
            raise DataError(str(problem)) from None
        if room is not None and len(ids) >= room:
            raise DataError(
                f"the conversation has {len(ids):,} tokens and the model takes {room:,}; /reset begins anew"
            )
        return ids

    def _answer(self, ids: list[int], who: Who, write: Write) -> tuple[str, bool]:
        """The answer, and whether nobody stopped it."""
        import torch

        tuned, sampling = self.tuned, dict(self.sampling)
        if tuned.context_tokens is not None:
            sampling["max_new_tokens"] = min(
                sampling["max_new_tokens"], tuned.context_tokens - len(ids)
            )
        said: list[str] = []

        def heard(text: str) -> None:
            said.append(text)
            write(text)

        streamer = _streamer(tuned, heard)
        whole = True
        with tuned.speaking(who) as model, torch.no_grad():
            prompt = torch.tensor([ids], device=model.device)
            config = generation_config(
                stop_token_ids=tuned.stop_token_ids, pad_token_id=tuned.pad_token_id, **sampling
            )
            try:
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=config,
                    streamer=streamer,
                )
            except KeyboardInterrupt:
                whole = False
                streamer.end()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise EngineError(
                    f"the GPU is out of memory at {len(ids):,} tokens of conversation; /reset begins anew"
                ) from None
        return "".join(said), whole


def _streamer(tuned: Tuned, heard: Write) -> TextStreamer:
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def put(self, value: torch.Tensor) -> None:
            if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in tuned.stop_token_ids:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                heard(text)

    # Special tokens are shown, as in comparison.json: a tool call may be made of them.
    return Streamer(
        tuned.tokenizer,
        skip_prompt=True,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
