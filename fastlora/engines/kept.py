"""What a model keeps of its layers for backward: train.checkpointing and [memory], put on a loaded model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from fastlora.engines.base import Announce, Engine, resolve_checkpointing
from fastlora.engines.unsloth import streamed_layers
from fastlora.errors import EngineError
from fastlora.plan import setup
from fastlora.recipe.schema import MemorySection, Recipe

if TYPE_CHECKING:
    from fastlora_kernels import DenseWeights
    from fastlora_kernels.recompute import Mode
    from peft import PeftModel


def memory_problems(recipe: Recipe, engine: Engine) -> Iterator[str]:
    """A line for each thing that train.checkpointing and [memory] ask for and `engine` cannot do here."""
    checkpointing = None
    try:
        checkpointing = resolve_checkpointing(recipe, engine)
    except EngineError as error:
        yield str(error)
    streams = engine.capabilities.streams_layers
    yield from setup.memory_problems(recipe, engine.name, checkpointing, streams=streams)


def keep_as_asked(model: PeftModel, engine: Engine, recipe: Recipe, announce: Announce) -> None:
    """Recompute the layers of `model`, which has its kernels, as the recipe says; unsloth's own checkpointing is on it
    since it was loaded.

    Raises EngineError: its layers cannot be recomputed so.
    """
    memory, checkpointing = recipe.memory, resolve_checkpointing(recipe, engine)
    dequantized = bool(memory.keep_dequantized)
    wanted = bool(memory.keep_layers or memory.keep_attention_layers)
    if checkpointing == "none" and (wanted or dequantized):
        announce('memory: train.checkpointing = "none" keeps every layer as it is')
    if checkpointing in ("none", "unsloth"):
        return
    layers = _count(model)
    modes = modes_of(layers, memory, streamed_layers(model), announce)
    try:
        offload = checkpointing == "offload"
        _recompute(model, engine, modes, offload=offload, keep_dequantized=dequantized)
    except ValueError as error:
        if wanted or checkpointing == "offload":
            raise EngineError(
                f'train.checkpointing: {error}; set train.checkpointing = "full" and leave [memory] out'
            ) from error
        _fall_back(model, error, announce)
        return
    if dequantized and not any(_dequantizes(module) for module in model.modules()):
        announce(f"memory.keep_dequantized: {_NONE}")
    elif dequantized:
        recorded = setup.records(recipe, engine.name, checkpointing)
        if why := setup.compiled(engine.name, model.config.model_type, recorded):
            announce(f"memory.keep_dequantized: it does nothing ({why})")


def dense_as_asked(model: PeftModel, recipe: Recipe, announce: Announce) -> DenseWeights | None:
    """What of `model`, which has its kernels, is to be dequantized once a step, for its recorded micro-batches
    (train/graphs.py). None: nothing."""
    from fastlora_kernels import DenseWeights
    from fastlora_kernels.recompute import decoder_layers

    if not (wanted := recipe.memory.dense_layers):
        return None
    layers = decoder_layers(model)
    count = at_most("memory.dense_layers", wanted, len(layers), announce)
    last = layers[len(layers) - count :]
    if not (found := [m for one in last for m in one.modules() if _dequantizes(m)]):
        announce(f"memory.dense_layers: {_NONE}")
        return None
    return DenseWeights(found)


def recompute_all(model: PeftModel, engine: Engine, announce: Announce, *, offload: bool) -> None:
    """Every layer of a model that trains already, whatever was kept until now."""
    try:
        _recompute(model, engine, ["layer"] * _count(model), offload=offload)
    except ValueError as error:
        _fall_back(model, error, announce)


def modes_of(
    layers: int, memory: MemorySection, streamed: Collection[int], announce: Announce
) -> list[Mode]:
    """One for each layer. Those that keep something are the last ones, whose backward comes first. Weights that are
    streamed would have to stay for a layer that keeps all; one that keeps its attention is still entered again for its
    backward, which is when they come back."""
    modes: list[Mode] = ["layer"] * layers
    kinds: tuple[tuple[str, int | None, Mode], ...] = (
        ("keep_layers", memory.keep_layers, "keep"),
        ("keep_attention_layers", memory.keep_attention_layers, "attention"),
    )
    for key, wanted, mode in kinds:
        free = [
            place
            for place, taken in enumerate(modes)
            if taken == "layer" and (mode != "keep" or place not in streamed)
        ]
        count = at_most(f"memory.{key}", wanted or 0, len(free), announce)
        for place in free[len(free) - count :]:
            modes[place] = mode
    return modes


def at_most(key: str, wanted: int, there: int, announce: Announce) -> int:
    if wanted > there:
        announce(f"{key}: {there}, since the model has no more layers for it ({wanted} asked for)")
    return min(wanted, there)


def _count(model: PeftModel) -> int:
    from fastlora_kernels.recompute import decoder_layers

    return len(decoder_layers(model))


_NONE = "there are none; fastlora's kernels run no 4-bit layer"


def _dequantizes(module: object) -> bool:
    """Whether fastlora's kernels make a matrix of its 4-bit weight that may stay; DoRA scales what it has made."""
    from fastlora_kernels.layers.linear import AttachedLinear4bit

    return isinstance(module, AttachedLinear4bit) and not any(module.use_dora.values())


def _recompute(
    model: PeftModel,
    engine: Engine,
    modes: list[Mode],
    *,
    offload: bool,
    keep_dequantized: bool = False,
) -> None:
    from fastlora_kernels import recompute_layers

    recompute_layers(model, modes, offload=offload, keep_dequantized=keep_dequantized)
    engine.layers_are_recomputed(model)


def _fall_back(model: PeftModel, why: Exception, announce: Announce) -> None:
    announce(f"train.checkpointing: transformers' own, not fastlora's ({why})")
    transformers_own(model)


def transformers_own(model: PeftModel) -> None:
    """Let every layer be computed again by transformers' checkpointing."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
