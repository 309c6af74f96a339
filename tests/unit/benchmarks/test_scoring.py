"""The check of a benchmark's texts: what it measures, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scoring import losses
from tests.support import tiny_model

PROMPT = (3, 1, 4)


def greedy(model: torch.nn.Module, length: int) -> tuple[int, ...]:
    tokens = list(PROMPT)
    for _ in range(length):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(PROMPT) :])


@torch.no_grad()
def test_a_greedy_text_has_no_regret_and_another_loses_what_the_model_says() -> None:
    model = tiny_model()
    best = greedy(model, 6)
    other = (*best[:-1], (best[-1] + 1) % 16)
    found, changed = losses(model, PROMPT, [best, other])
    last = model(input_ids=torch.tensor([[*PROMPT, *best[:-1]]])).logits[0, -1].log_softmax(-1)
    assert found.regret == pytest.approx(0, abs=1e-6)
    assert changed.regret == pytest.approx(float(last[best[-1]] - last[other[-1]]) / 6, abs=1e-5)
    assert changed.nats - found.nats == pytest.approx(changed.regret, abs=1e-5)


@torch.no_grad()
def test_the_nats_are_those_of_each_token_after_what_came_before() -> None:
    model = tiny_model()
    text = (5, 9, 2)
    logits = model(input_ids=torch.tensor([[*PROMPT, *text]])).logits[0].log_softmax(-1)
    expected = -sum(float(logits[len(PROMPT) - 1 + place, token]) for place, token in enumerate(text)) / len(text)
    assert losses(model, PROMPT, [text])[0].nats == pytest.approx(expected, abs=1e-5)
