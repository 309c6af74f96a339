from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from serving.engine.detokenizer import Detokenizer
from serving.engine.request import RequestState
from serving.engine.sampler import argmax, sample, truncate, uniform
from serving.types import GenerationRequest, SamplingParams
from tests.support import tiny_tokenizer

EOS = frozenset({1})
VOCABULARY = 2048


def state(prompt: list[int], generated: list[int] | None = None, seed: int = 0, **params: Any) -> RequestState:
    sampling = dataclasses.replace(SamplingParams(max_tokens=10, temperature=0), **params)
    request = GenerationRequest("x", "default", tuple(prompt), sampling)
    tokens = prompt + (generated or [])
    return RequestState(request, Detokenizer(tiny_tokenizer().backend_tokenizer), seed, 0.0, 0, tokens)


def one(row: torch.Tensor, entry: RequestState) -> int | None:
    return sample(row[None], [entry], EOS)[0]


def test_argmax_by_blocks_is_argmax_with_the_lowest_index_of_ties() -> None:
    logits = torch.randn(5, 4096, generator=torch.Generator().manual_seed(0)).round(decimals=0)
    best = logits.amax(-1)
    expected = [(row == top).nonzero()[0, 0].item() for row, top in zip(logits, best, strict=True)]
    assert argmax(logits).tolist() == expected
    assert argmax(logits[:, :1000]).tolist() == [(row == row.max()).nonzero()[0, 0].item() for row in logits[:, :1000]]


def test_rows_follow_their_own_parameters() -> None:
    logits = torch.zeros(3, VOCABULARY)
    logits[:, 7], logits[:, 8] = 5.0, 4.0
    entries = [state([3]), state([3], logit_bias=((7, -100.0),)), state([3], temperature=1.0, top_k=1)]
    assert sample(logits, entries, EOS) == [7, 8, 7]


def test_repetition_penalty_counts_the_prompt_presence_and_frequency_do_not() -> None:
    row = torch.zeros(VOCABULARY)
    row[7], row[8] = 5.0, 4.5
    assert one(row, state([7], repetition_penalty=1.2)) == 8
    assert one(row, state([7], presence_penalty=2.0)) == 7
    assert one(row, state([3], [7], presence_penalty=2.0)) == 8
    assert one(row, state([3], [7], frequency_penalty=0.3)) == 7
    assert one(row, state([3], [7, 7], frequency_penalty=0.3)) == 8


def test_negative_logits_grow_more_negative_under_repetition_penalty() -> None:
    row = torch.full((VOCABULARY,), -9.0)
    row[7], row[8] = -1.0, -1.1
    assert one(row, state([7], repetition_penalty=1.5)) == 8


def test_ends_are_banned_until_min_tokens_are_out() -> None:
    row = torch.zeros(VOCABULARY)
    row[1], row[9], row[8] = 9.0, 8.0, 7.0
    assert one(row, state([3], min_tokens=1, stop_token_ids=(9,))) == 8
    assert one(row, state([3], [5], min_tokens=1, stop_token_ids=(9,))) == 1


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.49}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.79}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.31}, [0, 1]),
        ({"min_p": 0.1, "top_k": 3}, [0, 1, 2]),
        ({"top_k": 2, "top_p": 0.6}, [0]),
    ],
)
def test_truncation_keeps_what_its_definition_says(params: dict[str, Any], kept: list[int]) -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    result = truncate(probabilities, SamplingParams(max_tokens=1, **params))
    assert result.nonzero().flatten().tolist() == kept
    assert torch.equal(result[kept], probabilities[kept])


def test_a_nucleus_larger_than_the_first_guess_is_exact() -> None:
    probabilities = torch.rand(20_000, generator=torch.Generator().manual_seed(1)).double()
    probabilities = (probabilities / probabilities.sum()).float()
    result = truncate(probabilities, SamplingParams(max_tokens=1, top_p=0.9))
    ordered, order = probabilities.sort(descending=True)
    count = int((ordered.double().cumsum(-1) - ordered.double() < 0.9 * probabilities.double().sum()).sum())
    assert set(result.nonzero().flatten().tolist()) == set(order[:count].tolist())


def test_a_seed_and_a_position_decide_the_token() -> None:
    row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))
    tokens = [one(row, state([3], [5] * step, seed=42, temperature=1.0)) for step in range(20)]
    again = [one(row, state([3], [5] * step, seed=42, temperature=1.0)) for step in range(20)]
    other = [one(row, state([3], [5] * step, seed=43, temperature=1.0)) for step in range(20)]
    assert tokens == again
    assert tokens != other
    assert len(set(tokens)) > 5


def test_neighbours_do_not_change_a_seeded_row() -> None:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(3))
    alone = one(logits[1], state([3], seed=7, temperature=0.8))
    entries = [state([3], temperature=1.5), state([3], seed=7, temperature=0.8), state([3])]
    assert sample(logits, entries, EOS)[1] == alone


def test_frequencies_follow_the_distribution() -> None:
    row = torch.full((VOCABULARY,), float("-inf"))
    row[10], row[20], row[30] = torch.tensor([0.6, 0.3, 0.1]).log()
    count = Counter(one(row, state([3], seed=seed, temperature=1.0)) for seed in range(3000))
    assert {token: round(n / 3000, 1) for token, n in count.items()} == {10: 0.6, 20: 0.3, 30: 0.1}


def test_temperature_sharpens_and_a_tiny_one_is_greedy() -> None:
    row = torch.zeros(VOCABULARY)
    row[7] = 1.0
    drawn = {one(row, state([3], seed=seed, temperature=1e-30)) for seed in range(20)}
    assert drawn == {7}


def test_uniform_numbers_fill_the_unit_interval() -> None:
    numbers = [uniform(1, position) for position in range(2000)]
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.03


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_are_told_from_the_others(temperature: float) -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[0] = float("nan")
    logits[1, 7] = 50.0
    assert sample(logits, [state([3], temperature=temperature), state([3], temperature=temperature)], EOS) == [None, 7]


def test_bad_words_are_banned_where_they_would_be_completed() -> None:
    row = torch.zeros(VOCABULARY)
    row[7], row[8] = 5.0, 4.0
    assert one(row, state([3], bad_words=((7,),))) == 8
    assert one(row, state([3], generated=[6], bad_words=((6, 7),))) == 8
    assert one(row, state([3], generated=[5], bad_words=((6, 7),))) == 7
    assert one(row, state([3, 6], bad_words=((6, 7),))) == 7  # the prompt's tokens begin no word of the answer


def test_only_allowed_tokens_are_chosen() -> None:
    row = torch.arange(VOCABULARY).float()
    assert one(row, state([3], allowed_token_ids=(5, 9, 2))) == 9
    assert one(row, state([3], allowed_token_ids=(5, 9, 2), bad_words=((9,),))) == 5


def test_a_ban_that_would_leave_nothing_is_not_obeyed() -> None:
    row = torch.arange(VOCABULARY).float()
    assert one(row, state([3], allowed_token_ids=(1,), min_tokens=4)) == 1
    assert one(row, state([3], allowed_token_ids=(5,), bad_words=((5,),))) == 5
    assert one(row * float("nan"), state([3], allowed_token_ids=(5,), bad_words=((5,),))) is None


def test_the_smallest_nucleus_is_the_likeliest_token() -> None:
    row = torch.zeros(VOCABULARY)
    row[7] = 5.0
    for number in range(5):
        assert one(row, state([3], temperature=1.0, top_p=5e-324, seed=number)) == 7
