"""Logits → tokens, each row by its own parameters, one random stream a request. Knows no cache and no text.

Order: penalties, logit bias, banned ends and words, what a grammar allows; then temperature, min_p, top_k, top_p as
vLLM has it; then one uniform a token from a generator keyed by (seed, position) and the inverse of the cumulative
distribution in vocabulary order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.grammar import apply_mask, masks
from serving.engine.request import RequestState
from serving.types import SamplingParams
from vblora import kernels

ARGMAX_BLOCK = 512
NUCLEUS_GUESS = 1024  # tokens looked at first for top_p, before sorting the whole vocabulary


def sample(logits: Tensor, states: Sequence[RequestState], end_of_text: frozenset[int]) -> list[int | None]:
    """The next token of each request from its row of `logits` (n, vocabulary); None where the row is not finite."""
    if all(state.request.sampling.temperature == 0 and not changes_logits(state) for state in states):
        best = argmax(logits)
        finite = logits[torch.arange(len(logits), device=logits.device), best].isfinite()
        return [token if ok else None for token, ok in zip(best.tolist(), finite.tolist(), strict=True)]
    allowed = masks([state.matcher for state in states if state.matcher is not None])
    logits = logits.clone() if any(state.matcher is not None for state in states) else logits  # not the caller's
    rows = list(logits)
    for index, state in enumerate(states):
        if needs_adjusting(state):
            rows[index] = adjust(logits[index].float().clone(), state, end_of_text)
        if state.matcher is not None:
            apply_mask(rows[index], next(allowed))
    tokens: list[int] = [0] * len(rows)
    greedy = [index for index, state in enumerate(states) if state.request.sampling.temperature == 0]
    if greedy:
        for index, token in zip(greedy, argmax(_stack(logits, rows, greedy)).tolist(), strict=True):
            tokens[index] = token
    for index, state in enumerate(states):
        if state.request.sampling.temperature > 0:
            tokens[index] = draw(rows[index].float(), state.request.sampling, uniform(state.seed, len(state.tokens)))
    chosen = torch.stack([rows[index][token] for index, token in enumerate(tokens)]) if tokens else logits[:0, 0]
    return [token if ok else None for token, ok in zip(tokens, chosen.isfinite().tolist(), strict=True)]


def _stack(logits: Tensor, rows: list[Tensor], greedy: list[int]) -> Tensor:
    """The greedy rows as one tensor; the logits themselves where that is all of them, untouched."""
    untouched = len(greedy) == len(rows) and all(row.data_ptr() == logits[i].data_ptr() for i, row in enumerate(rows))
    return logits if untouched else torch.stack([rows[index].float() for index in greedy])


def argmax(logits: Tensor) -> Tensor:
    """The lowest index of each row's maximum, as `torch.argmax` over (n, vocabulary), by maxima of blocks first."""
    if kernels.usable(logits) and logits.is_contiguous():
        return kernels.argmax(logits)
    vocabulary = logits.shape[-1]
    if vocabulary % ARGMAX_BLOCK:
        return logits.argmax(-1)
    blocks = logits.reshape(len(logits), -1, ARGMAX_BLOCK)
    best = blocks.amax(-1).argmax(-1)
    winners = blocks[torch.arange(len(logits), device=logits.device), best]
    return best * ARGMAX_BLOCK + winners.argmax(-1)


def changes_logits(state: RequestState) -> bool:
    """Whether a request asks for more than temperature and truncation."""
    return state.matcher is not None or needs_adjusting(state)


def needs_adjusting(state: RequestState) -> bool:
    """Whether `adjust` would change anything."""
    params = state.request.sampling
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    banned = params.bad_words or params.allowed_token_ids or state.num_generated < params.min_tokens
    return bool(params.logit_bias or penalised or banned)


def adjust(row: Tensor, state: RequestState, end_of_text: frozenset[int]) -> Tensor:
    """One row (vocabulary,) of logits, which may be changed, with penalties, bias and bans.

    Presence and frequency count generated tokens (OpenAI); repetition counts the prompt's too (CTRL, arXiv 1909.05858).
    """
    params = state.request.sampling
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(state.tokens)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and state.generated:
        counts = Counter(state.generated)
        seen = torch.tensor(list(counts), device=row.device)
        often = torch.tensor(list(counts.values()), device=row.device)
        row[seen] -= params.presence_penalty + params.frequency_penalty * often
    for token, bias in params.logit_bias:
        row[token] += bias
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids, device=row.device)
        kept = row[allowed]
        row.fill_(float("-inf"))[allowed] = kept
    banned = sorted(_banned(state, end_of_text))
    if banned:
        allowed_row = row.clone()
        row[torch.tensor(banned, device=row.device)] = float("-inf")
        if not row.isfinite().any():  # where nothing else is allowed a ban cannot be obeyed
            return allowed_row
    return row


def _banned(state: RequestState, end_of_text: frozenset[int]) -> set[int]:
    """The tokens that would complete a bad word, or end the answer too early."""
    params = state.request.sampling
    generated = tuple(state.generated)
    banned = {last for *before, last in params.bad_words if generated[len(generated) - len(before) :] == tuple(before)}
    if state.num_generated < params.min_tokens:
        banned |= end_of_text.union(params.stop_token_ids)
    return banned


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the token's position alone, so that recomputing repeats it."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return float((int.from_bytes(digest, "big") >> 11) / (1 << 53))


def draw(row: Tensor, params: SamplingParams, number: float) -> int:
    """The token of one row (vocabulary,) at which the truncated distribution's cumulative sum passes `number`."""
    shifted = (row - row.max()) / params.temperature  # from the maximum, so that a tiny temperature cannot overflow
    probabilities = truncate(torch.softmax(shifted, dim=-1), params)
    cumulative = probabilities.double().cumsum(-1)
    target = torch.tensor(number, dtype=torch.double, device=row.device) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, target, right=True))
    # Rounding can leave the target at the very end, past the last token that has any probability.
    return token if token < len(row) else int(probabilities.nonzero()[-1]) if probabilities.any() else 0


def truncate(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Zero what min_p, top_k and top_p leave out of one row of probabilities; the rest is not rescaled.

    top_k keeps ties with the k-th; top_p keeps the smallest set of largest probabilities, of what min_p and top_k
    left, whose share reaches p.
    """
    if params.min_p > 0:
        floor = params.min_p * probabilities.max()
        probabilities = torch.where(probabilities >= floor, probabilities, 0.0)
    if 0 < params.top_k < len(probabilities):
        floor = probabilities.topk(params.top_k).values[-1]
        probabilities = torch.where(probabilities >= floor, probabilities, 0.0)
    if params.top_p < 1:
        probabilities = _nucleus(probabilities, params.top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    goal = top_p * probabilities.double().sum()
    for size in (min(NUCLEUS_GUESS, len(probabilities)), len(probabilities)):
        values, tokens = probabilities.topk(size)
        cumulative = values.double().cumsum(-1)
        if cumulative[-1] >= goal:
            break
    # A token stays if those before it had not reached the goal; the first always, also where the goal rounds to 0.
    needed = (cumulative - values.double()) < goal
    needed[0] = True
    keep = tokens[needed]
    kept = torch.zeros_like(probabilities)
    kept[keep] = probabilities[keep]
    return kept
