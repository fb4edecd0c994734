"""A run's folder with everything that a report shows, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = '<script>document.title = "hit"</script> & $x$ "quoted"'

MANIFEST: dict[str, Any] = {
    "status": "finished",
    "recipe_file": "llama31",
    "resume_command": "fastlora run llama31 --resume",
    "notes": ["engine: peft (no CUDA GPU)", HOSTILE],
    "versions": {"python": "3.12.1", "torch": "2.11.0"},
    "machine": {"platform": "Linux", "gpu": "NVIDIA H100", "gpu_gib": 79.2, "cuda": "12.8"},
    "commit": "abc1234def",
    "recipe": {
        "engine": "auto",
        "model": {"name": "org/model", "revision": None},
        "train": {"lr": 0.0002, "steps": 40},
    },
    "engine": "peft",
    "dtype": "bfloat16",
    "seed": 3407,
    "data": {
        "sources": [
            {"name": "rows.jsonl", "format": "messages", "rows": 1200, "bad_rows": [[3, "empty"]]}
        ],
        "train": {"rows": 1150, "tokens": 24026, "supervised_tokens": 6513, "truncated_rows": 17},
        "eval": {"rows": 50, "tokens": 1101, "supervised_tokens": 301, "truncated_rows": 0},
    },
    "preview": [
        {"text": "<|user|>What is it?", "supervised": False},
        {"text": "It is taught.", "supervised": True},
    ],
    "probe_ids": [987654321],
    "started": "2026-11-25T03:36:10+00:00",
    "ended": "2026-11-25T03:46:10+00:00",
    "kernels": [
        {"kind": "q_proj", "count": 28, "kernel": "fastlora", "reason": ""},
        {"kind": "v_proj", "count": 28, "kernel": "fastlora", "reason": ""},
        {"kind": "o_proj", "count": 27, "kernel": "PEFT", "reason": "dropout"},
    ],
    "answers": {"rows": 20, "expected": 18, "before": {"chrf": 12.25}, "after": {"chrf": 88.5, "rouge_l": 0.4}},
    "auto": [{"key": "lora.rank", "value": 32, "why": "for 1,150 rows"}],
    "memory": {
        "budget_gib": 12.0, "comfortable_gib": 11.432, "host_gib": 9.5, "tokens_per_s": 10_729.4,
        "filled": [{"key": "memory.keep_layers", "value": 10, "why": "of 28 layers"}], "plainest": {},
    },
    "eval_before": {"loss": 2.25, "by_source": {"cipher": 1.5}},
    "check": {
        "rows": {"all": 1200, "looked_at_closely": 1000},
        "findings": [{
            "kind": "near_duplicate", "severity": "warn", "says": "nearly the same as another row", "detail": "",
            "count": 2, "rows": [{"source": "rows.jsonl", "line": 77, "split": "train"}], "example": HOSTILE,
        }],
        "passed": True,
    },
    "advice": [{
        "key": "train.lr", "what": "a rate of 4e-3", "why": "it is outside 1e-4..3e-4", "set": "Set 2e-4",
        "when": "before",
    }],
    "merge": {"dtype": "bfloat16", "logit_error": 0.00199, "effect": 1.02, "answer_tokens": [70707]},
    "export": {"q8_0": {"file": "model-q8_0.gguf", "top1_agreement": 0.998}},
    "result": {"steps": 40, "seconds": 600.2, "tokens": 120130, "tokens_per_s_median": 9123.4,
               "peak_reserved_gib": 7.06, "best_step": 40},
}  # fmt: skip


def entries(steps: int = 40) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        found.append({
            "step": step, "loss": 3.0 / step, "grad_norm": 1.5, "lr": 2e-4, "tokens": step * 1000,
            "tokens_per_s": 9000.0 + step, "peak_reserved_gib": 7.06, "peak_allocated_gib": 6.5,
        })  # fmt: skip
        if step % 10 == 0:
            found.append({
                "step": step, "eval_loss": 2.0 - step / 100,
                "eval_loss_by_source": {"cipher": 1.0, "_$general$": 0.5},
            })  # fmt: skip
    return found


COMPARISON = [
    {"prompt": "Say it.", "expected": "It.", "before": HOSTILE, "after": "It."},
    {"prompt": [{"role": "user", "content": "As messages"}], "before": "a", "after": "w" * 300},
]


def make_run(
    folder: Path,
    *,
    metrics: list[dict[str, Any]] | None = None,
    comparison: object = COMPARISON,
    **manifest: Any,
) -> Path:
    """A key of `manifest` that is None is left out."""
    folder.mkdir(parents=True)
    whole = {key: value for key, value in (MANIFEST | manifest).items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(whole))
    lines = [json.dumps(entry) for entry in (entries() if metrics is None else metrics)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "comparison.json").write_text(json.dumps(comparison))
    return folder
