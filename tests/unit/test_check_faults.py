"""Every fault that was put into generated rows is found in its row, and nothing in the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
from transformers import AutoTokenizer

from fastlora.check.check import Report, check_data
from fastlora.recipe.findings import KINDS
from fastlora.recipe.schema import Recipe

Checked = Callable[..., Report]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def recipe_for(*sources: Path, **sections: dict[str, Any]) -> Recipe:
    train, *held_out = map(str, sources)
    data = {"sources": [train], "eval_sources": held_out} | sections.pop("data", {})
    whole = {"model": {"name": "tiny"}, "data": data, "output": {"dir": "runs"}}
    return Recipe.model_validate(whole | sections)


def found(report: Report) -> set[tuple[str, int]]:
    rows = report.rows
    return {
        (finding.code, rows.all[place].number)
        for finding in report.findings
        for place in finding.rows
    }


def check(rows: planted.Planted, folder: Path, tokenizer: Any) -> Report:
    recipe = recipe_for(
        *rows.write(folder),
        check=planted.LIMITS,
        model={"name": "tiny", "seq_len_tokens": planted.SEQ_LEN_TOKENS},
    )
    return check_data(recipe, tokenizer)


def test_every_planted_fault_is_found_and_no_other(tmp_path: Path, tokenizer: Any) -> None:
    rows = planted.with_faults(500, each=2)
    report = check(rows, tmp_path, tokenizer)
    # Faults that are not ASCII: the tiny model's tokenizer knows nothing else.
    assert {one for one in found(report) if one[0] != "token_lost"} == rows.expected
    # All kinds that a row of these files can have; the rest are tested below.
    assert {finding.code for finding in report.findings} == set(KINDS) - {
        "mix_refused", "template_unusable", "template_refused", "template_bos", "template_stop", "tokenizer_missing",
    }  # fmt: skip
    severities = [finding.kind.severity for finding in report.findings]
    assert severities == sorted(severities)  # "error" comes first
    assert all(finding.example for finding in report.findings)


def test_nothing_is_found_in_clean_rows(tmp_path: Path, tokenizer: Any) -> None:
    report = check(planted.clean(300, seed=5), tmp_path, tokenizer)
    assert found(report) == set()
    assert report.passed
    assert set(report.answers.languages or {}) == {"en"}


def test_characters_that_the_tokenizer_drops(tmp_path: Path, tokenizer: Any) -> None:
    class Lossy:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: Any, **settings: Any) -> Any:
            kept = [one.replace("z", "") for one in ([text] if isinstance(text, str) else text)]
            return tokenizer(kept[0] if isinstance(text, str) else kept, **settings)

    rows = planted.Planted(
        train=[planted.chat("Say it.", "It is a zebra."), *planted.clean(40, seed=1).train]
    )
    path = rows.write(tmp_path)[0]
    assert "token_lost" not in {code for code, _ in found(check_data(recipe_for(path), tokenizer))}
    lossy: Any = Lossy()
    (one,) = [f for f in check_data(recipe_for(path), lossy).findings if f.code == "token_lost"]
    assert one.rows == {0: "'z'"}


def test_a_secret_is_named_and_not_repeated(tmp_path: Path, tokenizer: Any) -> None:
    key = "gh" + "p_" + "q7" * 18
    answer = f"It is {key}, and ann@posteo.de has it."
    rows = planted.Planted(train=[planted.chat("Say it.", answer)])
    # Cut as well: the row is the example of several findings.
    recipe = recipe_for(rows.write(tmp_path)[0], model={"name": "tiny", "seq_len_tokens": 64})
    report = check_data(recipe, tokenizer)
    assert {"secret", "email", "truncated_answer"} <= {one.code for one in report.findings}
    assert "ann@" not in json.dumps(report.document(examples=False))
    document = json.dumps(report.document())
    assert "GitHub Token: ghp_" in document
    assert key[:12] not in document


@pytest.fixture
def check_template(tmp_path: Path, tokenizer: Any) -> Checked:
    """Chats of the given roles, laid out by a template."""

    def check(template: str, *roles: str) -> Report:
        (tmp_path / "t.jinja").write_text(template)
        turns = [{"role": role, "content": f"It is {role}."} for role in roles]
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        data = {"template": str(tmp_path / "t.jinja")}
        return check_data(recipe_for(tmp_path / "rows.jsonl", data=data), tokenizer)

    return check


_TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
_ASK = "{% if add_generation_prompt %}assistant: {% endif %}"


def test_two_bos_tokens(check_template: Checked) -> None:
    assert found(check_template("<|bos|>" + _TURNS + _ASK, "user", "assistant")) == set()
    twice = check_template("<|bos|><|bos|>" + _TURNS + _ASK, "user", "assistant")
    assert found(twice) == {("template_bos", 1)}


def test_an_answer_that_nothing_ends(check_template: Checked) -> None:
    report = check_template(_TURNS + _ASK, "user", "assistant", "user")
    assert found(report) == {("template_stop", 1), ("role_order", 1)}


def test_a_row_that_the_template_refuses(check_template: Checked) -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    )
    report = check_template(strict + _TURNS + _ASK, "system", "user", "assistant")
    assert found(report) == {("template_refused", 1)}
    assert "no system prompt" in report.findings[0].rows[0]


def test_a_broken_template_is_one_finding(check_template: Checked) -> None:
    report = check_template("{% for %}", "user", "assistant")
    assert [finding.code for finding in report.findings] == ["template_unusable"]
    assert "t.jinja: line 1" in report.findings[0].general


def test_markup_is_no_fault_where_no_template_lays_rows_out(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["<|user|>Say it.<|end|>", "### Instruction:\nSay it.", "<|im_start|>Say it."]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    report = check_data(recipe_for(tmp_path / "rows.jsonl"), tokenizer)
    assert found(report) == {("template_token", 3)}


def test_limits_in_tokens_and_priced_truncation(tmp_path: Path, tokenizer: Any) -> None:
    # <bos> <user> q <end> <assistant> and the answer, which ends with a token too.
    lengths = (3, 10, 20, 40)
    rows = planted.Planted(train=[planted.chat("q", "x" * length) for length in lengths])
    recipe = recipe_for(
        rows.write(tmp_path)[0],
        model={"name": "tiny", "seq_len_tokens": 16},
        check={"min_answer_tokens": 5, "max_answer_tokens": 30},
    )
    report = check_data(recipe, tokenizer)
    assert found(report) >= {("answer_short", 1), ("answer_long", 4)}
    assert {place for code, place in found(report) if code == "truncated_answer"} == {3, 4}
    tokens = report.tokens
    assert tokens is not None
    totals = [5 + length + 1 for length in lengths]
    for priced, limit in zip(tokens.lengths, (16, 24, 32, 64), strict=True):
        lost = [max(0, total - limit) for total in totals]
        assert priced.seq_len_tokens == limit
        assert priced.tokens_lost == priced.answer_tokens_lost == sum(lost)
        assert priced.rows_cut == sum(one > 0 for one in lost)
        assert priced.peak_gib is None  # no config.json
    assert tokens.tokens == sum(totals)


def test_longer_rows_have_their_price_in_memory(tmp_path: Path, tokenizer: Any) -> None:
    shape = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 8, "num_attention_heads": 32,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    rows = planted.Planted(train=[planted.chat("q", "x" * 40)])
    recipe = recipe_for(
        rows.write(tmp_path)[0],
        model={"name": str(tmp_path), "seq_len_tokens": 16},
        train={"micro_batch": 512},
    )
    tokens = check_data(recipe, tokenizer).tokens
    assert tokens is not None
    prices = [one.peak_gib for one in tokens.lengths]  # 16, 24, 32, 64, and the longest row has 46
    assert None not in prices
    assert prices == sorted(set(prices))
    assert 1 < prices[0] < prices[-1] < 10


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_bytes_that_are_no_utf8_cost_their_row_alone(
    suffix: str, tmp_path: Path, tokenizer: Any
) -> None:
    rows = [("Why?", "Because."), ("Who?", "The ba\xffker."), ("When?", "At noon.")]
    if suffix == ".csv":
        content = "prompt,completion\n" + "".join(f"{one},{other}\n" for one, other in rows)
        number = 3
    else:
        content = json.dumps([{"prompt": a, "completion": b} for a, b in rows], ensure_ascii=False)
        number = 2
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content.encode("latin-1"))
    assert found(check_data(recipe_for(path), tokenizer)) == {("unreadable_bytes", number)}


def test_instructions_that_all_rows_share_make_no_duplicates(
    tmp_path: Path, tokenizer: Any
) -> None:
    words = planted._Words(3)
    instruction = " ".join(words.sentence() for _ in range(12))
    rows = planted.Planted(
        train=[
            planted.chat(f"{instruction}\n\n{words.sentence()}", words.answer()) for _ in range(60)
        ]
    )
    assert found(check_data(recipe_for(rows.write(tmp_path)[0]), tokenizer)) == set()


def test_a_split_by_share_is_searched_for_leaks(tmp_path: Path, tokenizer: Any) -> None:
    words = planted._Words(4)
    one = [planted.chat(words.question(), words.answer()) for _ in range(40)]
    path = planted.Planted(train=one * 2).write(tmp_path)[0]
    report = check_data(recipe_for(path, data={"eval_sources": [], "eval_split": 0.5}), tokenizer)
    held_out = {report.rows.all[place].number for place in report.rows.held_out}
    assert len(held_out) == 40
    twin = {number: (number + 39) % 80 + 1 for number in range(1, 81)}
    leaked = {
        number for number in range(1, 81) if number not in held_out and twin[number] in held_out
    }
    assert {number for code, number in found(report) if code == "leakage_pair"} == leaked != set()


def test_without_a_tokenizer_the_words_are_checked_all_the_same(tmp_path: Path) -> None:
    rows = planted.with_faults(150, each=1)
    recipe = recipe_for(
        *rows.write(tmp_path), check=planted.LIMITS | {"require_no": ["truncated", "role_unknown"]}
    )
    report = check_data(recipe, None, no_tokenizer="model.name: gone")
    needs = {code for code, kind in KINDS.items() if kind.needs_tokenizer}
    expected = {
        one
        for one in rows.expected
        if one[0] not in needs and b"<|bos|>" not in rows.train[one[1] - 1]
    }
    drift = {one for one in expected ^ found(report) if one[0].startswith("drift")}
    assert (
        found(report) - drift == expected - drift
    )  # with so few rows, more kinds of form are no drift
    assert report.findings[-1].general == "model.name: gone"
    assert {gate.key: gate.met for gate in report.gates} == {
        'check.require_no = ["truncated"]': False,
        'check.require_no = ["role_unknown"]': False,
    }
    assert "not measured" in report.gates[0].says


def test_of_many_that_are_nearly_alike_the_first_stays(tmp_path: Path, tokenizer: Any) -> None:
    words = planted._Words(2)
    question, answer = words.question(), words.answer()
    again = [planted.chat(question, f"{answer} {number}") for number in range(60)]
    others = [planted.chat(words.question(), words.answer()) for _ in range(60)]
    rows = planted.Planted(train=[*others, *again])
    report = check_data(recipe_for(rows.write(tmp_path)[0]), tokenizer)
    assert found(report) == {("near_pair", number) for number in range(62, 121)}
