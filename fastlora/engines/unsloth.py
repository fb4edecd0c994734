"""The unsloth engine: FastLanguageModel with its fused kernels and its gradient checkpointing.

Importing unsloth patches transformers, peft and trl for the whole process, so a process has one engine.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.cache import cache_folder
from fastlora.engines.base import (
    PACKED_LENGTHS,
    Announce,
    Capabilities,
    new_position_ids,
    not_loadable,
    resolve_checkpointing,
    resolve_dtype,
    where_they_end,
)
from fastlora.engines.memory import GIB, host_free_bytes
from fastlora.errors import EngineError
from fastlora.plan.setup import FUSED, records
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class UnslothEngine:
    name = "unsloth"
    capabilities = Capabilities(
        needs_cuda=True,
        checkpointing=("unsloth", "offload", "full", "none"),
        streams_layers=True,
    )
    longest_packed = 0

    def prepare(self) -> None:
        """Raises EngineError when unsloth cannot be imported: a version that does not fit, mostly."""
        # Read at import: no phoning home; compiled modules go to a cache, not to the user's folder.
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth_compiled"))
        inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        try:
            import unsloth  # noqa: F401
        except Exception as error:
            raise EngineError(
                f"unsloth cannot be imported ({type(error).__name__}: {error}). Install the versions that "
                "fastlora is tested with: pip install 'fastlora[cuda]'; or set engine = \"peft\""
            ) from error
        if inductor:  # unsloth drops it at import
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = inductor

    def load(self, recipe: Recipe, announce: Announce) -> PeftModel:
        from safetensors import SafetensorError
        from unsloth import FastLanguageModel

        model, lora, memory = recipe.model, recipe.lora, recipe.memory
        # A relative path that looks like a repository is looked up on the Hub even if the folder exists.
        name = str(Path(model.name).absolute()) if Path(model.name).is_dir() else model.name
        wanted = resolve_checkpointing(recipe, self)
        # True: fastlora's takes the place of torch's function, which unsloth then calls for (engines/kept.py).
        checkpointing: Any = {"unsloth": "unsloth", "none": False}.get(wanted, True)
        streaming = {"offload_layers": memory.stream_layers} if memory.stream_layers else {}
        recorded = records(recipe, self.name, wanted)
        # By its own estimate of a step unsloth moves the embedding to host memory. There the host looks rows up, for
        # which it waits for the GPU, so that no graph can record it. memory.vram has counted where it is, and what the
        # recipe says of it is done by engines/embedding.py.
        ours = recorded or memory.vram is not None or memory.embedding is not None
        stays = {"offload_embedding": False} if ours else {}
        try:
            with _all_pinned() if streaming else nullcontext():
                base, _ = FastLanguageModel.from_pretrained(
                    name,
                    max_seq_length=model.seq_len_tokens,
                    dtype=resolve_dtype(model),
                    load_in_4bit=model.quantization == "nf4",
                    load_in_8bit=model.quantization == "int8",
                    revision=model.revision,
                    trust_remote_code=model.trust_remote_code,
                    use_exact_model_name=True,
                    use_gradient_checkpointing=checkpointing,
                    random_state=recipe.train.seed,
                    **streaming,
                    **stays,
                )
        except (OSError, ValueError, SafetensorError) as error:
            if streaming and "offload_layers" in str(error):
                raise EngineError(
                    f"memory.stream_layers: unsloth cannot stream this model here ({error}); leave it out"
                ) from error
            raise EngineError(not_loadable(model.name, error)) from error
        if recipe.data.packing and base.config.model_type == "gemma2":
            raise EngineError(
                "data.packing: unsloth does not keep packed rows apart for gemma2; set data.packing = false"
            )
        layers = base.config.get_text_config().num_hidden_layers
        if memory.stream_layers and memory.stream_layers >= layers:
            announce(
                f"memory.stream_layers: {layers - 1}, since unsloth keeps one of {layers} on the GPU"
            )
        kept = min(memory.keep_layers or 0, layers) if wanted == "unsloth" else 0
        if wanted == "unsloth" and kept < (memory.keep_layers or 0):
            announce(
                f"memory.keep_layers: {kept}, all that the model has ({memory.keep_layers} asked for)"
            )
        if recorded and recipe.data.packing:
            from fastlora.engines.packed import why_not

            recorded = not why_not(base.config, recipe, self.name)
        with _layers_compiled(not recorded):
            adapted: PeftModel = FastLanguageModel.get_peft_model(
                base,
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                bias=lora.bias,
                use_rslora=lora.rslora,
                use_dora=lora.dora,
                use_gradient_checkpointing=checkpointing,
                checkpoint_skip_layers=kept,
                random_state=recipe.train.seed,
            )
        if adapted.get_input_embeddings().weight.device.type == "cpu":
            announce(
                "memory: unsloth has moved the embedding to host memory, since by its estimate a step would not fit"
            )
        return adapted

    def packed_inputs(self, seq_lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        import torch

        return {
            "position_ids": new_position_ids(seq_lengths),
            PACKED_LENGTHS: torch.tensor(seq_lengths, dtype=torch.int32),
            **where_they_end(seq_lengths, self.longest_packed),
        }

    @contextmanager
    def generating(self, model: PeftModel) -> Iterator[None]:
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
        try:
            yield
        finally:
            FastLanguageModel.for_training(
                model, use_gradient_checkpointing=model._unsloth_gradient_checkpointing
            )

    def layers_are_recomputed(self, model: PeftModel) -> None:
        # for_training, which its trainer and `generating` call, gives every layer's flag this value.
        model._unsloth_gradient_checkpointing = True

    def drop_broken_step(self) -> None:
        # Its checkpointing counts layers from one backward to the next; in the first pass it learns how many there are.
        # Without buffers it has not been used, and the reset cannot be called.
        from unsloth_zoo import gradient_checkpointing as checkpointing

        if getattr(checkpointing, "CPU_BUFFERS", None):
            import torch

            torch.cuda.synchronize()  # copies to and from them may still be under way
            checkpointing.reset_unsloth_gradient_checkpointing_buffers()


@contextmanager
def _instead(module: str, name: str, ours: Callable[[Any], Any]) -> Iterator[None]:
    """Within it unsloth's `name` is ours(theirs). Where it has none of that name, nothing changes."""
    place: Any = None
    with suppress(ImportError):
        place = import_module(module)
    if not hasattr(place, name):
        yield
        return
    theirs = getattr(place, name)
    setattr(place, name, ours(theirs))
    try:
        yield
    finally:
        setattr(place, name, theirs)


_LEFT_FREE = 2 * GIB
"""Of the host's memory, for the system, beside what is pinned."""


def _all_pinned() -> AbstractContextManager[None]:
    """Within it streamed weights are pinned in whole, where the host holds them.

    unsloth writes them into host memory, and pins no more of that than is free then, less 15 % of the machine's memory,
    as if they came once more: where 15 % are left beside them, none at all. The rest would be copied several times
    slower. Pinning takes no more than is written already.
    """

    def budget(theirs: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: sys.maxsize if host_free_bytes() >= _LEFT_FREE else theirs()

    return _instead("unsloth_zoo.block_swap", "_pin_budget", budget)


_COMPILE = "UNSLOTH_BLOCK_COMPILE_LEGACY"
"""Read when an adapter is put on. "0": layers of FastLanguageModel's own architectures are not compiled, and run its
Triton kernels as they are. Others' are compiled when they are loaded, and were measured so (docs/log.md)."""


@contextmanager
def _layers_compiled(wanted: bool) -> Iterator[None]:
    """Layers that get their adapter within it are compiled as unsloth likes, or not.

    A record needs no fast Python, which is most of what compiling gives, for 40 to 60 s; and behind a compiled layer
    down_proj's product is made again for nobody (fastlora_kernels/unneeded.py). What the environment says about it
    is the user's word and stays.
    """
    if wanted or _COMPILE in os.environ or "UNSLOTH_BLOCK_COMPILE" in os.environ:
        yield
        return
    os.environ[_COMPILE] = "0"
    try:
        yield
    finally:
        del os.environ[_COMPILE]


def rows_as_long_as_they_are() -> AbstractContextManager[None]:
    """Within it attention takes q, k and v as they are, for lengths that recur.

    unsloth pads each by 1 to 128 tokens where cuDNN computes it, so that fewer lengths have plans made for them (170 ms
    each). At 8B and 2,048 tokens that is 4 % of the time without checkpointing: three tensors filled and copied, an
    eighth more attention, and gradients cut out again. What the environment says about it is the user's word and stays.
    """
    if "UNSLOTH_SDPA_CUDNN_BUCKET" in os.environ:
        return nullcontext()
    return _instead("unsloth.utils.attention_dispatch", "_CUDNN_LENGTH_BUCKET", lambda theirs: 0)


_SWITCH = "UNSLOTH_RETURN_HIDDEN_STATES"
"""With it, forwards of unsloth's give the last hidden states in place of logits, and no loss."""


def attach_own_loss(model: PeftModel) -> str | None:
    """Let fastlora's loss take the place of unsloth's, which asks the GPU which tokens have a label and waits for it;
    why not, if it cannot."""
    from fastlora_kernels.layers.head import Backbone, attach_head

    base = model.get_base_model()
    honours = "__UNSLOTH_SUPPORTS_RETURN_HIDDEN_STATES__"  # on classes that its compiler made
    backbone = Backbone(_hidden_states, _softcap)
    if not (base.config.model_type in FUSED or getattr(type(base), honours, False)):
        if (shape := _shape_rewritten(type(base))) is None:
            return f"unsloth's forward of {base.config.model_type} does not give hidden states"
        backbone = Backbone(_of_the_model, shape)
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(base.config, name, None) not in (None, 1, 1.0):
            return f"logits are scaled ({name})"
    return attach_head(model, in_evaluation=True, backbone=backbone)


def _shape_rewritten(kind: Any) -> Any:
    """How `kind` makes its logits, if its forward is transformers' but for the loss, which unsloth wrote into it when
    the module was imported (Phi-3; Gemma 3's softcap keeps it from that)."""
    from fastlora_kernels.layers.head import shape_as_written

    kind = vars(kind).get("_fastlora_theirs", kind)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    written = code is not None and code.co_filename.startswith("<unsloth-fused:")
    return shape_as_written(kind) if written else None


def _of_the_model(
    theirs: Any, model: Any, labels: torch.Tensor, given: dict[str, Any]
) -> tuple[torch.Tensor, Any]:
    outputs = model.model(**given)
    return outputs.last_hidden_state, outputs


def _softcap(model: Any) -> Any:
    from fastlora_kernels.ops.head_loss import Shape

    return Shape(1.0, getattr(model.config, "final_logit_softcapping", None))


def _hidden_states(
    theirs: Any, model: Any, labels: torch.Tensor, given: dict[str, Any]
) -> tuple[torch.Tensor, Any]:
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        # With labels it knows padding for padding on the right, which causal attention needs no mask for.
        outputs = theirs(model, labels=labels, return_dict=True, **given)
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
    hidden: torch.Tensor = outputs.logits
    if hidden.shape[-1] != model.lm_head.in_features:
        raise EngineError(
            f"unsloth gave {hidden.shape[-1]} numbers a token where the {model.lm_head.in_features} of the hidden "
            "states were asked for; set memory.cuda_graphs = false"
        )
    return hidden, outputs


def streamed_layers(model: PeftModel) -> frozenset[int]:
    """Places of the layers whose weights unsloth streams from the host; none on another engine's model."""
    return frozenset(getattr(getattr(model, "_unsloth_block_swap", None), "indices", ()))


def without_fused_lora(model: PeftModel) -> int:
    """Put PEFT's forward back wherever unsloth installed a fused LoRA kernel; how many there were.

    For the benchmark's ledger: the difference is what those kernels are worth.
    """
    from unsloth.models.llama import _decline_fused_lora_for_fsdp

    count = _decline_fused_lora_for_fsdp(model, reason="the benchmark asked for it")
    assert isinstance(count, int)
    return count


def fused_layers(model: PeftModel) -> set[str]:
    """Names of the LoRA layers that unsloth's fused kernels run, by the functions that it put on the modules
    which hold them."""
    return {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        for attribute, function, kinds in _INSTALLED
        if _function_name(vars(module).get(attribute)).startswith(function)
        for kind in kinds
    }


def group_qkv(model: PeftModel) -> None:
    """Where unsloth calls q, k and v one by one, let ours take them together: inside its compiled blocks they cannot
    see by themselves that they share an x."""
    from fastlora_kernels.layers.group import outputs_of, trace_together

    def apply_qkv(attention: Any, x: torch.Tensor) -> list[torch.Tensor]:
        return outputs_of((attention.q_proj, attention.k_proj, attention.v_proj), x)

    for module in model.modules():
        if _function_name(vars(module).get("apply_qkv")) == "original_apply_qkv":
            module.apply_qkv = apply_qkv
    trace_together(model)  # of other architectures, whose attention's own forward calls them


# (attribute of the instance, how the name of unsloth's function for it begins, LoRA layers that it runs).
_INSTALLED = (
    ("apply_qkv", "apply_lora_qkv", ("q_proj", "k_proj", "v_proj")),
    ("apply_o", "apply_lora_o", ("o_proj",)),
    ("forward", "apply_lora_mlp", ("gate_proj", "up_proj", "down_proj")),
    ("_unsloth_forward", "apply_lora_mlp", ("gate_proj", "up_proj", "down_proj")),  # a tiled MLP's
)


def _function_name(value: Any) -> str:
    """Of a function, or of the one inside a bound method or a partial."""
    value = getattr(value, "__func__", value)
    return getattr(getattr(value, "func", value), "__name__", "")


def why_not_fused(model: PeftModel, name: str) -> str:
    """Why unsloth 2026.10 leaves the LoRA layer `name` to PEFT."""
    holder, _, kind = name.rpartition(".")
    parent, layer = model.get_submodule(holder), model.get_submodule(name)
    group = next((kinds for _, _, kinds in _INSTALLED if kind in kinds), ())
    members = {kind: getattr(parent, kind, None) for kind in group}
    bare = [kind for kind, member in members.items() if not hasattr(member, "lora_A")]
    bases = {kind: getattr(member, "base_layer", member) for kind, member in members.items()}
    biased = [kind for kind, base in bases.items() if getattr(base, "bias", None) is not None]
    lora = model.peft_config[model.active_adapter]
    weight = getattr(getattr(layer, "base_layer", None), "weight", None)
    if "8bit" in type(layer).__name__:
        return "int8 base"
    if model.config.model_type not in FUSED:
        return f"model type {model.config.model_type}"
    if not group:
        return "it has no kernel for them"
    if lora.use_dora:
        return "DoRA"
    if bare:
        return f"no adapter on {', '.join(bare)}"
    if biased:
        return f"bias on {', '.join(biased)}"
    if lora.bias != "none":
        return f"lora.bias = {lora.bias}"
    if str(getattr(getattr(weight, "quant_state", weight), "dtype", "")) == "torch.float32":
        return "float32 base"
    if lora.lora_dropout:
        return "dropout, with UNSLOTH_FUSED_LORA_DROPOUT=0"
    return "it installed no kernel on them"
