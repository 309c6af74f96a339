"""The equations against their definition, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from vblora.mixture import TopK, compose, compose_all, index_dtype, matrix_a, matrix_b, topk_mixture


def test_mixture_is_the_softmax_over_the_largest_only() -> None:
    mixture = topk_mixture(torch.tensor([[1.0, 3.0, -2.0, 2.0]]), 2)
    assert mixture.indices.tolist() == [[1, 3]]
    first = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(mixture.weights, torch.tensor([[first, 1 - first]]))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_compose_sums_weighted_rows(k: int) -> None:
    torch.manual_seed(0)
    bank, logits = torch.randn(5, 3), torch.randn(2, 4, 5)
    mixture = topk_mixture(logits, k)
    wanted = (mixture.weights.unsqueeze(-1) * bank[mixture.indices]).sum(-2)
    torch.testing.assert_close(compose(mixture, bank), wanted)
    small = TopK(mixture.indices.to(torch.uint8), mixture.weights)
    torch.testing.assert_close(compose(small, bank), wanted)


def test_compose_passes_gradients_to_logits_and_bank() -> None:
    torch.manual_seed(0)
    bank = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, v: compose(topk_mixture(s, 2), v), (logits, bank))


def test_matrices_have_sub_vectors_where_the_method_puts_them() -> None:
    sub_a, sub_b = torch.randn(2, 3, 4), torch.randn(5, 2, 4)
    a, b = matrix_a(sub_a), matrix_b(sub_b).T
    assert a.shape == (2, 12)
    assert b.shape == (20, 2)
    for q in range(2):
        for j in range(3):
            assert torch.equal(a[q, j * 4 : (j + 1) * 4], sub_a[q, j])
        for j in range(5):
            assert torch.equal(b[j * 4 : (j + 1) * 4, q], sub_b[j, q])


def test_index_dtype_is_the_smallest_that_fits() -> None:
    sizes = {1: torch.uint8, 256: torch.uint8, 257: torch.int16, 32768: torch.int16, 32769: torch.int32}
    assert {size: index_dtype(size) for size in sizes} == sizes
    assert index_dtype(2**31 + 1) == torch.int64


def test_composing_many_in_one_operation() -> None:
    bank = torch.rand(12, 4)
    mixtures = [topk_mixture(torch.randn(*shape, 12), 3) for shape in ((2, 5), (7, 2), (1, 1))]
    for found, mixture in zip(compose_all(mixtures, bank), mixtures, strict=True):
        assert torch.equal(found, compose(mixture, bank))
