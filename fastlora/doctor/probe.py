"""`python -m fastlora.doctor.probe STEP...`: does each step and prints what came of it as a line of JSON.

A process of its own, because what is looked at may be broken in any way, also such that it ends the process. Nothing is
imported but by the steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

BEGINS = "fastlora.doctor: step"
"""Before a step's name in a line of its own on stderr."""

# package -> what a run takes from it: several load their parts on first use only.
_PARTS = {
    "transformers": ["Trainer", "AutoModelForCausalLM"],
    "trl": ["SFTTrainer", "SFTConfig"],
    "peft": ["LoraConfig", "PeftModel"],
    "unsloth": ["FastLanguageModel"],
}


def load(package: str) -> dict[str, Any]:
    """Imports it, and what a run takes from it."""
    module = import_module(package)
    for part in _PARTS.get(package, []):
        getattr(module, part)
    if package == "bitsandbytes":
        return _bitsandbytes()
    if package == "xformers":
        return {"not_loaded": _first_line(getattr(import_module("xformers._cpp_lib"),
                                                  "_cpp_library_load_exception", None))}  # fmt: skip
    return {}


def torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    if not found["available"]:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            found["why_not"] = _first_line(error)
        return found
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return found | {
        "gpus": torch.cuda.device_count(),
        "name": properties.name,
        "free_gib": free / 2**30,
        "total_gib": total / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def _bitsandbytes() -> dict[str, Any]:
    """What its compiled part can do; it is replaced by one that raises where it does not load."""
    library = import_module("bitsandbytes.cextension").lib
    return {
        "not_loaded": _first_line(vars(library).get("error_msg")),
        "cuda": bool(getattr(library, "compiled_with_cuda", False)),
    }


def kernels() -> dict[str, Any]:
    """One op of fastlora_kernels, forward and backward, against its equation in float64."""
    import torch
    from fastlora_kernels import glu
    from fastlora_kernels.dispatch import choose_backend
    from fastlora_kernels.ops.glu import BACKENDS

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    # Half a unit in the last place of bfloat16 is 0.2 %.
    dtype, limit = (torch.float32, 1e-5)
    if cuda:
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype, limit = (torch.bfloat16 if bfloat16 else torch.float16), 1e-2
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(8, 1030, device=device).to(dtype) for _ in range(3))
    inputs = [gate.requires_grad_(), up.requires_grad_()]
    started = time.perf_counter()
    h = glu(gate, up, "silu")
    found = [h, *torch.autograd.grad(h, inputs, dh)]
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_h = torch.nn.functional.silu(wide[0]) * wide[1]
    exact = [exact_h, *torch.autograd.grad(exact_h, wide, dh.double())]
    errors = [
        float((ours.double() - true).norm() / true.norm())
        for ours, true in zip(found, exact, strict=True)
    ]
    return {
        "backend": choose_backend(device, BACKENDS),
        "dtype": str(dtype).removeprefix("torch."),
        "off_by": max(errors),
        "right": all(error <= limit for error in errors),  # NaN is not
        "seconds": seconds,
    }


def models() -> dict[str, Any]:
    """Models in the Hub's cache: name, GiB, and whether a file of it was not downloaded to its end."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return {"models": [], "damaged": []}
    found = [
        (
            repo.repo_id,
            repo.size_on_disk / 2**30,
            any(Path(repo.repo_path).glob("blobs/*.incomplete")),
        )
        for repo in cache.repos
        if repo.repo_type == "model"
    ]
    return {
        "models": sorted(found, key=lambda model: -model[1]),
        "damaged": [_first_line(warning) for warning in cache.warnings],
    }


def _first_line(error: object) -> str:
    """As a sentence of a few words; nothing for None."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return " ".join(lines)[:200]


_STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch,
    "kernels": kernels,
    "models": models,
}


def main() -> None:
    # Libraries print to stdout; what is read there comes from here alone.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    for step in sys.argv[1:]:
        os.write(2, f"{BEGINS} {step}\n".encode())
        try:
            say(step=step, result=_STEPS[step]() if step in _STEPS else load(step))
        except BaseException as error:  # a library may even raise SystemExit
            absent = isinstance(error, ModuleNotFoundError) and error.name == step
            what = _first_line(error) or "no reason given"
            say(step=step, absent=absent, error=f"{type(error).__name__}: {what}")
    lines.close()
    os._exit(0)  # what a broken library does at exit no longer matters


if __name__ == "__main__":
    main()
