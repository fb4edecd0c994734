"""Before and after training, and what `fastlora chat` and `fastlora generate` make of the run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from fastlora.cli import chat as chat_command
from fastlora.cli.main import cli
from fastlora.cli.run import _print_result
from fastlora.errors import DataError
from fastlora.export.answers import _batches, answer, read_rows
from fastlora.export.chat import Conversation
from fastlora.export.load import Tuned, load_run
from fastlora.export.process import refuse_unfinished
from fastlora.recipe.load import load_recipe
from fastlora.rundir.store import RunDir
from fastlora.train import answers as train_answers
from fastlora.train.session import Request, train_run

ASKED = "Cipher: uvehwu"
SETTINGS = (
    "train.steps=20", "train.lr=0.01", "eval.rows=3", "eval.max_new_tokens=12", "train.eval_every_steps=20",
    'eval.metrics=["exact_match", "json_valid", "chrf"]',
)  # fmt: skip
# Closes turns as the tokenizer's template does, and says so of questions in words of its own.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'user' %}Say {% endif %}"
    "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


pytestmark = pytest.mark.xdist_group("answers")  # one worker makes the run


def trained(workplace: Any, *settings: str) -> dict[str, Any]:
    request = Request(load_recipe(workplace.recipe, settings), str(workplace.recipe), settings)
    return train_run(request, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def run(make_workplace: Callable[[], Any]) -> Path:
    """Trained with a template of its own; eval.prompts: a row with its answer and one without."""
    workplace = make_workplace()
    (workplace.folder / "own.jinja").write_text(TEMPLATE)
    held = json.loads((workplace.folder / "rows.jsonl").read_text().splitlines()[0])
    prompts = workplace.folder / "prompts.jsonl"
    prompts.write_text(json.dumps(held) + "\n\n" + json.dumps({"prompt": "Reverse: house"}) + "\n")
    trained(
        workplace,
        *SETTINGS,
        f"eval.prompts={prompts}",
        f"data.template={workplace.folder}/own.jinja",
    )
    (workplace.folder / "own.jinja").unlink()
    path: Path = workplace.path()
    return path


@pytest.fixture(scope="module")
def tuned(run: Path) -> Tuned:
    return load_run(RunDir.look(run))


@pytest.fixture
def loaded_once(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands take the model that is loaded already."""
    monkeypatch.setattr("fastlora.export.load.load_run", lambda _: tuned)


def compared(run: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads((run / "comparison.json").read_text())
    return rows


def test_a_run_compares_before_and_after(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, manifest = compared(run), json.loads((run / "manifest.json").read_text())
    assert [set(row) for row in rows[:4]] == 4 * [{"prompt", "expected", "before", "after"}]
    assert rows[3]["prompt"] == f"<|bos|><|user|>Say {ASKED}<|end|><|assistant|>"
    assert rows[3]["expected"] == "xyhkzx"
    assert set(rows[4]) == {"prompt", "before", "after"}
    told = manifest["answers"]
    assert (told["rows"], told["expected"]) == (5, 4)
    for when in ("before", "after"):
        right = sum(row[when] == row["expected"] for row in rows[:4])
        assert told[when]["exact_match"] == right / 4
        assert told[when]["json_valid"] == 0
    assert told["after"]["chrf"] != told["before"]["chrf"] > 0
    _print_result(manifest)
    said = capsys.readouterr().out
    assert f"exact     {told['before']['exact_match']:.1%} -> " in said
    assert f"{run}/comparison.json (5 prompts, before and after)" in said
    assert f"    after     {rows[0]['after']}\n" in said


def test_held_out_rows_without_asking(workplace: Any) -> None:
    """Eight by default, spread over all of them, and no scores."""
    workplace.recipe.write_text(workplace.recipe.read_text().replace("rows = 0\n", ""))
    manifest = trained(workplace, "train.steps=1", "eval.max_new_tokens=1")
    assert manifest["answers"] == {"rows": 8, "expected": 8, "before": {}, "after": {}}
    rows, settings = read_rows(workplace.path() / "answers.json")
    assert len({tuple(row.question.prompt_ids) for row in rows}) == 8
    assert settings["max_new_tokens"] == 1


def test_a_limited_time(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest prompts are answered, at least a batch of them; after training no others are asked."""
    original = train_answers.answered
    monkeypatch.setattr(
        train_answers, "answered", lambda *rest, **named: original(*rest, **named, batch_rows=2)
    )
    manifest = trained(
        workplace, "train.steps=1", "eval.rows=5", "eval.max_new_tokens=1", "eval.max_minutes=1e-9"
    )
    assert manifest["answers"]["rows"] == 2
    assert len(compared(workplace.path())) == 2
    assert "2 of 5 prompts were answered in 1e-09 minutes" in "\n".join(manifest["notes"])
    rows, _ = read_rows(workplace.path() / "answers.json")
    lengths = [len(row.question.prompt_ids) for row in rows]
    asked = [len(row.question.prompt_ids) for row in rows if row.answer_ids is not None]
    assert sorted(asked) == sorted(lengths)[:2]


def test_a_run_stopped_in_its_answers_is_unfinished(run: Path) -> None:
    stopped = RunDir.look(run)
    refuse_unfinished(stopped)
    del stopped.manifest["answers"]["after"]
    with pytest.raises(Exception, match="has not finished"):
        refuse_unfinished(stopped)


def test_batches_do_not_change_greedy_answers(run: Path, tuned: Tuned) -> None:
    rows, settings = read_rows(run / "answers.json")
    del settings["compute_dtype"]
    asked = [row.question for row in rows]
    with tuned.speaking("tuned") as model:
        for batch_rows in (1, 3):
            assert answer(model, asked, batch_rows=batch_rows, **settings) == [
                row.answer_ids for row in rows
            ]


def generate(run: Path, *arguments: object) -> Result:
    return CliRunner().invoke(cli, ["generate", str(run), *map(str, arguments)])


@pytest.mark.usefixtures("loaded_once")
def test_generate_repeats_what_the_run_recorded(run: Path, tmp_path: Path) -> None:
    prompts, out = run.parents[1] / "prompts.jsonl", tmp_path / "answers.jsonl"
    options = ("--prompts", prompts, "--max-new-tokens", 12, "--batch-size", 1)
    done = generate(run, *options, "--base", "--tuned", "--out", out)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.pop("row") for row in rows] == [1, 3]
    recorded = [
        {{"before": "base", "after": "tuned"}.get(key, key): text for key, text in row.items()}
        for row in compared(run)[3:]
    ]
    assert rows == recorded
    alone = generate(run.parent, *options)
    tuned_alone = [{key: text for key, text in row.items() if key != "base"} for row in recorded]
    assert [json.loads(line) for line in alone.stdout.splitlines()] == [
        {"row": number} | row for number, row in zip((1, 3), tuned_alone, strict=True)
    ]


@pytest.mark.usefixtures("loaded_once")
def test_generate_overwrites_nothing_and_names_rows(run: Path, tmp_path: Path) -> None:
    taken, prompts = tmp_path / "taken.jsonl", tmp_path / "prompts.jsonl"
    taken.write_text("mine")
    prompts.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    done = generate(run, "--prompts", prompts, "--out", taken)
    assert (done.exit_code, taken.read_text()) == (2, "mine")
    assert f"{taken} exists; give another name" in done.output
    done = generate(run, "--prompts", prompts, "--out", tmp_path / "no" / "x.jsonl")
    assert done.exit_code == 2
    assert "is not a folder" in done.output
    done = generate(run, "--prompts", prompts, "--out", tmp_path / "new.jsonl")
    assert done.exit_code == 1
    assert f"{prompts}: line 2: has none of messages" in done.output
    prompts.write_text(json.dumps({"prompt": "a" * 300}))
    done = generate(run, "--prompts", prompts)
    assert "line 1: is 308 tokens long; at most 255 fit" in done.output
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.usefixtures("loaded_once")
def test_sampling_repeats_with_its_seed(run: Path) -> None:
    prompts = run.parents[1] / "prompts.jsonl"
    options = ("--prompts", prompts, "--temperature", 2.0, "--max-new-tokens", 12)
    first, again, other = (generate(run, *options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def chat(run: Path, *lines: str, options: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(
        cli, ["chat", str(run), *options], input="".join(line + "\n" for line in lines)
    )


@pytest.mark.usefixtures("loaded_once")
def test_chat_through_a_pipe(run: Path) -> None:
    recorded = compared(run)[3]
    assert recorded["before"] != recorded["after"]
    limit = ("--max-new-tokens", "12")
    done = chat(run, ASKED, "/reset", "/base", "", ASKED, "/reset", "/both", ASKED, options=limit)
    assert done.exit_code == 0, done.output
    after, before = recorded["after"], recorded["before"]
    assert done.stdout.splitlines() == [after, before, before, after]
    # The second turn is asked with the first one before it.
    first, second = chat(run, ASKED, "Cipher: ney", options=limit).stdout.splitlines()
    assert first == after
    assert second != chat(run, "Cipher: ney", options=limit).stdout.strip()


@pytest.mark.usefixtures("loaded_once")
def test_chat_ends_a_pipe_at_what_it_does_not_know(run: Path) -> None:
    done = chat(run, "/bsae", ASKED)
    assert done.exit_code == 2
    assert "/bsae: no such command" in done.output
    assert done.stdout == ""
    assert chat(run, ASKED, options=("--top-p", "0.5")).exit_code == 2


def written(said: list[str]) -> Callable[[str], Callable[[str], None]]:
    return lambda _: said.append


def test_a_conversation_is_laid_out_as_in_training(tuned: Tuned) -> None:
    talk, said = Conversation(tuned, max_new_tokens=4), []
    talk.reset("Be brief")
    talk.ask(ASKED, ["tuned"], written(said))
    answer_text = "".join(said)
    assert answer_text
    ids = talk._ids([*talk.messages, {"role": "user", "content": "Two"}])
    assert tuned.tokenizer.decode(ids) == (
        f"<|bos|><|system|>Be brief<|end|><|user|>Say {ASKED}<|end|><|assistant|>"
        f"{answer_text}<|end|><|user|>Say Two<|end|><|assistant|>"
    )
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief"}]
    talk.reset("")
    assert talk.messages == []
    with pytest.raises(DataError, match=r"has 304 tokens and the model takes 256; /reset"):
        talk.ask("a" * 296, ["tuned"], written(said))
    assert talk.messages == []


def test_ctrl_c_ends_the_answer_alone(tuned: Tuned) -> None:
    talk = Conversation(tuned, max_new_tokens=12)
    pieces: list[str] = []

    def write(who: str) -> Callable[[str], None]:
        def heard(text: str) -> None:
            pieces.append(text)
            raise KeyboardInterrupt

        return heard

    # A line break ends a piece, and the tokenizer's letters are tokens.
    original = tuned.model.generate

    def generated(*rest: Any, streamer: Any, **named: Any) -> Any:
        import torch

        streamer.put(torch.tensor([[1]]))
        for letter in "ab\n":
            streamer.put(torch.tensor([tuned.tokenizer.convert_tokens_to_ids(letter)]))
        pytest.fail("went on")

    object.__setattr__(tuned.model, "generate", generated)
    try:
        answer_text, whole = talk.ask("Hi", ["base", "tuned"], write)
    finally:
        object.__setattr__(tuned.model, "generate", original)
    assert (answer_text, whole, pieces) == ("ab\n", False, ["ab\n"])
    assert talk.messages[-1] == {"role": "assistant", "content": "ab\n"}


def test_ctrl_c_beside_an_answer_ends_a_talk_in_a_pipe_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stopped:
        def ask(self, *_: object) -> None:
            raise KeyboardInterrupt

    def talk(terminal: bool) -> None:
        lines = iter(["Hi", None])
        monkeypatch.setattr(chat_command, "_line", lambda *_: next(lines))
        chat_command._talk(Stopped(), terminal)  # type: ignore[arg-type]

    talk(terminal=True)
    with pytest.raises(KeyboardInterrupt):
        talk(terminal=False)


@pytest.mark.parametrize("command", [["chat"], ["generate", "--prompts", "x.jsonl"]])
def test_runs_that_cannot_be_asked(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(name: object) -> Iterator[object]:
        done = CliRunner().invoke(cli, [command[0], str(name), *command[1:]])
        return done.exit_code, done.output

    code, output = said("tinny")
    assert code == 2
    assert "tinny: no folder of a run; as a recipe: " in output
    assert "did you mean tiny?" in output
    code, output = said("tiny")
    assert code == 1
    assert "no finished run in" in output
    assert "fastlora run tiny" in output
    (tmp_path / "manifest.json").write_text(
        json.dumps({"status": "interrupted", "resume_command": "fastlora run x --resume"})
    )
    code, output = said(tmp_path)
    assert code == 1
    assert "has not finished; go on with:\n  fastlora run x --resume" in output


def test_batches_hold_prompts_of_like_length_that_fit_together() -> None:
    assert list(_batches([9, 2, 30, 3, 8], most_rows=2, most_tokens=20)) == [[1, 3], [4, 0], [2]]
    assert list(_batches([9, 2, 8], most_rows=9, most_tokens=17)) == [[1, 2], [0]]
    assert list(_batches([], most_rows=2, most_tokens=20)) == []


def test_a_run_on_texts_of_a_model_without_a_template(workplace: Any) -> None:
    """Nothing was laid out in training, and nothing is in a chat: each line is begun text."""
    import shutil

    model = workplace.folder / "model"
    shutil.copytree(workplace.root / "recipes/tiny/model", model)
    (model / "chat_template.jinja").unlink()
    (workplace.folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"{letter} and so on"}) + "\n" for letter in "abcdefgh" * 3)
    )
    settings = ("train.steps=1", f"model.name={model}", "eval.max_new_tokens=3", "eval.rows=0")
    manifest = trained(workplace, *settings, 'eval.prompts=["a and"]')
    assert manifest["answers"]["rows"] == 1
    talk, said = Conversation(load_run(RunDir.look(workplace.path())), max_new_tokens=3), []
    talk.ask("a and", ["tuned"], written(said))
    (row,) = compared(workplace.path())
    assert (row["prompt"], row["after"]) == ("a and", "".join(said))
    with pytest.raises(DataError, match="nothing lays out a system turn"):
        talk.reset("Be brief")
