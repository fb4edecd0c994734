"""What the machine and the model's configuration rule out, said all at once: before an evening is spent,
before a weight is read, and before a run has a folder."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.engines.base import (
    Announce,
    Engine,
    not_loadable,
    resolve_dtype,
    target_problems,
)
from fastlora.engines.kept import memory_problems
from fastlora.errors import EngineError
from fastlora.export.score import PACKAGES
from fastlora.recipe.schema import Recipe
from fastlora.train.trackers import tracker_problems

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def check_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine | None,
    announce: Announce,
) -> None:
    """`engine` is None where none is chosen.

    Raises EngineError: a line for each thing that this recipe asks of this model here and cannot have.
    """
    from transformers import AutoConfig

    model = recipe.model
    problems = list(_machine_problems(recipe, engine))
    try:
        config = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        problems.append(not_loadable(model.name, error))
    else:
        problems += _export_problems(recipe, config, announce)
        problems += _weight_problems(recipe, config)
        problems += _token_problems(model.name, tokenizer, config, announce)
        if recipe.lora.target_modules != "all-linear":
            problems += target_problems(recipe.lora.target_modules, config, engine, announce)
    if problems:
        raise EngineError("\n".join(problems))


def _machine_problems(recipe: Recipe, engine: Engine | None) -> Iterator[str]:
    from fastlora_kernels.dispatch import read_environment

    try:
        resolve_dtype(recipe.model)
    except EngineError as error:
        yield str(error)
    try:
        read_environment()
    except ValueError as error:
        yield str(error)
    if engine is not None:
        yield from memory_problems(recipe, engine)
    if recipe.memory.cuda_graphs:
        from fastlora.train.graphs import can_record

        if not can_record():
            yield "memory.cuda_graphs: there is no CUDA GPU here; set it to false, or train on one"
    yield from tracker_problems(recipe)
    for metric in recipe.eval.metrics:
        if metric in PACKAGES and find_spec(PACKAGES[metric][0]) is None:
            yield (
                f"eval.metrics: {metric} needs {PACKAGES[metric][1]}; pip install 'fastlora[metrics]', or leave it out"
            )


def _weight_problems(recipe: Recipe, config: PretrainedConfig) -> Iterator[str]:
    """A folder that was copied in part, found before the rows are read; only headers of files are."""
    from fastlora.export.stream import Checkpoint

    folder, output = Path(recipe.model.name), recipe.output
    if not folder.is_dir():
        return
    # Loadable for a training, while an export reads safetensors.
    otherwise_stored = hasattr(config, "quantization_config") or any(folder.glob("*.bin"))
    if otherwise_stored and output.merge == "none" and not output.export:
        return
    try:
        Checkpoint(folder)
    except EngineError as error:
        yield f"model.name: {str(error).removeprefix('model.name: ')}"


def _export_problems(recipe: Recipe, config: PretrainedConfig, announce: Announce) -> Iterator[str]:
    output, name = recipe.output, recipe.model.name
    asked = [
        key for key, on in (("merge", output.merge != "none"), ("export", output.export)) if on
    ]
    stored = getattr(config, "quantization_config", None)
    if asked and stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if getattr(method, "value", method) == "bitsandbytes":
            announce(
                f"output.{asked[0]}: {name} is quantized on disk; it is dequantized, and its error stays in the result"
            )
        else:
            yield (
                f"output.{asked[0]}: {name} is quantized on disk; name its 16-bit original or leave output."
                f"{asked[0]} out"
            )
    if output.export:
        from fastlora.export.gguf_write import ARCHITECTURES

        if config.model_type not in ARCHITECTURES:
            yield (
                f"output.export: GGUF is written for {', '.join(ARCHITECTURES)} models, and {name} is "
                f"{config.model_type}; leave it out and use output.merge"
            )


def _token_problems(
    name: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, announce: Announce
) -> Iterator[str]:
    """Tokens past the end of the embedding: the first row that holds one would end the run.

    Tokens with a name (`image_token`) that no template writes only earn a note: some text models, Gemma 3 1B
    among them, have the tokenizer of their siblings that see.
    """
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if size is None:
        return
    beyond = {token for token, number in tokenizer.get_vocab().items() if number >= size}
    template = str(tokenizer.chat_template)
    always = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    unasked = {token for token in tokenizer.all_special_tokens if token not in template} - always
    if beyond - unasked:
        shown = ", ".join(sorted(beyond - unasked)[:3])
        yield (
            f"model.name: the tokenizer of {name} has tokens past the end of the model's embedding ({size}): {shown}; "
            f"{len(beyond)} in all. Use the tokenizer that came with the model; or, if they were added on purpose, "
            "make room with model.resize_token_embeddings(len(tokenizer)) and save the model again"
        )
    elif beyond:
        announce(
            f"model.name: the model has no embedding for {', '.join(sorted(beyond)[:3])}; rows must not hold them"
        )
