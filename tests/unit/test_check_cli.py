"""`fastlora check` as typed: report, document, exit codes, gates and clean files."""

from __future__ import annotations

import json
from pathlib import Path

import planted
import pytest
from click.testing import CliRunner, Result

from fastlora.check import check
from fastlora.check.brief import check_before_run
from fastlora.cli.main import cli
from fastlora.engines.base import load_tokenizer
from fastlora.errors import GateError
from fastlora.recipe.load import load_recipe


class Place:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def write(self, lines: list[bytes], data: str = "", check: str = "") -> Path:
        planted.Planted(train=lines).write(self.folder)
        recipe = self.folder / "mine.toml"
        recipe.write_text(
            f'[model]\nname = "{self.model}"\n[data]\nsources = ["train.jsonl"]\n{data}\n'
            f'[check]\n{check}\n[output]\ndir = "runs"\n'
        )
        return recipe

    def check(self, *arguments: str) -> Result:
        done = CliRunner().invoke(cli, ["check", str(self.folder / "mine.toml"), *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Place:
    return Place(tmp_path, tiny_model)


GOOD = planted.chat("Who is it?", "It is the baker.")
OTHER = planted.chat("Where is it?", "It is at the old station.")
BLANK = planted.chat("Who is it?", " ")
MAIL = planted.chat("Where to?", "Write to ann@posteo.de soon.")


def test_the_report_and_the_document(place: Place) -> None:
    place.write([GOOD, BLANK, GOOD, MAIL, b"{"])
    done = place.check()
    assert done.exit_code == 0
    report = done.stdout
    assert "5 rows, 3 with errors" in report
    assert report.index("duplicate_pair") < report.index("email")
    assert "        train.jsonl: line 3: as train.jsonl: line 1\n" in report
    assert "e.g. Who is it? -> It is the baker." in report
    assert " --write-clean clean.jsonl\n" in report
    assert "a run would refuse these data: 2 rows that cannot be trained on" in report
    document = json.loads(place.check("--json").stdout)
    assert document["rows"] == {
        "all": 5,
        "train": 3,
        "eval": 0,
        "with_errors": 3,
        "looked_at_closely": 3,
    }
    lines = {one["kind"]: [row["line"] for row in one["rows"]] for one in document["findings"]}
    assert lines == {"unreadable_row": [5], "empty_turn": [2], "duplicate_pair": [3], "email": [4]}
    assert document["passed"] is True


@pytest.mark.parametrize(
    ("check", "missed"),
    [
        ('require_no = ["leakage", "duplicate"]', ['check.require_no = ["duplicate"]']),
        ("max_share = { duplicate_pair = 0.5, email = 0.1 }", ["check.max_share.email = 0.1"]),
        ("max_share = { duplicate = 0.25 }", []),
        ("max_lost_answer_tokens_share = 0", []),
    ],
)
def test_gates_exit_with_3(check: str, missed: list[str], place: Place) -> None:
    place.write([GOOD, OTHER, GOOD, MAIL], check=check)
    done = place.check("--json")
    assert done.exit_code == (3 if missed else 0)
    gates = json.loads(done.stdout)["gates"]
    assert [gate["key"] for gate in gates if not gate["met"]] == missed
    assert all(gate["says"] for gate in gates)


def test_a_gate_on_lost_answer_tokens(place: Place) -> None:
    place.write([planted.chat("q", "x" * 40)], check="max_lost_answer_tokens_share = 0.5")
    # 5 tokens come before the answer's 41.
    assert place.check("--set", "model.seq_len_tokens=26").exit_code == 0
    done = place.check("--set", "model.seq_len_tokens=25")
    assert done.exit_code == 3
    assert "gate not met: check.max_lost_answer_tokens_share = 0.5: 51.22%" in done.stdout
    assert "seq_len_tokens  rows cut" in done.stdout


def test_a_run_is_told_which_length_saves_the_answers(place: Place) -> None:
    path = place.write([planted.chat("q", "x" * 40)])
    said: list[str] = []
    for limit in (25, 8):
        recipe = load_recipe(path, [f"model.seq_len_tokens={limit}"])
        check_before_run(recipe, load_tokenizer(recipe.model), said.append)
    cut = [line for line in said if " tokens lost " in line]
    assert cut[0].endswith(
        "21 answer tokens lost (51.2%); model.seq_len_tokens = 50 saves 100% of them"
    )
    assert len(cut) == 2
    assert "saves" not in cut[1]  # four times as many are still too few


def test_a_mistaken_gate_is_a_mistake_of_the_recipe(place: Place) -> None:
    place.write(
        [GOOD], check='require_no = ["leakege"]\nmin_answer_chars = 9\nmax_answer_chars = 3'
    )
    done = place.check()
    assert done.exit_code == 2
    assert (
        "mine.toml: check.require_no: no finding is named 'leakege'; did you mean leakage"
        in done.output
    )
    assert "mine.toml: check.min_answer_chars: 9 is above max_answer_chars (3)" in done.output


def test_a_model_that_is_not_there(place: Place) -> None:
    place.write([GOOD, GOOD])
    done = place.check("--set", "model.name=./no-model")
    assert done.exit_code == 0
    assert "tokenizer_missing" in done.stdout
    assert "no-model cannot be loaded" in done.stdout
    assert "duplicate_pair" in done.stdout


def test_what_a_run_would_refuse_to_draw_is_a_finding(place: Place) -> None:
    place.write([GOOD, OTHER], data="eval_split = 200")
    report = place.check().stdout
    assert "mix_refused" in report
    assert "leaves none to train on" in report


def test_a_missing_source_is_an_error(place: Place) -> None:
    place.write([GOOD])
    (place.folder / "train.jsonl").unlink()
    done = place.check()
    assert done.exit_code == 1
    assert "train.jsonl" in done.output


def test_clean_files_go_round(place: Place) -> None:
    rows = planted.with_faults(200, each=1)
    place.write(rows.train, data='eval_sources = ["eval.jsonl"]', check="min_answer_chars = 20")
    rows.write(place.folder)
    before = json.loads(place.check("--json").stdout)
    offending = {
        row["line"]
        for one in before["findings"]
        for row in one["rows"]
        if one["severity"] == "error" and row["split"] == "train"
    }
    clean = place.folder / "clean.jsonl"
    document = json.loads(place.check("--json", "--write-clean", str(clean)).stdout)["clean"]
    kept = [line for number, line in enumerate(rows.train, 1) if number not in offending]
    assert [json.loads(line) for line in clean.read_bytes().splitlines()] == [
        json.loads(line) for line in kept
    ]
    removed = [
        json.loads(line) for line in (place.folder / "clean.removed.jsonl").read_text().splitlines()
    ]
    assert {entry["line"] for entry in removed} == offending
    assert all(entry["reasons"] for entry in removed)
    kinds = {reason.partition(":")[0] for entry in removed for reason in entry["reasons"]}
    assert "email" not in kinds
    assert "near_pair" in kinds
    settings = [part for one in document["settings"] for part in ("--set", one)]
    after = json.loads(place.check("--json", *settings).stdout)
    assert {one["severity"] for one in after["findings"]} <= {"warning"}
    assert after["rows"]["all"] == document["rows_kept"]
    assert (place.folder / "train.jsonl").read_bytes().splitlines() == rows.train


def test_the_next_command_keeps_what_was_set(place: Place) -> None:
    place.write([GOOD, BLANK])
    clean = str(place.folder / "clean.jsonl")
    given = ["--set", "data.eval_split=0", "--set", "model.seq_len_tokens=99"]
    done = place.check(*given, "--write-clean", clean)
    typed = done.stdout.splitlines()[-1]
    assert " --set model.seq_len_tokens=99 --set 'data.sources=[" in typed


def test_of_duplicates_the_first_stays_and_held_out_rows_go_apart(place: Place) -> None:
    words = planted._Words(1)
    once = [planted.chat(words.question(), words.answer()) for _ in range(20)]
    place.write([*once, *once], data="eval_split = 10")
    done = place.check("--write-clean", str(place.folder / "c.jsonl"))
    train, held_out = (
        (place.folder / name).read_bytes().splitlines() for name in ("c.jsonl", "c.eval.jsonl")
    )
    assert sorted(map(json.loads, [*train, *held_out]), key=str) == sorted(
        map(json.loads, once), key=str
    )
    assert "data.eval_sources=" in done.stdout


def test_sources_of_other_formats_keep_theirs(place: Place) -> None:
    place.write([GOOD, GOOD], data="")
    (place.folder / "more.csv").write_text("question,answer\nWhy is it so?,It is late.\nWhy?,\n")
    more = '{ path = "more.csv", columns = { instruction = "question", output = "answer" } }'
    recipe = place.folder / "mine.toml"
    recipe.write_text(recipe.read_text().replace('["train.jsonl"]', f'["train.jsonl", {more}]'))
    document = json.loads(
        place.check("--json", "--write-clean", str(place.folder / "c.jsonl")).stdout
    )
    files = [Path(file) for file in document["clean"]["files"]]
    assert [file.name for file in files] == ["c.1.train.jsonl", "c.2.more.jsonl"]
    assert json.loads(files[1].read_text()) == {
        "question": "Why is it so?",
        "answer": "It is late.",
    }
    settings = [part for one in document["clean"]["settings"] for part in ("--set", one)]
    after = json.loads(place.check("--json", *settings).stdout)
    assert [source["format"] for source in after["sources"]] == ["messages", "alpaca"]
    assert after["findings"] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.jsonl", "would be written over"),
        ("clean.csv", r"end the name in .jsonl"),
        ("gone/clean.jsonl", "no such folder"),
    ],
)
def test_a_clean_file_that_cannot_be_is_refused_first(
    name: str, message: str, place: Place
) -> None:
    place.write([GOOD])
    done = place.check("--write-clean", str(place.folder / name))
    assert done.exit_code == 2
    assert message in done.output
    assert (place.folder / "train.jsonl").read_bytes() == GOOD + b"\n"


def test_no_clean_file_without_a_row(place: Place) -> None:
    place.write([BLANK])
    done = place.check("--write-clean", str(place.folder / "clean.jsonl"))
    assert done.exit_code == 1
    assert "no row to train on would be left" in done.output
    assert not (place.folder / "clean.jsonl").exists()


def test_before_a_run_a_sample_is_looked_at_and_gates_look_at_all(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "SAMPLE_ROWS", 50)
    rows = planted.clean(100, seed=8).train
    rows[60] = rows[3]
    path = place.write(rows)
    said: list[str] = []
    recipe = load_recipe(path)
    found = check_before_run(recipe, load_tokenizer(recipe.model), said.append)
    assert said[0] == (
        "check: 100 rows for exact repeats and leaks, a sample of 50 for the rest: 1 with errors; "
        "`fastlora check` names them, --write-clean leaves them out"
    )
    assert "duplicate_pair: 1 row: " in said[1]
    assert "first train.jsonl: line 61" in said[1]
    assert found["findings"][0]["rows"][0]["line"] == 61
    assert "example" not in found["findings"][0]
    recipe = load_recipe(path, ['check.require_no=["leakage"]'])
    found = check_before_run(recipe, load_tokenizer(recipe.model), said.append)
    assert found["rows"]["looked_at_closely"] == 100
    recipe = load_recipe(path, ["check.max_share={ duplicate = 0 }"])
    with pytest.raises(GateError, match=r"check.max_share.duplicate = 0: 1 of 100 rows"):
        check_before_run(recipe, load_tokenizer(recipe.model), said.append)
