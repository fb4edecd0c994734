"""From what the processes sent to rows that may be shown: gates, figures, ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.bench import gates
from fastlora.bench.processes import Failed
from fastlora.bench.schema import OPTIONS, Arm, ArmResult, Gate, LedgerEntry, Spread


def assess(
    arms: Sequence[Arm],
    results: Mapping[str, dict[str, Any]],
    failures: Mapping[str, Failed],
    *,
    gradients: Path,
    warmup_steps: int,
    ceilings: Mapping[str, float],
) -> list[ArmResult]:
    """A row for each arm. `gradients`: the folder with NAME.safetensors of each arm, plain and exact."""
    rows = []
    firsts: dict[bool, str] = {}  # padded and packed arms take other steps through the same rows
    for arm in arms:
        if arm.name in results:
            result = results[arm.name]
            first = results[firsts.setdefault(arm.packed, arm.name)]
            found = _gates(arm, result, first, results[next(iter(firsts.values()))], gradients)
            rows.append(_row(arm, result, found, figures(result, warmup_steps, ceilings)))
        elif arm.name in failures:
            failed = failures[arm.name]
            peaks = {
                key: failed.told.get(key)
                for key in ("peak_allocated_gib", "peak_reserved_gib", "driver_gib")
            }
            rows.append(
                ArmResult(arm=arm.name, status=failed.status, detail=failed.detail, **peaks)  # type: ignore[arg-type]
            )
        else:
            rows.append(ArmResult(arm=arm.name, status="interrupted", detail="not measured"))
    return rows


def _gates(
    arm: Arm,
    result: Mapping[str, Any],
    first: Mapping[str, Any],
    first_of_all: Mapping[str, Any],
    gradients: Path,
) -> list[Gate]:
    """`first`: of the arms that pack as this one does; a first arm has none to be compared with."""
    from safetensors.torch import load_file

    alone = first is result
    work = gates.gate_work(result, first_of_all if alone else first, same_order=not alone)
    of_arm, plain, exact = (
        load_file(gradients / f"{name}.safetensors") for name in (arm.name, "plain", "exact")
    )
    found = [
        work,
        gates.gate_loss(result["losses"]),
        gates.gate_gradients(result),
        gates.gate_weights(result),
        gates.gate_parity(of_arm, plain, exact),
    ]
    return found if alone else [*found, gates.gate_trajectory(result["losses"], first["losses"])]


def _row(
    arm: Arm, result: Mapping[str, Any], found: list[Gate], shown: dict[str, Any]
) -> ArmResult:
    red = [f"{gate.name}: {gate.detail}" for gate in found if not gate.passed]
    return ArmResult(
        arm=arm.name,
        status="red" if red else "ok",
        detail="; ".join(red),
        gates=found,
        losses=result["losses"],
        load_s=result["load_s"],
        notes=result["notes"],
        **({} if red else shown),  # no speed on a red gate
    )


def figures(result: dict[str, Any], warmup: int, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """The report's figures of an arm, from its steps after warm-up."""
    seconds = result["step_s"][warmup:]
    tokens, supervised = result["step_tokens"][warmup:], result["step_supervised"][warmup:]
    flops, total = result["flops"], sum(result["step_tokens"])
    # Squared lengths are known for the whole run; their share is that of the tokens.
    squared = result["squared_lengths"] * sum(tokens) / total
    model = flops["matmul"] * sum(tokens) + flops["attention"] * squared
    again = flops["recompute_matmul"] * sum(tokens) + flops["recompute_attention"] * squared
    peak = ceilings.get("gemm_tflops", 0) * 1e12 * sum(seconds)
    return {
        "tokens_per_s": spread([t / s for t, s in zip(tokens, seconds, strict=True)]),
        "supervised_tokens_per_s": spread(
            [t / s for t, s in zip(supervised, seconds, strict=True)]
        ),
        "step_s": spread(seconds),
        "peak_allocated_gib": result["peak_allocated_gib"],
        "peak_reserved_gib": result["peak_reserved_gib"],
        "driver_gib": result["driver_gib"],
        "mfu": round(model / peak, 4) if peak else None,
        "hfu": round((model + again) / peak, 4) if peak else None,
        "counted": {
            "steps": len(result["step_s"]),
            "tokens": total,
            "supervised_tokens": sum(result["step_supervised"]),
            "padding_share": round(1 - total / result["fed_tokens"], 4),
            "digest": result["digest"],
        },
    }


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6)

    return Spread(p20=at(0.2), p50=at(0.5), p80=at(0.8))


def ledger(arms: Sequence[ArmResult]) -> list[LedgerEntry]:
    """An entry for each arm that is another one with one option more."""
    by_name = {arm.arm: arm for arm in arms}
    entries = []
    for arm in arms:
        for option, (_, what) in OPTIONS.items():
            base = by_name.get(arm.arm.removesuffix(option))
            if base is None or base is arm:
                continue
            entries.append(
                LedgerEntry(
                    ingredient=what,
                    arm=arm.arm,
                    base=base.arm,
                    tokens_per_s=arm.tokens_per_s.p50 if arm.tokens_per_s else None,
                    base_tokens_per_s=base.tokens_per_s.p50 if base.tokens_per_s else None,
                    peak_reserved_gib=arm.peak_reserved_gib,
                    base_peak_reserved_gib=base.peak_reserved_gib,
                )
            )
    return entries
