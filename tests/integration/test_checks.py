"""What is refused before the weights are read, and what must not be."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.bench import loaded
from fastlora.bench.schema import Arm
from fastlora.engines import Engine
from fastlora.engines.base import load_tokenizer, target_problems
from fastlora.engines.liger import LigerEngine
from fastlora.engines.peft import PeftEngine
from fastlora.engines.unsloth import UnslothEngine
from fastlora.errors import EngineError
from fastlora.recipe.schema import Recipe
from fastlora.train.checks import check_model

WITHOUT_TRACKERS = """
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name in ("tensorboard", "wandb") else real(name, *rest)
)
"""
Checked = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model, its weight file without a tensor: nothing here may read one."""
    from safetensors.torch import save_file

    copied = Path(
        shutil.copytree(
            tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
        )
    )
    save_file({}, copied / "model.safetensors")
    return copied


def change(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def recipe_for(model: Path, **sections: dict[str, Any]) -> Recipe:
    whole = {
        "model": {"name": str(model)},
        "data": {"sources": ["x.jsonl"]},
        "output": {"dir": "runs"},
    }
    return Recipe.model_validate(whole | sections)


@pytest.fixture
def checked(model: Path) -> Checked:
    """check_model on that copy: (problems, notes)."""

    def check(engine: Engine | None = None, **sections: dict[str, Any]) -> Any:
        recipe = recipe_for(model, **sections)
        notes: list[str] = []
        try:
            check_model(recipe, load_tokenizer(recipe.model), engine, notes.append)
        except EngineError as error:
            return str(error).splitlines(), notes
        return [], notes

    return check


def test_all_problems_come_together_and_leave_no_run(workplace: Any) -> None:
    hide = workplace.folder / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(WITHOUT_TRACKERS)
    path = os.pathsep.join(filter(None, (str(hide), os.environ.get("PYTHONPATH"))))
    _, err = workplace.run(
        "--set", 'output.report_to=["tensorboard", "wandb"]',
        "--set", "train.checkpointing=unsloth",
        "--set", 'lora.target_modules=["q_proj", "v_prj"]',
        expect=1, new=True, PYTHONPATH=path,
    )  # fmt: skip
    for problem in (
        "output.report_to: tensorboard is not installed; pip install tensorboard",
        "output.report_to: wandb is not installed; pip install wandb",
        "train.checkpointing: the peft engine has no 'unsloth'; it has full, offload, none",
        "lora.target_modules: the model has no v_prj; did you mean v_proj?",
    ):
        assert problem in err
    assert not (workplace.folder / "runs").exists()
    assert "gemm_4bit_forward" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU does")
@pytest.mark.parametrize("how", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_kernels_that_there_are_not_are_refused_with_the_rest(
    workplace: Any, how: tuple[str, ...]
) -> None:
    """Where they would be used, and where they would not."""
    arguments = (*how, "--set", "train.checkpointing=unsloth")
    for name, mode, problem in (
        ("bogus", "auto", "not a backend; set it to one of triton, interpret, reference"),
        ("triton", "off", "Triton needs a GPU, and this runs on cpu; set it to reference"),
        ("interpret", "all", "set TRITON_INTERPRET=1 too, before Triton is imported"),
    ):
        _, err = workplace.run(
            *arguments, "--set", f"kernels.mode={mode}", expect=1,
            FASTLORA_KERNELS=name, TRITON_INTERPRET="0",
        )  # fmt: skip
        assert f"FASTLORA_KERNELS={name}: {problem}" in " ".join(err.split())
        assert "the peft engine has no 'unsloth'" in err
        assert "Traceback" not in err
    assert not (workplace.folder / "runs").exists()


def test_layers_are_looked_at_and_classes_are_left_to_who_loads_the_model() -> None:
    """unsloth puts some of its own into modules, which the packages would not give any more. One that is no package of
    transformers' keeps what it imported itself."""
    import transformers

    package = transformers.models.llama
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    config = transformers.LlamaConfig(**small, num_attention_heads=2)
    for name in ("LlamaForCausalLM", "LlamaModel"):
        assert getattr(package, name)  # which keeps it
    assert target_problems(["q_proj"], config, PeftEngine(), print) == []
    assert not {"LlamaForCausalLM", "LlamaModel"} & vars(package).keys()
    assert package.LlamaForCausalLM is transformers.LlamaForCausalLM

    mine = types.ModuleType("mine")
    written = type("Mine", (transformers.LlamaForCausalLM,), {"__module__": "mine.modeling"})
    mine.Mine = written  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mine", mine)
        patch.setattr(
            transformers.AutoModelForCausalLM, "from_config", lambda config: written(config)
        )
        assert target_problems(["q_proj"], config, PeftEngine(), print) == []
    assert vars(mine)["Mine"] is written


def test_a_configuration_that_cannot_be_read_does_not_hide_the_rest(
    checked: Checked, model: Path
) -> None:
    change(model, model_type="llama9")
    problems, _ = checked(PeftEngine(), train={"checkpointing": "unsloth"})
    assert [line.partition(":")[0] for line in problems] == ["train.checkpointing", "model.name"]


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_on_head_and_embedding(checked: Checked, model: Path, tied: bool) -> None:
    change(model, tie_word_embeddings=tied)
    lora = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    for engine in (None, PeftEngine()):
        problems, notes = checked(engine, lora=lora, output={"dir": "runs", "merge": "16bit"})
        assert problems == []
        assert [note.count("(tie_word_embeddings)") for note in notes] == [1, 1] * tied
    problems, notes = checked(UnslothEngine(), lora=lora)
    for problem, target in zip(problems, ("embed_tokens", "lm_head"), strict=True):
        assert f"unsloth trains {target} whole" in problem
        assert 'set engine = "peft"' in problem
    assert notes == []
    problems, _ = checked(LigerEngine(), lora=lora)
    assert ["liger takes its loss from lm_head's weight" in line for line in problems] == [True]


def test_the_benchmark_refuses_an_arm_that_would_not_train_what_is_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(model, tie_word_embeddings=False)
    asked = recipe_for(model, lora={"target_modules": ["lm_head"]})
    monkeypatch.setattr(loaded, "choose_engine", lambda *_: types.SimpleNamespace(
        name="unsloth", prepare=lambda: None, load=lambda *_: pytest.fail("it was loaded")
    ))  # fmt: skip
    task = types.SimpleNamespace(arm=Arm.parse("unsloth"))
    with pytest.raises(EngineError, match="unsloth trains lm_head whole"):
        loaded.Loaded(task, asked)


def add_tokens(folder: Path, *tokens: str, **named: str) -> None:
    """Fill the embedding of 128, then go on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(len(tokenizer), 128)])
    tokenizer.add_tokens([*tokens, *named.values()], special_tokens=True)
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    saved["extra_special_tokens"] = named
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))


def test_tokens_past_the_end_of_the_embedding(checked: Checked, model: Path) -> None:
    add_tokens(model)
    assert checked() == ([], [])
    add_tokens(model, "<tool>")
    (problem,), _ = checked()
    assert "past the end of the model's embedding (128): <tool>; 1 in all" in problem
    assert "resize_token_embeddings" in problem


def test_named_tokens_past_the_end_count_where_the_template_writes_them(
    checked: Checked, model: Path
) -> None:
    """Gemma 3 1B has its siblings' token for images, and trains."""
    add_tokens(model, image_token="<image_soft_token>")
    problems, (note,) = checked()
    assert problems == []
    assert "no embedding for <image_soft_token>; rows must not hold them" in note
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# <image_soft_token> #}")
    assert "embedding (128): <image_soft_token>; 1 in all" in checked()[0][0]


def test_a_damaged_weight_file_is_said_to_be(workplace: Any, tmp_path: Path) -> None:
    tiny = workplace.root / "recipes/tiny/model"
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    _, err = workplace.run("--set", f"model.name={tmp_path}/cut", expect=1)
    assert "cut is damaged or incomplete" in err
    assert "copy the folder again" in err
    assert "Traceback" not in err


def test_a_weight_file_that_lacks_weights_is_refused(workplace: Any, tmp_path: Path) -> None:
    """transformers would draw them at random, and the run would train on noise."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    shutil.copytree(workplace.root / "recipes/tiny/model", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, err = workplace.run("--set", f"model.name={folder}", expect=1)
    assert "lacks 1 weights, such as model.layers.0.mlp.up_proj.weight" in " ".join(err.split())


def test_exports_that_cannot_be_made_are_refused_before_training(model: Path) -> None:
    recipe = recipe_for(model, output={"dir": "runs", "export": ["q8_0"]})
    tokenizer, said = load_tokenizer(recipe.model), list[str]()

    def check() -> None:
        check_model(recipe, tokenizer, None, said.append)

    check()
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change(model, quantization_config=nf4)
    check()
    assert "is quantized on disk; it is dequantized" in said[-1]
    change(model, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(EngineError, match=r"output\.export: .*name its 16-bit original"):
        check()
    change(model, quantization_config=None, model_type="gpt_neox")
    with pytest.raises(EngineError, match=r"output\.export: GGUF is written for llama, mistral"):
        check()


def test_weights_copied_in_part_are_found_without_loading_them(
    checked: Checked, model: Path
) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (problem,), _ = checked()
    assert "is damaged or incomplete" in problem
    weights.unlink()
    (problem,), _ = checked()
    assert "has no model.safetensors" in problem
    (model / "pytorch_model.bin").write_bytes(
        b""
    )  # loadable, for all that is known, and not exportable
    assert checked(output={"dir": "runs", "merge": "none"})[0] == []
    assert len(checked(output={"dir": "runs", "merge": "16bit"})[0]) == 1


def test_a_gate_on_the_data_refuses_a_run_before_its_model_is_loaded(workplace: Any) -> None:
    rows = (workplace.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (workplace.folder / "rows.jsonl").write_text("".join([*rows, rows[0]]))
    _, err = workplace.run("--set", 'check.require_no=["duplicate", "leakage"]', expect=3)
    assert "check: 81 rows: 1 with errors" in err
    assert "the data do not meet the recipe's [check]:" in err
    assert "kernels:" not in err
    assert not (workplace.folder / "runs").exists()
