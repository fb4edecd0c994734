"""GGUF files of small random models: written, read back by an inverse of its own, and compared."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import peft_model, save_adapter, save_base, save_tokenizer
from gguf import GGMLQuantizationType, GGUFReader, quants

from fastlora.errors import EngineError
from fastlora.export.forward import Row, logits_of, streaming
from fastlora.export.gguf_read import GgufModel
from fastlora.export.gguf_write import entries, larger_types, write_gguf
from fastlora.export.k_quants import q4_k, q4_k_m_type, q6_k
from fastlora.export.modelfile import modelfile, ollama_template
from fastlora.export.parity import LIMITS, Reference, problems, streamed
from fastlora.export.plan import Plan
from fastlora.export.vocabulary import CONTROL, UNUSED, Vocabulary, read_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROWS = [Row(list(range(3, 50))), Row([7, 90, 4, 31, 88, 2, 5], answer_from=3)]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama3 tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama biases": ("Llama", {"attention_bias": True}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}  # fmt: skip
TOKENS = Vocabulary("gpt2", "gpt-2", [str(n) for n in range(128)], [1] * 128, merges=["0 0"])


def write(folder: Path, base: Path, quant: str, **adapter: Any) -> tuple[Plan, Path]:
    plan = Plan(base, save_adapter(base, folder / "adapter", **adapter))
    path = folder / f"model-{quant}.gguf"
    write_gguf(plan, path, quant, TOKENS, "made")
    return plan, path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_model_with_its_adapter(family: str, tmp_path: Path) -> None:
    name, config = FAMILIES[family]
    base = save_base(tmp_path / "base", name, **config)
    plan, path = write(tmp_path, base, "f16")
    read = GgufModel(path)
    model = read.empty_model(plan.model)
    with streaming(model, model, read.weight, torch.device("cpu")):
        got = logits_of(model, ROWS, torch.device("cpu"))
    adapted = peft_model(base, tmp_path / "adapter")
    wanted = logits_of(adapted, ROWS, torch.device("cpu"))
    for left, right in zip(got, wanted, strict=True):
        assert float((left - right).norm()) < 0.003 * float(right.norm())
    names = {tensor.name for tensor in GGUFReader(path).tensors}
    assert ("output.weight" in names) == (not config.get("tie_word_embeddings", False))
    assert ("rope_freqs.weight" in names) == ("llama3" in family)
    assert ("blk.1.attn_q.bias" in names) == ("qwen2" in family or "biases" in family)


def test_rows_too_short_for_a_type_are_said_to_be_of_another(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    plan = Plan(base, save_adapter(base, tmp_path / "adapter"))
    assert larger_types(entries(plan, "q8_0"), "q8_0", 1) == ""
    said = larger_types(entries(plan, "q4_k_m"), "q4_k_m", 1)
    assert "matrices are Q8_0: rows of " in said
    assert "hold no whole number of q4_k_m's blocks" in said


@pytest.mark.parametrize("quant", ["bf16", "q8_0", "q4_k_m"])
def test_quantized_files_pass_the_gate_and_a_perturbed_tensor_does_not(
    quant: str, tmp_path: Path
) -> None:
    base = save_base(
        tmp_path / "base", hidden_size=256, intermediate_size=512, num_hidden_layers=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    plan, path = write(tmp_path, base, quant, scale=0.1)
    wanted = {"bf16": "BF16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}[quant]
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == wanted
    assert types["output_norm.weight"] == "F32"
    reference = Reference(plan, ROWS)

    def found() -> list[str]:
        read = GgufModel(path)
        return problems(
            reference.compare(streamed(read.empty_model(plan.model), read.weight)), LIMITS[quant]
        )

    assert found() == []
    reader = GGUFReader(path, "r+")
    tensor = next(one for one in reader.tensors if one.name == "blk.0.ffn_down.weight")
    tensor.data[:] = np.roll(tensor.data, 1, axis=0)  # the right values in the wrong rows
    reader.data.flush()
    del reader, tensor
    assert any("logits differ" in problem for problem in found())


def test_a_forgotten_and_a_doubled_adapter_are_red_however_small(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    plan = Plan(base, save_adapter(base, tmp_path / "adapter", scale=0.01))
    reference = Reference(plan, ROWS)
    model = plan.model
    report = reference.compare(streamed(model, plan.weight))
    assert report["effect"] < 0.1
    assert problems(report, LIMITS["f16"]) == []
    for times, carried in ((0, (-0.01, 0.01)), (2, (1.9, 2.1))):

        def weight(name: str, times: int = times) -> torch.Tensor:
            bare = plan.weight(name, edited=False)
            return bare + times * (plan.weight(name) - bare)

        report = reference.compare(streamed(model, weight))
        assert carried[0] < report["carried"] < carried[1]
        assert any("it carries" in problem for problem in problems(report, LIMITS["f16"]))


def test_architectures_that_are_not_served_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "Mixtral", num_local_experts=2)
    with pytest.raises(
        EngineError, match="llama, mistral, qwen2, qwen3 models, and this is mixtral"
    ):
        write(tmp_path, base, "f16", target_modules=["q_proj"])
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    base = save_base(tmp_path / "dynamic", rope_parameters=dynamic)
    with pytest.raises(
        EngineError, match="rope_type default, linear, llama3 and yarn, and this is dynamic"
    ):
        write(tmp_path, base, "f16")


@pytest.mark.parametrize(("pack", "kind", "most"), [(q4_k, "Q4_K", 0.075), (q6_k, "Q6_K", 0.019)])
def test_k_quants_against_the_packages_reader(pack: Any, kind: str, most: float) -> None:
    """The limits are those of Gaussian weights; Q4_1, of five bits a weight, errs by 0.078 of their RMS."""
    type_ = GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    rows = rng.normal(scale=0.02, size=(64, 512)).astype(np.float32)
    back = quants.dequantize(pack(rows), type_)
    assert float(np.sqrt(np.mean((back - rows) ** 2)) / rows.std()) < most
    for odd in (
        np.zeros((1, 256)),
        np.full((1, 256), 0.3),
        np.full((1, 256), -0.3),
        np.eye(1, 256),
    ):
        back = quants.dequantize(pack(odd.astype(np.float32)), type_)
        assert np.abs(back - odd).max() < 0.01
    # What lies on the grid comes back: of q4_k with one scale for all parts, of q6_k with powers of two.
    grid = np.tile(np.arange(16, dtype=np.float32), 16)[None] * 63 if kind == "Q4_K" else None
    if grid is not None:
        assert np.abs(quants.dequantize(pack(grid), type_) - grid).max() <= 1e-3 * grid.max()
    assert q4_k_m_type("output.weight", 32).name == "Q6_K"
    assert [q4_k_m_type(f"blk.{n}.ffn_down.weight", 32).name for n in (0, 4, 5, 6, 28)] == [
        "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "model", "pre"),
    [("llama3", "gpt2", "llama-bpe"), ("qwen2", "gpt2", "qwen2"), ("tekken", "gpt2", "tekken"),
     ("gpt2", "gpt2", "gpt-2"), ("sentencepiece", "llama", "default")],
)  # fmt: skip
def test_vocabularies(kind: str, model: str, pre: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = save_tokenizer(tmp_path, kind, 320)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = read_vocabulary(folder, 330, [3, 1])
    assert (vocabulary.model, vocabulary.pre) == (model, pre)
    count = len(tokenizer)
    assert vocabulary.tokens[:count] == tokenizer.convert_ids_to_tokens(list(range(count)))
    assert vocabulary.types[count:] == [UNUSED] * (330 - count)
    assert vocabulary.types[3] == CONTROL
    assert vocabulary.special == {"bos": 0, "eos": 1, "unk": 2, "eot": 3}
    assert not vocabulary.add_bos
    assert vocabulary.chat_template == tokenizer.chat_template
    if kind == "sentencepiece":
        ids = tokenizer("lazy dog", add_special_tokens=False).input_ids
        assert len(ids) < 6  # it merges; the greedy merge by score is the same one
        assert _by_score("▁lazy▁dog", vocabulary) == ids
        assert vocabulary.add_space_prefix


def _by_score(text: str, vocabulary: Vocabulary) -> list[int]:
    """SentencePiece's BPE: join the two neighbours whose union scores highest, until none is a token."""
    number = {token: place for place, token in enumerate(vocabulary.tokens)}
    pieces = list(text)
    while True:
        joined = [
            (vocabulary.scores[number[left + right]], -place)
            for place, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in number
        ]
        if not joined:
            return [number[piece] for piece in pieces]
        place = -max(joined)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def test_a_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, "llama3", 320)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(EngineError, match=r"not known here \(known: llama-bpe, qwen2"):
        read_vocabulary(folder, 320, [1])
    with pytest.raises(EngineError, match="past the end of the embedding"):
        read_vocabulary(save_tokenizer(tmp_path / "long", "gpt2", 320), 100, [1])


def test_ollama_templates(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert ollama_template(tokenizer) == (
        '{{- range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}'
        '{{ else if eq .Role "assistant" }}<|end|><|assistant|>{{ .Content }}<|end|>{{ end }}{{ end }}'
        "<|end|><|assistant|>"
    )
    # One that adds a default system message lays out more than turns: that of its family.
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert "<|im_start|>{{ .Role }}" in str(ollama_template(tokenizer))
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert ollama_template(tokenizer) is None
    text = modelfile("m.gguf", tokenizer, ["<|end|>"], 2048)
    assert text.startswith("FROM ./m.gguf\n# The chat template")
    assert 'PARAMETER stop "<|end|>"\nPARAMETER num_ctx 2048\n' in text
