"""What the engine tells beside text: log probabilities, embeddings, structures, several answers to one prompt."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
import torch

from serving.engine import Engine
from serving.engine.streams import Generation
from serving.types import GenerationRequest, SamplingParams, Structure
from tests.integration.engine.conftest import tiny_engine
from tests.support import random_adapter, tiny_model, tiny_tokenizer

IDS = itertools.count()
TEXT = "the restaurant serves the best food of the town"


def request(prompt: str = TEXT, revision: str | None = None, **fields: Any) -> GenerationRequest:
    own = {name: fields.pop(name) for name in ("follows", "pooled", "priority", "cache_salt") if name in fields}
    sampling = dataclasses.replace(SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), **fields)
    tokens = tuple(tiny_tokenizer().encode(prompt))
    return GenerationRequest(f"o{next(IDS)}", "default", tokens, sampling, revision, **own)


def plain_logprobs(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = tiny_model()(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def test_logprobs_are_of_the_models_own_distribution(engine: Engine) -> None:
    """Whatever bias, penalties and temperature make of it."""
    changed = {"temperature": 1.3, "seed": 3, "logit_bias": ((70, 5.0),), "presence_penalty": 1.0}
    (answer,) = engine.generate([request(logprobs=3, prompt_logprobs=1, **changed)])
    prompt = tiny_tokenizer().encode(TEXT)
    rows = plain_logprobs([*prompt, *answer.token_ids])
    for place, score in enumerate(answer.logprobs, len(prompt)):
        row = rows[place - 1]
        assert score.token_id == answer.token_ids[place - len(prompt)]
        assert score.logprob == pytest.approx(float(row[score.token_id]), abs=1e-4)
        assert score.rank == int((row > row[score.token_id]).sum()) + 1
        assert [token for token, _ in score.top] == row.topk(3).indices.tolist()
    assert [score.token_id for score in answer.prompt_logprobs] == prompt[1:]
    for place, score in enumerate(answer.prompt_logprobs, 1):
        assert score.logprob == pytest.approx(float(rows[place - 1][prompt[place]]), abs=1e-4)


def mixed(engine: Engine, revision: str) -> list[GenerationRequest]:
    words = Structure("regex", "[a-z]{20}")
    engine.grammars.check(words, "regex")
    return [
        request("the quick", prompt_logprobs=2, logprobs=1, max_tokens=60),
        request("best food " * 4, revision, prompt_logprobs=0, max_tokens=40),
        request("a", revision, structure=words, temperature=1.0, seed=5, max_tokens=60, ignore_eos=False),
        request(TEXT, pooled=True, max_tokens=0),
        request(TEXT, frequency_penalty=1.0, logprobs=0, max_tokens=60),
        request("fox " * 20, revision, pooled=True, max_tokens=0),
    ]


def alike(one: Generation, other: Generation) -> bool:
    """The same but for rounding."""
    floats = [
        ([score.logprob for score in side.logprobs + side.prompt_logprobs], side.embedding) for side in (one, other)
    ]
    return (
        (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        and floats[0][0] == pytest.approx(floats[1][0], abs=1e-4)
        and floats[0][1] == pytest.approx(floats[1][1], abs=1e-4)
    )


def test_nothing_of_it_changes_when_requests_are_preempted_and_computed_again() -> None:
    roomy = tiny_engine()
    tight = tiny_engine(kv_cache_bytes=128 * 2 * 2 * 2 * 16 * 4, max_model_len=128)
    roomy.start()
    tight.start()
    try:
        answers = []
        for engine in (roomy, tight):
            adapter = engine.load_adapter(random_adapter(tiny_model(), rank=4, seed=1))
            answers.append([engine.generate([one])[0] for one in mixed(engine, adapter)])
            answers.append(engine.generate(mixed(engine, adapter) + mixed(engine, adapter)))
        alone, together, alone_tight, together_tight = answers
        assert tight.stats().preemptions > 0 == roomy.stats().preemptions
        for others in (together, alone_tight, together_tight):
            assert all(alike(one, other) for one, other in zip(itertools.cycle(alone), others, strict=False))
        assert re.fullmatch("[a-z]{20}", alone[2].text)
        assert alone[2].finish_reason == "stop"
        assert len(alone[3].embedding) == 64 and alone[3].token_ids == ()
    finally:
        roomy.close()
        tight.close()


def test_followers_wait_for_the_prompt_and_share_it(engine: Engine) -> None:
    leader = request(TEXT * 3, cache_salt="followers")
    others = [request(TEXT * 3, cache_salt="followers", follows=leader.request_id) for _ in range(3)]
    before = engine.stats()
    answers = engine.generate([leader, *others])
    after = engine.stats()
    full = (len(leader.prompt_token_ids) - 1) // 16 * 16
    assert after.prefix_hits - before.prefix_hits == 3 * full
    assert len(set(answers)) == 1


def test_followers_of_a_request_that_ends_early_go_on(engine: Engine) -> None:
    leader = request(TEXT * 3)
    follower = request(TEXT * 3, follows=leader.request_id)
    (expected,) = engine.generate([request(TEXT * 3)])
    running = engine.stream(leader)
    events = engine.stream(follower)
    running.close()  # a generator that never began submits nothing: nobody to wait for
    assert "".join(event.text for event in events) == expected.text


def test_bad_words_are_never_completed(engine: Engine) -> None:
    (free,) = engine.generate([request(max_tokens=30)])
    pair = free.token_ids[4:6]
    (kept,) = engine.generate([request(max_tokens=30, bad_words=(pair,))])
    assert pair not in list(itertools.pairwise(kept.token_ids))
    assert kept.token_ids[:5] == free.token_ids[:5]
