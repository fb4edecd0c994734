"""Small random models and adapters of every kind, for the tests of merging and exporting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_base(folder: Path, family: str = "Llama", dtype: str = "float32", **config: Any) -> Path:
    """A random model of a family of transformers, in `folder`, in shards if `shard` says how large."""
    import transformers

    shard = config.pop("shard", "5GB")
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**(SIZES | config))
    model = transformers.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05) if parameter.dim() > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.1
            )
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_adapter(base: Path, folder: Path, scale: float = 0.2, **config: Any) -> Path:
    """A random adapter on the model in `base`: every trained tensor moved."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | config
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter) * scale
                parameter.add_(noise.abs() if "magnitude" in name else noise)
    adapted.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def save_tokenizer(folder: Path, kind: str, rows: int = 128) -> Path:
    """A small trained tokenizer: `llama3`, `qwen2`, `tekken` or `gpt2` (byte-level BPE), or `sentencepiece`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from fastlora.export.vocabulary import PRE

    text = ["the lazy dog's tail, 1234 times: over and over again\n\n  x = y + 42"] * 4
    special = ["<s>", "</s>", "<unk>", "<|end|>"]
    if kind == "sentencepiece":
        pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer = trainers.BpeTrainer(vocab_size=rows, special_tokens=pieces, show_progress=False)
        made.train_from_iterator(text, trainer)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                          decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
        vocab = made.get_vocab()
        # As converted from SentencePiece: bytes are no special tokens.
        state = made.to_str()
        import json

        document = json.loads(state)
        document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in special]
        assert len(vocab) <= rows
        made = Tokenizer.from_str(json.dumps(document))
    else:
        made = Tokenizer(models.BPE())
        patterns = {name: pattern for pattern, name in PRE.items()}
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        if kind == "gpt2":
            made.pre_tokenizer = level
        else:
            name = {"llama3": "llama-bpe"}.get(kind, kind)
            split = pre_tokenizers.Split(Regex(patterns[name]), behavior="isolated")
            made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=rows, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        made.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|end|>"],
        chat_template="{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder
