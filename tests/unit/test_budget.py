"""What memory.vram chooses, and the memory of layers that are kept, kept in part and streamed."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import H100, LLAMA_8B, card, predicted, recipe

from fastlora.cli.main import cli
from fastlora.engines import kept
from fastlora.engines.peft import PeftEngine
from fastlora.engines.unsloth import UnslothEngine
from fastlora.errors import EngineError, RecipeError
from fastlora.plan import gpus, working
from fastlora.plan.advise import with_settings
from fastlora.plan.budget import Choice, choose
from fastlora.plan.predict import Card, Prediction, predict
from fastlora.plan.setup import memory_problems
from fastlora.plan.shape import shape_of
from fastlora.recipe.advice import apply
from fastlora.recipe.load import load_recipe
from fastlora.recipe.schema import Recipe
from fastlora.train.advising import filled_from
from fastlora.train.planned import fit_memory

SMALL = LLAMA_8B | {"num_hidden_layers": 6}
OPEN: dict[str, Any] = {"train": {"effective_batch": 16}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))


def chosen(
    vram_gib: float, config: Any = LLAMA_8B, host_gib: float | None = None, **sections: Any
) -> Choice | None:
    shape, there = shape_of(config), card(vram_gib, host_gib)

    def again(other: Recipe) -> Prediction:
        return predict(other, shape, there)

    return choose(again(recipe(**{**OPEN, **sections})), again)


def rate(found: Prediction) -> float:
    assert found.speed
    return found.speed.tokens_per_s


@settings(max_examples=40, deadline=None)
@given(st.floats(5, 60), st.sampled_from(["unsloth", "peft"]), st.sampled_from(["auto", "all"]))
def test_it_fits_and_more_memory_is_never_slower(vram: float, engine: str, kernels: str) -> None:
    sections = {"engine": engine, "kernels": {"mode": kernels}}
    less, more = chosen(vram, **sections), chosen(vram + 2, **sections)
    if less is None:
        return
    assert more
    for one, size in ((less, vram), (more, vram + 2)):
        assert one.result.memory.comfortable_gib <= size
        setup = one.result.setup
        assert setup.micro_batch * setup.accumulation == 16
    # Streaming is the last resort, also where its larger micro-batches are predicted to be the faster ones.
    if not less.result.setup.stream_layers:
        assert rate(more.result) >= 0.99 * rate(less.result)
    if less.plainest.memory.comfortable_gib <= vram:
        assert rate(less.result) >= 0.99 * rate(less.plainest)


@pytest.mark.parametrize("vram", [2.9, 3.3, 4.5, 6, 9, 30])
@pytest.mark.parametrize("engine", ["unsloth", "peft"])
def test_nothing_that_fits_is_faster(vram: float, engine: str) -> None:
    """Every value of every key, where the search takes only some."""
    shape, there = shape_of(SMALL), card(vram)
    now = recipe(**OPEN, engine=engine)
    policies = ["none", "full", "offload", *(["unsloth"] if engine == "unsloth" else [])]
    best = 0.0
    for micro in (1, 2, 4, 8):
        for policy in policies:
            for whole in range(7):
                for parts in range(7 - whole if policy in ("full", "offload") else 1):
                    settings = {
                        "train.micro_batch": micro, "train.checkpointing": policy,
                        "memory.keep_layers": whole, "memory.keep_attention_layers": parts,
                    }  # fmt: skip
                    found = predict(with_settings(now, settings), shape, there)
                    if found.verdict == "fits":
                        best = max(best, rate(found))
    choice = chosen(vram, SMALL, engine=engine)
    if best:
        assert choice
        assert rate(choice.result) >= 0.99 * best
        assert choice.result.setup.stream_layers == 0
    else:
        assert choice is None or choice.result.setup.stream_layers > 0


def test_what_the_recipe_says_stays() -> None:
    train = {"effective_batch": 16, "micro_batch": 2, "checkpointing": "full"}
    choice = chosen(16, engine="unsloth", train=train, memory={"keep_attention_layers": 3})
    assert choice
    assert set(choice.settings) == {"memory.keep_layers"}
    setup = choice.result.setup
    assert (setup.micro_batch, setup.policy, setup.keep_attention_layers) == (2, "full", 3)
    assert setup.keep_layers == choice.settings["memory.keep_layers"] > 0


ASKED: tuple[dict[str, Any], ...] = (
    {}, {"keep_layers": 2}, {"keep_layers": 100}, {"keep_attention_layers": 2}, {"stream_layers": 3},
    {"stream_layers": 100}, {"stream_layers": 2, "keep_layers": 1, "keep_attention_layers": 9},
)  # fmt: skip
TRAINED: tuple[dict[str, Any], ...] = (
    {}, {"accumulation": 4}, {"effective_batch": 6, "micro_batch": 3}, {"checkpointing": "none"},
    {"checkpointing": "full"}, {"checkpointing": "offload", "accumulation": 2, "micro_batch": 4},
)  # fmt: skip


@pytest.mark.parametrize("engine", ["unsloth", "peft"])
@pytest.mark.parametrize("layers", [1, 6])
def test_whatever_is_chosen_can_be_run(engine: str, layers: int) -> None:
    """The recipe that comes of it is valid, the engine does not refuse it, and it is planned as it was chosen."""
    here = UnslothEngine() if engine == "unsloth" else PeftEngine()
    shape, chose = shape_of(SMALL | {"num_hidden_layers": layers}), 0
    for vram, memory, train, base in product((2.8, 3.4, 5, 30), ASKED, TRAINED, ("nf4", "int8")):
        there = card(vram)

        def again(other: Recipe, there: Card = there) -> Prediction:
            return predict(other, shape, there)

        asked = recipe(engine=engine, memory=memory, train=train, model={"quantization": base})
        refused = list(memory_problems(asked, engine, _policy(asked), streams=engine == "unsloth"))
        if refused:
            with pytest.raises(RecipeError):
                again(asked)
            continue
        choice = choose(again(asked), again)
        if choice is None:
            continue
        chose += 1
        taken = apply(asked, choice.filled)
        assert list(kept.memory_problems(taken, here)) == []
        assert replace(again(taken).setup, notes=()) == replace(choice.result.setup, notes=())
        setup, before = choice.result.setup, again(asked).setup
        assert setup.tokens * setup.accumulation == before.tokens * before.accumulation
        assert setup.stream_layers < layers
        assert setup.stream_layers + setup.keep_layers + setup.keep_attention_layers <= layers
        assert choice.plainest.setup.keep_layers == choice.plainest.setup.stream_layers == 0
    assert chose > 50


def _policy(asked: Recipe) -> str:
    default = "unsloth" if asked.engine == "unsloth" else "full"
    return default if asked.train.checkpointing == "auto" else asked.train.checkpointing


def test_a_great_batch_takes_no_longer() -> None:
    began = time.perf_counter()
    assert chosen(12, SMALL, train={"effective_batch": 2 * 500_000_003})
    assert time.perf_counter() - began < 10


def test_micro_batches_by_default_are_chosen_too() -> None:
    """Resumed under another budget, they are to stay."""
    choice = chosen(30, SMALL, engine="unsloth", train={"accumulation": 1})
    assert choice
    assert choice.settings["train.micro_batch"] == choice.result.setup.micro_batch == 2


def test_layers_are_streamed_only_where_nothing_else_fits() -> None:
    roomy, tight = chosen(8.5, engine="unsloth"), chosen(6.0, engine="unsloth")
    assert roomy
    assert tight
    assert roomy.result.setup.stream_layers == 0
    streamed = tight.settings["memory.stream_layers"]
    fewer = with_settings(tight.result.recipe, {**tight.settings, "memory.stream_layers": streamed - 1})  # fmt: skip
    assert predict(fewer, tight.result.shape, tight.result.card).verdict != "fits"
    assert chosen(6.0, engine="peft") is None
    assert chosen(6.0, engine="unsloth", memory={"stream_layers": 0}) is None
    assert chosen(6.0, engine="unsloth", host_gib=6) is None  # no room for them there
    assert chosen(2.0, engine="unsloth") is None


def test_the_host_may_be_what_does_not_suffice() -> None:
    """Inputs of layers are not offloaded into memory that is not there."""
    long = {
        "engine": "unsloth",
        "model": {"seq_len_tokens": 32768},
        "train": {"effective_batch": 2},
    }
    choice = chosen(40, **long)
    little = chosen(40, host_gib=9, **long)
    assert choice
    assert little
    assert little.result.memory.host_gib <= 9 < choice.result.memory.host_gib or (
        choice.result.setup.policy in ("none", "full")
    )


def test_kept_layers_are_gone_before_others_are_computed_again() -> None:
    def peak(**memory: int) -> dict[str, float]:
        train = {"checkpointing": "full", "micro_batch": 8, "effective_batch": 8}
        moments = predicted(engine="unsloth", train=train, memory=memory).memory.moments
        return {name: sum(one.bytes for one in terms) for name, terms in moments.items()}

    bare, two = peak(), peak(keep_layers=2)
    assert two["backward of a layer"] < bare["backward of a layer"] + 2.1 * (two["loss"] - bare["loss"])  # fmt: skip
    one = peak(keep_layers=1)
    # The last layer's own, which would have been made again for its backward, and its output with it.
    output = 8 * 2048 * 4096 * 2
    assert bare["backward of a layer"] - one["backward of a layer"] == pytest.approx(output)
    parts = peak(keep_attention_layers=32)
    assert bare["loss"] < parts["loss"] < peak(keep_layers=32)["loss"]


def test_kept_layers_are_still_there_when_a_streamed_one_behind_them_is_computed_again() -> None:
    """unsloth streams the last layer before any other."""

    def needs(whole: int) -> float:
        asked = {"stream_layers": 8, "keep_layers": whole}
        train = {"checkpointing": "full", "micro_batch": 8, "effective_batch": 8}
        found = predicted(engine="unsloth", train=train, memory=asked)
        saves = working.layer_saves(found.shape, found.setup)
        inputs = working.checkpoint_bytes(found.shape, found.setup)
        terms = found.memory.moments["backward of a layer"]
        return sum(one.bytes for one in terms) - inputs - whole * saves

    assert needs(4) == pytest.approx(needs(0), rel=0.001)


@pytest.mark.parametrize(
    ("policy", "kept", "staged", "on_host"),
    [
        ("unsloth", 0, 2, 32), ("unsloth", 32, 0, 0), ("offload", 0, 3, 31), ("offload", 30, 2, 1),
        ("offload", 31, 1, 0), ("offload", 32, 0, 0),
    ],
)  # fmt: skip
def test_copies_of_inputs_are_as_many_as_there_are_layers_for(
    policy: str, kept: int, staged: int, on_host: int
) -> None:
    """In inputs of a layer; fastlora leaves the last one's where it is."""
    train = {"checkpointing": policy}
    found = predicted(engine="unsloth", train=train, memory={"keep_layers": kept})
    one = found.setup.tokens * 4096 * 2
    assert working.staging_bytes(found.shape, found.setup) == staged * one
    assert working.host_inputs_bytes(found.shape, found.setup) == on_host * one
    pinned = [term.bytes for term in found.memory.host if term.name == "pinned checkpoints"]
    assert pinned == ([on_host * one] if on_host else [])


def test_recorded_micro_batches_have_memory_of_their_own() -> None:
    def planned(graphs: bool, **sections: Any) -> Prediction:
        asked = {"keep_layers": 4, "cuda_graphs": graphs}
        return predicted(train={"checkpointing": "offload", "micro_batch": 1}, memory=asked, **sections)  # fmt: skip

    without, recorded = (planned(graphs, engine="peft") for graphs in (False, True))
    assert recorded.speed
    assert recorded.speed.host_s == 0
    pool = recorded.memory.moments["loss"][-1]
    comes_and_goes = without.memory.moments[without.memory.peak]
    lasting = sum(one.bytes for one in without.memory.moments["optimizer step"])
    assert pool.bytes == sum(one.bytes for one in comes_and_goes) - lasting
    more = recorded.memory.allocated_gib - without.memory.allocated_gib
    assert more == pytest.approx(pool.bytes / 2**30)
    assert planned(True, engine="unsloth").setup.loss == "fastlora"


@pytest.mark.parametrize(
    "sections",
    [
        {"engine": "unsloth"},  # by unsloth's checkpointing
        {"engine": "unsloth", "train": {"checkpointing": "full"}, "memory": {"stream_layers": 2}},
        {"engine": "unsloth", "train": {"checkpointing": "full"}, "data": {"sources": ["x"], "packing": True}},
        {"engine": "unsloth", "train": {"checkpointing": "full"}, "kernels": {"mode": "off"}},
        {"engine": "peft", "kernels": {"mode": "off"}},  # by TRL's loss
        {"engine": "peft", "lora": {"dropout": 0.1}},
    ],
)  # fmt: skip
def test_graphs_that_a_run_refuses_are_not_planned_with(sections: dict[str, Any]) -> None:
    asked = sections | {"memory": {**sections.get("memory", {}), "cuda_graphs": True}}
    found = predicted(**asked)
    assert not found.setup.graphs
    assert found.memory == predicted(**sections).memory
    assert any("a run would go on without them" in note for note in found.setup.notes)


def test_a_choice_says_what_and_why() -> None:
    choice = chosen(12, engine="unsloth")
    assert choice
    lines = list(choice.lines())
    assert lines[0].startswith("memory.vram = 12.00 GiB: ")
    assert len(lines) == 1 + len(choice.filled)
    document = json.loads(json.dumps(choice.document()))
    assert document["budget_gib"] == 12
    assert document["comfortable_gib"] <= 12
    assert document["tokens_per_s"] >= document["plainest"]["tokens_per_s"]
    assert [one["key"] for one in document["filled"]] == list(choice.settings)


# -- the recipe, the command, a run --------------------------------------------------------


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


def test_plan_refuses_the_budget_that_a_run_refuses(model: Path) -> None:
    """Also where it fits tightly."""

    def plan(*more: str) -> tuple[Any, int, str]:
        stated = (
            f"model.name={model}", "engine=peft", "train.micro_batch=2", "train.checkpointing=full",
            "memory.keep_layers=0", "memory.keep_attention_layers=0",
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
    _, code, said = plan("--set", "memory.vram=20GiB")
    assert code == 0
    assert "name one with --gpu" in said


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


def on_a_card(monkeypatch: pytest.MonkeyPatch, name: str, card_gib: float, others_gib: float = 0) -> None:  # fmt: skip
    import torch

    size = int(card_gib * 2**30)
    properties = SimpleNamespace(name=name, total_memory=size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)
    used = int((others_gib + 0.82) * 2**30)  # with this process's own context
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
    batches = {one.key for one in filled_from({"memory": memory})}
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
    taken, _ = fit_memory(asked, "unsloth", 1500, lambda said: None)
    assert taken.memory.keep_layers


def test_no_more_is_chosen_than_pytorch_may_take(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As where the benchmark stands for a smaller card."""
    import torch

    on_a_card(monkeypatch, H100, 79.2)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.25)
    asked = recipe(**OPEN, model={"name": str(model)}, memory={"vram": "auto"})
    _, memory = fit_memory(asked, "unsloth", 1500, lambda said: None)
    assert memory
    assert memory["budget_gib"] == pytest.approx(0.25 * 79.2 + 0.82, abs=0.01)


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
    nothing = {"keep_layers": 0, "keep_attention_layers": 0}
    needs = predicted(engine="peft", train=stated, memory=nothing, model={"seq_len_tokens": 1500}).memory  # fmt: skip
    between = f"{(needs.needed_gib + needs.comfortable_gib) / 2}GiB"
    asked = recipe(train=stated, model={"name": str(model)}, memory={"vram": between, **nothing})
    with pytest.raises(EngineError, match=rf"it stands it needs {needs.comfortable_gib:.2f} and"):
        fit_memory(asked, "peft", 1500, lambda said: None)


def test_a_model_that_cannot_be_counted_has_no_budget(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
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


def test_without_a_gpu_nothing_is_chosen(model: Path) -> None:
    said: list[str] = []
    asked = recipe(model={"name": str(model)}, memory={"vram": "auto"})
    assert fit_memory(asked, "peft", 1500, said.append) == (asked, None)
    assert "no GPU" in said[0]
