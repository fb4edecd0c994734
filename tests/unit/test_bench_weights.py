"""Random checkpoints: what transformers loads from them, in which format, cut down and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastlora.bench.suites import bundled, fitting, load_suite, plan_for, renamed
from fastlora.bench.weights import cut_down, random_checkpoint
from fastlora.errors import EngineError, RecipeError, UsageError
from fastlora.recipe.schema import ModelSection

SHAPE = load_suite(bundled()["tiny"]).shape
QWEN = {
    "model_type": "qwen2", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


def make(folder: Path, shape: dict[str, object] = SHAPE, quantization: str = "none") -> Path:
    model = ModelSection(name="any", quantization=quantization, dtype="float32")  # type: ignore[arg-type]
    return random_checkpoint(shape, model, folder)


def load(folder: Path) -> torch.nn.Module:
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    return model


@pytest.mark.parametrize("shape", [SHAPE, QWEN], ids=["llama", "qwen2-tied-biased"])
def test_every_weight_is_there_and_plausible(tmp_path: Path, shape: dict[str, object]) -> None:
    folder = make(tmp_path, shape)
    model = load(folder)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        else:
            assert 0.01 < float(parameter.detach().std()) < 0.03, name
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_same_shape_is_made_once_and_with_the_same_bytes(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    stamp = (first / "config.json").stat().st_mtime_ns
    assert make(tmp_path / "a") == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    second = make(tmp_path / "b")
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert make(tmp_path / "a", {**SHAPE, "hidden_size": 128}) != first


def test_nf4_is_what_bitsandbytes_would_have_made_of_the_same_weights(tmp_path: Path) -> None:
    import bitsandbytes as bnb

    model = load(make(tmp_path, quantization="nf4"))
    plain = load(make(tmp_path))
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.quant_state.nested
    assert not isinstance(model.lm_head, bnb.nn.Linear4bit)
    got = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    codes, state = bnb.functional.quantize_4bit(
        plain.model.layers[1].mlp.down_proj.weight.data, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(got, bnb.functional.dequantize_4bit(codes, state).to(got.dtype))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_cut_down_keeps_the_first_layers(tmp_path: Path, quantization: str) -> None:
    whole = make(tmp_path, quantization=quantization)
    small = load(cut_down(str(whole), None, 1, tmp_path / "cut"))
    assert len(small.model.layers) == 1
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, load(whole).state_dict()[name]), name
    assert json.loads((whole / "config.json").read_text())["num_hidden_layers"] == 2


def test_cut_down_of_one_file_and_of_more_layers_than_there_are(
    tmp_path: Path, tiny_model: Path
) -> None:
    before = (tiny_model / "config.json").read_text()
    small, _ = AutoModelForCausalLM.from_pretrained(
        cut_down(str(tiny_model), None, 1, tmp_path / "cut"), output_loading_info=True
    )
    assert len(small.model.layers) == 1
    whole = load(cut_down(str(tiny_model), None, 99, tmp_path / "whole"))
    assert len(whole.model.layers) == json.loads(before)["num_hidden_layers"]
    assert (tiny_model / "config.json").read_text() == before


def test_what_cannot_be_made_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="shape: not a model's"):
        make(tmp_path, {"model_type": "no such"})
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 1000})())
    with pytest.raises(EngineError, match="free some space, or set FASTLORA_CACHE"):
        make(tmp_path / "full")
    assert [path.suffix for path in (tmp_path / "full").iterdir()] == [".lock"]
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(EngineError, match="holds no safetensors"):
        cut_down(str(tmp_path), None, 1, tmp_path / "cut")
    with pytest.raises(EngineError, match=r"shape: .* gpt2 .* no num_hidden_layers"):
        make(tmp_path / "gpt2", {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2})
    assert not (tmp_path / "gpt2").exists()


def test_a_model_that_cannot_be_cut_down_is_explained(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(checkpoint: object) -> str:
        with pytest.raises(EngineError) as caught:
            cut_down(str(checkpoint), None, 1, tmp_path / "cut")
        return str(caught.value)

    assert "cannot be loaded" in told(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "cannot be loaded" in told(empty)
    (empty / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    (empty / "config.json").write_text('{"model_type": "gemma3", "text_config": {}}')
    assert "cut gemma3 down" in told(empty)

    def offline(name: str, allow_patterns: list[str], **_: object) -> str:
        assert "*.safetensors" in allow_patterns
        raise OSError("no internet")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "org/model cannot be loaded (no internet)" in told("org/model")


def test_two_benchmarks_make_a_checkpoint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first, and then takes what that has made."""
    from fastlora.bench import weights

    locked = weights.locked

    @contextmanager
    def waiting(path: Path) -> Iterator[None]:
        monkeypatch.setattr(weights, "locked", locked)
        first = make(tmp_path)
        monkeypatch.setattr(weights, "_write_shards", None)
        with locked(path):
            yield
        assert path == tmp_path / f".{first.name}.lock"

    monkeypatch.setattr(weights, "locked", waiting)
    load(make(tmp_path))


@pytest.mark.parametrize("name", bundled())
def test_every_suite_is_whole(name: str) -> None:
    from transformers import AutoConfig

    plan = plan_for(name, 0.0)
    assert plan.shape is not None
    assert AutoConfig.for_model(**plan.shape).num_hidden_layers >= plan.parity_layers
    assert [arm.name for arm in plan.arms]
    head = bundled()[name].read_text().splitlines()
    assert head[0].startswith("# ")
    assert head[1] == f"# fastlora bench {name}"


@pytest.mark.parametrize(
    ("gib", "suite"),
    [(0, "tiny"), (8, "tiny"), (12, "llama32-1b"), (19, "llama31-8b"), (140, "qwen25-7b")],
)
def test_the_suite_that_fits(gib: float, suite: str) -> None:
    assert fitting(gib) == suite


def test_a_suite_like_another_is_that_one_but_for_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'like = "tiny"\narms = ["peft"]\n[lora]\ndora = true\n[shape]\nvocab_size = 300\n'
    )
    mine, tiny = load_suite(path), load_suite(bundled()["tiny"])
    assert mine.shape == {**tiny.shape, "vocab_size": 300}
    assert mine.lora == tiny.lora.model_copy(update={"dora": True})
    assert (mine.arms, mine.train) == (["peft"], tiny.train)
    assert plan_for(str(path), 0.0).shape == mine.shape
    path.write_text('like = "tinny"\n')
    with pytest.raises(RecipeError, match=r"like: no suite 'tinny'; known: .*tiny"):
        load_suite(path)


def test_a_suite_with_mistakes_tells_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = bundled()["tiny"].read_text()
    path.write_text(text.replace("vram_gib = 0", "vram_gib = -1").replace("rank = 8", 'rank = "8"'))
    with pytest.raises(RecipeError) as caught:
        plan_for(str(path), 0.0)
    assert any("vram_gib" in problem for problem in caught.value.problems)
    assert any("lora.rank" in problem for problem in caught.value.problems)
    with pytest.raises(UsageError, match="did you mean tiny"):
        plan_for("tinny", 0.0)
    path.write_text(text.replace('"peft"', '"peftt"', 1))
    with pytest.raises(RecipeError, match=r"mine\.toml: arms: peftt: no engine"):
        plan_for(str(path), 0.0)


def test_a_recipe_that_packs_is_measured_packed(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = '[model]\nname = "m"\nrevision = "r"\n[data]\nsources = ["d.jsonl"]\npacking = true\n'
    text += '[output]\ndir = "o"\n'
    (tmp_path / "d.jsonl").touch()
    path.write_text(text)
    plan = plan_for(str(path), 24.0)
    assert [arm.name for arm in plan.arms] == ["peft+packing", "liger+packing", "unsloth+packing"]
    model = renamed(plan.recipe, "other").model
    assert (model.name, model.revision) == ("other", None)


def test_files_written_at_once_are_those_of_one_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = make(tmp_path / "many", quantization="nf4")
    monkeypatch.setattr("fastlora.bench.weights._WRITERS", 1)
    one = make(tmp_path / "one", quantization="nf4")
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in many.iterdir()) == names
    assert len([name for name in names if name.endswith(".safetensors")]) == 3
    for name in names:
        assert (many / name).read_bytes() == (one / name).read_bytes()


def test_a_writer_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, **_: object) -> None:
        if "layer-001" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
