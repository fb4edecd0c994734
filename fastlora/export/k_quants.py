"""Q4_K and Q6_K, the types of a q4_k_m file, which the gguf package reads and does not write.

Q4_K, blocks of 256 in 8 parts of 32: w = d s q - dmin m, with q of 4 bits, s and m of 6. Q6_K, blocks of 256 in 16
parts of 16: w = d s q, with q of 6 bits and s of 8. d and dmin are float16. The tests hold the bytes to the gguf
package's dequantize.

A part's scale is fitted by least squares to what its first rounding gave, from several first scales; of these the
one that errs least is kept. Shapes: N blocks, P parts of a block, K weights of a part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType

_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""First scales, in parts of what the widest weight asks for."""
_TINY = 1e-30


def q4_k_m_type(name: str, layers: int) -> GGMLQuantizationType:
    """The mix that llama.cpp names q4_k_m: six bits where errors cost the most. `name`: a tensor's, in the file."""
    from gguf import GGMLQuantizationType

    if name == "output.weight":
        return GGMLQuantizationType.Q6_K
    if name.endswith(("attn_v.weight", "ffn_down.weight")):
        layer, eighth = int(name.split(".")[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return GGMLQuantizationType.Q6_K
    return GGMLQuantizationType.Q4_K


def q4_k(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 (rows, 256 n) -> bytes (rows, 144 n)."""
    import torch

    w_NPK = _blocks(rows, 8)
    scale_NP, low_NP = _fit_with_offset(w_NPK)
    d_N1, s_NP = _levels(scale_NP, 63)
    dmin_N1, m_NP = _levels(low_NP, 63)
    step_NP1, low_NP1 = (d_N1 * s_NP).unsqueeze(-1), (dmin_N1 * m_NP).unsqueeze(-1)
    q_NPK = ((w_NPK + low_NP1) / step_NP1.clamp_min(_TINY)).round().clamp(0, 15).to(torch.uint8)
    s, m = s_NP.to(torch.uint8), m_NP.to(torch.uint8)
    packed = torch.cat(
        [
            s[:, :4] | (s[:, 4:] >> 4) << 6,
            m[:, :4] | (m[:, 4:] >> 4) << 6,
            (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        dim=1,
    )
    nibbles = (q_NPK[:, 0::2] | q_NPK[:, 1::2] << 4).flatten(1)
    return _bytes([_half(d_N1), _half(dmin_N1), packed, nibbles], rows)


def q6_k(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 (rows, 256 n) -> bytes (rows, 210 n)."""
    import torch

    w_NPK = _blocks(rows, 16)
    scale_NP = _fit(w_NPK)
    widest = scale_NP.gather(1, scale_NP.abs().argmax(1, keepdim=True))
    d_N1 = (widest / -128).half().float()
    s_NP = (scale_NP / _nonzero(d_N1)).round().clamp(-128, 127)
    step = _nonzero((d_N1 * s_NP).unsqueeze(-1))
    q_NPK = (w_NPK / step).round().clamp(-32, 31) + 32
    q = q_NPK.to(torch.uint8).reshape(-1, 2, 4, 32)  # two halves, each of four groups of 32
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = (
        q[:, :, 0] >> 4 | (q[:, :, 1] >> 4) << 2 | (q[:, :, 2] >> 4) << 4 | (q[:, :, 3] >> 4) << 6
    )
    scales = s_NP.to(torch.int8).view(torch.uint8)
    return _bytes([low.flatten(1), high.flatten(1), scales, _half(d_N1)], rows)


def _blocks(rows: np.ndarray[Any, Any], parts: int) -> torch.Tensor:
    import torch

    from fastlora.export.forward import compute_device

    flat = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).to(compute_device())
    return flat.reshape(-1, parts, 256 // parts)


def _fit_with_offset(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and low of each part, both >= 0, for w = scale q - low with q in 0..15."""
    low = (-w.amin(-1)).clamp_min(0)
    width = (w.amax(-1) + low).clamp_min(0)
    best_scale, best_low, best = width / 15, low, None
    for shrink in _SHRINKS:
        scale, offset = width * shrink / 15, low * shrink
        for _ in range(2):
            q = (
                ((w + offset.unsqueeze(-1)) / scale.clamp_min(_TINY).unsqueeze(-1))
                .round()
                .clamp(0, 15)
            )
            q_mean, w_mean = q.mean(-1), w.mean(-1)
            spread = (q.square().mean(-1) - q_mean.square()).clamp_min(0)
            fitted = ((q * w).mean(-1) - q_mean * w_mean) / spread.clamp_min(1e-12)
            # All in one level, or the offset below 0: the one is fitted without the other.
            spreads = spread > 1e-6
            offset = (fitted.where(spreads, 0 * fitted) * q_mean - w_mean).clamp_min(0)
            offset = offset.where(spreads | (q_mean == 0), 0 * offset)
            alone = (q * w).sum(-1) / q.square().sum(-1).clamp_min(1e-12)
            scale = fitted.where(spreads & (offset > 0), alone).clamp_min(0)
        error = (scale.unsqueeze(-1) * q - offset.unsqueeze(-1) - w).square().sum(-1)
        better = error < best if best is not None else error >= 0
        best_scale, best_low = scale.where(better, best_scale), offset.where(better, best_low)
        best = error if best is None else error.minimum(best)
    return best_scale, best_low


def _fit(w: torch.Tensor) -> torch.Tensor:
    """scale of each part, of either sign, for w = scale q with q in -32..31."""
    widest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_scale, best = widest / -32, None
    for shrink in _SHRINKS:
        scale = widest * shrink / -32
        q = (w / _nonzero(scale).unsqueeze(-1)).round().clamp(-32, 31)
        scale = (q * w).sum(-1) / q.square().sum(-1).clamp_min(1e-12)
        error = (scale.unsqueeze(-1) * q - w).square().sum(-1)
        better = error < best if best is not None else error >= 0
        best_scale = scale.where(better, best_scale)
        best = error if best is None else error.minimum(best)
    return best_scale


def _levels(values: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The float16 unit of a block's values, and each value in whole units."""
    unit = (values.amax(1, keepdim=True) / most).half().float()
    return unit, (values / unit.clamp_min(_TINY)).round().clamp(0, most)


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    return values.where(values != 0, values.new_tensor(_TINY))


def _half(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.half().view(torch.uint8)


def _bytes(parts: list[torch.Tensor], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import torch

    packed = torch.cat(parts, dim=1).cpu().numpy()
    return np.ascontiguousarray(packed.reshape(*rows.shape[:-1], -1))


def _table() -> dict[Any, Any]:
    from gguf import GGMLQuantizationType

    return {GGMLQuantizationType.Q4_K: q4_k, GGMLQuantizationType.Q6_K: q6_k}


K_QUANTS = _table()
