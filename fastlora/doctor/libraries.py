"""What is said of Python, the GPU, the packages and the kernels, from what the probe answered."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

from fastlora.doctor import Check
from fastlora.doctor.ask import Answers
from fastlora.doctor.tested import FOR_GPU, NEEDED, PYTHON, TESTED
from fastlora.rundir import provenance

_REINSTALL_TORCH = f"pip install --force-reinstall 'torch{NEEDED['torch']}'"


def python() -> Iterator[Check]:
    version = platform.python_version()
    right = _within(version, PYTHON)
    yield Check(
        "python",
        "ok" if right else "wrong",
        f"{version}, tested {PYTHON}",
        "" if right else "install Python 3.11 or newer and make a new environment with it",
    )


def gpu(torch: Mapping[str, Any], driver: str | bool | None = True) -> Iterator[Check]:
    """`torch`: what the probe said of it. `driver`: the NVIDIA driver's version; True asks for it."""
    version = provenance.driver() if driver is True else driver
    if not version:
        yield Check(
            "driver",
            "warn",
            "no NVIDIA driver (nvidia-smi does not answer)",
            "train on a machine with an NVIDIA GPU and its driver",
        )
    else:
        yield Check("driver", "ok", str(version))
    if "error" in torch:
        return  # said of torch itself
    cuda = torch["cuda"]
    if torch["available"]:
        yield Check("cuda", "ok", f"{cuda}, of torch's build")
        yield _one_gpu(torch)
    elif not version:
        build = f"torch is built for {cuda}" if cuda else "torch is built without it"
        yield Check("cuda", "ok", f"not used; {build}")
        yield Check(
            "gpu",
            "warn",
            "none: on the CPU only tests and tiny models are trained",
            "train on a machine with an NVIDIA GPU",
        )
    elif cuda is None:
        yield Check(
            "cuda", "wrong", "torch is built without it, and there is a GPU", _REINSTALL_TORCH
        )
    else:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield Check(
            "cuda",
            "wrong",
            f"torch is built for {cuda} and finds no GPU: {torch.get('why_not') or 'it does not say why'}",
            "unset CUDA_VISIBLE_DEVICES"
            if hidden in ("", "-1")
            else f"install an NVIDIA driver for CUDA {cuda} (this one is {version}), and restart",
        )


def _one_gpu(torch: Mapping[str, Any]) -> Check:
    free, total = torch["free_gib"], torch["total_gib"]
    others = f"; the first of {torch['gpus']}" if torch["gpus"] > 1 else ""
    number = "bfloat16" if torch["bfloat16"] else "no bfloat16: it trains in float16"
    found = f"{torch['name']}, {free:.1f} of {total:.1f} GiB free, compute capability {torch['capability']}, "
    found += f"{number}{others}"
    if free < total / 2:
        return Check("gpu", "warn", found, "end what holds its memory: nvidia-smi lists it")
    return Check("gpu", "ok", found)


def packages(answers: Answers, names: Iterable[str]) -> Iterator[Check]:
    has_gpu = bool(answers["torch"].get("available"))
    return (_package(name, answers.get(name), has_gpu) for name in names)


def _package(name: str, answer: Mapping[str, Any] | None, has_gpu: bool) -> Check:
    """`answer` is None where it was not imported: unsloth without a GPU, and unsloth_zoo, which unsloth imports."""
    needed, version = name in NEEDED, _version(name)
    wanted = f"{name}{TESTED[name]}"
    found = f"{version or 'of unknown version'}, tested {TESTED[name]}"
    if version is None and (answer is None or answer.get("absent")):
        if needed:
            return Check(name, "wrong", "not installed", f"pip install '{wanted}'")
        if has_gpu and name != "xformers":
            remedy = (
                "pip install 'fastlora[cuda]'" if "unsloth" in name else f"pip install '{wanted}'"
            )
            return Check(name, "warn", "not installed", remedy)
        instead = "PyTorch's attention takes its place" if has_gpu else "only a GPU needs it"
        return Check(name, "ok", f"not installed; {instead}")
    if answer is not None and "error" in answer:
        return Check(
            name,
            "warn" if name == "xformers" else "wrong",
            f"{found}; it cannot be imported: {answer['error']}",
            _mend(name, version),
        )
    if why := (answer or {}).get("not_loaded"):
        # Without its compiled part unsloth takes PyTorch's attention instead of xformers.
        wrong = has_gpu and name == "bitsandbytes"
        return Check(
            name,
            "wrong" if wrong else "warn",
            f"{found}; its compiled part does not load: {why}",
            _mend(name, version),
        )
    if name == "bitsandbytes" and has_gpu and answer and not answer.get("cuda"):
        return Check(
            name, "wrong", f"{found}; it has no CUDA, so no nf4 and no int8", _mend(name, version)
        )
    if version is not None and not _within(version, TESTED[name]):
        return Check(name, "wrong" if needed else "warn", found, f"pip install '{wanted}'")
    return Check(name, "ok", found)


def _mend(name: str, version: str | None) -> str:
    """The installed version again if it is a tested one: torch, for one, wants one version of triton alone."""
    if name == "torch":
        return _REINSTALL_TORCH
    if name == "xformers":
        return "pip uninstall -y xformers"
    if name == "unsloth":
        both = " ".join(f"'{one}{FOR_GPU[one]}'" for one in ("unsloth", "unsloth_zoo"))
        return f"pip install --force-reinstall --no-deps {both}"
    tested = version is not None and _within(version, TESTED[name])
    wanted = f"=={version}" if tested else TESTED[name]
    return f"pip install --force-reinstall --no-deps '{name}{wanted}'"


def kernel_environment(answers: Answers) -> dict[str, str]:
    """Where there is no GPU, Triton's interpreter runs the kernels; without Triton their reference does."""
    if "error" in answers["triton"]:
        return {"FASTLORA_KERNELS": "reference"}
    if answers["torch"].get("available"):
        return {"FASTLORA_KERNELS": "triton", "TRITON_INTERPRET": "0"}
    return {"FASTLORA_KERNELS": "interpret", "TRITON_INTERPRET": "1"}


_WHERE = {
    "triton": "on the GPU",
    "interpret": "in Triton's interpreter, on the CPU",
    "reference": "by its reference in PyTorch, for want of Triton",
}


def kernels(answers: Answers) -> Iterator[Check]:
    answer = answers["kernels"]
    remedy = _mend("triton", _version("triton"))
    if "error" in answers["torch"]:
        yield Check("kernels", "warn", "not run: torch cannot be imported", _REINSTALL_TORCH)
    elif "error" in answer:
        yield Check("kernels", "wrong", f"the gated activation failed: {answer['error']}", remedy)
    else:
        found = (
            f"gated activation, forward and backward in {answer['dtype']}, {_WHERE[answer['backend']]}: off by "
            f"{answer['off_by']:.1e} of float64, {answer['seconds']:.1f} s"
        )
        right = answer["right"]
        yield Check("kernels", "ok" if right else "wrong", found, "" if right else remedy)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except Exception:  # also damaged metadata
        return None


def _within(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)
