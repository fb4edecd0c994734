"""Running out of memory: what is recognised, what is split, what is asked again."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlora.data.prompts import Question
from fastlora.engines.memory import explained, in_words, is_out_of_memory
from fastlora.engines.peft import PeftEngine
from fastlora.errors import EngineError
from fastlora.export.answers import answered
from fastlora.recipe.schema import Recipe
from fastlora.train.collate import (
    ROW_LABELS,
    ROW_LENGTHS,
    Collator,
    SplittableCollator,
    split,
    split_labels,
)
from fastlora.train.oom import Continuation
from fastlora.train.resume import MEMORY_KEYS, changed_keys


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
        ),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
        ),
        caused(RuntimeError("backend failed"), torch.OutOfMemoryError("CUDA out of memory.")),
    ],
)
def test_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        # Shared memory of a kernel; inductor calls it by the other's name.
        RuntimeError("out of resource: shared memory, Required: 98304, Hardware limit: 65536"),
        RuntimeError("No valid triton configs. OutOfMemoryError: out of resource: triton_tem_fused_0 out of memory"),
        ValueError("this prompt speaks of out of memory"),
        caused(EngineError("told already"), torch.OutOfMemoryError("CUDA out of memory.")),
    ],
)  # fmt: skip
def test_not_out_of_memory(error: Exception | None) -> None:
    assert not is_out_of_memory(error)


def test_triton_says_it_otherwise_of_a_kernel_that_is_too_large() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    assert not is_out_of_memory(errors.OutOfResources(98304, 65536, "shared memory"))


def test_explained() -> None:
    with (
        pytest.raises(EngineError, match=r"^out of memory while loading it\. Take another$"),
        explained("loading it", lambda: "Take another"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(RuntimeError, match="else"), explained("loading it", lambda: ""):
        raise RuntimeError("something else")


def test_figures_in_words() -> None:
    figures = {"allocated_gib": 3.0, "reserved_gib": 3.5, "others_gib": 1.0, "card_gib": 8.0}
    assert in_words({}) == ""
    assert in_words(figures) == " (3.00 GiB in use and 3.50 reserved of 8.0, 1.00 not by PyTorch)"
    assert in_words(figures | {"asked_gib": 4.0}).endswith("PyTorch, 4.00 more asked for)")


def rows(lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    ids = iter(range(1, 10_000))
    found = []
    for length in lengths:
        tokens = torch.tensor([next(ids) for _ in range(length)])
        found.append({"input_ids": tokens, "labels": tokens.clone()})
    return found


def packs(lengths: list[list[int]]) -> list[dict[str, Any]]:
    plain = rows([sum(pack) for pack in lengths])
    for row in plain:
        row["labels"][0] = -100
    return [row | {"seq_lengths": pack} for row, pack in zip(plain, lengths, strict=True)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("packed", [False, True])
def test_a_part_is_what_the_collator_makes_of_its_rows(packed: bool, seed: int) -> None:
    draw, engine = random.Random(seed), PeftEngine()
    lengths = [[draw.randint(1, 9) for _ in range(draw.randint(1, 3))] for _ in range(7)]
    all_rows: list[dict[str, Any]] = (
        packs(lengths) if packed else rows([sum(row) for row in lengths])
    )
    batch = SplittableCollator(0, engine)(all_rows)
    for most in range(1, 9):
        parts = split(batch, most, engine)
        labelled = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
        assert split_labels(batch, most) == labelled
        chunks = [all_rows[first : first + most] for first in range(0, 7, most)]
        assert len(parts) == len(chunks)
        for part, chunk in zip(parts, chunks, strict=True):
            wanted = Collator(0, engine)(chunk)
            assert part.keys() == wanted.keys()
            assert not {ROW_LENGTHS, ROW_LABELS} & part.keys()
            assert all(torch.equal(part[name], wanted[name]) for name in wanted)
            assert all(tensor.is_contiguous() for tensor in part.values())


class Linear:
    """What Continuation needs of a trainer, around a model whose loss is the mean of its labels' squares."""

    def __init__(self) -> None:
        self.state, self._tr_loss = SimpleNamespace(global_step=0), torch.zeros(())
        self._metrics: dict[str, dict[str, list[float]]] = {"train": {}}
        self._total_train_tokens = 0
        self.model = torch.nn.Linear(1, 1, bias=False)

    def loss(self, part: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = part["labels"][:, 1:]
        picked = labels[labels >= 0].float()
        return (self.model.weight * picked).square().mean()


@pytest.mark.parametrize("seed", range(3))
def test_means_are_weighted_by_their_tokens(seed: int) -> None:
    """Of models that are not told the tokens of a step; one part has no token with a loss, and so no mean."""
    torch.manual_seed(seed)
    recipe = Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {"sources": ["x"]},
            "train": {"micro_batch": 4},
            "output": {"dir": "x"},
        }
    )
    said: list[str] = []
    run = SimpleNamespace(manifest={}, update=lambda **_: None)
    guard = Continuation(run, recipe, PeftEngine(), "none", said.append)  # type: ignore[arg-type]
    trainer = guard.trainer = Linear()  # type: ignore[assignment]
    batch = SplittableCollator(0, PeftEngine())(rows([5, 2, 7, 3]))
    batch["labels"][1, :] = -100
    batch[ROW_LABELS][1] = 0
    trainer.loss({"labels": batch["labels"]}).backward()
    wanted_loss, wanted = trainer.loss(batch).item(), trainer.model.weight.grad.clone()
    trainer.model.zero_grad()
    guard.on_step_begin(None, None, None)  # type: ignore[arg-type]
    calls: list[int] = []

    def forward(
        part: dict[str, torch.Tensor], labels: int, parts: int, share: float | None
    ) -> torch.Tensor:
        assert labels == int((part["labels"][:, 1:] >= 0).sum())
        calls.append(len(part["labels"]))
        loss = trainer.loss(part) / parts * (1 if share is None else share)
        loss.backward()
        if len(part["labels"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")  # its gradients are there
        return loss.detach()

    total = guard.train(forward, batch, means=True) + trainer._tr_loss
    assert calls == [4, 2, 1, 1, 1]
    assert float(total) == pytest.approx(wanted_loss, rel=1e-6)
    assert torch.allclose(trainer.model.weight.grad, wanted, rtol=1e-6)
    assert len(said) == 2
    assert guard.most_rows("step") == 1
    assert guard.most_rows("evaluation") == 4


def test_answers_are_asked_again_in_smaller_batches() -> None:
    """In the order and with the answers of batches that fit; the limit found holds for later ones."""
    asked = [
        Question(prompt_ids=[1] * length, expected_ids=None) for length in (3, 3, 4, 4, 5, 5, 6)
    ]
    seen: list[int] = []

    class Model:
        device = torch.device("cpu")

        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            seen.append(len(input_ids))
            if len(input_ids) > 2:
                raise RuntimeError("CUDA error: out of memory")
            lengths = (input_ids != 0).sum(1, keepdim=True)
            return torch.cat([input_ids, lengths, torch.full_like(lengths, 9)], dim=1)

    settings = {"stop_token_ids": [9], "pad_token_id": 0, "max_new_tokens": 2, "batch_rows": 4}
    said: list[str] = []
    batches = answered(Model(), asked, announce=said.append, **settings)  # type: ignore[arg-type]
    answers = [one for batch in batches for one in batch]
    assert answers == [(place, [len(asked[place].prompt_ids)]) for place in range(7)]
    assert seen == [4, 2, 2, 2, 1]
    assert said == ["answers: out of memory with 4 prompts at a time; at most 2 from now on"]


def test_answers_that_do_not_fit_one_by_one() -> None:
    class Model:
        device = torch.device("cpu")

        def generate(self, **_: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    settings = {"stop_token_ids": [9], "pad_token_id": 0, "max_new_tokens": 2}
    with pytest.raises(torch.OutOfMemoryError):
        list(answered(Model(), [Question([1, 1], None)] * 3, **settings))  # type: ignore[arg-type]


def test_what_only_changes_memory_may_change_on_resume() -> None:
    then = {"train": {"checkpointing": "auto", "lr": 1.0}}
    now = {"train": {"checkpointing": "full", "lr": 1.0}}
    assert changed_keys(then, now, but=MEMORY_KEYS) == []
    assert changed_keys(then, now) == ["train.checkpointing: was 'auto', now 'full'"]
    now["train"]["lr"] = 2.0
    assert changed_keys(then, now, but=MEMORY_KEYS) == ["train.lr: was 1.0, now 2.0"]
