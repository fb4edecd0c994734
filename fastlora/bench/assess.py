"""From what the processes sent to rows that may be shown: gates, figures, ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.bench import gates
from fastlora.bench import work as works
from fastlora.bench.processes import Failed
from fastlora.bench.schema import OPTIONS, Arm, ArmResult, Gate, LedgerEntry, Spread, kind_of


def assess(
    arms: Sequence[Arm],
    results: Mapping[str, dict[str, Any]],
    failures: Mapping[str, Failed],
    *,
    scratch: Path,
    seq_len_tokens: int,
    warmup_steps: int,
    ceilings: Mapping[str, float],
    vram_cap_gib: float | None = None,
) -> list[ArmResult]:
    """A row for each arm. `scratch`: the folder with rows.json and the gradients, NAME.safetensors."""
    rows = []
    firsts: dict[bool, str] = {}  # padded and packed arms take other steps through the same rows
    for arm in arms:
        if arm.name in results:
            firsts.setdefault(arm.packed, arm.name)
            found = _gates(arm, results, firsts, scratch, seq_len_tokens, vram_cap_gib)
            rows.append(_row(arm, results[arm.name], found, warmup_steps, ceilings))
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
    results: Mapping[str, Mapping[str, Any]],
    firsts: Mapping[bool, str],
    scratch: Path,
    seq_len_tokens: int,
    vram_cap_gib: float | None,
) -> list[Gate]:
    """`firsts`: the first arm that pads, and that packs. A first arm has no trajectory to keep to, and the
    first of all no gradients of the whole model."""
    from safetensors.torch import load_file

    result, first_of_all = results[arm.name], next(iter(firsts.values()))
    asked = works.load(scratch / "rows.json")
    digest, order = works.expected(works.pack(asked, seq_len_tokens) if arm.packed else asked)
    of_arm, plain, exact = (
        load_file(scratch / f"{name}.safetensors") for name in (arm.name, "plain", "exact")
    )
    found = [
        gates.gate_work(result, digest, order),
        gates.gate_loss(result["losses"], result["first_rows_after"]),
        gates.gate_gradients(result),
        gates.gate_weights(result),
        gates.gate_parity(of_arm, plain, exact),
    ]
    if vram_cap_gib is not None:
        found.append(gates.gate_memory(result["driver_gib"], vram_cap_gib))
    if arm.name != first_of_all:
        whole, wanted = (
            load_file(scratch / f"{name}.depth.safetensors") for name in (arm.name, first_of_all)
        )
        found.append(gates.gate_depth(whole, wanted))
    if arm.name != firsts[arm.packed]:
        trajectory = results[firsts[arm.packed]]["losses"]
        found.append(gates.gate_trajectory(result["losses"], trajectory))
    return found


def _row(
    arm: Arm,
    result: Mapping[str, Any],
    found: list[Gate],
    warmup_steps: int,
    ceilings: Mapping[str, float],
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
        **({} if red else figures(result, warmup_steps, ceilings)),  # no speed on a red gate
    )


def figures(
    result: Mapping[str, Any], warmup: int, ceilings: Mapping[str, float]
) -> dict[str, Any]:
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
        "tokens_per_s": rate(tokens, seconds),
        "supervised_tokens_per_s": rate(supervised, seconds),
        "step_s": spread(seconds),
        "peak_allocated_gib": result["peak_allocated_gib"],
        "peak_reserved_gib": result["peak_reserved_gib"],
        "driver_gib": result["driver_gib"],
        "host_gib": result["host_gib"],
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


def rate(tokens: Sequence[int], seconds: Sequence[float]) -> Spread:
    """Tokens/s. Where steps differ in tokens, p50 is all tokens over all seconds: the median of their speeds
    would favour the long ones, and flatter packing."""
    found = spread([count / time for count, time in zip(tokens, seconds, strict=True)])
    if len(set(tokens)) == 1:
        return found
    return found.model_copy(update={"p50": round(sum(tokens) / sum(seconds), 6)})


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6)

    return Spread(p20=at(0.2), p50=at(0.5), p80=at(0.8))


def ledger(rows: Sequence[ArmResult]) -> list[LedgerEntry]:
    """An entry for each arm that is another one with one option more."""
    arms = {(arm := Arm.parse(row.arm)).engine + "|".join(sorted(arm.options)): row for row in rows}
    entries = []
    for row in rows:
        arm = Arm.parse(row.arm)
        for option in sorted(arm.options, key=lambda option: list(OPTIONS).index(kind_of(option))):
            base = arms.get(arm.engine + "|".join(sorted(arm.options - {option})))
            if base is None:
                continue
            entries.append(
                LedgerEntry(
                    ingredient=OPTIONS[kind_of(option)][1],
                    arm=row.arm,
                    base=base.arm,
                    tokens_per_s=row.tokens_per_s.p50 if row.tokens_per_s else None,
                    base_tokens_per_s=base.tokens_per_s.p50 if base.tokens_per_s else None,
                    peak_reserved_gib=row.peak_reserved_gib,
                    base_peak_reserved_gib=base.peak_reserved_gib,
                )
            )
    return entries
