"""What is counted, against real tensors: byte for byte where it is stored, and activations by a profiler."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastlora.plan import speed, stored, working
from fastlora.plan.setup import Setup, setup_of
from fastlora.plan.shape import Linear, Shape, shape_of
from fastlora.recipe.schema import Recipe

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 64},
    "gemma3_text": {"tie_word_embeddings": True},
    "phi3": {"pad_token_id": 0},
}


def recipe(**sections: dict[str, Any]) -> Recipe:
    given = {
        "model": {"name": "m", **sections.pop("model", {})},
        "data": {"sources": ["rows.jsonl"]},
        "output": {"dir": "out"},
        **sections,
    }
    return Recipe.model_validate(given)


def setup(shape: Shape, engine: Any = "peft", **sections: dict[str, Any]) -> Setup:
    return setup_of(recipe(**sections), shape, engine=engine)


def model_of(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    built = AutoConfig.for_model(**config, use_cache=False)
    return AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16, attn_implementation="sdpa")


def adapted(model: Any, rank: int = 8, **more: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear", **more)
    return get_peft_model(model, lora, autocast_adapter_dtype=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True])
def test_parameters_and_adapters_are_those_of_the_model(family: str, dora: bool) -> None:
    config = LLAMA | {"model_type": family} | FAMILIES[family]
    model = model_of(config)
    shape = shape_of(config)
    assert shape.notes == ()
    assert shape.parameters == sum(one.numel() for one in model.parameters())
    planned = setup(shape, model={"quantization": "none"}, lora={"rank": 8, "dora": dora})
    assert stored.resident_bytes(shape, planned) + stored.rest_bytes(shape, planned) == sum(
        one.nbytes for one in model.parameters()
    )
    trained = [one for one in adapted(model, use_dora=dora).parameters() if one.requires_grad]
    assert sorted(stored.adapter_tensors(shape, planned)) == sorted(one.numel() for one in trained)
    assert stored.adapter_bytes(shape, planned) == sum(one.nbytes for one in trained)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 192), (96, 1088), (1000, 320)])
def test_nf4_is_as_large_as_bitsandbytes_makes_it(rows: int, columns: int) -> None:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        torch.randn(rows, columns, dtype=torch.bfloat16), compress_statistics=True, quant_type="nf4"
    )
    parts = [codes, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert stored.nf4_bytes(rows * columns) == sum(part.nbytes for part in parts)


def test_int8_is_as_large_as_bitsandbytes_makes_it() -> None:
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(torch.randn(96, 320, dtype=torch.float16))
    assert stored.int8_bytes(Linear("x", 320, 96)) == codes.nbytes + scales.nbytes


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("elements", [100, 4095, 4096, 5000, 16 * 4096])
def test_optimizer_state_is_as_large_as_it_is(optimizer: str, elements: int) -> None:
    import bitsandbytes as bnb

    parameter = torch.nn.Parameter(torch.zeros(elements))
    parameter.grad = torch.ones(elements)
    made: Any = bnb.optim.AdamW8bit if optimizer == "adamw_8bit" else torch.optim.AdamW
    kept = made([parameter])
    if optimizer == "adamw":
        kept.step()
    else:  # its step needs a GPU; what it keeps does not
        kept.check_overrides()
        kept.init_state(kept.param_groups[0], parameter, 0, 0)
    shared = ("step", "qmap1", "qmap2")  # one for all tensors
    state = {key: value for key, value in kept.state[parameter].items() if key not in shared}
    assert stored.state_bytes(elements, optimizer) == sum(one.nbytes for one in state.values())


def test_a_paged_optimizer_leaves_the_card_where_tensors_are_large() -> None:
    shape = shape_of(LLAMA | {"hidden_size": 4096, "intermediate_size": 14336})
    paged = setup(shape, train={"optimizer": "paged_adamw_8bit"})
    whole = setup(shape, train={"optimizer": "adamw_8bit"})
    small = stored.optimizer_bytes(shape, paged)
    assert 0 < small < stored.optimizer_bytes(shape, paged, paged=True)
    assert small + stored.optimizer_bytes(shape, paged, paged=True) == stored.optimizer_bytes(
        shape, whole
    )


def test_targets_outside_the_layers_are_counted() -> None:
    shape = shape_of(LLAMA)
    planned = setup(shape, lora={"rank": 4, "target_modules": ["q_proj", "lm_head"]})
    layer = [4 * 128, 4 * 128]
    assert stored.adapter_tensors(shape, planned) == [*layer, *layer, 4 * 128, 4 * 256]


# -- activations ---------------------------------------------------------------------------


def quantized(model: Any) -> Any:
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False,
                compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def allocated(model: Any, tokens: int) -> tuple[int, int]:
    """(bytes that are there when backward begins, the most), of a step over one row; beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile, record_function

    ids = torch.randint(0, 256, (1, tokens))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(tokens)).loss
        with record_function("backward begins"):
            loss.backward()
    events = found.profiler.kineto_results.events()
    begins = min(one.start_ns() for one in events if one.name() == "backward begins")
    changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    now = most = saved = 0
    for at, size in sorted(changes, key=lambda change: change[0]):
        saved = now if at < begins else saved
        now += size
        most = max(most, now)
    return saved, most


def per_token(made: Any, layers: int) -> tuple[float, float]:
    """Of a model of so many layers: what is saved, and the most, for each token; sizes of weights fall out."""
    model = made(layers)
    model.train()
    (saved, most), (saved_more, most_more) = allocated(model, 256), allocated(model, 512)
    return (saved_more - saved) / 256, (most_more - most) / 256


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small products are ten times as slow where two threads share a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("quantization", "kernels"),
    [("nf4", "off"), ("none", "off"), ("none", "all")],  # ours leave 4-bit weights on a CPU alone
)
def test_activations_are_those_a_profiler_finds(
    quantization: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT asks torch.is_autocast_enabled(), which speaks of a GPU, whether to convert: here it is told of the CPU."""
    from fastlora_kernels import attach, recompute_layers

    ask = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": ask(device))
    shape = shape_of(LLAMA)
    sections: dict[str, Any] = {
        "model": {"quantization": quantization, "seq_len_tokens": 1024},
        "train": {"micro_batch": 1},
        "lora": {"rank": 8},
        "kernels": {"mode": kernels},
    }
    planned = setup(shape, **sections)

    def made(checkpointing: bool) -> Any:
        def build(layers: int) -> Any:
            model = model_of(LLAMA | {"num_hidden_layers": layers})
            model = adapted(quantized(model) if quantization == "nf4" else model)
            if kernels == "all":
                assert not any(attach(model).by_layer.values())
            if checkpointing:
                recompute_layers(model, ["layer"] * layers)
            return model

        return build

    saves = working.layer_saves(shape, planned) / planned.tokens
    two, three = (per_token(made(False), layers)[0] for layers in (2, 3))
    assert three - two == pytest.approx(saves, rel=0.01)
    if kernels == "all":
        return  # on a CPU they work otherwise: no kernel, but its reference
    most = per_token(made(True), 2)[1]
    inputs = shape.layers * working.input_bytes(shape, planned) / planned.tokens
    work = working.layer_works(shape, planned) / planned.tokens
    # Its input is among these, and its output there as well.
    assert most == pytest.approx(inputs + saves + work, rel=0.05)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("kept", "stays", "once"),
    [
        (0, False, 0), (0, True, 0), (2, False, 0), (2, True, 0),
        (0, False, 1), (1, False, 1), (1, True, 1), (2, True, 1), (1, True, 2),
    ],
)  # fmt: skip
def test_weights_are_dequantized_as_often_as_is_counted(
    kept: int, stays: bool, once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kept`: layers that keep their attention; `stays`: memory.keep_dequantized; `once`: dense_layers."""
    from fastlora_kernels import DenseWeights, attach, dense, recompute_layers
    from fastlora_kernels.ops import lora_linear
    from fastlora_kernels.recompute import decoder_layers

    made: list[torch.Tensor] = []
    own = lora_linear.dequantize

    def noted(*given: Any, **named: Any) -> torch.Tensor:
        made.append(own(*given, **named))
        return made[-1]

    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    for module in (lora_linear, dense):
        monkeypatch.setattr(module, "dequantize", noted)
    shape = shape_of(LLAMA)
    planned = setup(
        shape,
        lora={"rank": 8},
        kernels={"mode": "all"},
        train={"checkpointing": "full"},
        memory={
            "keep_attention_layers": kept, "keep_dequantized": stays,
            "cuda_graphs": True, "dense_layers": once,
        },
    )  # fmt: skip
    model = adapted(quantized(model_of(LLAMA))).train()
    model.enable_input_require_grads()
    assert not any(attach(model).by_layer.values())
    recompute_layers(
        model, ["layer"] * (2 - kept) + ["attention"] * kept, keep_dequantized=stays  # type: ignore[list-item]
    )  # fmt: skip
    weights = DenseWeights(decoder_layers(model)[2 - once :])
    ids = torch.randint(0, 256, (1, 64))
    for _ in range(2):  # at first with down_proj, and what is then kept
        made.clear()
        weights.refresh()
        with weights.used():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            forward = len(made)
            loss.backward()
    found = [sum(one.numel() for one in some) for some in (made[:forward], made[forward:])]
    assert found == list(speed.dequantized(shape, planned))
    # What stays of a layer, it makes but once again.
    sizes = {one.name: one.weights for one in shape.linears}
    mlp = sizes["gate_proj"] + sizes["up_proj"]
    expected = (sum(sizes.values()) - sizes["down_proj"], mlp) if stays and once < 2 else (0, 0)
    assert working.dequantized_kept(shape, planned) == expected


def saved_by_a_layer(model: Any, tokens: int) -> int:
    """Bytes that the second layer saves of a row, adapters' weights and all; not the rotation, which is all layers'."""
    layer = model.get_base_model().model.layers[1]
    found: dict[int, torch.UntypedStorage] = {}
    inside, rotation = False, set()

    def enter(module: Any, given: Any, named: Any) -> None:
        nonlocal inside
        inside = True
        rotation.update(one.untyped_storage().data_ptr() for one in named["position_embeddings"])

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in rotation:
            found[storage.data_ptr()] = storage
        return tensor

    hooks = [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(leave),
    ]
    ids = torch.randint(0, 256, (1, tokens))
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saving, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids)
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in found.values())


def saved_by_all(model: Any, tokens: int) -> int:
    """Bytes that a model saves of a row."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(0, 256, (1, tokens))
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saving, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("family", "quantization", "kernels", "lora"),
    [
        *((family, *how, {}) for family in FAMILIES for how in (("nf4", "off"), ("none", "off"), ("none", "all"))),
        ("llama", "none", "off", {"dora": True}),
        ("llama", "none", "all", {"dora": True}),
        ("llama", "none", "all", {"dropout": 0.1}),
    ],
)  # fmt: skip
def test_a_layer_saves_what_is_counted(
    family: str, quantization: str, kernels: str, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of every family: all of it, and its attention alone."""
    from fastlora_kernels import attach, recompute_layers

    ask = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": ask(device))
    config = LLAMA | {"model_type": family} | FAMILIES[family]
    shape = shape_of(config)
    planned = setup(
        shape,
        model={"quantization": quantization},
        lora={"rank": 8, **lora},
        kernels={"mode": kernels},
    )
    model = model_of(config)
    model = adapted(
        quantized(model) if quantization == "nf4" else model,
        use_dora=planned.dora,
        lora_dropout=planned.dropout,
    ).train()
    if kernels == "all":
        assert not any(attach(model).by_layer.values())
    recompute_layers(model, ["layer", "keep"])
    more = saved_by_a_layer(model, 256) - saved_by_a_layer(model, 128)
    assert more / 128 == working.layer_saves(shape, planned) / planned.tokens
    found = []
    for modes in (["layer", "layer"], ["layer", "attention"]):
        recompute_layers(model, modes)  # type: ignore[arg-type]
        found.append(saved_by_all(model, 256) - saved_by_all(model, 128))
    beside_input = working.attention_bytes(shape, planned) - working.input_bytes(shape, planned)
    assert (found[1] - found[0]) / 128 == beside_input / planned.tokens


def test_unsloths_chunks_are_those_of_its_rule() -> None:
    """4,096 tokens x 128,256 logits x 16 bytes are 7.8 GiB: four chunks for 4 GiB, more where less is free."""
    shape = shape_of(LLAMA | {"vocab_size": 128256})
    planned = setup(shape, engine="unsloth", model={"seq_len_tokens": 2048})
    assert working.unsloth_chunk_tokens(shape, planned, 60 * 2**30) == 1024
    assert working.unsloth_chunk_tokens(shape, planned, 3.5 * 2**30) == 512
    tiny = setup(shape, engine="unsloth", model={"seq_len_tokens": 64})
    assert working.unsloth_chunk_tokens(shape, tiny, 60 * 2**30) == 128


def test_of_a_streamed_layer_the_scales_stay_on_the_gpu() -> None:
    """unsloth streams parameters; what bitsandbytes scales their codes by is beside them."""
    import bitsandbytes as bnb

    shape = shape_of(LLAMA | {"num_hidden_layers": 8})
    codes = scales = 0
    for one in shape.linears:
        layer = bnb.nn.Linear4bit(one.inputs, one.outputs, bias=False, quant_type="nf4")
        weight = bnb.nn.Params4bit(layer.weight.data, compress_statistics=True, quant_type="nf4")
        quantized = weight._quantize("cpu")
        state = quantized.quant_state
        parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        codes += sum(each.nbytes for each in (quantized.data,))
        scales += sum(part.nbytes for part in parts)

    def planned(streamed: int) -> Setup:
        return setup(shape, "unsloth", memory={"stream_layers": streamed})

    assert stored.streamed_bytes(shape, planned(5)) == 5 * codes
    # Three of those that are streamed have slots, whichever they are.
    assert stored.resident_bytes(shape, planned(5)) == (8 - 5 + 3) * codes + 8 * scales
    assert stored.resident_bytes(shape, planned(2)) == stored.resident_bytes(shape, planned(0))
