"""Linear layers in 8-bit integers against the same in full, and where they are refused."""

from __future__ import annotations

import pytest
import torch

from serving.engine.quantization import Int8Product, check_quantization, quantize_rows
from serving.errors import StartupError
from vblora import kernels

WIDTH, OUT = 64, 48


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@torch.inference_mode()
def test_a_product_is_near_the_exact_one_and_rows_do_not_change_each_other(bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, WIDTH, generator=generator).to(dtype)
    weight[3] = 0
    added = torch.randn(OUT, generator=generator).to(dtype) if bias else None
    x = torch.randn(1, 9, WIDTH, generator=generator).to(dtype)
    x[0, 4] = 0
    product = Int8Product(weight, added)
    expected = x.float() @ weight.float().T + (0 if added is None else added.float())
    got = product(x)
    assert got.dtype == dtype and got.shape == expected.shape
    assert float((got.float() - expected).norm() / expected.norm()) < 0.02
    loud = x.clone()
    loud[0, 0] *= 1000
    assert torch.equal(product(loud)[0, 1:], got[0, 1:])


def test_both_ways_of_quantising_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    x[1] = 0
    integers, scales = quantize_rows(x)
    monkeypatch.setattr(kernels, "available", False)
    others, same_scales = quantize_rows(x)
    assert torch.allclose(scales, same_scales, rtol=1e-6) and int((integers - others).abs().max()) <= 1


def test_it_is_refused_where_there_are_no_such_products(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantization(None, torch.device("cuda"), torch.float16)
    with pytest.raises(StartupError, match="needs a CPU with VNNI"):
        check_quantization("int8", torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    with pytest.raises(StartupError, match="float32 or bfloat16, not torch"):
        check_quantization("int8", torch.device("cpu"), torch.float16)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(StartupError, match="needs a CPU with VNNI"):
        check_quantization("int8", torch.device("cpu"), torch.bfloat16)
