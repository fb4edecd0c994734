"""Merging an adapter into its 16-bit base, with a gate: the saved model must answer as the adapter does.

Runs in a process of its own (`python -m fastlora.export.merge RUN`): unsloth patches transformers for
the whole process that trained, and the merged model must be right for those who load it without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.engines.peft import PeftEngine
from fastlora.errors import FastloraError, GateError, RunDirError
from fastlora.export.answers import answer, read_answers
from fastlora.rundir.store import RunDir, drop_scratch, whole_folder

if TYPE_CHECKING:
    import torch

# What 16-bit merged weights cost: 0.7 % of the logits' RMS on the tiny model, 16 % on a random 8B one after
# 20 steps at a high rate, where a forgotten adapter is 99 %. So the allowance is half the adapter's own
# effect, or 5 % where the effect is smaller than the noise; there `carried`, in which noise averages out,
# still tells a merged adapter from a forgotten or doubled one.
NOISE = 0.05
CARRIED = (0.8, 1.2)


def refuse_unfinished(run: RunDir) -> None:
    """Raises RunDirError: the run has no adapter yet, or has not yet answered with it."""
    if "result" not in run.manifest or "after" not in run.manifest.get("answers", ["after"]):
        raise RunDirError(
            f"{run.path}: the run has not finished; go on with:\n  {run.manifest.get('resume_command')}"
        )


def merge_in_new_process(run: RunDir) -> dict[str, Any]:
    """Merge the run's adapter; returns the report of `merge_run`.

    Raises GateError: the merged model does not agree with the adapter. FastloraError: anything else.
    """
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("UNSLOTH_")
    }
    # -P: in a checkout, the folder kernels/ must not pass for a module. A session of its own: Ctrl-C is for
    # this process, which then ends that one.
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "fastlora.export.merge", str(run.path)],
            stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
    finally:
        drop_scratch(run.merged)  # of a process that was killed, by us or for want of memory
    lines = done.stdout.strip().splitlines()
    try:
        document = json.loads(lines[-1]) if lines else {}
    except ValueError:
        document = {}
    if done.returncode == 0:
        return dict(document)
    message = document.get("error", f"the merging process ended with status {done.returncode}")
    again = f"the adapter is safe in {run.adapter}; merge again with: fastlora merge {run.path}"
    kind = GateError if done.returncode == GateError.exit_code else FastloraError
    raise kind(f"merge: {message}\n{again}")


def merge_run(run: RunDir) -> dict[str, Any]:
    """Write run.merged: base + adapter in the base's 16-bit type, with the tokenizer.

    The merged model is read back from the disk and its logits are compared with those of base + adapter
    on the run's probe row; its answers with those that the adapter gave in training. It takes the name
    `merged` only when they agree. Report: dtype; compared_in; logit_error, RMS of the difference over RMS
    of the logits; effect, the same between adapter and bare base; carried, how much of the effect the
    merged model has too (1 is all, 0 is a forgotten adapter); top1_agreement, share of positions;
    answers and answers_same.

    Raises GateError: logit_error above both NOISE and half of effect, or carried outside CARRIED.
    RunDirError: the run has no adapter.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (run.adapter / "adapter_model.safetensors").exists():
        raise RunDirError(f"{run.path}: holds no adapter; the run has not finished")
    model = run.manifest["recipe"]["model"]
    probe = torch.tensor([run.manifest["probe_ids"]])
    dtype = getattr(torch, run.manifest["merge_dtype"])
    options = {"revision": model["revision"], "trust_remote_code": model["trust_remote_code"]}
    device, compute = _room_for(AutoConfig.from_pretrained(model["name"], **options), dtype)

    def load(name: str, **options: Any) -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=compute, device_map={"": str(device)}, attn_implementation="sdpa", **options
        )
        return loaded.eval()

    base = load(model["name"], **options)
    adapted = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    with torch.no_grad():
        wanted = adapted(input_ids=probe.to(device)).logits.float().cpu()
        with adapted.disable_adapter():
            unadapted = adapted(input_ids=probe.to(device)).logits.float().cpu()
    merged = adapted.merge_and_unload(safe_merge=True).to(dtype)
    merged.config.dtype = dtype
    stop_token_ids = run.manifest["stop_token_ids"]
    merged.generation_config.eos_token_id = (
        stop_token_ids if len(stop_token_ids) > 1 else stop_token_ids[0]
    )
    tokenizer = AutoTokenizer.from_pretrained(str(run.adapter))
    report: dict[str, Any] = {
        "dtype": run.manifest["merge_dtype"],
        "compared_in": str(compute).removeprefix("torch."),
    }
    with whole_folder(run.merged) as folder:
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        del base, adapted, merged
        if device.type == "cuda":
            torch.cuda.empty_cache()
        again = load(str(folder))
        with torch.no_grad():
            got = again(input_ids=probe.to(device)).logits.float().cpu()
        report |= _agreement(got, wanted, unadapted)
        error, effect, carried = report["logit_error"], report["effect"], report["carried"]
        # Written so that NaN fails.
        if not (error <= max(NOISE, effect / 2) and CARRIED[0] <= carried <= CARRIED[1]):
            raise GateError(
                f"the merged model does not agree with the adapter: its logits differ by {error:.1%} of their RMS, "
                f"of which the adapter's whole effect is {effect:.1%}, and carry {carried:.0%} of that effect; "
                "it was not kept"
            )
        answers_path = run.path / "answers.json"
        if answers_path.exists():
            asked, given, settings = read_answers(answers_path)
            compute = getattr(torch, settings.pop("compute_dtype"))
            answers = answer(again.to(compute), asked, **settings)
            report["answers"] = len(asked)
            report["answers_same"] = sum(
                left == right for left, right in zip(answers, given, strict=True)
            )
    return report


def _agreement(
    got: torch.Tensor, wanted: torch.Tensor, unadapted: torch.Tensor
) -> dict[str, float]:
    """Logits (1, tokens, vocabulary) of the merged model, of base + adapter, and of the base."""
    effect, achieved = wanted - unadapted, got - unadapted
    size, scale = float(effect.square().sum()), float(wanted.square().mean().sqrt())
    return {
        "logit_error": float((got - wanted).square().mean().sqrt()) / scale,
        "effect": float(effect.square().mean().sqrt()) / scale,
        # An adapter that changes nothing is carried whole by anything.
        "carried": float((achieved * effect).sum()) / size if size > 0 else 1.0,
        "top1_agreement": float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
    }


def _room_for(config: Any, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Where to merge and in which type: float32, which rounds once and compares without noise, on the
    GPU or the CPU, if it fits there with room to spare; else in `dtype`."""
    import psutil
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    places = [(torch.device("cpu"), psutil.virtual_memory().available)]
    if torch.cuda.is_available():
        places.insert(0, (torch.device("cuda", 0), torch.cuda.mem_get_info()[0]))
    for compute in (torch.float32, dtype):
        for device, free in places:
            if free > 1.3 * parameters * compute.itemsize + 2**30:
                return device, compute
    return torch.device("cpu"), dtype


def main(run_path: str) -> int:
    """Prints the report, or {"error": ...}, as one line of JSON; progress goes to stderr."""
    results, sys.stdout = sys.stdout, sys.stderr
    PeftEngine().prepare()
    run = RunDir(Path(run_path))
    run.manifest = json.loads(run.manifest_path.read_text(encoding="utf-8"))
    try:
        document, code = merge_run(run), 0
    except FastloraError as error:
        document, code = {"error": str(error)}, error.exit_code
    except Exception as error:
        document, code = {"error": f"{type(error).__name__}: {error}"}, 1
    print(json.dumps(document), file=results)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
