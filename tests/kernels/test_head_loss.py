"""The chunked loss against its equation with all logits at once, in wider arithmetic and in the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastlora_kernels import reference
from fastlora_kernels.ops import head_loss, skinny
from fastlora_kernels.ops.four_bit import FourBit
from fastlora_kernels.ops.head_loss import Shape, cross_entropy_, lora_head_loss
from torch.utils._python_dispatch import TorchDispatchMode
from waits import Waits

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = torch.finfo(torch.float32).eps
NAMES = ("hidden", "weight", "bias", "A", "B")
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter's bfloat16 products are garbage


def inputs(
    shape: tuple[int, ...], v: int, k: int, r: int, *, bias: bool = False, labelled: float = 0.7
) -> tuple[list[Any], torch.Tensor]:
    """[hidden, weight, bias, A, B] in float64 and labels, with logits of a few units."""
    torch.manual_seed(0)
    made = [
        torch.randn(*shape, k, dtype=torch.float64),
        torch.randn(v, k, dtype=torch.float64) * 2 / k**0.5,
        torch.randn(v, dtype=torch.float64) if bias else None,
        torch.randn(r, k, dtype=torch.float64) / k**0.5 if r else None,
        torch.randn(v, r, dtype=torch.float64) if r else None,
    ]
    labels = torch.randint(v, shape)
    labels[torch.rand(shape) > labelled] = -100
    return [None if t is None else t.to(DEVICE) for t in made], labels.to(DEVICE)


def results(
    op: Any,
    given: list[Any],
    dtype: torch.dtype,
    labels: torch.Tensor,
    trained: str,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The loss and the gradient of each input named in `trained`, for an upstream gradient of 3."""
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in given]
    for name, leaf in zip(NAMES, leaves, strict=True):
        if leaf is not None:
            leaf.requires_grad_(name in trained)
    loss = op(*leaves, 0.5, labels, **options)
    wanted = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None and n in trained}
    found = torch.autograd.grad(loss, list(wanted.values()), torch.full_like(loss, 3.0))
    return {"loss": loss.detach(), **dict(zip(wanted, found, strict=True))}


@torch.no_grad()
def row_losses(
    given: list[Any], dtype: torch.dtype, labels: torch.Tensor, logit_scale: float = 1.0,
    softcap: float | None = None, **_: Any,
) -> torch.Tensor:  # fmt: skip
    hidden, weight, bias, a, b = (None if t is None else t.to(dtype) for t in given)
    z = torch.nn.functional.linear(hidden, weight, bias)
    if a is not None:
        z = reference.lora_linear(hidden, weight, bias, a, b, 0.5)
    z = z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z.to(torch.promote_types(dtype, torch.float32)).flatten(0, -2)
    return torch.nn.functional.cross_entropy(z, labels.reshape(-1), reduction="none")


def assert_errs_no_more(given: list[Any], dtype: torch.dtype, labels: Any, **options: Any) -> None:
    # Both of them get inputs that `dtype` can hold, so that the error is of the arithmetic alone.
    given = [None if t is None else t.to(dtype).double() for t in given]
    most = {"most_labels": options.pop("most_labels")} if "most_labels" in options else {}
    truth = results(reference.lora_head_loss, given, torch.float64, labels, **options)
    theirs = results(reference.lora_head_loss, given, dtype, labels, **options)
    ours = results(lora_head_loss, given, dtype, labels, **options, **most)
    assert ours.keys() == theirs.keys()
    assert ours["loss"].dtype == torch.float32
    # Errors of rows cancel in their sum, by chance: it is held to what they would come to without that.
    exact, rounded = (row_losses(given, wide, labels, **options) for wide in (torch.float64, dtype))
    items = options.get("num_items") or int((labels != -100).sum())
    uncancelled = float((rounded.double() - exact).abs().sum()) / items
    for name, true in truth.items():
        assert ours[name].dtype == theirs[name].dtype, name
        allowed, error = (float((t[name].double() - true).norm()) for t in (theirs, ours))
        allowed = max(allowed, uncancelled) if name == "loss" else allowed
        assert float(true.norm()) > 0, name
        assert error <= 2 * allowed + EPS * float(true.norm()), (name, error, allowed)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """About 17 rows of 1,000 float32 logits."""
    monkeypatch.setattr(head_loss, "LOGITS_BYTES", 17 * 4000)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("shape", "v", "r"), [((1,), 1000, 8), ((63,), 1003, 40), ((257,), 1000, 8), ((2, 31), 1003, 8)]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_items": 100, "logit_scale": 0.25}, {"softcap": 3.0, "logit_scale": 1.5}],
    ids=["mean", "sum, scaled", "softcapped"],
)
def test_loss_and_every_gradient(
    shape: tuple[int, ...], v: int, r: int, dtype: torch.dtype, options: Any, backend: str
) -> None:
    given, labels = inputs(shape, v, 24, r, labelled=1.0 if shape == (1,) else 0.7)
    if r == 40:
        given[2] = torch.randn(v, dtype=torch.float64, device=DEVICE)
    trained = "hidden A B" if r == 8 else "hidden weight bias A B"
    assert_errs_no_more(given, dtype, labels, trained=trained, **options)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "A", "B", "hidden weight"])
@pytest.mark.parametrize("r", [0, 8])
def test_only_what_is_wanted(trained: str, r: int, backend: str) -> None:
    if r == 0 and trained in "AB":
        pytest.skip("no adapter")
    given, labels = inputs((63,), 1003, 24, r, bias=True)
    assert_errs_no_more(given, torch.float32, labels, trained=trained)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("more", [0, 50])
@pytest.mark.parametrize("options", [{}, {"num_items": 100.0, "softcap": 3.0}])
def test_with_the_most_labels_given_it_is_the_same_and_nothing_waits(
    options: Any, more: int, backend: str
) -> None:
    given, labels = inputs((2, 31), 1003, 24, 8, bias=True)
    labels[0, 3] = labels[1, 30] = 7
    most = int((labels != -100).sum()) + more
    trained = "hidden weight bias A B"
    plain = results(lora_head_loss, given, torch.float32, labels, trained, **options)
    if "num_items" in options:
        options = options | {"num_items": torch.tensor(100, device=DEVICE)}
    with Waits() as waits:
        found = results(
            lora_head_loss, given, torch.float32, labels, trained, most_labels=most, **options
        )
    assert (
        backend != "reference" or not waits.found
    )  # Triton's interpreter reads what it computes with
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert not found["hidden"].flatten(0, 1)[labels.flatten() == -100].any()
    assert_errs_no_more(given, torch.float32, labels, trained=trained, most_labels=most, **options)


@pytest.mark.parametrize("items", [None, 0, 5])
def test_no_labels_where_there_might_be_some(items: int | None, backend: str) -> None:
    given, labels = inputs((63,), 1003, 24, 8, bias=True)
    labels[:] = -100
    trained = "hidden weight bias A B"
    found = results(
        lora_head_loss, given, torch.float32, labels, trained, most_labels=9, num_items=items
    )
    loss = float(found.pop("loss"))
    assert loss == 0 if items else math.isnan(loss)
    assert not any(gradient.any() or gradient.isnan().any() for gradient in found.values())


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_real_vocabulary(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "LOGITS_BYTES", 2**25)
    given, labels = inputs((300,), 128_256, 256, 16)
    assert_errs_no_more(given, torch.bfloat16, labels, trained="hidden A B", softcap=softcap)


def test_both_gradients_of_one_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a real vocabulary; with one that the buffer's rows are longer than, it is two products."""
    reads, once = [], skinny.in_one_pass
    dtype = torch.bfloat16 if CUDA else torch.float32  # a GPU's is for 16 bits
    monkeypatch.setattr(skinny, "one_pass", lambda *_: True)
    monkeypatch.setattr(skinny, "in_one_pass", lambda *given: reads.append(given) or once(*given))
    for v in (1024, 1000):
        given, labels = inputs((63,), v, 24, 8)
        assert_errs_no_more(given, dtype, labels, trained="hidden A B")
    assert {g.shape[1] for g, *_ in reads} == ({1024} if backend != "reference" else set())


def test_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    monkeypatch.setattr(head_loss, "LOGITS_BYTES", 2 * 7 * 8)  # two rows of 7
    given, labels = inputs((2, 4), 7, 5, 2, bias=True)
    leaves = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(
        lambda *t: lora_head_loss(
            *t, 0.5, labels, shift=True, num_items=3.0, logit_scale=1.5, softcap=2.0
        ),
        leaves,
    )


def test_shifted_labels_are_transformers(backend: str) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    given, labels = inputs((2, 31), 50, 24, 0)
    hidden, weight, *_ = (None if t is None else t.float() for t in given)
    logits = hidden @ weight.T
    for options in ({}, {"num_items_in_batch": torch.tensor(77)}):
        wanted = ForCausalLMLoss(logits, labels, 50, **options)
        items = options.get("num_items_in_batch")
        got = lora_head_loss(
            hidden, weight, None, None, None, 1.0, labels, shift=True, num_items=items
        )
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("items", [None, 5])
def test_no_labels_at_all(items: int | None, backend: str) -> None:
    """NaN for the mean of nothing, as in transformers; the gradients are zero, not NaN."""
    given, labels = inputs((63,), 1000, 24, 8, labelled=0.0)
    options: Any = {"trained": "hidden A B", "num_items": items}
    theirs = results(reference.lora_head_loss, given, torch.float32, labels, **options)
    ours = results(lora_head_loss, given, torch.float32, labels, **options)
    torch.testing.assert_close(ours["loss"], theirs["loss"], equal_nan=True)
    assert bool(ours["loss"].isnan()) is (items is None)
    for name in ("hidden", "A", "B"):
        assert not ours[name].any(), name


def test_one_label(backend: str) -> None:
    given, labels = inputs((63,), 1003, 24, 8, labelled=0.0)
    labels[40] = 7
    assert_errs_no_more(given, torch.float32, labels, trained="hidden A B")
    ours = results(lora_head_loss, given, torch.float32, labels, trained="hidden")
    assert ours["hidden"].any(dim=1).nonzero().tolist() == [[40]]


def test_a_gradient_that_float16_could_not_hold_without_the_upstream_one(backend: str) -> None:
    """With 1e6 items each logit's gradient is below 1e-6; float16 ends at 6e-8."""
    given, labels = inputs((63,), 1003, 24, 8)
    assert_errs_no_more(
        [t if t is None else t / 8 for t in given],
        torch.float32,
        labels,
        trained="A",
        num_items=1e6,
    )
    leaves = [None if t is None else t.half().requires_grad_() for t in given]
    loss = lora_head_loss(*leaves, 0.5, labels, num_items=1e6)
    (scaled,) = torch.autograd.grad(loss, leaves[0], torch.full_like(loss, 2.0**20))
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    loss = reference.lora_head_loss(*wide, 0.5, labels, num_items=1e6)
    (true,) = torch.autograd.grad(loss, wide[0], torch.full_like(loss, 2.0**20))
    assert float((scaled - true).norm() / true.norm()) < 2e-3


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_sums_over_a_chunk_that_float16_could_not_hold() -> None:
    """dA before 1/n is 2,000 x 60; float16 ends at 65,504."""
    hidden = torch.full((2000, 64), 60.0, device=DEVICE, dtype=torch.float16)
    weight = torch.zeros(1000, 64, device=DEVICE, dtype=torch.float16)
    a = torch.zeros(1, 64, device=DEVICE, requires_grad=True)
    b = torch.zeros(1000, 1, device=DEVICE)
    b[0] = 1
    labels = torch.zeros(2000, dtype=torch.long, device=DEVICE)
    lora_head_loss(hidden, weight, None, a, b, 1.0, labels).backward()
    torch.testing.assert_close(a.grad, torch.full_like(a, -60 * 0.999), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """float32 adapter, base in `dtype`: products in autocast's dtype, gradients in the parameters'."""
    given, labels = inputs((63,), 1003, 24, 8)
    leaves = [None if t is None else t.float().requires_grad_() for t in given]
    leaves[1] = given[1].to(dtype)

    def found(op: Any) -> list[torch.Tensor]:
        with torch.autocast(DEVICE, HALF):
            loss = op(*leaves, 0.5, labels)
        wanted = [leaves[0], leaves[3], leaves[4]]
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    leaves[1] = leaves[1].double()
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    loss = reference.lora_head_loss(*wide, 0.5, labels)
    truth = [loss.detach(), *torch.autograd.grad(loss, [wide[0], wide[3], wide[4]])]
    leaves[1] = leaves[1].to(dtype)
    exact, rounded = (row_losses(wide, of, labels) for of in (torch.float64, HALF))
    uncancelled = float((rounded.double() - exact).abs().sum()) / int((labels != -100).sum())
    for true, own, their in zip(
        truth, found(lora_head_loss), found(reference.lora_head_loss), strict=True
    ):
        assert own.dtype == their.dtype == torch.float32
        allowed = max(float((their - true).norm()), 0.0 if true.dim() else uncancelled)
        assert float((own - true).norm()) <= 2 * allowed + EPS * float(true.norm())


def test_the_same_twice_and_chunks_hardly_matter(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, labels = inputs((257,), 1003, 24, 8)
    options: Any = {"trained": "hidden weight A B"}
    once = results(lora_head_loss, given, torch.float32, labels, **options)
    again = results(lora_head_loss, given, torch.float32, labels, **options)
    monkeypatch.setattr(head_loss, "LOGITS_BYTES", 1)  # a row at a time
    rows = results(lora_head_loss, given, torch.float32, labels, **options)
    for name, tensor in once.items():
        assert torch.equal(tensor, again[name]), name
        torch.testing.assert_close(rows[name], tensor, rtol=1e-5, atol=1e-6)


def test_saved_gradients_serve_twice(backend: str) -> None:
    given, labels = inputs((63,), 100, 24, 8)
    leaves = [None if t is None else t.float().requires_grad_() for t in given]
    wanted = [leaves[0], leaves[3], leaves[4]]
    loss = lora_head_loss(*leaves, 0.5, labels)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(2 * loss, wanted)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(two, 2 * one)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within it had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_holds_all_logits(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    tokens, v, k = 257, 1000, 8
    given, labels = inputs((tokens,), v, k, 4, labelled=1.0)
    leaves = [None if t is None else t.float() for t in given]
    for place in (0, 3, 4):
        leaves[place].requires_grad_()
    with Largest() as ours, torch.set_grad_enabled(grad):
        loss = lora_head_loss(*leaves, 0.5, labels)
        if grad:
            loss.backward()
    # A row of the buffer has 1,024 places. The weight, viewed, has 8 x 1,000.
    assert 17 * 1000 >= ours.numel > 10 * 1000 or ours.numel == 17 * 1024
    with Largest() as plain:
        reference.lora_head_loss(*leaves, 0.5, labels)
    assert plain.numel == tokens * v


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_peak_memory_is_as_the_docstring_says() -> None:
    tokens, v, k, r = 4096, 128_256, 1024, 16
    hidden = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, k, device=DEVICE, dtype=torch.bfloat16) * 0.02
    a = torch.randn(r, k, device=DEVICE, requires_grad=True)
    b = torch.zeros(v, r, device=DEVICE, requires_grad=True)
    labels = torch.randint(v, (tokens,), device=DEVICE)
    labels[::2] = -100

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            lora_head_loss(hidden, weight, None, a, b, 1.0, labels).backward()

    step()  # cuBLAS's workspace
    hidden.grad = a.grad = b.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    n = tokens // 2
    chunk = -(-n // -(-n // (head_loss.LOGITS_BYTES // (2 * v))))
    buffer, dh, dx = chunk * v * 2, n * k * 2, tokens * k * 2
    # A, B in 16 bits; the sums, what is added to them and the gradients, in float32.
    adapter = r * (k + v) * (2 + 3 * 4)
    width, _ = skinny.tile(skinny.room(torch.device("cuda")), v, r)
    parts = 4 * r * (-(-v // width) * chunk + v)
    allowed = buffer + dh + dx + 3 * chunk * k * 4 + adapter + parts + 2**20
    assert torch.cuda.max_memory_allocated() - before <= allowed


@pytest.mark.parametrize("stride", [0, 21])
@pytest.mark.parametrize("v", [1, 3, 1000, 1003, 8192 + 5])
def test_the_rows_alone(v: int, stride: int, backend: str) -> None:
    """Extreme logits, rows that lie apart, and nothing written beside them."""
    torch.manual_seed(0)
    apart = torch.full((5, v + stride), 7.0, device=DEVICE)
    z = apart[:, :v]
    z.copy_(torch.randn(5, v, device=DEVICE) * torch.tensor([0.1, 1, 10, 100, 1e4])[:, None].to(z))
    labels = torch.randint(v, (5,), device=DEVICE)
    for softcap in (None, 30.0):
        wide = z.double().requires_grad_()
        capped = wide * 0.5 if softcap is None else softcap * torch.tanh(wide * 0.5 / softcap)
        true = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
        (slope,) = torch.autograd.grad(true.sum(), wide)
        mine = apart.clone()
        losses = cross_entropy_(mine[:, :v], labels, Shape(0.5, softcap), True)
        torch.testing.assert_close(losses.double(), true.detach(), rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(mine[:, :v].double(), slope, rtol=2e-5, atol=1e-5)
        assert (mine[:, v:] == 7).all()
        untouched = z.clone()
        torch.testing.assert_close(
            cross_entropy_(untouched, labels, Shape(0.5, softcap), False), losses
        )
        assert torch.equal(untouched, z)


def test_tokens_that_cannot_be(backend: str) -> None:
    """Logits of -inf, whole blocks of them before and behind the others; and a row that is ignored."""
    torch.manual_seed(0)
    z = torch.randn(3, 40_000, device=DEVICE)
    z[:, :17_000] = z[:, 36_000:] = -math.inf
    labels = torch.randint(17_000, 36_000, (3,), device=DEVICE)
    labels[1] = -100
    wide = z.double().requires_grad_()
    true = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (slope,) = torch.autograd.grad(true.sum(), wide)
    losses = cross_entropy_(z, labels, Shape(1.0, None), True)
    torch.testing.assert_close(losses.double(), true.detach(), rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(z.double(), slope, rtol=2e-5, atol=1e-5)
    assert losses[1] == 0
    assert (z[1] == 0).all()


def test_a_label_outside_the_vocabulary_is_not_silent() -> None:
    given, labels = inputs((9,), 50, 8, 0, labelled=1.0)
    labels[3] = 50
    leaves = [None if t is None else t.float() for t in given]
    if CUDA:
        assert lora_head_loss(*leaves, 1.0, labels).isnan()
    else:
        with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
            lora_head_loss(*leaves, 1.0, labels)


def test_what_does_not_fit_is_named() -> None:
    given, labels = inputs((9,), 50, 8, 2)
    with pytest.raises(ValueError, match=r"lora_head_loss: hidden \(9, 8\), weight \(50, 8\)"):
        lora_head_loss(*given, 1.0, labels[:4])
    with pytest.raises(ValueError, match="go together"):
        lora_head_loss(*given[:4], None, 1.0, labels)
    with pytest.raises(ValueError, match="softcap 0"):
        lora_head_loss(*given, 1.0, labels, softcap=0)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    given, labels = inputs((9,), 50, 8, 2)
    leaves = [None if t is None else t.requires_grad_() for t in given]
    loss = lora_head_loss(*leaves, 1.0, labels)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, leaves[0], create_graph=True)


def test_a_4_bit_weight(backend: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    given, labels = inputs((63,), 96, 64, 8)
    hidden, weight, _, a, b = (None if t is None else t.float() for t in given)
    packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(DEVICE)
    wide = reference.dequantize(FourBit.of(packed), torch.float32)
    got = lora_head_loss(hidden, packed, None, a, b, 0.5, labels)
    torch.testing.assert_close(got, reference.lora_head_loss(hidden, wide, None, a, b, 0.5, labels))
