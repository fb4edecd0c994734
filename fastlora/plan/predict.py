"""One recipe on one card: memory, speed, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastlora.plan.gpus import Gpu
from fastlora.plan.measured import Correction, correction
from fastlora.plan.memory import Memory, Term, memory
from fastlora.plan.setup import EngineName, Setup, setup_of
from fastlora.plan.shape import Shape
from fastlora.plan.speed import Speed, speed
from fastlora.plan.working import GIB
from fastlora.recipe.schema import Recipe

Verdict = Literal["fits", "tight", "no", "unknown"]
"""tight: what is allocated fits, and the allocator may have to give back what it holds beside that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What there is to fit into; None: not said."""

    gpu: Gpu | None
    vram_gib: float | None
    host_gib: float | None = None
    whole_gib: float | None = None
    """Of the card, where vram_gib is a budget on it: unsloth sizes its loss by what is free on the card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    recipe: Recipe
    shape: Shape
    setup: Setup
    card: Card
    memory: Memory
    speed: Speed | None
    """None: the GPU is not known."""
    correction: Correction

    @property
    def verdict(self) -> Verdict:
        vram, host = self.card.vram_gib, self.card.host_gib
        if vram is None:
            return "unknown"
        if self.memory.needed_gib > vram or (host is not None and self.memory.host_gib > host):
            return "no"
        return "fits" if self.memory.comfortable_gib <= vram else "tight"

    def document(self) -> dict[str, Any]:
        """As JSON; memory in GiB."""
        mem, setup, gpu = self.memory, self.setup, self.card.gpu
        return {
            "model": {
                "type": self.shape.model_type,
                "parameters": self.shape.parameters,
                "layers": self.shape.layers,
            },
            "setup": {
                "engine": setup.engine,
                "checkpointing": setup.policy,
                "keep_layers": setup.keep_layers,
                "keep_attention_layers": setup.keep_attention_layers,
                "keep_dequantized": setup.keep_dequantized,
                "stream_layers": setup.stream_layers,
                "dense_layers": setup.dense_layers,
                "embedding": "host" if setup.host_embedding else "gpu",
                "loss": setup.loss,
                "quantization": setup.quantization,
                "micro_batch": setup.micro_batch,
                "accumulation": setup.accumulation,
                "row_tokens": setup.row_tokens,
                "rank": setup.rank,
                "optimizer": setup.optimizer,
            },
            "gpu": gpu and {"name": gpu.name, "tflops": gpu.tflops, "source": gpu.source},
            "vram_gib": self.card.vram_gib,
            "verdict": self.verdict,
            "peak": {
                "moment": mem.peak,
                "allocated_gib": round(mem.allocated_gib, 3),
                "reserved_gib": round(mem.reserved_gib, 3),
                "needed_gib": round(mem.needed_gib, 3),
                "comfortable_gib": round(mem.comfortable_gib, 3),
                "context_gib": round(mem.context / GIB, 3),
            },
            "moments": {name: _gib(terms) for name, terms in mem.moments.items()},
            "host": _gib(mem.host) | {"limit_gib": self.card.host_gib},
            "speed": self.speed
            and {
                "tokens_per_s": round(self.speed.tokens_per_s, 1),
                "bound_by": self.speed.bound_by,
                "seconds": self.seconds and round(self.seconds, 1),
            },
            "correction": {
                "factor": round(self.correction.factor, 4),
                "runs": self.correction.runs,
                "largest_error": self.correction.error and round(self.correction.error, 4),
            },
            "notes": list(setup.notes),
        }

    @property
    def seconds(self) -> float | None:
        """Of the whole training, with full rows; None where the recipe counts in epochs, or the GPU is not known."""
        steps = self.recipe.train.steps
        if steps is None or self.speed is None:
            return None
        return self.speed.seconds(steps * self.setup.tokens * self.setup.accumulation)


def _gib(terms: tuple[Term, ...]) -> dict[str, Any]:
    named = {one.name: round(one.bytes / GIB, 4) for one in terms}
    return {"terms": named, "total_gib": round(sum(one.bytes for one in terms) / GIB, 3)}


def predict(
    recipe: Recipe,
    shape: Shape,
    card: Card,
    *,
    engine: EngineName | None = None,
    row_tokens: int | None = None,
) -> Prediction:
    """Raises RecipeError: as setup_of does."""
    gpu = card.gpu
    setup = setup_of(
        recipe, shape, engine=engine, row_tokens=row_tokens, bfloat16=gpu is None or gpu.bfloat16
    )
    found = correction(gpu.name if gpu else None, setup)
    return Prediction(
        recipe=recipe,
        shape=shape,
        setup=setup,
        card=card,
        memory=memory(
            shape,
            setup,
            vram_gib=card.whole_gib or card.vram_gib or 80,
            hopper=gpu is not None and gpu.hopper,
            correction=found.factor,
        ),
        speed=None if gpu is None or not gpu.tflops else speed(shape, setup, gpu),
        correction=found,
    )
