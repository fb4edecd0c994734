"""Packed rows kept apart by where they end: the numbers of a mask, in shapes that stay."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fastlora_kernels import recompute_layers
from fastlora_kernels.attention import Attention, Give, Keep
from flash import flash, pretend_to_have_it
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from waits import Waits

from fastlora.engines import unsloth, varlen
from fastlora.engines.base import CUMULATIVE_LENGTHS, where_they_end
from fastlora.engines.packed import PLAIN, keep_rows_apart, why_not
from fastlora.engines.peft import PeftEngine
from fastlora.errors import EngineError
from fastlora.plan.setup import FUSED
from fastlora.recipe.schema import Recipe
from fastlora.train.collate import Collator
from fastlora.train.shapes import pad

LENGTHS = (5, 1, 12, 7)
LONGEST = 12


def heads(count: int, tokens: int, seed: int, size: int = 8) -> torch.Tensor:
    """As a model has them: (1, heads, tokens, size), a view of (1, tokens, heads x size)."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.randn(1, tokens, count * size, generator=draw, requires_grad=True)
    return made.view(1, tokens, count, size).transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_each_row_attends_to_itself(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_flash", flash)
    q, k, v = (heads(count, sum(LENGTHS), seed) for seed, count in enumerate((4, 2, 2)))
    ends = where_they_end((*LENGTHS, 0, 0), LONGEST)[CUMULATIVE_LENGTHS]
    with Waits(error=True):
        found = varlen.attend(q, k, v, ends, LONGEST, scale)
    rows = [each.split(LENGTHS, dim=2) for each in (q, k, v)]
    alone = [
        scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True, scale=scale)
        for row in zip(*rows, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone, dim=2).transpose(1, 2))


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device, where the operator itself says what it takes and gives; it knows of no autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


@pytest.mark.usefixtures("meta")
def test_pytorch_takes_it_so_and_has_a_backward() -> None:
    q, k, v = (
        torch.empty(1, count, 32, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for count in (4, 2, 2)
    )
    out = varlen.attend(q, k, v, torch.empty(5, device="meta", dtype=torch.int32), 16)
    assert (out.shape, out.dtype) == ((1, 32, 4, 8), torch.bfloat16)
    out.sum().backward()
    assert [each.grad.shape for each in (q, k, v)] == [each.shape for each in (q, k, v)]


@pytest.mark.usefixtures("meta")
def test_its_outputs_can_be_kept_for_backward() -> None:
    """fastlora_kernels/attention.py knows the operator."""
    q, k, v = (
        torch.empty(1, count, 320, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for count in (4, 2, 2)
    )
    ends = torch.empty(5, device="meta", dtype=torch.int32)
    attention = Attention(torch.nn.Identity(), lambda: varlen.attend(q, k, v, ends, 160))
    kept = list[torch.Tensor]()
    keep = Keep(kept.append)
    with torch.no_grad(), keep.around():
        attention()
    assert [each.shape for each in kept] == [(320, 4, 8), (4, 320)]  # and the log-sum-exp
    give = Give(keep.entries, kept)
    with give.around():
        out = attention()
    assert give.entries == []
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_it_runs_in_the_type_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> Any:
        seen.append((q.dtype, k.dtype, v.dtype))
        return flash(q, k, v, *rest, **named)

    monkeypatch.setattr(varlen, "_flash", spy)
    q, k, v = heads(2, 4, 0), heads(2, 4, 1), heads(2, 4, 2).bfloat16()
    ends = where_they_end((4,), LONGEST)[CUMULATIVE_LENGTHS]
    with torch.autocast("cpu", torch.float16):
        assert varlen.attend(q, k, v, ends, 4).dtype == torch.float16
    assert varlen.attend(q, k, v, ends, 4).dtype == torch.float32
    assert seen == [(torch.float16,) * 3, (torch.bfloat16,) * 3]


@pytest.mark.usefixtures("meta")
def test_more_rows_than_backward_counts_are_refused() -> None:
    q = torch.empty(1, 32, 2**18, 128, device="meta", dtype=torch.bfloat16)
    few, many = (torch.empty(n, device="meta", dtype=torch.int32) for n in (1000, 3000))
    varlen.attend(q, q, q, few, 2048)
    with pytest.raises(EngineError, match=r"2,999 rows in 262,144 tokens.*train.micro_batch"):
        varlen.attend(q, q, q, many, 2048)


SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def recipe(**changes: Any) -> Recipe:
    given: dict[str, Any] = {
        "model": {"name": "x", "seq_len_tokens": LONGEST},
        "data": {"sources": ["x"], "packing": True},
        "output": {"dir": "x"},
    }
    return Recipe.model_validate(given | changes)


def model_of(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **more, use_cache=False)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))


def rows() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (sum(LENGTHS),), generator=draw).tolist()
    starts = {0, 5, 6, 18}
    labels = [-100 if place in starts else token for place, token in enumerate(ids)]
    return [{"input_ids": ids, "labels": labels, "seq_lengths": list(LENGTHS)}]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_a_model_gives_what_it_gives_with_a_mask(
    kind: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients, with padding that is longer than a row and rows of no tokens; layers that are computed again
    when the model's forward is over, too. Other calls are as before."""
    pretend_to_have_it(monkeypatch)
    model, engine, said = model_of(kind), PeftEngine(), list[str]()
    if recomputed:
        recompute_layers(model, ["layer", "attention"])
    model.train()
    mine = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def found(batch: dict[str, Any]) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in mine)]

    masked = Collator(0, engine)(rows())
    unpacked = {"input_ids": masked["input_ids"], "attention_mask": torch.ones(1, sum(LENGTHS))}

    def written() -> torch.Tensor:
        model.config.use_cache = True
        one = {name: each[:, :6] for name, each in unpacked.items()}
        ids: torch.Tensor = model.generate(**one, max_new_tokens=6, do_sample=False)
        model.config.use_cache = False
        return ids

    want, plain, text = found(masked), model(**unpacked).logits, written()
    keep_rows_apart(model, engine, recipe(), said.append)
    assert said == []
    batch = Collator(0, engine)(rows())
    assert batch[CUMULATIVE_LENGTHS].tolist() == [0, 5, 6, 18, 25]
    padded = pad(batch, 40, 0, rows=9, longest=LONGEST)
    assert padded[CUMULATIVE_LENGTHS].tolist() == [0, 5, 6, 18, 25, 37, 40, 40, 40, 40]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a mask")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", never)
        for given in (batch, padded):
            for got, wanted in zip(found(given), want, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    again = model(**unpacked).logits
    assert torch.equal(again, plain)
    assert torch.equal(written(), text)
    assert model.config._attn_implementation == f"fastlora_packed_{LONGEST}"


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("mistral", {"sliding_window": LONGEST}, ""),
        ("mistral", {"sliding_window": 11}, "a sliding window of 11 tokens in rows of 12"),
        ("gemma2", {}, "attention with softcapping"),
        ("olmo2", {}, "not known to serve olmo2"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout of 0.1"),
    ],
)
def test_what_a_mask_keeps_apart_still(
    kind: str, more: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_to_have_it(monkeypatch)
    config = AutoConfig.for_model(kind, **SIZES, **more)
    assert why_not(config, recipe(), "peft") == why
    if why:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        engine, said = PeftEngine(), list[str]()
        base = SimpleNamespace(config=config)
        model: Any = SimpleNamespace(get_base_model=lambda: base)
        keep_rows_apart(model, engine, recipe(), said.append)
        assert said == [f"data.packing: a mask keeps rows apart, flash attention cannot ({why})"]
        assert CUMULATIVE_LENGTHS not in engine.packed_inputs([3, 4])


def test_unsloths_own_attention_serves_only_what_it_has_a_forward_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_to_have_it(monkeypatch)
    assert why_not(AutoConfig.for_model("qwen3", **SIZES), recipe(), "unsloth") == ""
    assert FUSED - {"gemma2"} <= PLAIN  # what plan/setup.py goes by
    assert "phi3" in why_not(AutoConfig.for_model("phi3", **SIZES), recipe(), "unsloth")


def test_without_a_gpu_a_mask_it_is_and_nothing_is_said() -> None:
    model, engine, said = model_of("llama"), PeftEngine(), list[str]()
    keep_rows_apart(model, engine, recipe(), said.append)
    assert said == []
    assert model.config._attn_implementation == "sdpa"
    assert engine.packed_inputs([3, 4]).keys() == {"position_ids"}


def test_a_row_that_would_not_all_be_computed_is_an_error() -> None:
    engine = PeftEngine()
    engine.longest_packed = LONGEST
    with pytest.raises(ValueError, match="a packed row of 13 tokens where 12 are the most"):
        engine.packed_inputs([3, LONGEST + 1])


def test_padding_of_more_rows_than_there_is_room_for() -> None:
    engine = PeftEngine()
    engine.longest_packed = LONGEST
    batch = Collator(0, engine)(rows())
    ends = [
        pad(batch, length, 0, rows=most, longest=LONGEST)[CUMULATIVE_LENGTHS].tolist()
        for length, most in ((25, 3), (40, 5), (25, 6))
    ]
    own = [0, 5, 6, 18, 25]
    assert ends == [own, [*own, 37, 40], [*own, 25, 25]]


def test_unsloths_attention_is_asked_unless_rows_say_where_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What its forwards do, with modules that stand for its own."""
    monkeypatch.setattr(varlen, "_flash", flash)
    modules = {name: ModuleType(f"unsloth.models.{name}") for name in ("llama", "mistral", "qwen3")}
    parent: Any = ModuleType("unsloth.models")
    for name, module in modules.items():
        module.get_packed_info_from_kwargs = lambda given, device, positions=None: "theirs"  # type: ignore[attr-defined]
        module.run_attention = lambda *, config, context, Q, K, V: "theirs"  # type: ignore[attr-defined]
        setattr(parent, name, module)
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    monkeypatch.setitem(sys.modules, "unsloth.models", parent)
    for longest in (99, LONGEST):  # put on twice, it is not wrapped twice
        varlen.unsloth_serves_packed_rows(longest)
    engine = unsloth.UnslothEngine()
    assert engine.packed_inputs(LENGTHS).keys() == {"position_ids", "packed_seq_lengths"}
    engine.longest_packed = LONGEST
    given = pad(Collator(0, engine)(rows()), 40, 0, rows=9, longest=LONGEST)
    assert given["packed_seq_lengths"].tolist() == [5, 1, 12, 7, 12, 3, 0, 0, 0]
    q, k, v = (heads(count, 40, seed) for seed, count in enumerate((4, 2, 2)))
    for module in modules.values():
        ask, attend = module.get_packed_info_from_kwargs, module.run_attention
        config = SimpleNamespace(flash_varlen_kwargs={"softmax_scale": 0.5})
        with Waits(error=True):
            known = ask(given, q.device)
            lengths, ends, longest = known
            found = attend(config=config, context=SimpleNamespace(seq_info=known), Q=q, K=k, V=v)
        assert (lengths, ends, longest) == (
            given["packed_seq_lengths"], given[CUMULATIVE_LENGTHS], LONGEST,
        )  # fmt: skip
        want = varlen.attend(q, k, v, given[CUMULATIVE_LENGTHS], LONGEST, 0.5)
        assert torch.equal(found, want)
        assert not found.isnan().any()
        other = {"packed_seq_lengths": given["packed_seq_lengths"]}
        known = ask(other, q.device, None)
        assert known == "theirs"
        context = SimpleNamespace(seq_info=known)
        assert attend(config=config, context=context, Q=q, K=k, V=v) == "theirs"
