"""Logits → log probabilities of chosen tokens and of the likeliest ones. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.types import TokenLogprob

ROWS = 16  # rows of float32 over the vocabulary at a time: 16 MiB for 262,144 tokens


@torch.inference_mode()
def token_logprobs(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """For each row of `logits` (n, vocabulary) its token's log probability, rank and the likeliest `tops[i]` tokens.

    The probabilities are the softmax of the logits as they are, in float32.
    """
    found: list[TokenLogprob] = []
    for begin in range(0, len(tokens), ROWS):
        found += _of_rows(logits[begin : begin + ROWS], tokens[begin : begin + ROWS], tops[begin : begin + ROWS])
    return found


def _of_rows(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    values = logits.float()
    norms = values.logsumexp(-1, keepdim=True)
    chosen = values.gather(-1, torch.tensor(tokens, device=values.device)[:, None])
    ranks = (values > chosen).sum(-1) + 1
    best = values.topk(min(max(tops), values.shape[-1]), -1)
    rows = zip(
        tokens,
        (chosen - norms)[:, 0].tolist(),
        ranks.tolist(),
        best.indices.tolist(),
        (best.values - norms).tolist(),
        tops,
        strict=True,
    )
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(ids[:top], logprobs[:top], strict=True)))
        for token, logprob, rank, ids, logprobs, top in rows
    ]
