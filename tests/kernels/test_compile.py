"""Every kernel compiled for GPUs that are not here: what the interpreter does not see, types and registers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any

from fastlora_kernels.ops import cast, dequantize, head_loss, skinny

OPS = "fastlora_kernels.ops."
PLACES = {"KIND": "nested", "WORDS": True, "BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256}
PLAIN = PLACES | {"BLOCK_N": 16, "BLOCK_K": 256, "SCALES": 4}
DENSE = PLAIN | {
    "KIND": "dense",
    "WORDS": False,
    "SCALES": 0,
    "BLOCKSIZE": 1,
    "NESTED_BLOCKSIZE": 1,
}
RANKS = {"RANK": 40, "PADDED_RANK": 64, "BLOCK_R": 64}
TYPES = {  # of arguments that are not the usual *bf16 for ..._ptr and i32
    "absmax_ptr": "*u8", "table_ptr": "*fp32", "nested_absmax_ptr": "*fp32", "nested_table_ptr": "*fp32",
    "offset_ptr": "*fp32", "row_scale_ptr": "*fp32", "c_ptr": "*fp32", "partial_ptr": "*fp32", "parts_ptr": "*fp32",
    "up_parts_ptr": "*fp32", "db_parts_ptr": "*fp32", "seed_ptr": "*i64", "scaling": "fp32", "p": "fp32",
}  # fmt: skip
GLU = {"ACTIVATION": "gelu", "BLOCK": 1024}
KERNELS: list[tuple[str, dict[str, Any], dict[str, str], dict[str, int]]] = [
    ("dequantize._dequantize", PLAIN | RANKS | {"FOLD": False, "ORDERED": False, "ROW_SCALE": False},
     {"weight_ptr": "*u8"}, {}),
    ("dequantize._row_norms", PLAIN | RANKS, {"weight_ptr": "*u8", "out_ptr": "*fp32"}, {}),
    ("dequantize._row_norms", DENSE | RANKS, {"out_ptr": "*fp32", "absmax_ptr": "*bf16"}, {}),
    ("cast._cast", {"BLOCK": cast.BLOCK}, dict.fromkeys([f"ptr_{i}" for i in range(cast.MOST)], "*fp32"), {}),
    ("head_loss._cross_entropy", {"SOFTCAP": True, "GRADIENT": True, "BLOCK_V": head_loss.BLOCK_V},
     {"labels_ptr": "*i64", "loss_ptr": "*fp32", "logit_scale": "fp32", "softcap": "fp32"},
     {"num_warps": head_loss.BLOCK_V // 512}),
    ("skinny._sum_parts", {"RANK": 16, "BLOCK": 256, "AT_ONCE": 16}, {}, {}),
    ("glu._glu", GLU, {}, {}),
    ("glu._glu_backward", GLU, {}, {}),
    ("dropout._dropout", {"BLOCK": 2048}, {}, {}),
    ("dora_linear._scale_columns", {"BIAS": True, "BLOCK_T": 64, "BLOCK_N": 64}, {}, {}),
    ("dora_linear._column_dots", {"BLOCK_T": 64, "BLOCK_N": 64}, {}, {}),
]  # fmt: skip


def folded(architecture: int) -> list[tuple[str, dict[str, Any], dict[str, str], dict[str, int]]]:
    """With A and B in float32, as in forward, and cast, as in backward, with the tiles that are taken there."""
    found = []
    for itemsize, kind in ((4, "*fp32"), (2, "*bf16")):
        for rank, row_scale in ((16, False), (40, True), (130, False)):
            hopper = architecture == 90
            tile, warps = dequantize.fold_tile(rank, itemsize, hopper)
            more = {"FOLD": True, "ORDERED": hopper, "ROW_SCALE": row_scale}
            constants = dequantize._compiled_in(tile, rank, "nested", 64, 256, 4096, True, **more)
            types = {"weight_ptr": "*u8", "a_ptr": kind, "b_ptr": kind}
            found.append(("dequantize._dequantize", constants, types, {"num_warps": warps}))
    return found


def one_pass(architecture: int) -> list[tuple[str, dict[str, Any], dict[str, str], dict[str, int]]]:
    """With the tiles that are taken there."""
    found = []
    for n, rank in ((14336, 16), (4096, 16), (14336, 32)):
        block_n, stages = skinny.tile(SHARED_KIB[architecture] * 1024, n, rank)
        blocks = {"BLOCK_T": skinny.BLOCK_T, "BLOCK_N": block_n, "RANK": rank, "BLOCK_R": rank}
        options = {"num_warps": skinny.WARPS, "num_stages": stages}
        found.append(("skinny._up_and_gradient", blocks, {}, options))
    block_t, block_n, warps = skinny.EXPANDED
    blocks = {"BIAS": True, "RANK": 32, "BLOCK_R": 32, "BLOCK_T": block_t, "BLOCK_N": block_n}
    found.append(("skinny._expand", blocks, {}, {"num_warps": warps}))
    return found


def kernels_of(architecture: int) -> list[Any]:
    return [*KERNELS, *folded(architecture), *one_pass(architecture)]


def compiled(architecture: int) -> list[tuple[str, int]]:
    """Each kernel's name and its bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    found = []
    for name, constants, types, options in kernels_of(architecture):
        module, _, function = name.partition(".")
        kernel = getattr(importlib.import_module(OPS + module), function)
        signature, fixed, aligned = {}, {}, {}
        for i, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument], fixed[(i,)] = "constexpr", constants[argument]
                continue
            usual = "*bf16" if argument.endswith("_ptr") else "i32"
            signature[argument] = (TYPES | types).get(argument, usual)
            if signature[argument] != "fp32":
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, fixed, aligned)
        binary = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        found.append((name, binary.metadata.shared))
    return found


SHARED_KIB = {80: 163, 89: 99, 90: 227}
"""What a program may have, by architecture."""


def test_they_fit() -> None:
    """In a process of its own: here the interpreter has Triton's place."""
    code = "import json; from test_compile import *; print(json.dumps([compiled(each) for each in SHARED_KIB]))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [os.path.dirname(__file__), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for (architecture, kib), found in zip(SHARED_KIB.items(), json.loads(run.stdout), strict=True):
        assert [name for name, _ in found] == [name for name, *_ in kernels_of(architecture)]
        for name, taken in found:
            assert taken <= kib * 1024, (architecture, name, taken)
