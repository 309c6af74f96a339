"""Linear layers in 8-bit integers: weights with a scale for each output, activations with one for each row.

A row's scale is its own, so that no request changes what another gets. The product is oneDNN's. Knows layers, not what
the model does with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serving.errors import StartupError
from vblora import kernels

HIGHEST = 127


class Int8Product:
    """x (..., rows, in) → x Wᵀ + bias (..., rows, out) in the dtype of x, float32 or bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        quantised, scales = quantize_rows(weight)
        self._bias = bias
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._scales = scales.flatten().clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros has 0
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        quantised, scales = quantize_rows(x)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantised.flatten(0, -2), 1.0, 0, self._weight, self._scales, self._zero_points, None, 1.0, 0, x.dtype,
            "none", [], "",
        )  # fmt: skip
        y = y.view(*x.shape[:-1], -1)
        if kernels.usable(y):
            kernels.scale_rows(y, scales)
        else:
            y.mul_(scales)
        return y if self._bias is None else y.add_(self._bias)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., width) as int8 of the same shape and a float32 scale a row (..., 1)."""
    if kernels.usable(x):
        return kernels.quantize_rows(x)
    scales = x.float().abs().amax(-1, keepdim=True) / HIGHEST
    return (x.float() / scales).nan_to_num(0.0).round().to(torch.int8), scales


def check_quantization(quantization: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `StartupError` where this machine, or the model's dtype, has no such products."""
    if quantization is None:
        return
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():
        raise StartupError(
            f"quantization {quantization} needs a CPU with VNNI instructions (AVX-512 VNNI or AVX-VNNI), which "
            f"{device} is not: start without it"
        )
    if dtype not in kernels.DTYPES:
        raise StartupError(f"quantization {quantization} takes dtype float32 or bfloat16, not {dtype}")
