"""Times each op of fastlora_kernels against PEFT, and against the products that no version can avoid.

    python benchmarks/kernels.py --shapes 4096x4096,4096x14336 --tokens 4096 --ranks 16 --json ops.json

A row is one op on one kind of base, forward and backward together: PEFT's layer; ours, the same layer after
fastlora_kernels.attach ("left to PEFT" where that says so); and the floor, x W^T and g W alone, with NF4 dequantized
for each of the two, as nobody has room to keep W. The set-up is training's: base in --dtype and frozen, adapter in
float32, under autocast. A row gets times only if ours is right: output and every gradient err at most twice as much
as PEFT's, against wider arithmetic. TFLOP/s and GB/s are ours: useful work and least traffic, by the median time.
Exit codes: 0 done, 2 wrong usage, 3 an op is wrong.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

# A script's folder comes first on the path, and there transformers and bitsandbytes, which try `import
# kernels`, would get this file. Whatever imports them is therefore imported later, inside functions.
HERE = Path(__file__).resolve().parent
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEFAULTS = {
    "cuda": ("4096x4096,4096x14336", "4096,16384", "16,64", 100),
    "cpu": ("256x256,256x896", "128", "8", 10),
}[DEVICE.type]


class Size(NamedTuple):
    k: int
    n: int
    tokens: int
    rank: int


class Case(NamedTuple):
    """One op on one kind of base. A new op is a line in CASES and the two functions it names."""

    op: str
    base: str
    arms: Callable[[Size, torch.dtype, str, int], dict[str, Any]]  # base and seed: see linear_arms
    work: Callable[[Size, torch.dtype, str], tuple[int, int, int]]  # see linear_work


def linear_layer(size: Size, dtype: torch.dtype, base: str, dora: bool = False) -> Any:
    model = nn.ModuleDict({"proj": linear_base(size.k, size.n, dtype, base)})
    return with_adapters(model, ["proj"], size.rank, base, dora)["proj"]


def linear_base(k: int, n: int, dtype: torch.dtype, base: str, bias: bool = False) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    if base == "nf4":
        linear = Linear4bit(k, n, bias=bias, compute_dtype=dtype, quant_type="nf4")
        linear = linear.to(dtype).to(DEVICE)  # the move to a device quantizes, scales too
    else:
        linear = nn.Linear(k, n, bias=bias, dtype=dtype, device=DEVICE)
    return linear.requires_grad_(False)  # type: ignore[no-any-return]


def with_adapters(model: Any, targets: list[str], rank: int, base: str, dora: bool = False) -> Any:
    """In float32, with a B that is not zero, as in the midst of training."""
    from peft import LoraConfig, inject_adapter_in_model

    model.is_loaded_in_4bit = base == "nf4"  # set by transformers, asked for by PEFT
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=targets)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1 / rank**0.5)
    return model


def dense(layer: Any, dtype: torch.dtype) -> Tensor:
    """W (N, K) of its base in `dtype`; NF4 dequantized in at most float32."""
    return dense_weight(layer.base_layer, dtype)


def dense_weight(linear: Any, dtype: torch.dtype) -> Tensor:
    weight: Tensor = linear.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32 if dtype == torch.float64 else dtype
        weight = dequantize_4bit(weight.data, quant_state=state)
    return weight.to(dtype)


def linear_arms(
    size: Size, dtype: torch.dtype, base: str, seed: int, dora: bool = False
) -> dict[str, Any]:
    """truth, floor, peft, and ours or `left`, the reason why PEFT keeps the layer."""
    from fastlora_kernels import attach

    torch.manual_seed(seed)
    x = torch.randn(size.tokens, size.k, dtype=dtype, device=DEVICE, requires_grad=True)
    g = torch.randn(size.tokens, size.n, dtype=dtype, device=DEVICE)
    layer = linear_layer(size, dtype, base, dora)
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if dora:
        trained.append(layer.lora_magnitude_vector["default"].weight)
    twin = copy.copy(layer)  # shares every weight
    left = list(attach(twin).left)

    def with_gradients(y: Tensor, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, Tensor]:
        found = (y.detach(), *torch.autograd.grad(y, inputs, g))
        names = ("y", "dx", "dA", "dB", "dm")[: len(found)]
        return dict(zip(names, found, strict=True))

    def step(layer: Any) -> dict[str, Tensor]:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            y = layer(x)
        return with_gradients(y, (x, *trained), g)

    def truth() -> dict[str, Tensor]:
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        inputs = [given.detach().to(wide).requires_grad_() for given in (x, *trained)]
        x_, a_, b_, *magnitude = inputs
        weight, scaling = dense(layer, wide), layer.scaling["default"]
        y = x_ @ weight.T + scaling * (x_ @ a_.T) @ b_.T
        if magnitude:
            norm = torch.linalg.vector_norm((weight + scaling * b_ @ a_).detach(), dim=1)
            y = y * (magnitude[0] / norm)
        return with_gradients(y, tuple(inputs), g.to(wide))

    return {
        "truth": truth,
        "floor": lambda: (x.detach() @ dense(layer, dtype).T, g @ dense(layer, dtype)),
        "peft": lambda: step(layer),
    } | ({"left": left[0]} if left else {"ours": lambda: step(twin)})


def linear_work(size: Size, dtype: torch.dtype, base: str) -> tuple[int, int, int]:
    """FLOPs, the floor's FLOPs (a multiply-add is two), bytes read and written at the least.

    x W^T and g W are the floor; then x A^T, (x A^T) B^T, g B, (g B) A, dA and dB. Forward reads x, W, A, B and
    writes y; backward reads g, x, W, A, B and writes dx, dA, dB. A and B are float32.
    """
    floor = 4 * size.tokens * size.k * size.n
    adapter = size.rank * (size.k + size.n)
    nf4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # code, scale of 64, and scale of 256 scales
    weight = size.k * size.n * (nf4 if base == "nf4" else dtype.itemsize)
    moved = size.tokens * (3 * size.k + 2 * size.n) * dtype.itemsize + 2 * weight + 3 * 4 * adapter
    return floor + 6 * size.tokens * adapter, floor, round(moved)


class Projections(nn.Module):
    """q, k and v of an attention with grouped heads: k and v a quarter as wide."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


class Mlp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return,operator]


def block_widths(size: Size, kind: str) -> dict[str, tuple[int, int]]:
    """Name -> inputs, outputs."""
    k, n = size.k, size.n
    if kind == "mlp":
        return {"gate_proj": (k, n), "up_proj": (k, n), "down_proj": (n, k)}
    return {"q_proj": (k, n), "k_proj": (k, max(1, n // 4)), "v_proj": (k, max(1, n // 4))}


def block_arms(size: Size, dtype: torch.dtype, base: str, seed: int, kind: str) -> dict[str, Any]:
    """As linear_arms, for several layers: `kind` is qkv (with biases), qv (adapters on q and v alone) or mlp."""
    from fastlora_kernels import attach

    torch.manual_seed(seed)
    widths = block_widths(size, kind)
    model: Any = Mlp() if kind == "mlp" else Projections()
    for name, (k, n) in widths.items():
        model.add_module(name, linear_base(k, n, dtype, base, bias=kind == "qkv"))
    if kind == "mlp":
        model.act_fn = nn.SiLU()
    targets = ["q_proj", "v_proj"] if kind == "qv" else list(widths)
    with_adapters(model, targets, size.rank, base)
    x = torch.randn(size.tokens, size.k, dtype=dtype, device=DEVICE, requires_grad=True)
    gs = [torch.randn(size.tokens, n, dtype=dtype, device=DEVICE) for _, n in widths.values()]
    upstream = gs[-1:] if kind == "mlp" else gs
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # shares every weight
    left = list(attach(twin).left)

    def found(ys: Any, inputs: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        ys = ys if isinstance(ys, tuple) else (ys,)
        gradients = torch.autograd.grad(ys, inputs, [g.to(dtype) for g in upstream])
        outputs = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return outputs | dict(zip(("dx", *trained), gradients, strict=True))

    def step(model: Any) -> dict[str, Tensor]:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            ys = model(x)
        return found(ys, [x, *trained.values()], dtype)

    def truth() -> dict[str, Tensor]:
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        x_, *rest = (p.detach().to(wide).requires_grad_() for p in (x, *trained.values()))
        adapters = dict(zip(trained, rest, strict=True))

        def linear(name: str, x: Tensor) -> Tensor:
            layer = getattr(model, name)
            plain = layer.base_layer if name in targets else layer
            y = x @ dense_weight(plain, wide).T
            if plain.bias is not None:
                y = y + plain.bias.to(wide)
            if name not in targets:
                return y
            a, b = (adapters[f"{name}.lora_{letter}.default.weight"] for letter in "AB")
            return y + layer.scaling["default"] * (x @ a.T) @ b.T

        if kind == "mlp":
            h = nn.functional.silu(linear("gate_proj", x_)) * linear("up_proj", x_)
            return found(linear("down_proj", h), [x_, *rest], wide)
        return found(tuple(linear(name, x_) for name in widths), [x_, *rest], wide)

    h = torch.randn(size.tokens, size.n, dtype=dtype, device=DEVICE) if kind == "mlp" else None

    def floor() -> None:
        for name, g in zip(widths, gs, strict=True):
            layer = getattr(model, name)
            plain = layer.base_layer if name in targets else layer
            given = h if name == "down_proj" and h is not None else x.detach()
            _ = given @ dense_weight(plain, dtype).T, g @ dense_weight(plain, dtype)

    arms = {"truth": truth, "floor": floor, "peft": lambda: step(model)}
    return arms | ({"left": left[0]} if left else {"ours": lambda: step(twin)})


def block_work(size: Size, dtype: torch.dtype, base: str, kind: str) -> tuple[int, int, int]:
    """The sum over its layers; the bytes are at the least x, the weights and the outputs, each way."""
    works = [
        linear_work(Size(k, n, size.tokens, 0 if bare else size.rank), dtype, base)
        for name, (k, n) in block_widths(size, kind).items()
        for bare in (kind == "qv" and name == "k_proj",)
    ]
    flops, floor_flops, moved = (sum(numbers) for numbers in zip(*works, strict=True))
    if kind != "mlp":  # x is read and dx written once for all
        moved -= (len(works) - 1) * 3 * size.tokens * size.k * dtype.itemsize
    return flops, floor_flops, moved


CASES = (
    Case("lora_linear", "dense", linear_arms, linear_work),
    Case("lora_linear", "nf4", linear_arms, linear_work),
    Case("dora_linear", "dense", partial(linear_arms, dora=True), linear_work),
    Case("dora_linear", "nf4", partial(linear_arms, dora=True), linear_work),
    *(
        Case(f"lora_{kind}", base, partial(block_arms, kind=kind), partial(block_work, kind=kind))
        for kind in ("qkv", "qv", "mlp")
        for base in ("dense", "nf4")
    ),
)


def measure(case: Case, size: Size, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """One row, as it goes into the JSON: times in ms; `status` is ok, left (to PEFT) or wrong."""
    click.echo(f"{case.op} {case.base} {size}", err=True)
    first = case.arms(size, dtype, case.base, 0)
    flops, floor_flops, least = case.work(size, dtype, case.base)
    row: dict[str, Any] = {"op": case.op, "base": case.base, **size._asdict(), "status": "ok"}
    row |= {"flops": flops, "floor_flops": floor_flops, "bytes": least}
    if "left" in first:
        row |= {"status": "left", "reason": first["left"]}
    else:
        truth, found = first["truth"](), (first["ours"](), first["peft"]())
        row["error"] = {  # relative, in the 2-norm: ours, PEFT's
            name: [float((tensors[name] - true).norm() / true.norm()) for tensors in found]
            for name, true in truth.items()
        }
        eps = torch.finfo(torch.float32).eps
        if not all(ours <= 2 * peft + eps for ours, peft in row["error"].values()):  # so for NaN
            return row | {"status": "wrong"}
    # So many sets that going round them finds nothing in the L2 cache; at tiny sizes 64 must do.
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if DEVICE.type == "cuda" else 0
    count = min(64, max(2, 1 + 2 * cache // least))
    sets = [first] + [case.arms(size, dtype, case.base, seed) for seed in range(1, count)]
    for arm, times in timed(sets, repeats).items():
        p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        tflops = (floor_flops if arm == "floor" else flops) / p50 / 1e9
        row[arm] = {"p20": p20, "p50": p50, "p80": p80, "tflops": tflops}
        if arm != "floor":
            over = {f"over_{other}": p50 / row[other]["p50"] for other in ("floor", "peft")}
            row[arm] |= {"gb_s": least / p50 / 1e6, **over}
    return row


def timed(sets: list[dict[str, Any]], repeats: int) -> dict[str, list[float]]:
    """ms of each repeat. The arms take turns, so that a clock that drifts does so for all."""

    def now() -> Any:
        if DEVICE.type == "cpu":
            return time.perf_counter() * 1e3
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    spans: dict[str, list[Any]] = {arm: [] for arm in ("floor", "peft", "ours") if arm in sets[0]}
    warm_up = max(3, repeats // 5)
    for turn in range(warm_up + repeats):
        for place, (arm, span) in enumerate(spans.items()):
            start = now()
            sets[(turn + place) % len(sets)][arm]()
            span.append((start, now()))
    if DEVICE.type == "cpu":
        return {arm: [b - a for a, b in span[warm_up:]] for arm, span in spans.items()}
    torch.cuda.synchronize()
    return {arm: [a.elapsed_time(b) for a, b in span[warm_up:]] for arm, span in spans.items()}


def table(rows: list[dict[str, Any]], dtype: str) -> Table:
    names = "op,base,in x out,tokens,rank,GFLOP,MB,floor,PEFT,ours,/ PEFT,/ floor,TFLOP/s,GB/s"
    shown = Table(*names.split(","), title=f"{DEVICE}, {dtype}; ms at p20, p50, p80")
    for row in rows:
        cells = [row["op"], row["base"], f"{row['k']}x{row['n']}", row["tokens"], row["rank"]]
        cells += [f"{row['flops'] / 1e9:.4g}", f"{row['bytes'] / 1e6:.4g}"]
        for arm in ("floor", "peft", "ours"):
            times = [row[arm][p] for p in ("p20", "p50", "p80")] if arm in row else []
            cells.append(" ".join(f"{ms:.3g}" for ms in times))
        if row["status"] == "ok":
            ours = row["ours"]
            cells += [f"{ours[key]:.3g}" for key in ("over_peft", "over_floor", "tflops", "gb_s")]
        elif row["status"] == "left":
            cells[-1] = f"left to PEFT: {row['reason']}"
        else:
            errors = row["error"].items()
            cells[-1] = "WRONG: " + ", ".join(f"{n} {e:.1e} (PEFT {p:.1e})" for n, (e, p) in errors)
        shown.add_row(*map(str, cells), style="red" if row["status"] == "wrong" else None)
    return shown


def listed(_: click.Context, option: click.Parameter, text: str) -> list[list[int]]:
    """Reads 4096x4096,4096x14336, or 16,64 for other options than shapes."""
    item = r"[1-9]\d*x[1-9]\d*" if option.name == "shapes" else r"[1-9]\d*"
    if not re.fullmatch(f"{item}(,{item})*", text):
        raise click.BadParameter(f"{text!r} is not a list like {option.default}")
    return [[int(number) for number in entry.split("x")] for entry in text.split(",")]


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--shapes", default=DEFAULTS[0], callback=listed, help="inputs x outputs")
@click.option("--tokens", default=DEFAULTS[1], callback=listed)
@click.option("--ranks", default=DEFAULTS[2], callback=listed)
@click.option("--dtype", default="bfloat16", type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--repeats", default=DEFAULTS[3], type=click.IntRange(min=1))
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(shapes: Any, tokens: Any, ranks: Any, dtype: str, repeats: int, target: Any) -> None:
    from fastlora.rundir import provenance, store

    sizes = [Size(k, n, t, r) for k, n in shapes for (t,) in tokens for (r,) in ranks]
    rows = [measure(case, size, getattr(torch, dtype), repeats) for case in CASES for size in sizes]
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows, dtype))
    if target:
        document: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "dtype": dtype}
        document |= {"commit": provenance.commit(HERE), "versions": provenance.versions()}
        document |= {"machine": provenance.machine(), "repeats": repeats, "rows": rows}
        store.write_atomic(target, json.dumps(document, indent=1) + "\n")
    sys.exit(3 if any(row["status"] == "wrong" for row in rows) else 0)


if __name__ == "__main__":
    main()
