"""An interrupted run that is resumed is, to the last bit, the run that was not interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("resume")  # one worker makes what they are compared with
STEPS = 16
# A rate this high makes the held-out loss rise after its first falls.
EARLY = (
    "--set", "train.lr=0.02", "--set", "train.epochs=40", "--set", "train.scheduler=constant",
    "--set", "train.early_stopping_patience=2", "--set", "train.keep_best=true",
    "--set", "train.keep_checkpoints=1", "--set", "train.eval_every_steps=2",
    "--set", "train.save_every_steps=99", "--set", "train.log_every_steps=7",
    "--set", "eval.rows=4", "--set", 'eval.metrics=["exact_match"]',
)  # fmt: skip
Make = Callable[[], object]


def by_epochs(workplace: object) -> object:
    """Evaluates and saves by epochs, and logs at other steps than either."""
    text = workplace.recipe.read_text()
    text = text.replace("eval_every_steps = 4\nsave_every_steps = 4", "log_every_steps = 3")
    workplace.recipe.write_text(text)
    return workplace


def weights(workplace: object, number: int = 1) -> dict[str, bytes]:
    tensors = load_file(workplace.path(number) / "adapter" / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def uninterrupted(make_workplace: Make) -> object:
    workplace = make_workplace()
    workplace.run(new=True)
    return workplace


@pytest.fixture(scope="module")
def whole_by_epochs(make_workplace: Make) -> object:
    workplace = by_epochs(make_workplace())
    workplace.run(new=True)
    return workplace


@pytest.fixture(scope="module")
def stopped_early(make_workplace: Make) -> object:
    workplace = make_workplace()
    workplace.run(*EARLY, new=True)
    return workplace


def assert_same_run(resumed: object, whole: object) -> None:
    assert resumed.losses() == whole.losses()
    assert weights(resumed) == weights(whole)
    then, now = whole.manifest(), resumed.manifest()
    assert now["status"] == "finished"
    for key in ("steps", "best_step", "eval_losses", "tokens"):
        assert now["result"][key] == then["result"][key], key
    assert now.get("answers") == then.get("answers")
    assert not resumed.path(2).exists()


def test_two_runs_are_the_same_and_neither_overwrites(uninterrupted: object) -> None:
    uninterrupted.run()
    assert uninterrupted.losses(2) == uninterrupted.losses(1)
    assert weights(uninterrupted, 2) == weights(uninterrupted, 1)
    assert len([entry for entry in uninterrupted.losses() if entry[1] == "loss"]) == STEPS


# 4, 8, 12: where an evaluation is due and a checkpoint is written anyway; 8 is the end of an epoch.
@pytest.mark.parametrize(
    ("how", "step"), [("SIGINT", s) for s in (3, 8, 12)] + [("SIGTERM", 7), ("evaluation", 4)]
)
def test_a_signal_saves_and_resume_goes_on(
    how: str, step: int, uninterrupted: object, workplace: object
) -> None:
    new = how == "SIGTERM"
    said = workplace.interrupt(how, step, expect=143 if how == "SIGTERM" else 130, new=new)
    assert f"fastlora run {workplace.recipe} --resume\n" in said
    assert workplace.manifest()["status"] == "interrupted"
    page = workplace.path() / "report.html"
    assert f"<pre>fastlora run {workplace.recipe} --resume</pre>" in page.read_text()
    assert (workplace.path() / "checkpoints" / f"checkpoint-{step}" / "COMPLETE").exists()
    assert (step, "eval_loss") not in [entry[:2] for entry in workplace.losses()]
    workplace.run("--resume", new=new)
    assert "<strong>finished</strong>" in page.read_text()
    assert_same_run(workplace, uninterrupted)


# In the middle of an epoch, at its end (before its evaluation and in it), and at the last step.
@pytest.mark.parametrize(
    ("how", "step"), [("SIGINT", 5), ("SIGINT", 8), ("evaluation", 8), ("SIGINT", STEPS)]
)
def test_an_interrupt_does_not_evaluate(
    how: str, step: int, whole_by_epochs: object, workplace: object
) -> None:
    by_epochs(workplace).interrupt(how, step, expect=130)
    assert step not in [entry[0] for entry in workplace.losses() if entry[1] == "eval_loss"]
    checkpoint = workplace.path() / "checkpoints" / f"checkpoint-{step}"
    assert (checkpoint / "COMPLETE").exists()
    if step <= 8:
        assert json.loads((checkpoint / "trainer_state.json").read_text())["best_metric"] is None
    workplace.run("--resume")
    assert_same_run(workplace, whole_by_epochs)


@pytest.mark.parametrize("how", ["SIGINT", "answers"])
def test_a_run_that_has_stopped_early_does_not_train_on(
    how: str, stopped_early: object, workplace: object
) -> None:
    """Stopped before the evaluation that ends training, and after it."""
    last = stopped_early.manifest()["result"]["steps"]
    workplace.interrupt(how, last, *EARLY, expect=130)
    workplace.run("--resume", *EARLY)
    assert_same_run(workplace, stopped_early)


def test_a_signal_in_a_finaliser_before_the_merge(workplace: object) -> None:
    """Python swallows what is raised there; and the training, over in mid-epoch, stays over."""
    settings = ("--set", "train.steps=5", "--set", "output.merge=16bit")
    workplace.interrupt("finaliser", 0, *settings, expect=143)
    assert workplace.manifest()["status"] == "interrupted"
    assert not (workplace.path() / "merged").exists()
    then, trained = workplace.losses(), weights(workplace)
    workplace.run("--resume", *settings)
    assert (workplace.losses(), weights(workplace)) == (then, trained)
    assert workplace.manifest()["status"] == "finished"
    assert (workplace.path() / "merged").exists()


def test_a_second_signal_leaves_at_once(workplace: object, uninterrupted: object) -> None:
    workplace.interrupt("twice", 6, expect=130)
    assert not (workplace.path() / "checkpoints" / "checkpoint-6").exists()
    workplace.run("--resume")  # from checkpoint 4
    assert_same_run(workplace, uninterrupted)


def test_kill_in_the_middle_of_a_save(workplace: object, uninterrupted: object) -> None:
    workplace.interrupt("kill-save", 8, expect=-9)
    torn = workplace.path() / "checkpoints" / "checkpoint-8"
    assert torn.exists()
    assert not (torn / "COMPLETE").exists()
    _, err = workplace.run("--resume")
    assert "checkpoint-8 was not written to its end" in err
    assert_same_run(workplace, uninterrupted)


def test_a_full_disk_says_so_and_resumes(workplace: object, uninterrupted: object) -> None:
    said = workplace.interrupt("full-save", 8, expect=1)
    assert "the disk is full; free some space" in said
    assert f"fastlora run {workplace.recipe} --resume" in said
    assert "Traceback" not in said
    assert "file write failed" in (workplace.path() / "report.html").read_text()
    workplace.run("--resume")
    assert_same_run(workplace, uninterrupted)


def test_resume_refuses_another_recipe_or_other_data(workplace: object) -> None:
    workplace.interrupt("SIGINT", 2, expect=130)
    _, err = workplace.run("--resume", "--set", "train.lr=1e-3", "--set", "lora.rank=8", expect=1)
    assert "no unfinished run of this recipe" in err
    assert (
        f"{workplace.path()}:\n  lora.rank: was 4, now 8\n  train.lr: was 0.002, now 0.001" in err
    )
    with (workplace.folder / "rows.jsonl").open("a") as file:
        file.write(
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        )
    _, err = workplace.run("--resume", expect=1)
    assert "the data have changed" in err


def test_nothing_to_resume(uninterrupted: object) -> None:
    _, err = uninterrupted.run("--resume", expect=1)
    assert "no unfinished run" in err
