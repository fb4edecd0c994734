"""Does what was exported answer as the adapter does? Adapter, base and export read the same tokens in float32.

The adapter runs in PEFT on the 16-bit base; the base without it says what a forgotten adapter would look like.
Greedy text is compared without generating it: the greedy answers of two models are the same if and only if,
along the one's answer, the other prefers the same token at every place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastlora.engines.memory import host_free_bytes
from fastlora.errors import EngineError
from fastlora.export.forward import Row, Weights, batches, compute_device, logits_of, streaming

if TYPE_CHECKING:
    import torch

    from fastlora.export.plan import Plan

_KEPT_BYTES = 512 * 2**20
"""Of logits, for each of adapter and base: 1,046 tokens of a vocabulary of 128,256."""
_MOST_TOKENS = 16_384
_BATCH_BYTES = 256 * 2**20
_BATCH_TOKENS = 4_096


@dataclass(frozen=True, slots=True)
class Limits:
    """What the rounding of a type may cost where the adapter's whole effect is small; elsewhere half of what
    forgetting the adapter costs. On random 8B weights bfloat16's rounding moves logits by 16 % of their RMS where
    a forgotten adapter moves them by 99 %; on the tiny model by 0.7 %."""

    logits: float
    """RMS of the difference over RMS of the logits."""
    kl: float
    """Nats a token."""
    tokens: float
    """Share of positions where another token is preferred."""
    carried: tuple[float, float]
    """Part of the adapter's effect that the export has; noise averages out in it, so that it tells a merged
    adapter from a forgotten (0) or doubled (2) one where the effect is small."""


SIXTEEN_BITS = Limits(logits=0.05, kl=0.01, tokens=0.02, carried=(0.8, 1.2))
LIMITS = {
    "f16": SIXTEEN_BITS,
    "bf16": SIXTEEN_BITS,
    "q8_0": Limits(logits=0.05, kl=0.02, tokens=0.03, carried=(0.8, 1.2)),
    # 4.9 bits a weight: llama.cpp's own table has a perplexity 0.5 to 1.5 % above 16 bits'.
    "q4_k_m": Limits(logits=0.25, kl=0.15, tokens=0.15, carried=(0.6, 1.4)),
}


def choose_rows(
    probe: Sequence[int],
    answers: Sequence[tuple[Sequence[int], Sequence[int]]],
    held_out: Sequence[Sequence[int]],
    vocabulary: int,
) -> list[Row]:
    """As many as their logits have room for: the probe row, then answers and held-out rows in turn."""
    asked = [Row([*prompt, *answer], len(prompt)) for prompt, answer in answers if len(prompt) > 0]
    kept = [Row(list(ids)) for ids in held_out]
    room = min(_MOST_TOKENS, _KEPT_BYTES // (4 * vocabulary))
    chosen = [Row(list(probe)[:room])]
    room -= len(chosen[0].ids)
    for pair in _in_turn(asked, kept):
        if len(pair.ids) <= room:
            chosen.append(pair)
            room -= len(pair.ids)
    return chosen


def _in_turn(left: Sequence[Row], right: Sequence[Row]) -> Iterator[Row]:
    for number in range(max(len(left), len(right))):
        yield from left[number : number + 1]
        yield from right[number : number + 1]


class Reference:
    """The logits of base + adapter and of the bare base on some rows."""

    def __init__(self, plan: Plan, rows: Sequence[Row]) -> None:
        self.plan, self.device = plan, compute_device()
        vocabulary = int(plan.model.config.get_text_config(decoder=True).vocab_size)
        self.batches = batches(rows, max(1, min(_BATCH_TOKENS, _BATCH_BYTES // (4 * vocabulary))))
        if plan.fused or plan.adapter.config.get("ensure_weight_tying"):
            self._whole_base()
        else:
            self._streamed_base()

    def _streamed_base(self) -> None:
        from fastlora.export.names import empty_model

        plan = self.plan
        base = empty_model(plan.base, plan.trust_remote_code)
        with streaming(base, base, lambda name: plan.weight(name, edited=False), self.device):
            self.base = [logits_of(base, batch, self.device) for batch in self.batches]
        adapted = self._with_adapter(base)
        with streaming(adapted, adapted.base_model.model, self._wrapped, self.device):
            self.adapter = [logits_of(adapted, batch, self.device) for batch in self.batches]

    def _wrapped(self, name: str) -> torch.Tensor:
        """A parameter by the name that it has in PEFT's model: the adapter's own, else the base's."""
        saved = f"base_model.model.{name}".replace(".modules_to_save.default.", ".")
        saved = saved.replace(".default", "")
        weights = self.plan.adapter.weights
        for key in (saved, saved.removesuffix(".weight"), saved.replace(".base_layer.", ".")):
            if key in weights.stored:
                return weights.rows(key)
        base = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        return self.plan.weight(base, edited=False)

    def _whole_base(self) -> None:
        """Where transformers fuses tensors at loading, or PEFT ties layers: these cannot be read one by one."""
        base = load_whole(self.plan.base, self.plan.trust_remote_code, self.device)
        self.base = [logits_of(base, batch, self.device) for batch in self.batches]
        adapted = self._with_adapter(base)
        self.adapter = [logits_of(adapted, batch, self.device) for batch in self.batches]

    def _with_adapter(self, base: Any) -> Any:
        from peft import PeftModel

        adapter, empty = str(self.plan.adapter.folder), any(p.is_meta for p in base.parameters())
        return PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=empty).eval()

    def compare(self, candidate: Callable[[Sequence[Row]], list[torch.Tensor]]) -> dict[str, Any]:
        """`candidate`: logits of the export for a batch of rows.

        Report: positions; logit_error, RMS of the difference over RMS of the logits; effect, the same between
        adapter and bare base; carried, how much of the effect the export has too (1 is all, 0 is a forgotten
        adapter); kl, KL(adapter | export) in nats a token, and kl_forgotten, KL(adapter | base);
        top1_agreement, share of positions, and top1_forgotten, the base's; answers, answers_same and
        answers_forgotten, how many of the adapter's greedy answers export and base give, token by token.
        """
        sums = _Sums()
        for batch, wanted, without in zip(self.batches, self.adapter, self.base, strict=True):
            for row, got, want, bare in zip(batch, candidate(batch), wanted, without, strict=True):
                sums.add(row, got, want, bare)
        return sums.report()


class _Sums:
    def __init__(self) -> None:
        self.positions = self.answers = self.same = self.same_base = 0
        self.error = self.effect = self.scale = self.shared = 0.0
        self.kl = self.kl_base = 0.0
        self.top1 = self.top1_base = 0
        self.answer_tokens: list[int] = []

    def add(self, row: Row, got: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> None:
        effect = wanted - base
        self.positions += len(row.ids)
        self.error += float((got - wanted).square().mean(-1).sum())
        self.effect += float(effect.square().mean(-1).sum())
        self.scale += float(wanted.square().mean(-1).sum())
        self.shared += float(((got - base) * effect).mean(-1).sum())
        wanted_log = wanted.log_softmax(-1)
        self.kl += _kl(wanted_log, got)
        self.kl_base += _kl(wanted_log, base)
        best, best_got, best_base = wanted.argmax(-1), got.argmax(-1), base.argmax(-1)
        self.top1 += int((best == best_got).sum())
        self.top1_base += int((best == best_base).sum())
        if row.answer_from is not None:
            # Each place predicts the next token; the last, what comes after the answer.
            first = row.answer_from - 1
            given = row.ids[row.answer_from :]
            leaves = [n for n, token in enumerate(given) if int(best[first + n]) != token]
            # Where the adapter on the 16-bit base leaves the answer that was given in training (on a quantized
            # one), its greedy text is another from there on, and not known.
            span = slice(first, first + (leaves[0] if leaves else len(given)) + 1)
            self.answers += 1
            self.answer_tokens.append(span.stop - span.start)
            self.same += bool((best[span] == best_got[span]).all())
            self.same_base += bool((best[span] == best_base[span]).all())

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = {
            "positions": self.positions,
            "logit_error": (self.error / self.scale) ** 0.5,
            "effect": (self.effect / self.scale) ** 0.5,
            # An adapter that changes nothing is carried whole by anything.
            "carried": self.shared / self.effect if self.effect > 0 else 1.0,
            "kl": self.kl / self.positions,
            "kl_forgotten": self.kl_base / self.positions,
            "top1_agreement": self.top1 / self.positions,
            "top1_forgotten": self.top1_base / self.positions,
        }
        if self.answers:
            report |= {
                "answers": self.answers,
                "answers_same": self.same,
                "answers_forgotten": self.same_base,
                "answer_tokens": self.answer_tokens,
            }
        return report


def _kl(wanted_log: torch.Tensor, other: torch.Tensor) -> float:
    return float((wanted_log.exp() * (wanted_log - other.log_softmax(-1))).sum())


def problems(report: dict[str, Any], limits: Limits) -> list[str]:
    """One line for each limit that is not kept. Takes `answer_tokens` out of the report. NaN fails."""
    tokens = report.pop("answer_tokens", [])
    found = []

    def within(value: float, floor: float, forgotten: float, text: str) -> None:
        limit = max(floor, forgotten / 2)
        if not value <= limit:
            found.append(text.format(value=value, limit=limit, forgotten=forgotten))

    within(
        report["logit_error"], limits.logits, report["effect"],
        "logits differ by {value:.1%} of their RMS (limit {limit:.1%}; the adapter's whole effect is {forgotten:.1%})",
    )  # fmt: skip
    low, high = limits.carried
    if not low <= report["carried"] <= high:
        found.append(
            f"it carries {report['carried']:.0%} of the adapter's effect (limits {low:.0%} to {high:.0%})"
        )
    within(
        report["kl"], limits.kl, report["kl_forgotten"],
        "KL is {value:.3g} nats a token (limit {limit:.3g}; {forgotten:.3g} without the adapter)",
    )  # fmt: skip
    within(
        # One position of few may always differ: rows of a training without held-out ones can be that short.
        1 - report["top1_agreement"], max(limits.tokens, 1.01 / report["positions"]), 1 - report["top1_forgotten"],
        "another token is preferred at {value:.1%} of positions (limit {limit:.1%}; {forgotten:.1%} without the "
        "adapter)",
    )  # fmt: skip
    if tokens:
        # As many as would change if every token of theirs did so as often as is allowed; one always may.
        chance = sum(1 - (1 - limits.tokens) ** count for count in tokens)
        changed, forgotten = (
            report["answers"] - report[key] for key in ("answers_same", "answers_forgotten")
        )
        within(
            changed, max(1.0, chance), forgotten,
            "{value} of " + str(report["answers"]) + " greedy answers are others (limit {limit:.1f}; {forgotten} "
            "without the adapter)",
        )  # fmt: skip
    return found


def streamed(model: Any, weights: Weights) -> Callable[[Sequence[Row]], list[torch.Tensor]]:
    """The logits of `model`, empty, with `weights` read as its layers need them."""
    device = compute_device()

    def run(batch: Sequence[Row]) -> list[torch.Tensor]:
        with streaming(model, model, weights, device):
            return logits_of(model, batch, device)

    return run


def load_whole(folder: Any, trust_remote_code: bool, device: torch.device) -> Any:
    """Raises EngineError: the host has no room for it in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = host_free_bytes()
    if 2 * stored > free:  # float32 from 16 bits
        raise EngineError(
            f"{folder}: comparing it needs about {2 * stored / 2**30:.0f} GiB of memory, since transformers fuses its "
            f"weights at loading, and {free / 2**30:.0f} are free; run it where there are more"
        )
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, device_map={"": str(device)}, attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return model.eval()
