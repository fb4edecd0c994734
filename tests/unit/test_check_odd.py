"""Whatever a file holds, the check answers with findings or an error of our own, never a traceback.

CHECK_EXAMPLES=10000 pytest tests/unit/test_check_odd.py tries so many; the default is for every day.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer

from fastlora.check.brief import check_before_run
from fastlora.check.check import check_data
from fastlora.check.clean import plan_files, write_clean
from fastlora.check.show import show
from fastlora.data.format import FIELDS
from fastlora.errors import FastloraError, GateError
from fastlora.recipe.findings import KINDS
from fastlora.recipe.load import load_recipe

EXAMPLES = int(os.environ.get("CHECK_EXAMPLES", "60"))

# Surrogates, NULs, other families' markup and JSON in every place where words may stand.
WORDS = st.one_of(
    st.text(st.characters(codec=None), max_size=30),
    st.sampled_from(["", " ", "<|im_start|>", "<|bos|>", "[INST]", '{"a": 1}', '{"a": ', "a b c d e f g h i j k"]),
)  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "boss", None, 3])
TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": ROLES, "content": WORDS},
            optional={"weight": st.sampled_from([0, 1, 2]), "tool_calls": st.just([{"name": "f", "arguments": {}}])},
        ),
        st.fixed_dictionaries({"from": ROLES, "value": WORDS}),
        WORDS,
    ),
    max_size=4,
)  # fmt: skip
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
ROWS = st.one_of(
    st.fixed_dictionaries({"messages": TURNS}, optional={"tools": ANYTHING, "system": WORDS}),
    st.fixed_dictionaries({"conversations": TURNS}),
    st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}),
    st.fixed_dictionaries({"instruction": WORDS, "output": WORDS}, optional={"input": ANYTHING}),
    st.fixed_dictionaries({"text": WORDS}),
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4),
    ANYTHING,
)
LINES = st.lists(
    st.one_of(ROWS.map(lambda row: json.dumps(row).encode()), st.binary(max_size=30)), max_size=8
)
NAMES = st.sampled_from([*KINDS, "near", "leakage", "duplicates"])
CHECKS = st.fixed_dictionaries(
    {},
    optional={
        "min_answer_chars": st.integers(0, 20),
        "max_answer_chars": st.integers(1, 20),
        "min_answer_tokens": st.integers(1, 9),
        "near_similarity": st.sampled_from([0.7, 0.8, 1, 2]),
        "require_no": st.lists(NAMES, max_size=2),
        "max_share": st.dictionaries(NAMES, st.sampled_from([0, 0.5, 2]), max_size=2),
        "max_lost_answer_tokens_share": st.sampled_from([0, 0.1]),
    },
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "data.eval_split": st.sampled_from([1, 0.5, 3]),
        "data.template": st.sampled_from(["none", "tokenizer"]),
        "data.supervise": st.just("all"),
        "model.seq_len_tokens": st.sampled_from([8, 64]),
    },
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[*HealthCheck],
    derandomize=EXAMPLES < 1000,
)
@given(
    lines=LINES,
    held_out=st.none() | LINES,
    check=CHECKS,
    more=SETTINGS,
    has_tokenizer=st.booleans(),
)
def test_odd_rows_and_recipes_are_findings_or_errors(
    lines: list[bytes],
    held_out: list[bytes] | None,
    check: dict[str, Any],
    more: dict[str, Any],
    has_tokenizer: bool,
    tokenizer: Any,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
        source = 'sources = ["rows.jsonl"]\n'
        if held_out is not None:
            (folder / "held.jsonl").write_bytes(b"\n".join(held_out))
            source += 'eval_sources = ["held.jsonl"]\n'
        path = folder / "r.toml"
        path.write_text(f'[model]\nname = "x"\n[data]\n{source}[output]\ndir = "runs"\n')
        typed = [f"check.{key}={_toml(value)}" for key, value in check.items()]
        typed += [f"{key}={_toml(value)}" for key, value in more.items()]
        chosen = tokenizer if has_tokenizer else None
        clean = folder / "clean.jsonl"
        # Errors of our own end an example; what else is raised fails it.
        with contextlib.suppress(FastloraError):
            recipe = load_recipe(path, typed)
            report = check_data(recipe, chosen, no_tokenizer="gone")
            assert all(finding.rows or finding.general for finding in report.findings)
            bad = [row for row in report.rows.all if row.problem is not None]
            assert len(report.rows.good) + len(bad) == len(report.rows.all)
            json.dumps(report.document()).encode()
            shown = io.StringIO()
            show(report, Console(file=shown))
            shown.getvalue().encode()
            with contextlib.suppress(GateError):
                said: list[str] = []
                check_before_run(recipe, tokenizer, said.append)
                assert said
                "".join(said).encode()
            written = write_clean(report, clean, plan_files(clean, recipe), recipe)
            again = check_data(
                load_recipe(path, [*typed, *written["settings"]]), chosen, no_tokenizer="gone"
            )
            assert not again.refused


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)
