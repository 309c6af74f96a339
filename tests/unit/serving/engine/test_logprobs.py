"""Log probabilities from logits, beside torch's log_softmax."""

from __future__ import annotations

import pytest
import torch

from serving.engine.logprobs import ROWS, token_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_ranks_and_the_likeliest_of_many_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2 * ROWS + 3, 50).to(dtype)
    tokens = torch.randint(50, (len(logits),)).tolist()
    tops = [row % 4 for row in range(len(logits))]
    expected = logits.float().log_softmax(-1)
    for row, score in enumerate(token_logprobs(logits, tokens, tops)):
        assert score.token_id == tokens[row]
        assert score.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        assert score.rank == 1 + sum(bool(value > logits[row, tokens[row]]) for value in logits[row])
        best = logits[row].float().topk(tops[row])
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(expected[row, best.indices].tolist(), abs=1e-5)


def test_more_than_the_vocabulary_is_all_of_it() -> None:
    (score,) = token_logprobs(torch.zeros(1, 5), [2], [20])
    assert len(score.top) == 5
    assert score.rank == 1  # equals are not before it


def test_nothing_is_nothing() -> None:
    assert token_logprobs(torch.zeros(0, 5), [], []) == []
