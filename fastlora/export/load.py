"""The model of a run, to be asked."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastlora.data.mask import Encoder
from fastlora.data.prompts import prompt_encoder
from fastlora.engines.base import not_loadable
from fastlora.engines.peft import PeftEngine
from fastlora.errors import EngineError
from fastlora.recipe.schema import ModelSection
from fastlora.rundir.store import RunDir

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

Who = Literal["base", "tuned"]


@dataclass(frozen=True, slots=True)
class Tuned:
    """Base and adapter, in evaluation mode, with all that lays prompts out as in training."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    stop_token_ids: list[int]
    context_tokens: int | None
    """How long prompt and answer may be together, where the model says so."""
    base_note: str = ""
    """What keeps `base` from being the model before training, if anything does."""

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @contextlib.contextmanager
    def speaking(self, who: Who) -> Iterator[PeftModel]:
        """Within it the model is the base or the tuned one."""
        with contextlib.ExitStack() as opened:
            if who == "base":
                opened.enter_context(
                    warnings.catch_warnings(action="ignore")
                )  # `base_note` says it
                opened.enter_context(self.model.disable_adapter())
            yield self.model


def load_encoder(run: RunDir) -> Encoder:
    """Lays prompts out as in the run's training; its tokenizer is the adapter's."""
    from transformers import AutoTokenizer

    recipe = run.manifest["recipe"]
    tokenizer = AutoTokenizer.from_pretrained(
        str(run.adapter), trust_remote_code=recipe["model"]["trust_remote_code"]
    )
    # A .jinja file of the recipe is in the adapter's tokenizer.
    return prompt_encoder(
        tokenizer, "none" if recipe["data"]["template"] == "none" else "tokenizer"
    )


def context_tokens(run: RunDir) -> int | None:
    """How long prompt and answer may be together, where the model says so. Raises EngineError: it is not found."""
    from transformers import AutoConfig

    model = ModelSection.model_validate(run.manifest["recipe"]["model"])
    try:
        config = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise EngineError(not_loadable(model.name, error)) from error
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if most is None else int(most)


def load_run(run: RunDir) -> Tuned:
    """The run's base, quantized as it was trained on, on the GPU if there is one, under its adapter.

    Through transformers and PEFT, whichever engine trained. Raises RunDirError: the run holds no adapter.
    EngineError: the base cannot be loaded, or not here in the type that the recipe asks for.
    """
    run.require_adapter()
    engine = PeftEngine()
    engine.prepare()
    room = context_tokens(run)
    from peft import PeftModel

    recipe = run.manifest["recipe"]
    base = engine.load_base(ModelSection.model_validate(recipe["model"]))
    encoder, bias = load_encoder(run), recipe["lora"]["bias"]
    return Tuned(
        model=PeftModel.from_pretrained(base, str(run.adapter)).eval(),
        tokenizer=encoder.tokenizer,
        encoder=encoder,
        stop_token_ids=run.manifest["stop_token_ids"],
        context_tokens=room,
        base_note="" if bias == "none" else f"the trained biases stay (lora.bias = {bias!r})",
    )
