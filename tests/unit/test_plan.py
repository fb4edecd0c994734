"""Predictions against what was measured, what is advised, what runs teach, and the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from plans import H100, LLAMA_8B, card, predicted, recipe
from scripts import script

from fastlora.bench.suites import load_suite, plan_for
from fastlora.cli.main import cli
from fastlora.errors import EngineError, RecipeError
from fastlora.plan import gpus, measured
from fastlora.plan.advise import Advice, advise
from fastlora.plan.predict import Card, Prediction, predict
from fastlora.plan.shape import read_config, shape_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpus, "installed", lambda: None)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return script("plan")


PLAIN_PEFT: dict[str, Any] = {"engine": "peft", "kernels": {"mode": "off"}}


# -- against measurements ------------------------------------------------------------------


NOT_MET = {
    # Dense weights were taken one by one then, and left holes (docs/log.md).
    (
        "2026-11-28-llama31-8b-h200",
        "unsloth+fastlora+record+dense32-kernels-checkpointing",
        "reserved",
    ),
    # The allocator's luck: the same run took 8.58 and 8.60 elsewhere.
    ("2026-11-24-llama32-1b-h100", "peft", "reserved"),
    # What PEFT's DoRA makes of the weights in a layer that unsloth compiled is not counted.
    ("2026-11-28-llama31-8b-dora-h200", "unsloth", "allocated"),
    ("2026-11-28-llama31-8b-dora-h200", "unsloth", "reserved"),
    ("2026-11-29-llama31-8b-dora-h200", "unsloth", "allocated"),
    ("2026-11-29-llama31-8b-dora-h200", "unsloth", "reserved"),
    # 7 % too much: unsloth compiles Phi 3's attention, of which all is counted that transformers' keeps.
    ("2026-11-29-phi4-record-h200", "unsloth+fastlora+offload+record", "allocated"),
    ("2026-11-29-phi4-record-h200", "unsloth+fastlora+record+budget", "allocated"),
}

NOT_FORESEEN = {("1 x 71,936", "frontier, 2026-11-28"), ("35 x 2,048", "frontier, 2026-11-28")}
"""By unsloth: it fails, and is predicted to need 2 % less than the cap."""


def test_every_measured_peak_is_met(generator: ModuleType) -> None:
    found = list(generator.rows())
    peaks = [one for one in found if one.reserved_gib]
    assert len(peaks) >= 19
    assert {one.arm for one in peaks} >= {"peft", "liger", "unsloth", "unsloth-checkpointing"}
    missed = {
        (one.source, one.arm, what)
        for one in peaks
        for what in ("allocated", "reserved")
        if abs(one.errors.get(what, 0)) > generator.WITHIN
    }
    assert missed == NOT_MET
    frontier = [one for one in found if one.fits is not None]
    assert len(frontier) >= 13
    wrong = {
        (one.batch, one.source)
        for one in frontier
        if (one.predicted.needed_gib <= one.cap_gib) is not one.fits
    }
    assert wrong == NOT_FORESEEN
    for one in frontier:
        if (one.batch, one.source) in NOT_FORESEEN:
            assert one.predicted.needed_gib > 0.975 * one.cap_gib


def test_speeds_are_those_of_the_reports(generator: ModuleType) -> None:
    """Where the GPU is the limit; hosts differ by more than a prediction could be held to."""
    reports = [one for one in generator.rows() if one.source.endswith("-h100")]
    unsloth = [one for one in reports if one.suite == "llama31-8b" and one.arm == "unsloth"]
    assert unsloth
    assert all(abs(one.errors["speed"]) < 0.05 for one in unsloth)
    assert all(abs(one.errors["speed"]) < 0.26 for one in reports if one.tokens_per_s)


@pytest.mark.parametrize(
    ("layers", "engine", "kernels", "policy", "gpu_ms", "within", "dense"),
    [
        (16, "unsloth", "auto", "unsloth", 72.0, 0.05, 0),
        (16, "unsloth", "auto", "none", 52.3, 0.05, 0),
        (16, "unsloth", "all", "none", 48.3, 0.05, 0),
        (16, "peft", "auto", "full", 78.6, 0.05, 0),
        (16, "peft", "auto", "none", 61.7, 0.05, 0),
        (6, "unsloth", "auto", "unsloth", 79.5, 0.09, 0),  # the GPU idled now and then, and its clock was higher
        (6, "unsloth", "all", "unsloth", 72.3, 0.11, 0),
        (6, "unsloth", "all", "offload", 76.7, 0.05, 0),  # recorded, but compiled still
        (6, "peft", "auto", "full", 84.5, 0.05, 0),
        (6, "unsloth", "all", "none", 56.2, 0.05, 0),
        (6, "unsloth", "all", "none", 54.9, 0.05, 6),
        (16, "unsloth", "all", "none", 46.0, 0.05, 16),
    ],
)  # fmt: skip
def test_times_of_the_gpu_are_those_that_an_h200_took(
    layers: int, engine: str, kernels: str, policy: str, gpu_ms: float, within: float, dense: int
) -> None:
    """1B, and 6 layers of 8B, without what comes once a step. docs/plan.md has them."""
    small = {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True}  # fmt: skip
    shape = shape_of(LLAMA_8B | {"num_hidden_layers": layers} | (small if layers == 16 else {}))
    asked = recipe(
        engine=engine, kernels={"mode": kernels}, train={"checkpointing": policy, "accumulation": 10**6},
        memory={"dense_layers": dense, "cuda_graphs": True} if dense else {},
    )  # fmt: skip
    h200 = gpus.gpu_named("NVIDIA H200")
    found = predict(asked, shape, Card(gpu=h200, vram_gib=139.8)).speed
    assert found
    assert 1000 * found.gpu_s == pytest.approx(gpu_ms, rel=within)
    assert f"{gpu_ms} | {1000 * found.gpu_s:.1f} " in (ROOT / "docs" / "plan.md").read_text()


def test_the_tables_in_the_docs_are_in_step(generator: ModuleType) -> None:
    assert generator.main(["--check"]) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/suites/plan").glob("*.toml")))
def test_a_suite_that_is_not_bundled_is_predicted_by_its_report(
    path: Path, generator: ModuleType
) -> None:
    plan, spec = plan_for(str(path), 0.0), load_suite(path)
    settings = {"recipe": plan.recipe.model_dump(mode="json"), "shape": plan.shape}
    found = generator.own_suite({"name": plan.name, "settings": settings})
    assert generator.own_suite({"name": "llama31-8b", "settings": settings}) is None
    for arm in plan.arms:
        told, wanted = (
            generator.row(plan.name, arm.name, "NVIDIA H200", "here", spec=one)
            for one in (found, spec)
        )
        assert told == wanted


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("settings", "shape", None), ("settings", "work", {"lengths": "real"})],
)
def test_a_report_of_what_is_not_predicted_is_left_out(
    section: str, key: str, value: Any, generator: ModuleType, tmp_path: Path
) -> None:
    source = next((ROOT / "benchmarks/results").glob("*-llama31-8b-24gib-h200")) / "report.json"
    report = json.loads(source.read_text())
    folder = tmp_path / "benchmarks/results/one"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/measured.json", tmp_path / "benchmarks")
    for expected in (2, 0):
        (folder / "report.json").write_text(json.dumps(report))
        assert sum(one.source == "one" for one in generator.rows(tmp_path)) == expected
        report["name"] = "a recipe"
        report[section][key] = value


def test_a_table_that_is_not_in_step_is_mended(generator: ModuleType, tmp_path: Path) -> None:
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "benchmarks" / "measured.json").write_text("[]")
    path = tmp_path / "docs" / "plan.md"
    path.write_text("before\n<!-- plan:begin -->\nold\n<!-- plan:end -->\nafter\n")
    assert generator.main(["--check"], tmp_path) == 1
    assert "old" in path.read_text()
    assert generator.main([], tmp_path) == 0
    assert "old" not in path.read_text()
    assert path.read_text().startswith("before\n")
    assert path.read_text().endswith("after\n")
    assert generator.main(["--check"], tmp_path) == 0


# -- moments, policies ---------------------------------------------------------------------


def test_the_peak_is_one_moment_and_not_the_sum_of_all() -> None:
    memory = predicted(**PLAIN_PEFT).memory
    totals = {name: sum(term.bytes for term in terms) for name, terms in memory.moments.items()}
    assert memory.peak == "loss"
    assert memory.allocated_gib * 2**30 == pytest.approx(max(totals.values()))
    assert memory.dominant().name == "loss"
    chunked = predicted(**PLAIN_PEFT, train={"chunked_loss": True}).memory
    assert chunked.peak == "backward of a layer"
    assert chunked.needed_gib < memory.needed_gib - 4


def test_policies_go_from_much_memory_to_little_and_from_fast_to_slow() -> None:
    ways = [
        predicted(engine="unsloth", train={"checkpointing": policy, "micro_batch": 8})
        for policy in ("none", "full", "unsloth")
    ]
    needs = [one.memory.needed_gib for one in ways]
    assert needs == sorted(needs, reverse=True)
    assert ways[0].speed
    assert ways[1].speed
    assert ways[0].speed.tokens_per_s > ways[1].speed.tokens_per_s
    pinned = [term for term in ways[2].memory.host if term.name == "pinned checkpoints"]
    assert pinned[0].bytes == 32 * 8 * 2048 * 4096 * 2


def test_streamed_layers_were_measured_with_our_kernels_alone(generator: ModuleType) -> None:
    measured = [one.arm for one in generator.rows() if "+stream" in one.arm]
    assert measured
    assert all("+fastlora" in arm for arm in measured)
    for mode, told in (("all", False), ("auto", True)):
        asked = {"memory": {"stream_layers": 4}, "kernels": {"mode": mode}}
        notes = predicted(engine="unsloth", **asked).setup.notes
        assert any("stream_layers" in note for note in notes) is told


def test_verdicts() -> None:
    need = predicted(**PLAIN_PEFT).memory
    assert predicted(need.comfortable_gib + 0.01, **PLAIN_PEFT).verdict == "fits"
    assert predicted(need.needed_gib + 0.01, **PLAIN_PEFT).verdict == "tight"
    assert predicted(need.needed_gib - 0.01, **PLAIN_PEFT).verdict == "no"
    assert predicted(None, **PLAIN_PEFT).verdict == "unknown"
    little_host = predict(recipe(), shape_of(LLAMA_8B), card(79.2, host_gib=4))
    assert little_host.verdict == "no"


def test_70b_is_what_unsloths_table_says() -> None:
    """41 GB for QLoRA of 70B; not measured here."""
    big = LLAMA_8B | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    }  # fmt: skip
    found = predicted(config=big, engine="unsloth", train={"micro_batch": 1})
    assert found.memory.needed_gib == pytest.approx(41, rel=0.05)


# -- advice --------------------------------------------------------------------------------


def advised(vram_gib: float, **sections: Any) -> tuple[Advice | None, list[Advice]]:
    shape = shape_of(LLAMA_8B)
    return advise(
        predicted(vram_gib, **sections), lambda other: predict(other, shape, card(vram_gib))
    )


def test_what_leaves_the_training_as_it_is_comes_first() -> None:
    best, singles = advised(12, **PLAIN_PEFT)
    assert best
    assert best.change.same_training
    assert best.result.verdict != "no"
    order = [one.change.same_training for one in singles]
    assert order == sorted(order, reverse=True)
    fitting = [one for one in singles if one.change.same_training and one.result.verdict != "no"]
    assert best.result.speed
    assert all(
        one.result.speed and one.result.speed.tokens_per_s <= 1.01 * best.result.speed.tokens_per_s
        for one in fitting
    )


def test_a_smaller_micro_batch_keeps_the_effective_batch() -> None:
    _, singles = advised(7, engine="unsloth", train={"micro_batch": 8, "effective_batch": 24})
    sizes = [one.change.settings for one in singles if "train.micro_batch" in one.change.settings]
    assert sizes == [
        {"train.micro_batch": size, "train.effective_batch": 24} for size in (4, 2, 1)
    ]  # fmt: skip


def test_changes_are_combined_where_one_is_not_enough() -> None:
    best, singles = advised(8.0, **PLAIN_PEFT, train={"micro_batch": 8, "effective_batch": 8})
    assert best
    assert not any(
        one.result.verdict != "no" for one in singles if len(one.change.settings) == 1
        and "engine" not in one.change.settings and one.change.same_training
    )  # fmt: skip
    assert best.change.same_training
    assert best.result.memory.needed_gib <= 8.0


def test_what_needs_more_of_the_card_is_offered_for_the_host_alone() -> None:
    full = {"train.checkpointing": "full"}
    _, singles = advised(7, engine="unsloth")
    assert full not in [one.change.settings for one in singles]
    shape, little = shape_of(LLAMA_8B), card(24, host_gib=9)
    now = predict(recipe(engine="unsloth"), shape, little)
    best, singles = advise(now, lambda other: predict(other, shape, little))
    assert full in [one.change.settings for one in singles]
    assert best
    assert best.result.verdict != "no"


def test_weights_go_to_the_host_before_the_training_changes() -> None:
    unquantized = {"engine": "unsloth", "model": {"quantization": "none"}}
    best, _ = advised(9, **unquantized)
    assert best
    assert best.change.same_training
    assert best.change.settings["memory.stream_layers"] > 16
    shape, little = shape_of(LLAMA_8B), card(9, host_gib=12)
    now = predict(recipe(**unquantized), shape, little)
    best, _ = advise(now, lambda other: predict(other, shape, little))
    assert best
    assert best.change.settings == {"model.quantization": "nf4"}
    assert not best.change.same_training
    assert advised(3, engine="unsloth")[0] is None


# -- what runs teach -----------------------------------------------------------------------


def teach(found: Prediction, measured_gib: float) -> dict[str, Any]:
    from fastlora.train.planned import compare_with_plan

    said: list[str] = []
    document = compare_with_plan(found, measured_gib, said.append)
    assert document
    assert len(said) == 1
    assert f"{measured_gib:.2f} needed" in said[0]
    return document


def test_a_run_corrects_the_next_prediction_of_its_kind() -> None:
    first = predicted(engine="unsloth")
    assert first.correction.error is None
    needed = first.memory.reserved_gib + 0.2
    assert teach(first, needed)["error"] == pytest.approx(-0.2 / needed, abs=1e-4)
    second = predicted(engine="unsloth")
    assert second.memory.reserved_gib == pytest.approx(needed)
    assert second.memory.always_gib == first.memory.always_gib
    assert second.correction.runs == 1
    assert second.correction.error == pytest.approx(0.2 / needed, abs=1e-4)
    teach(second, needed)
    third = predicted(engine="unsloth")
    assert third.correction.runs == 2
    assert third.memory.reserved_gib == pytest.approx(needed)
    # longer rows as well, another kind not
    assert predicted(engine="unsloth", model={"seq_len_tokens": 8192}).correction.runs == 2
    assert predicted(**PLAIN_PEFT).correction.runs == 0


def test_a_run_teaches_once_and_not_with_less_at_a_time_than_was_predicted_for() -> None:
    from fastlora.train.planned import compare_with_plan, learn_from

    found, said = predicted(engine="unsloth"), []
    needed = found.memory.reserved_gib + 0.2
    document = compare_with_plan(found, needed, said.append, run="runs/1", ran_out=True)
    assert document
    assert "error" not in document
    assert "it ran out of memory" in said[0]
    assert measured.peaks(H100) == []
    for gib in (needed, needed + 1):  # cut short twice
        learn_from(found, gib, "runs/1")
    learn_from(predicted(**PLAIN_PEFT), needed, "runs/1")  # resumed in another way
    learn_from(found, needed, "runs/2")
    assert [(one.run, one.measured_gib) for one in measured.peaks(H100)] == [
        ("runs/1", needed + 1), ("runs/1", needed), ("runs/2", needed),
    ]  # fmt: skip


def test_one_strange_run_does_not_rule() -> None:
    first = predicted(engine="unsloth")
    teach(first, 5 * first.memory.reserved_gib)
    assert predicted(engine="unsloth").correction.factor == 1.5
    for _ in range(3):
        teach(predicted(engine="unsloth"), first.memory.reserved_gib)
    assert predicted(engine="unsloth").correction.factor == pytest.approx(1)


def test_a_torn_or_foreign_cache_is_no_error() -> None:
    path = measured.file_of(H100)
    path.parent.mkdir(parents=True)
    for content in ("{", "[]", '{"peaks": [{"like": 1}]}'):
        path.write_text(content)
        assert predicted(engine="unsloth").correction.runs == 0
    assert teach(predicted(engine="unsloth"), 7.0)
    measured.remember_ceilings(H100, {"gemm_tflops": 700.0, "copy_gb_s": 2800.0})
    assert measured.ceilings(H100) == {"gemm_tflops": 700.0, "copy_gb_s": 2800.0}
    assert len(measured.peaks(H100)) == 1


def test_a_run_on_a_cpu_is_not_predicted() -> None:
    from fastlora.train.planned import compare_with_plan, predict_run

    job: Any = SimpleNamespace(recipe=recipe())
    assert predict_run(job) is None
    assert compare_with_plan(None, None, print) is None


def test_a_run_says_its_prediction_before_it_loads(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from fastlora.train.planned import predict_run

    card = SimpleNamespace(name=H100, total_memory=int(79.2 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    rows = SimpleNamespace(longest_row_tokens=1500, tokens=1_000_000, rows=1000)
    data = SimpleNamespace(train=range(1000), stats=SimpleNamespace(train=rows))
    said: list[str] = []
    job: Any = SimpleNamespace(
        recipe=recipe(model={"name": str(model)}, train={"epochs": 2.0}),
        data=data, engine=SimpleNamespace(name="unsloth"), notes=said.append,
    )  # fmt: skip
    found = predict_run(job)
    assert found
    assert found.setup.row_tokens == 1500
    assert found.speed
    seconds = 2_000_000 / found.speed.tokens_per_s
    assert said[0].startswith(f"plan: {found.memory.reserved_gib:.2f} GiB and 0.83 of CUDA context")
    assert f"{seconds / 60:.0f} min in all" in said[0]
    teach(found, found.memory.reserved_gib + 1)
    assert predict_run(job)
    assert "over 1 runs like it" in said[1]
    (model / "config.json").write_text("{}")
    assert predict_run(job) is None  # and the run goes on
    assert "not predicted" in said[2]


# -- GPUs and configurations ---------------------------------------------------------------


def test_a_gpu_is_known_by_its_name_and_goes_by_what_was_measured() -> None:
    card = gpus.gpu_named("NVIDIA GeForce RTX 4090")
    assert card
    assert card.vram_gib == pytest.approx(23.5)
    assert card.tflops == pytest.approx(165 * 0.76)
    own = gpus.gpu_named(
        "NVIDIA GeForce RTX 4090", {"gemm_tflops": 150.0, "copy_gb_s": 900.0, "host_gb_s": 11.0}
    )
    assert own
    assert own.host_gb_s == 11.0
    assert (own.tflops, own.source) == (150.0, "measured by fastlora bench")


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("A100 40GB", "A100-PCIE-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        *((name, None) for name in (
            "NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA T400 4GB", "NVIDIA GH200 480GB", "NVIDIA H20",
            "NVIDIA GeForce RTX 4090 Laptop GPU", "Voodoo 2",
        )),
    ],
)  # fmt: skip
def test_a_gpu_is_not_taken_for_one_whose_name_is_part_of_its_own(
    name: str, like: str | None
) -> None:
    found, wanted = gpus.gpu_named(name), like and gpus.gpu_named(like)
    assert (found and replace(found, name="")) == (wanted and replace(wanted, name=""))


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for said, expected in (
        ("NVIDIA A10, 24564, 564", ("NVIDIA A10", 24000 / 1024)),
        ("NVIDIA A10, 24564, [N/A]", ("NVIDIA A10", 24564 / 1024)),
        ("No devices were found", None),
    ):
        program.write_text(f"#!/bin/sh\necho '{said}'\n")
        program.chmod(0o755)
        assert gpus.installed() == expected
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus.installed() is None


def test_what_a_config_lacks_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        shape_of({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": "two"})
    assert "vocab_size: is missing" in str(error.value)
    assert "num_hidden_layers: 'two'" in str(error.value)
    with pytest.raises(EngineError, match="experts"):
        shape_of(LLAMA_8B | {"model_type": "mixtral", "num_local_experts": 8})
    with pytest.raises(EngineError, match=r"holds no config\.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        read_config(str(tmp_path))
    with pytest.raises(EngineError, match="no such folder"):
        read_config(str(tmp_path / "missing"))


def test_an_unknown_family_is_taken_for_a_llama_aloud() -> None:
    shape = shape_of(LLAMA_8B | {"model_type": "granite"})
    assert "granite: not among the families" in shape.notes[0]
    assert shape.parameters == shape_of(LLAMA_8B).parameters
    seen = shape_of(
        {"model_type": "gemma3", "text_config": LLAMA_8B | {"model_type": "gemma3_text"}}
    )
    assert seen.model_type == "gemma3_text"
    assert "language model alone" in seen.notes[0]


def test_targets_that_are_not_there_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"no q_projj; it has q_proj, k_proj"):
        predicted(lora={"target_modules": ["q_projj"]})


# -- the command ---------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def plan(model: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        cli, ["plan", "llama31", "--set", f"model.name={model}", *arguments], catch_exceptions=False
    )


def test_it_says_whether_it_fits_and_what_to_change(model: Path) -> None:
    fits = plan(model, "--vram", "24GiB", "--gpu", "RTX 4090")
    assert fits.exit_code == 0
    for text in ("weights", "nf4", "tokens/s", "24.00 GiB: fits", "backward of a layer"):
        assert text in fits.output
    less = plan(model, "--vram", "6.05GiB", "--gpu", "RTX 4090")
    assert "6.05 GiB: does not fit" in less.output
    assert 'memory.vram = "6.05GiB" would choose' in less.output  # what would not fit into 6.0
    peft = ("--set", "engine=peft", "--set", "kernels.mode=off")
    small = plan(model, "--vram", "12GiB", "--gpu", "RTX 4090", *peft)
    assert small.exit_code == 3
    assert "does not fit" in small.output
    assert "What would need less" in small.output
    way = small.output.strip().splitlines()[-1].strip()
    assert way.startswith("--set ")
    again = plan(model, "--vram", "12GiB", "--gpu", "RTX 4090", *peft, *way.split())
    assert again.exit_code == 0
    longer = plan(model, "--vram", "9GiB", "--seq", "32768")
    assert longer.exit_code == 3


def test_json_is_one_document(model: Path) -> None:
    done = plan(model, "--vram", "7", "--host", "64GiB", "--gpu", "H100", "--json")
    assert done.exit_code == 3
    document = json.loads(done.stdout)
    assert document["verdict"] == "no"
    assert document["host"]["limit_gib"] == 64
    assert document["peak"]["moment"] in document["moments"]
    total = document["moments"]["loss"]
    assert sum(total["terms"].values()) == pytest.approx(total["total_gib"], abs=0.01)
    assert document["cheapest"]["settings"]
    assert document["changes"]


def test_without_a_gpu_it_asks_for_one(model: Path) -> None:
    done = plan(model)
    assert done.exit_code == 0
    assert "--vram 24GiB" in done.output
    assert "--gpu" in done.output
    unknown = plan(model, "--gpu", "Voodoo 2")
    assert unknown.exit_code == 2
    assert "RTX 4090" in unknown.output
    assert plan(model, "--vram", "lots").exit_code == 2


def test_this_machines_gpu_is_taken(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "installed", lambda: ("NVIDIA L4", 22.0))
    monkeypatch.setattr("fastlora.cli.plan.find_spec", lambda name: None)
    document = json.loads(plan(model, "--json").stdout)
    assert document["vram_gib"] == 22.0
    assert document["gpu"]["name"] == "NVIDIA L4"
    assert document["setup"]["engine"] == "peft"  # as a run would there, without unsloth


def test_a_plan_imports_neither_torch_nor_transformers(model: Path) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['fastlora', 'plan', 'llama31', '--set', 'model.name={model}', '--vram', '24']\n"
        "from fastlora.cli.main import cli\n"
        "cli(standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'bitsandbytes', 'peft'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
