"""memory.vram in a recipe, in `fastlora plan` and in a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
from click.testing import CliRunner
from plans import H100, LLAMA_8B, card, predicted, recipe

from fastlora.cli.main import cli
from fastlora.engines.engaged import cap_as_asked, load_model
from fastlora.engines.peft import PeftEngine
from fastlora.errors import EngineError, RecipeError
from fastlora.plan import gpus
from fastlora.plan.advise import with_settings
from fastlora.plan.predict import predict
from fastlora.plan.shape import shape_of
from fastlora.plan.working import CONTEXT
from fastlora.recipe.load import load_recipe
from fastlora.recipe.schema import Recipe
from fastlora.train.advising import filled_from
from fastlora.train.planned import fit_memory

OPEN: dict[str, Any] = {"train": {"effective_batch": 16}}


@pytest.fixture(autouse=True)
def own_cache_and_a_host_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen depends on the host's free memory, which the machine's other programs take."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastlora.train.planned.host_free_bytes", lambda: 64 * 2**30)


@pytest.mark.parametrize(
    ("value", "gib"),
    [
        ("12GiB", 12.0),
        (" .5 gib", 0.5),
        ("1e3", None),
        ("auto", None),
        ("0", None),
        ("9" * 400, None),
    ],
)
def test_an_amount_is_checked(value: str, gib: float | None) -> None:
    if gib is None and value != "auto":
        with pytest.raises(ValueError, match="is not an amount of memory"):
            recipe(memory={"vram": value})
    else:
        assert recipe(memory={"vram": value}).memory.vram_gib == gib


def test_the_problem_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(
        '[model]\nname = "m"\n[data]\nsources = ["x.jsonl"]\n[memory]\nvram = "lots"\n[output]\ndir = "o"\n'
    )
    with pytest.raises(RecipeError, match=r"memory\.vram: 'lots' is not an amount"):
        load_recipe(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b" / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path / "8b"


def test_plan_takes_the_budget_as_a_run_would(model: Path) -> None:
    def plan(*arguments: str) -> Any:
        base = ["plan", "llama31", "--set", f"model.name={model}", "--gpu", "RTX 4090", "--json"]
        return json.loads(CliRunner().invoke(cli, [*base, *arguments]).stdout)

    offered = plan("--vram", "12GiB")
    assert offered["setup"]["keep_layers"] == 0  # shown, not taken
    taken = plan("--vram", "12GiB", "--set", "memory.vram=auto")
    assert taken["vram_gib"] == plan("--set", "memory.vram=12GiB")["vram_gib"] == 12
    assert taken["verdict"] == "fits"
    settings = {one["key"]: one["value"] for one in taken["budget"]["filled"]}
    assert taken["setup"]["keep_layers"] == settings.get("memory.keep_layers", 0) > 0
    assert taken["budget"] == offered["budget"]
    assert taken["speed"]["tokens_per_s"] > offered["speed"]["tokens_per_s"]


def test_plan_says_what_a_run_takes_by_itself(model: Path) -> None:
    base = ["plan", "llama31", "--set", f"model.name={model}", "--gpu", "H200"]
    document = json.loads(CliRunner().invoke(cli, [*base, "--json"]).stdout)
    settings = {one["key"]: one["value"] for one in document["default"]["filled"]}
    assert settings["memory.cuda_graphs"] is True
    assert settings["train.checkpointing"] == "none"
    assert "train.micro_batch" not in settings
    assert document["default"]["budget_gib"] == pytest.approx(0.9 * 139.8)
    assert document["setup"]["checkpointing"] == "unsloth"  # as it stands
    shown = CliRunner().invoke(cli, base).output
    assert 'a run chooses memory.cuda_graphs = true, kernels.mode = "all", ' in shown
    budget = CliRunner().invoke(cli, [*base, "--set", "memory.vram=40GiB", "--json"])
    assert json.loads(budget.stdout)["default"] is None


def test_plan_refuses_the_budget_that_a_run_refuses(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Also where it fits tightly."""

    def plan(*more: str) -> tuple[Any, int, str]:
        stated = (
            f"model.name={model}", "engine=peft", "train.micro_batch=2", "train.checkpointing=full",
            "memory.keep_layers=0", "memory.keep_attention_layers=0", "memory.embedding=gpu",
        )  # fmt: skip
        base = ["plan", "llama31", "--json", *(part for one in stated for part in ("--set", one))]
        done = CliRunner().invoke(cli, [*base, *more])
        return json.loads(done.stdout), done.exit_code, done.stderr

    peak = plan("--gpu", "RTX 4090")[0]["peak"]
    least, roomy = peak["needed_gib"], peak["comfortable_gib"]
    for vram, verdict in (
        (least - 0.1, "no"),
        ((least + roomy) / 2, "tight"),
        (roomy + 0.1, "fits"),
    ):
        found, code, said = plan("--gpu", "RTX 4090", "--set", f"memory.vram={vram}GiB")
        assert found["verdict"] == verdict
        refused = verdict != "fits"
        assert (found["budget"] is None) == ("a run would refuse" in said) == refused
        assert code == 3 * refused
    monkeypatch.setattr(gpus, "installed", lambda: None)
    _, code, said = plan("--set", "memory.vram=20GiB")
    assert code == 0
    assert "name one with --gpu" in said
    _, code, said = plan("--gpu", "RTX 4090", "--set", "memory.vram=20GiB", "--host", "4GiB")
    assert code == 3
    assert "20.00 GiB, and 4.0 of the host; a run would refuse" in said
    # One that is not known is taken for another, as a run takes it.
    monkeypatch.setattr(gpus, "installed", lambda: ("Voodoo 2", 12.0))
    found, code, _ = plan("--set", "memory.vram=20GiB")
    assert code == 0
    assert found["budget"]["budget_gib"] == found["vram_gib"] == 12
    assert found["gpu"] == {"name": "Voodoo 2", "tflops": ANY, "source": gpus.GUESSED}
    _, code, said = plan("--set", f"memory.vram={least - 0.1}GiB")
    assert code == 3
    assert "a run would refuse" in said


def test_a_budget_is_no_larger_than_the_card(model: Path) -> None:
    base = ["plan", "llama31", "--set", f"model.name={model}", "--gpu", "RTX 4090", "--json"]
    for more in (
        ["--set", "memory.vram=80GiB"],
        ["--set", "memory.vram=80GiB", "--vram", "23.5GiB"],
    ):
        found = json.loads(CliRunner().invoke(cli, [*base, *more]).stdout)
        assert found["budget"]["budget_gib"] == found["vram_gib"] == 23.5
    less = CliRunner().invoke(cli, [*base, "--set", "memory.vram=9GiB", "--vram", "12GiB"])
    assert json.loads(less.stdout)["vram_gib"] == 9


def test_a_budget_does_not_shrink_the_card() -> None:
    """unsloth's loss takes what is free on the card, whatever of it the process may have."""
    there = replace(card(8.5), whole_gib=79.2)
    now = recipe(engine="unsloth")
    budget, small = (
        predict(now, shape_of(LLAMA_8B), one).memory.moments["loss"] for one in (there, card(8.5))
    )
    assert budget[-1].bytes > 1.5 * small[-1].bytes


CONTEXT_GIB = CONTEXT["unsloth"] / 2**30


def on_a_card(monkeypatch: pytest.MonkeyPatch, name: str, card_gib: float, others_gib: float = 0) -> None:  # fmt: skip
    import torch

    size = int(card_gib * 2**30)
    properties = SimpleNamespace(name=name, total_memory=size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)
    used = int((others_gib + CONTEXT_GIB) * 2**30)  # with this process's own
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (size - used, size))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)


def test_a_run_takes_what_is_chosen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_card(monkeypatch, H100, 79.2, others_gib=60)
    said: list[str] = []
    asked = recipe(**OPEN, model={"name": str(model)}, memory={"vram": "12GiB"})
    taken, memory = fit_memory(asked, "unsloth", 1500, said.append)
    assert memory
    assert memory["budget_gib"] == 12
    assert said[0].startswith("memory.vram = 12.00 GiB: ")
    # The batches are part of what the steps are; with them stated, the rest is chosen again and alike.
    stated = Recipe.model_validate(taken.model_dump(exclude_unset=True))
    again, _ = fit_memory(stated, "unsloth", 1500, said.append)
    assert again == taken
    batches = {one.key for one in filled_from({"memory": memory}, asked)}
    assert batches <= {"train.micro_batch", "train.effective_batch"}
    assert taken.train.micro_batch * taken.train.accumulation_steps == 16
    auto, memory = fit_memory(
        recipe(**OPEN, model={"name": str(model)}, memory={"vram": "auto"}),
        "unsloth",
        1500,
        said.append,
    )
    assert memory
    assert memory["budget_gib"] == pytest.approx(19.2, abs=0.01)
    assert auto.memory.keep_layers or auto.train.checkpointing == "none"


def test_a_gpu_that_is_not_known_has_a_budget_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    on_a_card(monkeypatch, "Voodoo 2", 12)
    assert gpus.gpu_named("Voodoo 2") is None
    asked = recipe(**OPEN, model={"name": str(model)}, memory={"vram": "auto"})
    said: list[str] = []
    taken, _ = fit_memory(asked, "unsloth", 1500, said.append)
    assert taken.memory.keep_layers or taken.memory.embedding
    assert said[0].endswith("; Voodoo 2 is taken for an RTX 3090")


def test_no_more_is_chosen_than_pytorch_may_take(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As where the benchmark stands for a smaller card."""
    import torch

    on_a_card(monkeypatch, H100, 79.2)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.25)
    asked = recipe(**OPEN, model={"name": str(model)}, memory={"vram": "auto"})
    _, memory = fit_memory(asked, "unsloth", 1500, lambda said: None)
    assert memory
    assert memory["budget_gib"] == pytest.approx(0.25 * 79.2 + CONTEXT_GIB, abs=0.01)


@pytest.mark.parametrize("others_gib", [0, 60])
def test_the_limit_is_on_what_this_process_holds(
    others_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    on_a_card(monkeypatch, H100, 79.2, others_gib)
    shares: list[float] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)

    def load(*_: Any) -> Any:
        raise EngineError("not needed here")

    engine: Any = SimpleNamespace(name="unsloth", load=load)
    with pytest.raises(EngineError, match="not needed"):
        load_model(engine, recipe(memory={"vram": "12GiB"}), print)
    assert shares == [pytest.approx((12 - CONTEXT_GIB - 2**-6) / 79.2, abs=1e-5)]


def test_the_limit_leaves_room_for_page_tables_that_were_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """unsloth pins streamed weights past PyTorch, which then knows of none."""
    import torch

    streams = {"stream_layers": 20, "vram": "12GiB"}
    found = predicted(engine="unsloth", memory=streams)
    tables_gib = found.memory.context / 2**30 - CONTEXT_GIB
    assert tables_gib > 2**-8
    on_a_card(monkeypatch, H100, 79.2, tables_gib)
    shares: list[float] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    engine: Any = SimpleNamespace(name="unsloth")
    cap_as_asked(recipe(memory=streams), engine, found.memory.context)
    wanted = (12 - CONTEXT_GIB - tables_gib - 2**-6) / 79.2
    assert shares == [pytest.approx(wanted, abs=1e-6)]


def test_no_more_is_chosen_than_is_free(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_card(monkeypatch, H100, 79.2, others_gib=65)
    said: list[str] = []
    asked = recipe(**OPEN, model={"name": str(model)}, memory={"vram": "80GiB"})
    _, memory = fit_memory(asked, "unsloth", 1500, said.append)
    assert memory
    assert memory["budget_gib"] == pytest.approx(14.2, abs=0.01)
    assert said[0].startswith("memory.vram: 80.00 GiB are not free")


def test_what_fits_nowhere_is_said_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_card(monkeypatch, H100, 79.2)
    asked = recipe(**OPEN, model={"name": str(model)}, memory={"vram": "3GiB"})
    with pytest.raises(EngineError, match=r"nothing fits into 3\.00 GiB.*fastlora plan"):
        fit_memory(asked, "unsloth", 1500, lambda said: None)


def test_what_would_fit_tightly_is_said_to_need_more(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    on_a_card(monkeypatch, H100, 79.2)
    stated = {"micro_batch": 2, "effective_batch": 2, "checkpointing": "full"}
    nothing = {"keep_layers": 0, "keep_attention_layers": 0, "embedding": "gpu"}
    needs = predicted(engine="peft", train=stated, memory=nothing, model={"seq_len_tokens": 1500}).memory  # fmt: skip
    between = f"{(needs.needed_gib + needs.comfortable_gib) / 2}GiB"
    asked = recipe(train=stated, model={"name": str(model)}, memory={"vram": between, **nothing})
    with pytest.raises(EngineError, match=rf"it stands it needs {needs.comfortable_gib:.2f} and"):
        fit_memory(asked, "peft", 1500, lambda said: None)


def test_what_cannot_be_counted_has_no_budget(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    on_a_card(monkeypatch, H100, 79.2)
    experts = LLAMA_8B | {"model_type": "mixtral", "num_local_experts": 8}
    (model / "config.json").write_text(json.dumps(experts))
    asked = recipe(model={"name": str(model)}, memory={"vram": "auto"})
    with pytest.raises(EngineError, match=r"^memory\.vram: .*has experts.*leave it out"):
        fit_memory(asked, "peft", 1500, lambda said: None)


def test_every_engine_of_the_benchmark_has_a_budget(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    on_a_card(monkeypatch, H100, 79.2)
    asked = recipe(**OPEN, model={"name": str(model)}, memory={"vram": "12GiB"})
    for engine in ("peft", "liger", "unsloth"):
        taken, memory = fit_memory(asked, engine, 1500, lambda said: None)
        assert memory
        assert taken.train.checkpointing in (*PeftEngine.capabilities.checkpointing, "unsloth")


def test_without_a_budget_it_is_nine_tenths_of_what_is_free(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    on_a_card(monkeypatch, H100, 79.2, others_gib=60)
    said: list[str] = []
    asked = recipe(**OPEN, model={"name": str(model)})
    taken, memory = fit_memory(asked, "unsloth", 1500, said.append)
    assert memory
    assert memory["budget_gib"] == pytest.approx(0.9 * 19.2, abs=0.01)
    assert said[0].startswith(f"memory: of {0.9 * 19.2:.2f} GiB that it may take: ")
    assert said[0].endswith("; memory.vram sets a limit")
    assert any('train.checkpointing = "' in line for line in said)  # as a recipe has it
    assert taken.train == asked.train.model_copy(
        update={"checkpointing": taken.train.checkpointing}
    )
    assert taken.memory.keep_layers
    assert taken.memory.vram is None
    assert taken.memory.cuda_graphs is None  # what they cost is not known here
    stated = recipe(**OPEN, model={"name": str(model)}, memory={"cuda_graphs": False})
    stated = with_settings(stated, {"train.checkpointing": "unsloth"})
    said.clear()
    assert fit_memory(stated, "unsloth", 1500, said.append)[0] == stated
    assert said == []
    # What does not fit, and what cannot be counted, is tried as it stands.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * 2**30, int(79.2 * 2**30)))
    assert fit_memory(asked, "unsloth", 1500, said.append) == (asked, None)
    (model / "config.json").write_text("{}")
    assert fit_memory(asked, "unsloth", 1500, said.append) == (asked, None)


def test_without_a_gpu_nothing_is_chosen(model: Path) -> None:
    said: list[str] = []
    plain = recipe(model={"name": str(model)})
    assert fit_memory(plain, "peft", 1500, said.append, lambda _: 1 / 0) == (plain, None)  # type: ignore[arg-type, return-value]
    assert said == []
    asked = recipe(model={"name": str(model)}, memory={"vram": "auto"})
    assert fit_memory(asked, "peft", 1500, said.append) == (asked, None)
    assert "no GPU" in said[0]
