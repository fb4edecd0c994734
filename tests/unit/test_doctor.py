from __future__ import annotations

import json
import os
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from fastlora.cli.main import cli
from fastlora.doctor import Check, examine, first_to_mend, libraries, places, tested
from fastlora.doctor.ask import ask

Plant = Callable[..., None]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Modules that come before those installed, in the processes that are asked: name -> source."""

    def planted(**modules: str) -> None:
        for name, source in modules.items():
            file = tmp_path / "planted" / name.replace("__", "/") / "__init__.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        before = os.environ.get("PYTHONPATH")
        path = os.pathsep.join(filter(None, (str(tmp_path / "planted"), before)))
        monkeypatch.setenv("PYTHONPATH", path)

    return planted


def test_the_tested_set_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    written = [
        Requirement(line) for line in (*project["dependencies"], *extras["cuda"], *extras["dev"])
    ]
    ranges = {one.name: one.specifier for one in written}
    assert project["requires-python"] == tested.PYTHON
    for name, specifier in tested.TESTED.items():
        assert Requirement(name + specifier).specifier == ranges[name], name
    needed = {Requirement(line).name for line in project["dependencies"]}
    assert set(tested.NEEDED) <= needed
    assert {Requirement(line).name for line in extras["cuda"]} <= set(tested.FOR_GPU)


def test_a_library_that_is_broken_in_any_way_costs_itself_alone(plant: Plant) -> None:
    plant(
        torch="import sys; print('a banner'); sys.exit('libtorch_cuda.so: undefined symbol')",
        triton="import os; os.kill(os.getpid(), 11)",
        bitsandbytes="import sys, os; sys.stderr.write('cannot find libcudart'); os._exit(3)",
        xformers="raise OSError('undefined symbol: _ZN3c10')",
        transformers="Trainer = 1",
        peft="import a_module_that_peft_needs",
        datasets="import time; time.sleep(60)",
        accelerate="",
    )
    steps = [
        "torch",
        "triton",
        "bitsandbytes",
        "xformers",
        "transformers",
        "peft",
        "datasets",
        "accelerate",
    ]
    found = ask(steps, seconds=4)
    assert list(found) == steps
    errors = {step: answer.get("error") for step, answer in found.items()}
    assert errors["torch"] == "SystemExit: libtorch_cuda.so: undefined symbol"
    assert errors["triton"] == "its process was ended by SIGSEGV"
    assert errors["bitsandbytes"] == "it ended its process with code 3 (cannot find libcudart)"
    assert errors["xformers"] == "OSError: undefined symbol: _ZN3c10"
    assert errors["transformers"].startswith("AttributeError: ")
    assert errors["peft"] == "ModuleNotFoundError: No module named 'a_module_that_peft_needs'"
    assert errors["datasets"] == "no answer within 4 s"
    assert errors["accelerate"] is None
    assert not any(answer.get("absent") for answer in found.values())
    assert ask(["no_such_library"])["no_such_library"]["absent"]


def test_xformers_and_bitsandbytes_that_import_without_their_compiled_part(plant: Plant) -> None:
    plant(
        xformers="",
        xformers___cpp_lib="_cpp_library_load_exception = OSError('built for torch 2.10')",
        bitsandbytes="",
        bitsandbytes__cextension="class Mock:\n  def __init__(self): self.error_msg = 'no libcudart'\nlib = Mock()",
    )
    found = ask(["xformers", "bitsandbytes"])
    assert found["xformers"] == {"not_loaded": "built for torch 2.10"}
    assert found["bitsandbytes"] == {"not_loaded": "no libcudart", "cuda": False}


def test_nothing_stays_behind_when_the_doctor_is_stopped(plant: Plant) -> None:
    import psutil

    plant(torch="import time; time.sleep(60)")
    there = psutil.Process().children()  # other tests' forkserver
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(["torch"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert psutil.Process().children() == there


GPU = {
    "cuda": "12.8", "available": True, "gpus": 1, "name": "NVIDIA H100", "free_gib": 78.0, "total_gib": 79.2,
    "capability": "9.0", "bfloat16": True,
}  # fmt: skip
NO_GPU = {"cuda": None, "available": False, "why_not": "Torch not compiled with CUDA enabled"}


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_gpu_is_described() -> None:
    found = by_name(libraries.gpu(GPU, "580.95"))
    assert [check.status for check in found.values()] == ["ok"] * 3
    assert found["gpu"].found == (
        "NVIDIA H100, 78.0 of 79.2 GiB free, compute capability 9.0, bfloat16"
    )
    old = GPU | {"bfloat16": False, "free_gib": 3.0, "gpus": 4, "capability": "7.0"}
    found = by_name(libraries.gpu(old, "580.95"))
    assert "no bfloat16: it trains in float16; the first of 4" in found["gpu"].found
    assert (found["gpu"].status, "nvidia-smi" in found["gpu"].remedy) == ("warn", True)


def test_a_gpu_that_torch_cannot_use_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cpu_build = by_name(libraries.gpu(NO_GPU, "580.95"))["cuda"]
    assert (cpu_build.status, cpu_build.remedy) == (
        "wrong", "pip install --force-reinstall 'torch>=2.10,<2.14'",
    )  # fmt: skip
    old = NO_GPU | {"cuda": "13.0", "why_not": "the NVIDIA driver is too old (found version 12040)"}
    too_old = by_name(libraries.gpu(old, "550.1"))["cuda"]
    assert too_old.status == "wrong"
    assert "found version 12040" in too_old.found
    assert "driver for CUDA 13.0 (this one is 550.1)" in too_old.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert by_name(libraries.gpu(old, "550.1"))["cuda"].remedy == "unset CUDA_VISIBLE_DEVICES"


def test_no_gpu_is_a_warning() -> None:
    statuses = {name: check.status for name, check in by_name(libraries.gpu(NO_GPU, None)).items()}
    assert statuses == {"driver": "warn", "cuda": "ok", "gpu": "warn"}


VERSIONS = {
    "torch": "2.11.0+cu128", "triton": "3.6.0", "xformers": "0.0.35", "unsloth": "2026.10.9",
    "unsloth_zoo": "2026.10.9", "bitsandbytes": "0.50.2", "transformers": "5.17.0", "trl": "1.15.0",
    "peft": "0.21.2", "accelerate": "1.15.0", "datasets": "4.8.5",
}  # fmt: skip


def judged(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str | None] | None = None,
    **answers: Any,
) -> dict[str, Check]:
    """On a machine with a GPU where all is well but what is given."""
    known = VERSIONS | (versions or {})
    monkeypatch.setattr(libraries, "_version", known.get)
    every: dict[str, Any] = {name: {} for name in VERSIONS}
    every |= {"torch": GPU, "bitsandbytes": {"cuda": True}} | answers
    return by_name(libraries.packages(every, VERSIONS))


def test_a_machine_where_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = judged(monkeypatch)
    assert {check.status for check in checks.values()} == {"ok"}
    assert first_to_mend(checks.values()) is None
    assert checks["unsloth"].found == "2026.10.9, tested ==2026.10.9"


ABSENT = {"error": "ModuleNotFoundError: No module named 'x'", "absent": True}


@pytest.mark.parametrize(
    ("name", "version", "answer", "status", "remedy"),
    [
        ("trl", "1.16.0", {}, "wrong", "pip install 'trl>=1.14,<=1.15.0'"),
        ("peft", None, ABSENT, "wrong", "pip install 'peft>=0.21'"),
        ("unsloth", "2026.11.2", {}, "warn", "pip install 'unsloth==2026.10.9'"),
        ("unsloth", None, ABSENT, "warn", "pip install 'fastlora[cuda]'"),
        ("xformers", None, ABSENT, "ok", ""),
        ("datasets", "6.0", {"error": "ImportError: x", "absent": False}, "wrong",
         "pip install --force-reinstall --no-deps 'datasets>=4.8,<5'"),
        ("triton", None, ABSENT, "warn", "pip install 'triton>=3.6,<3.10'"),
        ("xformers", "0.0.35", {"not_loaded": "built for torch 2.10"}, "warn", "pip uninstall -y xformers"),
        ("unsloth", "2026.10.9", {"error": "ImportError: x", "absent": False}, "wrong",
         "pip install --force-reinstall --no-deps 'unsloth==2026.10.9' 'unsloth_zoo==2026.10.9'"),
        ("bitsandbytes", "0.50.2", {"cuda": False}, "wrong",
         "pip install --force-reinstall --no-deps 'bitsandbytes==0.50.2'"),
        ("bitsandbytes", "0.50.2", {"not_loaded": "libcudart", "cuda": False}, "wrong",
         "pip install --force-reinstall --no-deps 'bitsandbytes==0.50.2'"),
    ],
)  # fmt: skip
def test_each_kind_of_broken_package(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    version: str | None,
    answer: dict[str, Any],
    status: str,
    remedy: str,
) -> None:
    checks = judged(monkeypatch, {name: version}, **{name: answer})
    assert (checks[name].status, checks[name].remedy) == (status, remedy)
    assert [one for one in checks if checks[one].status != "ok"] == (
        [name] if status != "ok" else []
    )


def test_what_is_wrong_comes_before_what_is_a_warning() -> None:
    checks = [
        Check("a", "ok", ""), Check("b", "warn", ""), Check("c", "wrong", ""), Check("d", "wrong", ""),
    ]  # fmt: skip
    assert first_to_mend(checks) == checks[2]
    assert first_to_mend(checks[:2]) == checks[1]


def test_kernels_that_are_off_or_fail_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_version", VERSIONS.get)
    ran = {
        "backend": "triton",
        "dtype": "bfloat16",
        "off_by": 1.7e-3,
        "right": True,
        "seconds": 0.8,
    }
    (good,) = libraries.kernels({"torch": GPU, "kernels": ran})
    assert good.status == "ok"
    assert "on the GPU: off by 1.7e-03 of float64, 0.8 s" in good.found
    for answer in (ran | {"off_by": float("nan"), "right": False}, {"error": "no kernel image"}):
        (bad,) = libraries.kernels({"torch": GPU, "kernels": answer})
        assert bad.status == "wrong"
        assert bad.remedy == "pip install --force-reinstall --no-deps 'triton==3.6.0'"
    (untried,) = libraries.kernels({"torch": {"error": "x"}, "kernels": {"error": "x"}})
    assert untried.status == "warn"


def test_where_the_kernels_run() -> None:
    broken = {"error": "OSError: broken"}
    for torch, triton, backend in (
        (GPU, {}, "triton"), (NO_GPU, {}, "interpret"), (GPU, broken, "reference"), (NO_GPU, broken, "reference"),
        ({"error": "x"}, {}, "interpret"),
    ):  # fmt: skip
        found = libraries.kernel_environment({"torch": torch, "triton": triton})
        assert found["FASTLORA_KERNELS"] == backend


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    found = by_name(places.folders())
    assert found["fastlora cache"].status == "wrong"
    assert "Not a directory" in found["fastlora cache"].found
    assert found["fastlora cache"].remedy == "export FASTLORA_CACHE=/a/folder/with/room"
    assert found["hub cache"].found.startswith(f"{tmp_path}/hf/hub, ")
    assert not (tmp_path / "hf").exists()
    usage = type("Usage", (), {"free": 3 * 2**30})
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage)
    assert by_name(places.folders())["triton cache"].status == "warn"


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "TRANSFORMERS_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "FASTLORA_KERNELS",
        "TRITON_INTERPRET",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FASTLORA_KERNELS", "")
    (offline,) = places.variables(gpu=True)
    assert offline == Check("offline", "ok", "the Hub is not asked (HF_HUB_OFFLINE=1)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    half, interpreted = places.variables(gpu=True)
    assert (half.status, half.remedy) == (
        "warn",
        "unset HF_DATASETS_OFFLINE; export HF_HUB_OFFLINE=1",
    )
    assert (interpreted.status, interpreted.remedy) == ("warn", "unset TRITON_INTERPRET")
    assert len(list(places.variables(gpu=False))) == 1


def test_models_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, blob in (("whole", "0" * 40), ("half", "1" * 40 + ".incomplete")):
        repo = tmp_path / f"models--org--{name}"
        commit = repo / "snapshots" / ("a" * 40)
        commit.mkdir(parents=True)
        (repo / "blobs").mkdir()
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("a" * 40)
        (repo / "blobs" / blob).write_bytes(b"x" * 2**20)
        (repo / "blobs" / ("2" * 40)).write_bytes(b"{}")
        (commit / "config.json").symlink_to(repo / "blobs" / ("2" * 40))
    answer = ask(["models"])["models"]
    assert [(name, half) for name, _, half in answer["models"]] in (
        [("org/half", True), ("org/whole", False)], [("org/whole", False), ("org/half", True)],
    )  # fmt: skip
    half, whole = places.models(answer)
    assert (half.status, half.remedy) == ("warn", "hf download org/half")
    assert whole.found.startswith("org/whole (")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (none,) = places.models({"models": [], "damaged": []})
    assert none.status == "warn"
    assert "HF_HUB_OFFLINE=0 hf download" in none.remedy


def test_the_command_names_the_first_wrong_thing_last(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, with nothing that imports."""
    libraries_of_all = (*tested.NEEDED, "triton", "xformers", "huggingface_hub", "fastlora_kernels")
    plant(**dict.fromkeys(libraries_of_all, "raise ImportError('planted')"))
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    *_, first, remedy = done.output.strip().splitlines()
    assert first.startswith("first mend torch: ")
    assert first.endswith("it cannot be imported: ImportError: planted")
    assert remedy == "  pip install --force-reinstall 'torch>=2.10,<2.14'"
    document = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)
    assert document["first_to_mend"]["name"] == "torch"
    assert {check["status"] for check in document["checks"]} == {"ok", "warn", "wrong"}


def test_a_check_that_fails_itself_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        name: {"error": "x", "absent": True} for name in (*tested.TESTED, "models", "kernels")
    }
    monkeypatch.setattr("fastlora.doctor.ask.ask", lambda *_, **__: dict(answers))

    def broken() -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(places, "folders", broken)
    (line,) = [check for check in examine() if "planted" in check.found]
    assert line.status == "wrong"
