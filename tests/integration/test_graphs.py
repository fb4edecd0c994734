"""A run of replays is the run without them. The recorder is reruns.py's, which computes a record's function again."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from flash import pretend_to_have_it
from ooms import Ooms
from place import Crash, Place, assert_same, last
from reruns import Recorders, never_recorded, refreshes

from fastlora.engines.engaged import Plan
from fastlora.errors import EngineError
from fastlora.plan.settle import MicroBatches
from fastlora.recipe.advice import Filled, apply
from fastlora.train.graphs import Graphs
from fastlora.train.shapes import Shapes, choose_shapes

# 65 rows: each epoch's last micro-batch, and step, has one.
SETTINGS = (
    "data.eval_split=15", "train.micro_batch=4", "train.effective_batch=8", "train.steps=10",
    "train.eval_every_steps=6", "train.save_every_steps=3", "train.chunked_loss=true",
)  # fmt: skip
GRAPHS = "memory.cuda_graphs=true"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(place: Place) -> dict[str, Any]:
    return place.run(*SETTINGS)


@pytest.fixture(scope="module")
def replayed(place: Place) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        Recorders(patch)
        return place.run(*SETTINGS, GRAPHS)


def assert_close(
    place: Place, one: dict[str, Any], other: dict[str, Any], error: float = 1e-4
) -> None:
    """Steps and tokens the same; losses, gradients and, in float32, adapter but for sums of other lengths. Adam's first
    steps are of a gradient's sign alone, and in bfloat16 that of the smallest is rounding."""
    mine, yours = (place.work.losses(last(run)) for run in (one, other))
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in yours]
    for (step, which, got), (_, _, want) in zip(mine, yours, strict=True):
        exact = "tokens" in which
        assert got == (want if exact else pytest.approx(want, rel=error)), (step, which)
    if one["dtype"] == "bfloat16":
        return
    for name, tensor in place.adapter(last(other)).items():
        difference = (place.adapter(last(one))[name] - tensor).abs().max()
        assert difference <= 10 * error * tensor.abs().max(), name


def test_replayed_it_is_the_same_run(
    place: Place, plain: dict[str, Any], replayed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several shapes, accumulation, micro-batches and steps that are not full, and an evaluation between."""
    assert_close(place, replayed, plain)
    found = replayed["cuda_graphs"]
    assert 1 < found["recorded"] <= len(found["lengths"])
    assert found["of"] == 19  # 2 to a step, 1 in the epoch's last
    assert found["replayed"] > 7
    lengths = f"cuda_graphs: {len(found['lengths'])} lengths, {found['padding']:.1%} padding"
    assert lengths in replayed["notes"]
    # And to the last bit that of the same shapes, computed as usual.
    Recorders(monkeypatch)
    with never_recorded(monkeypatch):
        assert_same(place, place.run(*SETTINGS, GRAPHS), replayed)


def test_resumed_it_is_the_run_that_was_not_interrupted(
    place: Place, replayed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Recorders(monkeypatch)
    crash = Crash(monkeypatch, at=8)
    with pytest.raises(RuntimeError, match="crashed"):
        place.run(*SETTINGS, GRAPHS)
    crash.at = 0
    # What has been chosen is kept, whatever would be chosen now.
    monkeypatch.setattr("fastlora.train.static.choose_shapes", lambda *_: 1 / 0)
    resumed = place.run(*SETTINGS, GRAPHS, resume=True)
    assert "resumed" in resumed
    assert len(made.made) == 2
    assert_same(place, resumed, replayed)


def test_weights_that_are_dequantized_once_a_step_are_those_of_the_step(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through accumulation, an evaluation, epochs' ends and a resume, to the last bit; and where nothing is recorded it
    is said that they are not."""
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    settings = (*SETTINGS, 'model.quantization="nf4"', 'kernels.mode="all"')
    dense = "memory.dense_layers=2"
    Recorders(monkeypatch)
    made_anew = place.run(*settings, GRAPHS)
    crash = Crash(monkeypatch, at=8)
    refreshed = refreshes(monkeypatch)
    with pytest.raises(RuntimeError, match="crashed"):
        place.run(*settings, GRAPHS, dense)
    crash.at = 0
    assert_same(place, place.run(*settings, GRAPHS, dense, resume=True), made_anew)
    assert refreshed.count(14) > 4  # 7 products of 2 layers
    with never_recorded(monkeypatch):
        short = ("train.steps=1", "train.eval_every_steps=1", "train.save_every_steps=1")
        noted = place.run(*settings, *short, dense)["notes"]
    assert "memory.dense_layers: it does nothing (micro-batches are not recorded)" in noted


def test_what_was_chosen_on_a_gpu_is_kept_when_it_is_resumed(
    place: Place, replayed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe does not say it, and what would be chosen now is not asked for: padding and numbers are the same."""
    Recorders(monkeypatch)
    chosen = [Filled("memory.cuda_graphs", True, "it is faster")]

    def choose(recipe: Any, *_: Any) -> Any:
        return apply(recipe, chosen), {"filled": [asdict(one) for one in chosen]}

    crash = Crash(monkeypatch, at=8)
    with monkeypatch.context() as patch:
        patch.setattr("fastlora.train.session.fit_memory", choose)
        with pytest.raises(RuntimeError, match="crashed"):
            place.run(*SETTINGS)
    crash.at = 0
    weighed: list[Any] = []

    def nothing(recipe: Any, engine: str, row_tokens: Any, announce: Any, of: Any) -> Any:
        weighed.append(of)
        return recipe, None

    monkeypatch.setattr("fastlora.train.session.fit_memory", nothing)
    resumed = place.run(*SETTINGS, resume=True)
    assert weighed == [None]
    assert "changed" not in resumed["resumed"][-1]
    assert resumed["cuda_graphs"]["lengths"] == list(replayed["cuda_graphs"]["lengths"])
    assert_same(place, resumed, replayed)


@pytest.mark.parametrize("size", [1, 8])
def test_a_held_out_loss_does_not_depend_on_the_micro_batch_that_was_chosen(
    size: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.effective_batch=8", "train.steps=1", "train.eval_every_steps=1")
    usual = place.run(*settings, "train.micro_batch=2")

    def choose(recipe: Any, *_: Any) -> Any:
        one = Filled("train.micro_batch", size, "it is faster")
        return apply(recipe, [one]), {"filled": [asdict(one)]}

    monkeypatch.setattr("fastlora.train.session.fit_memory", choose)
    chosen = place.run(*settings, "train.micro_batch=2")
    assert chosen["recipe"]["train"]["micro_batch"] == size
    losses = [run["result"]["eval_losses"] for run in (usual, chosen)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_graphs_would_cost_is_known_before_a_run_begins(
    place: Place, replayed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorders(monkeypatch)
    monkeypatch.setattr("fastlora.train.session.plan_kernels", lambda _: Plan(ours=True))
    found: list[MicroBatches] = []

    def choose(recipe: Any, engine: str, row_tokens: Any, announce: Any, of: Any) -> Any:
        found.append(of(recipe))
        return recipe, None

    monkeypatch.setattr("fastlora.train.session.fit_memory", choose)
    place.run(*SETTINGS, "train.steps=1")
    lengths = replayed["cuda_graphs"]["lengths"]
    # An epoch has 65 rows, and computes 17 x 4.
    padding = 1 - (1 - replayed["cuda_graphs"]["padding"]) * 65 / 68
    assert found[0].padding == pytest.approx(padding)
    assert found[0].rehearsed == 3 * len(lengths)
    assert found[0].count == 2
    assert lengths[0] < found[0].tokens < lengths[-1]


def test_out_of_memory_it_goes_on_without_graphs_and_then_in_smaller_forwards(
    place: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Recorders(monkeypatch)
    ooms = Ooms(monkeypatch, {5: ["backward"], 7: ["forward"]})
    disturbed = place.run(*SETTINGS, GRAPHS)
    assert [step for step, _ in ooms.raised] == [5, 7]
    assert made.last.forgotten == 1
    assert [(one["step"], one["rows"], one.get("graphs")) for one in disturbed["oom"]] == [
        (5, 4, False), (7, 2, None),
    ]  # fmt: skip
    assert disturbed["cuda_graphs"]["stopped"] == "out of memory at step 5"
    assert any("without memory.cuda_graphs from now on" in note for note in disturbed["notes"])
    assert_close(place, disturbed, plain)


def test_out_of_memory_while_it_is_recorded_rows_stay_together(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same micro-batch fitted as a call."""
    Recorders(monkeypatch, fail={0: torch.OutOfMemoryError("CUDA out of memory.")})
    disturbed = place.run(*SETTINGS, GRAPHS, "train.steps=3")
    ((step, rows, graphs),) = [(o["step"], o["rows"], o["graphs"]) for o in disturbed["oom"]]
    assert (rows, graphs) == (4, False)
    assert step in (2, 3)
    assert disturbed["cuda_graphs"]["stopped"] == f"out of memory at step {step}"
    assert len([entry for entry in place.work.losses(last(disturbed)) if entry[1] == "loss"]) == 3


def test_what_cannot_be_recorded_is_said_and_trained_as_usual(
    place: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Recorders(monkeypatch, fail={1: RuntimeError("operation not permitted")})
    stopped = place.run(*SETTINGS, GRAPHS)
    assert made.last.records == 2
    why = stopped["cuda_graphs"]["stopped"]
    assert why.startswith("RuntimeError: operation not permitted, support/reruns.py:")
    (note,) = [note for note in stopped["notes"] if note.startswith("cuda_graphs: not used")]
    assert f"({why}); a new run is faster with memory.cuda_graphs = false" in note
    assert_close(place, stopped, plain)


@pytest.mark.parametrize(
    "settings",
    [
        ("data.packing=true", "train.micro_batch=2", "train.effective_batch=4", "train.steps=3"),
        (
            'train.checkpointing="full"',
            'model.dtype="bfloat16"',
            'kernels.mode="all"',
            "train.steps=3",
        ),
        ("train.chunked_loss=false", 'train.checkpointing="offload"', "train.steps=3"),
    ],
    ids=["packed", "kernels, checkpointed, bfloat16", "offloaded, with logits"],
)
def test_nothing_waits_in_a_replay(
    settings: tuple[str, ...], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If something did, it would say so and replay nothing."""
    monkeypatch.setattr("fastlora.train.shapes.MOST_LENGTHS", 1)
    settings = (*SETTINGS, *settings)
    made = Recorders(monkeypatch)
    replayed = place.run(*settings, GRAPHS)
    assert "stopped" not in replayed["cuda_graphs"]
    assert (made.last.records, replayed["cuda_graphs"]["replayed"]) == (1, 4)
    with never_recorded(monkeypatch):
        assert_same(place, place.run(*settings, GRAPHS), replayed)
    error = 1e-2 if replayed["dtype"] == "bfloat16" else 1e-4
    assert_close(place, replayed, place.run(*settings), error)


def test_more_labels_than_are_provided_for_are_taken_in_turns(
    place: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fewer(*given: Any) -> Shapes:
        chosen = choose_shapes(*given)
        return replace(chosen, labels=tuple(most // 2 for most in chosen.labels))

    monkeypatch.setattr("fastlora.train.static.choose_shapes", fewer)
    Recorders(monkeypatch)
    made: list[Graphs] = []
    began = Graphs.__init__

    def begin(self: Graphs, *given: Any, **named: Any) -> None:
        made.append(self)
        began(self, *given, **named)

    monkeypatch.setattr(Graphs, "__init__", begin)
    replayed = place.run(*SETTINGS, GRAPHS)
    found = replayed["cuda_graphs"]
    assert made[0].replays > found["of"] > found["replayed"]  # two and more of some micro-batches
    assert f"{found['replayed']} of {found['of']} micro-batches were replays" in place.said
    assert_close(place, replayed, plain)
    with never_recorded(monkeypatch):
        assert_same(place, place.run(*SETTINGS, GRAPHS), replayed)


def test_packed_rows_are_kept_apart_by_where_they_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded and with layers computed again, it is the run with a mask; nor does anything wait."""
    packed = (
        "data.packing=true", "train.micro_batch=2", "train.effective_batch=4", "train.steps=6",
        'train.checkpointing="offload"',
    )  # fmt: skip
    monkeypatch.setattr("fastlora.train.shapes.MOST_LENGTHS", 1)
    masked = place.run(*SETTINGS, *packed)
    pretend_to_have_it(monkeypatch)
    made = Recorders(monkeypatch)
    replayed = place.run(*SETTINGS, *packed, GRAPHS)
    found = replayed["cuda_graphs"]
    assert "stopped" not in found
    assert found["rows"] == 8
    assert (made.last.records, found["replayed"], found["of"]) == (1, 10, 12)
    assert_close(place, replayed, masked)
    with never_recorded(monkeypatch):
        assert_same(place, place.run(*SETTINGS, *packed, GRAPHS), replayed)
    # A micro-batch with more rows than there is room for is computed as usual.

    def fewer(*given: Any) -> Shapes:
        return replace(choose_shapes(*given), rows=3)

    monkeypatch.setattr("fastlora.train.static.choose_shapes", fewer)
    some = place.run(*SETTINGS, *packed, GRAPHS)
    assert some["cuda_graphs"]["replayed"] < found["replayed"]
    assert_close(place, some, masked)


def test_without_a_gpu_it_is_refused_before_anything_is_loaded(place: Place) -> None:
    with pytest.raises(
        EngineError, match=r"^memory.cuda_graphs: there is no CUDA GPU here; set it to false"
    ):
        place.run(GRAPHS)
