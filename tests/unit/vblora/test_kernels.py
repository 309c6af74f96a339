"""The compiled kernels against the same maths in torch, and what they refuse. Attention is in test_attention.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from vblora import kernels

SLOTS, RANK, INPUTS, OUTPUTS = 5, 8, 40, (24, 64, 8)


def case(rows: int, dtype: torch.dtype, table_dtype: torch.dtype) -> dict[str, Tensor]:
    """Three modules in a slot, in another order than their outputs and with gaps between them; y is a slice."""
    generator = torch.Generator().manual_seed(rows)
    starts, start = [0, 0, 0], 3
    for module in (2, 0, 1):
        starts[module] = start
        start += RANK * (INPUTS + OUTPUTS[module]) + 5
    table = torch.randn(SLOTS, start, generator=generator).to(table_dtype)
    wide = torch.randn(rows, sum(OUTPUTS) + 7, generator=generator).to(dtype)
    return {
        "y": wide[:, : sum(OUTPUTS)],
        "x": torch.randn(rows, INPUTS, generator=generator).to(dtype),
        "table": table,
        "slots": torch.arange(rows, dtype=torch.int32) % SLOTS,
        "modules": torch.tensor(list(zip(starts, OUTPUTS, strict=True))),
    }


def add_delta(given: dict[str, Tensor]) -> None:
    kernels.add_delta(given["y"], given["x"], kernels.Delta(given["table"], given["slots"], given["modules"], RANK))


def expected(y: Tensor, x: Tensor, table: Tensor, slots: Tensor, modules: Tensor) -> Tensor:
    result, column = y.double(), 0
    for start, outputs in modules.tolist():
        middle, end = start + RANK * INPUTS, start + RANK * (INPUTS + outputs)
        a = table[:, start:middle].double().view(SLOTS, RANK, INPUTS)
        b = table[:, middle:end].double().view(SLOTS, RANK, outputs)
        for row, slot in enumerate(slots.tolist()):
            if slot:
                result[row, column : column + outputs] += x[row].double() @ a[slot].T @ b[slot]
        column += outputs
    return result


@pytest.mark.parametrize("rows", [1, 6, 700])
@pytest.mark.parametrize(
    ("dtype", "table_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
)
def test_deltas_of_modules_that_share_their_input(
    rows: int, dtype: torch.dtype, table_dtype: torch.dtype, tolerance: float
) -> None:
    given = case(rows, dtype, table_dtype)
    wanted, beside = expected(**given), given["y"]._base[:, sum(OUTPUTS) :].clone()
    add_delta(given)
    assert torch.allclose(given["y"].double(), wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)
    assert torch.equal(given["y"]._base[:, sum(OUTPUTS) :], beside)


def test_a_row_in_slot_zero_stays_as_it_is() -> None:
    given = case(3, torch.bfloat16, torch.float32)
    given["slots"].zero_()
    before = given["y"].clone()
    add_delta(given)
    assert torch.equal(given["y"], before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("slots", torch.tensor([0, 5, 1], dtype=torch.int32), "no such slot"),
        ("slots", torch.tensor([0, -1, 1], dtype=torch.int32), "no such slot"),
        ("slots", torch.tensor([0, 1, 1]), "slots must be int32"),
        ("slots", torch.tensor([0, 1], dtype=torch.int32), "as many rows"),
        ("modules", torch.tensor([[2000, 96]]), "no such module"),
        ("modules", torch.tensor([[0, 24]]), "as many outputs"),
        ("modules", torch.tensor([[-8, 96]]), "no such module"),
        ("modules", torch.tensor([[3]]), "modules, 2"),
        ("x", torch.zeros(3, INPUTS, dtype=torch.float64), "x must be float32 or bfloat16"),
        ("table", torch.zeros(SLOTS, 9), "no such module"),
    ],
)
def test_what_would_read_outside_of_a_tensor_is_refused(name: str, value: Tensor, message: str) -> None:
    given = case(3, torch.float32, torch.float32) | {name: value}
    with pytest.raises(RuntimeError, match=message):
        add_delta(given)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("indices", kernels.INDICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_composing(k: int, indices: torch.dtype, dtype: torch.dtype, tolerance: float) -> None:
    """More sub-vectors than one thread takes; the last weight of each is what the others leave of one."""
    generator = torch.Generator().manual_seed(k)
    bank = torch.randn(200, 24, generator=generator)
    chosen = torch.randint(200, (5000, k), generator=generator)
    weights = torch.rand(5000, k, generator=generator)
    weights /= weights.sum(-1, keepdim=True)
    target = torch.full((5000 * 24 + 8,), 9.0, dtype=dtype)
    kernels.compose(target[:-8], chosen.to(indices), weights[:, :-1].contiguous(), bank)
    expected = (bank.double()[chosen] * weights.double()[..., None]).sum(1).flatten()
    assert torch.allclose(target[:-8].double(), expected, atol=tolerance * 4, rtol=0)
    assert (target[-8:] == 9).all()


def test_composing_refuses_vectors_that_are_not_in_the_bank() -> None:
    weights, bank = torch.zeros(2, 1), torch.zeros(20, 8)
    for wrong in (20, -1):
        with pytest.raises(RuntimeError, match="no such vector"):
            kernels.compose(torch.zeros(16), torch.tensor([[0, 1], [2, wrong]], dtype=torch.int16), weights, bank)
    with pytest.raises(RuntimeError, match="must hold all"):
        kernels.compose(torch.zeros(8), torch.zeros(2, 2, dtype=torch.uint8), weights, bank)


def test_attention_refuses_blocks_outside_of_the_cache() -> None:
    cache = torch.zeros(32, 1, 8)
    for table, length, message in (([2], 16, "no such block"), ([-1], 3, "no such block"), ([0], 17, "fit its blocks")):
        with pytest.raises(RuntimeError, match=message):
            kernels.decode_attention(
                torch.zeros(1, 2, 8), cache, cache, torch.tensor([table], dtype=torch.int32),
                torch.tensor([length], dtype=torch.int32), block_size=16, window=None, scaling=1.0, softcap=None,
                sinks=None,
            )  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(48,), (7, 48), (1, 3, 5, 48), (1, 3, 600, 48)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """Also of a tensor whose dimensions were swapped, as the heads' norms get it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(48, generator=torch.Generator().manual_seed(1))
    for given in (x, x.transpose(1, 2)) if len(shape) == 4 else (x,):
        wide = given.double()
        wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        got = kernels.rms_norm(given, weight, 1e-5)
        assert got.dtype == dtype and got.shape == given.shape
        assert torch.allclose(got.double(), wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_new_keys_go_to_their_places_in_the_cache(dtype: torch.dtype) -> None:
    """Heads come first in what the model gives, and need not lie one behind the other."""
    fresh = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)[0]
    cache, targets = torch.zeros(32, 2, 8, dtype=dtype), torch.tensor([31, 0, 7, 8])
    kernels.store(cache, fresh, targets)
    assert torch.equal(cache[targets], fresh.transpose(0, 1))
    assert cache.count_nonzero() == fresh.count_nonzero()
    for wrong in (32, -1):
        with pytest.raises(RuntimeError, match="no such position"):
            kernels.store(cache, fresh, torch.tensor([0, 1, 2, wrong]))


@pytest.mark.parametrize("rows", [(3,), (1, 700)], ids=str)
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_rows_as_8_bit_integers(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each by its own scale: the smallest row is as exact, for its size, as the largest; zeros stay zeros."""
    x = torch.randn(*rows, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., 0, :] *= 1000
    x[..., 1, :] = 0
    integers, scales = kernels.quantize_rows(x)
    assert integers.dtype == torch.int8 and integers.shape == x.shape and scales.shape == (*rows, 1)
    error = (integers * scales - x.float()).abs().amax(-1)
    assert (error <= 0.505 * x.float().abs().amax(-1) / 127).all()
    assert not scales[..., 1, :].any() and not integers[..., 1, :].any()
    y = integers.to(dtype)
    kernels.scale_rows(y, scales)
    assert torch.allclose(y.float(), integers * scales, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rotary_positions(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 70, 3, 16, generator=generator).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn(1, 70, 16, generator=generator).to(dtype) for _ in range(2))
    first, second = x.double().chunk(2, dim=-1)
    wanted = x.double() * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    got = kernels.rotate(x, cos, sin)
    assert got.dtype == dtype and got.shape == x.shape
    assert torch.allclose(got.double(), wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)
    with pytest.raises(RuntimeError, match="an angle for each token"):
        kernels.rotate(x, cos[:, :69].contiguous(), sin[:, :69].contiguous())


@pytest.mark.parametrize("width", [1, 511, 512, 5000])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_the_highest_of_each_row(width: int, dtype: torch.dtype) -> None:
    x = torch.randint(-9, 9, (40, width), generator=torch.Generator().manual_seed(width)).to(dtype)
    x[0], x[1], x[2] = -float("inf"), float("inf"), 0
    x[3, width // 2] = 100
    wanted = (x == x.amax(-1, keepdim=True)).int().argmax(-1)  # the first of equal ones
    assert torch.equal(kernels.argmax(x), wanted)
    x[4:, width - 1] = x[5:, width // 3] = float("nan")
    assert x[torch.arange(4, 40), kernels.argmax(x)[4:]].isnan().all()
    assert torch.equal(kernels.argmax(x)[:4], wanted[:4])


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize(("size", "words"), [(1, 1), (32, 1), (70, 3), (1000, 32), (100, 2), (64, 0)])
def test_forbidding_what_has_no_bit(dtype: torch.dtype, size: int, words: int) -> None:
    generator = torch.Generator().manual_seed(size)
    bits = torch.randint(2, (words, 32), generator=generator)
    bits[1:2] = 0
    x = torch.randn(size + 40, generator=generator).to(dtype)
    kept = torch.cat([bits.flatten().bool(), torch.zeros(size, dtype=torch.bool)])[:size]
    wanted = torch.cat([x[:size].masked_fill(~kept, -torch.inf), x[size:]])
    kernels.forbid(x[:size], (bits << torch.arange(32)).sum(-1).to(torch.int32))
    assert torch.equal(x, wanted)


def test_bits_of_another_type_are_refused() -> None:
    with pytest.raises(RuntimeError, match="bits must be int32"):
        kernels.forbid(torch.zeros(64), torch.zeros(2, dtype=torch.int64))


def test_nothing_that_is_not_a_number_is_hidden() -> None:
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]], dtype=torch.bfloat16)
    assert kernels.rms_norm(x, torch.ones(2), 1e-6).isnan().any(dim=1).all()


def test_dtypes_and_devices_that_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.usable(torch.zeros(1)) and kernels.usable(torch.zeros(1, dtype=torch.bfloat16))
    assert not kernels.usable(torch.zeros(1, dtype=torch.float16))
    assert not kernels.usable(torch.zeros(1, device="meta"))
    monkeypatch.setattr(kernels, "available", False)
    assert not kernels.usable(torch.zeros(1))


def test_the_package_works_where_they_were_not_built() -> None:
    """As after an installation without a compiler: the module is not there."""
    code = (
        "import sys; sys.modules['vblora._kernels'] = None\n"
        "import vblora, vblora.kernels; assert vblora.kernels.available is False"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
