"""Every field of `/v1/completions` through the `openai` package, by its effect on the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from openai.types import Completion

from serving.types import GenerationRequest, SamplingParams
from tests.integration.api.conftest import BASE, Server
from tests.support import tiny_model, tiny_tokenizer

PROMPT = "the fox jumps"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def complete(client: OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> Completion:
    """Twelve greedy tokens after `PROMPT`, whatever they are; `extra` are vLLM's fields."""
    defaults: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    return client.completions.create(**{**defaults, **fields}, extra_body={"ignore_eos": True, **(extra or {})})


def text(client: OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> str:
    return complete(client, extra, **fields).choices[0].text


def tokens(client: OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> list[int]:
    """The ids of an answer's tokens, by way of its log probabilities."""
    choice = complete(client, extra, **{"logprobs": 0, **fields}).choices[0]
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    return [ids_of()[token] for token in choice.logprobs.tokens]


def ids_of() -> dict[str, int]:
    """Ids by the names that log probabilities give tokens, which differ for different tokens."""
    from serving.api.logprobs import token_text
    from serving.engine.vocabulary import Vocabulary

    vocabulary = Vocabulary(tiny_tokenizer(), 300, frozenset({1}))
    return {token_text(vocabulary.token_bytes(token)): token for token in range(len(tiny_tokenizer()))}


def plain_logprobs(ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) of a forward of the model by transformers, nothing of ours in it."""
    with torch.no_grad():
        logits: torch.Tensor = tiny_model()(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def test_all_four_kinds_of_prompt(client: OpenAI) -> None:
    ids = tiny_tokenizer().encode(PROMPT)
    other = tiny_tokenizer().encode("best food")
    alone = text(client)
    assert [choice.text for choice in complete(client, prompt=[PROMPT, "best food"]).choices] == [
        alone,
        text(client, prompt="best food"),
    ]
    assert text(client, prompt=ids) == alone
    both = complete(client, prompt=[other, ids])
    assert [choice.text for choice in both.choices] == [text(client, prompt="best food"), alone]
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage is not None and both.usage.prompt_tokens == len(ids) + len(other)


def test_the_answer_through_http_is_the_engines(server: Server, client: OpenAI) -> None:
    ids = tuple(tiny_tokenizer().encode(PROMPT))
    for temperature, seed in ((0.0, None), (0.9, 7)):
        params = SamplingParams(12, temperature, seed=seed, ignore_eos=True)
        (generation,) = server.context.engine.generate([GenerationRequest("in-process", "t", ids, params)])  # type: ignore[attr-defined]
        assert text(client, temperature=temperature, seed=seed) == generation.text


def test_n_shares_one_prompt_and_choice_i_uses_seed_plus_i(server: Server, client: OpenAI) -> None:
    prompt = [*range(3, 43)]
    reply = complete(client, prompt=prompt, n=4, temperature=1, seed=100)
    answers = [choice.text for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len(set(answers)) > 1
    alone = [text(client, prompt=prompt, temperature=1, seed=100 + index) for index in range(4)]
    assert answers == alone
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (40, 48)


def test_the_prompt_of_n_choices_is_computed_once(server: Server, client: OpenAI) -> None:
    before = server.context.engine.stats()
    complete(client, {"cache_salt": "once"}, prompt=[*range(3, 43)], n=5, temperature=1)
    after = server.context.engine.stats()
    looked_up, found = after.prefix_queries - before.prefix_queries, after.prefix_hits - before.prefix_hits
    assert (looked_up, found) == (5 * 40, 4 * 32)  # all full blocks of 16, for all but the first


def test_n_for_each_of_several_prompts(client: OpenAI) -> None:
    reply = complete(client, prompt=["the fox", "best food"], n=2)
    assert [choice.text for choice in reply.choices] == [
        *[text(client, prompt="the fox")] * 2,
        *[text(client, prompt="best food")] * 2,
    ]


def test_echo_begins_with_the_prompt(client: OpenAI) -> None:
    assert text(client, echo=True) == PROMPT + text(client)
    ids = tiny_tokenizer().encode(PROMPT)
    assert text(client, prompt=ids, echo=True) == PROMPT + text(client)
    assert text(client, echo=True, max_tokens=0) == PROMPT


@pytest.mark.parametrize("model", [BASE, "a1"])
def test_logprobs_are_those_of_a_plain_forward(server: Server, client: OpenAI, model: str) -> None:
    prompt = tiny_tokenizer().encode(PROMPT)
    choice = complete(client, model=model, prompt=prompt, echo=True, logprobs=5).choices[0]
    lists = choice.logprobs
    assert lists is not None and lists.tokens and lists.token_logprobs and lists.top_logprobs and lists.text_offset
    ids = [ids_of()[token] for token in lists.tokens]
    assert ids[: len(prompt)] == prompt
    expected = plain_logprobs(ids) if model == BASE else merged_logprobs(server, model, ids)
    assert lists.token_logprobs[0] is None and lists.top_logprobs[0] is None
    for place in range(1, len(ids)):
        row = expected[place - 1]
        assert lists.token_logprobs[place] == pytest.approx(float(row[ids[place]]), abs=1e-4)
        top = lists.top_logprobs[place]
        best = row.topk(5)
        assert set(top) >= {name for name, token in ids_of().items() if token in best.indices.tolist()}
        assert max(top.values()) == pytest.approx(float(best.values[0]), abs=1e-4)
        assert len(top) in (5, 6)  # the token itself is told of too


def merged_logprobs(server: Server, name: str, ids: list[int]) -> torch.Tensor:
    """Of the adapter merged into the base model's weights."""
    from vblora import VBLoRAModel

    model = VBLoRAModel.from_pretrained(tiny_model(), server_files(server) / name, name)
    merged = model.merge_and_unload()
    with torch.no_grad():
        logits: torch.Tensor = merged(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def server_files(server: Server) -> Any:
    return server.context.catalog._roots[0]  # type: ignore[attr-defined]


def test_offsets_point_at_the_tokens_in_the_text(client: OpenAI) -> None:
    choice = complete(client, prompt="grüß den Fuchs", echo=True, logprobs=0, max_tokens=4).choices[0]
    assert choice.logprobs is not None and choice.logprobs.text_offset and choice.logprobs.tokens
    offsets = choice.logprobs.text_offset
    assert offsets[:2] == [0, 0]  # the beginning of text is no part of it
    assert offsets == sorted(offsets)
    for token, offset in zip(choice.logprobs.tokens[1:], offsets[1:], strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token


def test_scoring_a_prompt_generates_nothing(client: OpenAI) -> None:
    reply = complete(client, echo=True, logprobs=1, max_tokens=0)
    lists = reply.choices[0].logprobs
    assert lists is not None and lists.tokens is not None and lists.token_logprobs is not None
    assert len(lists.tokens) == len(tiny_tokenizer().encode(PROMPT))
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None and reply.usage.completion_tokens == 0
    assert sum(value for value in lists.token_logprobs if value is not None) < 0


def test_prompt_logprobs_have_vllms_shape(client: OpenAI) -> None:
    prompt = tiny_tokenizer().encode(PROMPT)
    reply = complete(client, {"prompt_logprobs": 2}, prompt=prompt, max_tokens=1, n=2)
    first, second = (choice.model_extra["prompt_logprobs"] for choice in reply.choices if choice.model_extra)
    assert first == second
    expected = plain_logprobs(prompt)
    assert first[0] is None and len(first) == len(prompt)
    for place, entry in enumerate(first[1:], 1):
        own = entry[str(prompt[place])]
        row = expected[place - 1]
        assert own["logprob"] == pytest.approx(float(row[prompt[place]]), abs=1e-4)
        assert own["rank"] == int((row > row[prompt[place]]).sum()) + 1
        assert own["decoded_token"] == tiny_tokenizer().decode([prompt[place]])
        assert {int(token) for token in entry} == {*row.topk(2).indices.tolist(), prompt[place]}


def test_prompts_longer_than_one_step_are_scored_whole(client: OpenAI) -> None:
    prompt = [3 + (7 * place) % 290 for place in range(200)]  # more than are scored in one step
    reply = complete(client, {"prompt_logprobs": 0}, prompt=prompt, max_tokens=1)
    extra = reply.choices[0].model_extra or {}
    found = [
        entry[str(token)]["logprob"] for entry, token in zip(extra["prompt_logprobs"][1:], prompt[1:], strict=True)
    ]
    rows = plain_logprobs(prompt)
    assert found == pytest.approx([float(rows[place - 1][prompt[place]]) for place in range(1, 200)], abs=1e-4)


def test_scored_prompts_take_nothing_from_the_cache(client: OpenAI) -> None:
    def cached(**fields: Any) -> int:
        usage = complete(client, {"cache_salt": "scored"}, prompt=[*range(5, 45)], max_tokens=1, **fields).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert [cached(), cached(echo=True, logprobs=0), cached()] == [0, 0, 32]


@pytest.mark.parametrize("stop", [" ", ["zzz", " "]])
def test_stop_ends_the_text(client: OpenAI, stop: Any) -> None:
    whole = text(client, max_tokens=60)
    mark = next(part for part in (whole[4:6], whole[5:7]) if whole.find(part) >= 4)
    choice = complete(client, max_tokens=60, stop=[mark, "\x00never"]).choices[0]
    assert choice.text == whole[: whole.index(mark)]
    assert choice.finish_reason == "stop"
    included = complete(client, {"include_stop_str_in_output": True}, max_tokens=60, stop=mark).choices[0]
    assert included.text == whole[: whole.index(mark) + len(mark)]


def test_stop_token_ids_end_the_text(client: OpenAI) -> None:
    ids = tokens(client)
    end = next(place for place in range(2, 12) if ids.index(ids[place]) == place)
    choice = complete(client, {"stop_token_ids": [ids[end]]}).choices[0]
    assert choice.finish_reason == "stop"
    assert text(client).startswith(choice.text) and len(choice.text) < len(text(client))
    included = complete(client, {"stop_token_ids": [ids[end]], "include_stop_str_in_output": True}).choices[0]
    assert len(included.text) > len(choice.text)


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(client: OpenAI) -> None:
    def drawn(seed: int | None, **fields: Any) -> str:
        return text(client, temperature=1.3, seed=seed, **fields)

    assert drawn(5) == drawn(5) != drawn(6)
    crowd = complete(client, prompt=["a", PROMPT, "b c"], temperature=1.3, seed=5)
    assert crowd.choices[1].text == drawn(5)
    assert len({drawn(None) for _ in range(4)}) > 1


def test_logit_bias_forces_and_forbids(client: OpenAI) -> None:
    first = tokens(client)[0]
    assert tokens(client, logit_bias={"70": 100}) == [70] * 12
    assert tokens(client, logit_bias={str(first): -100})[0] != first


def test_presence_and_frequency_penalties(client: OpenAI) -> None:
    repeated = tokens(client, max_tokens=40, logit_bias={"70": 8})
    assert repeated.count(70) > 5
    for penalty in ("presence_penalty", "frequency_penalty"):
        fewer = tokens(client, max_tokens=40, logit_bias={"70": 8}, **{penalty: 2})
        assert fewer.count(70) < repeated.count(70)


def test_repetition_penalty(client: OpenAI) -> None:
    plain = tokens(client, max_tokens=60)
    varied = tokens(client, {"repetition_penalty": 5.0}, max_tokens=60)
    assert len(set(varied)) > len(set(plain))
    assert not set(varied[:20]) & set(tiny_tokenizer().encode(PROMPT))


def test_truncation_to_the_likeliest_token_is_greedy(client: OpenAI) -> None:
    greedy = text(client)
    assert text(client, {"top_k": 1}, temperature=1.5) == greedy
    assert text(client, {"min_p": 1.0}, temperature=1.5) == greedy
    assert text(client, top_p=1e-9, temperature=1.5) == greedy
    assert text(client, temperature=1.5, seed=1) != greedy


def test_min_tokens_and_ignore_eos(client: OpenAI) -> None:
    bias = {"1": 100}  # the end of text
    ended = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=12, temperature=0, logit_bias=bias)
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage is not None and ended.usage.completion_tokens == 1
    later = complete(client, {"ignore_eos": False, "min_tokens": 5}, logit_bias=bias)
    assert later.usage is not None and later.usage.completion_tokens == 6
    on = complete(client, logit_bias=bias)
    assert on.choices[0].finish_reason == "length"


def test_bad_words_and_allowed_token_ids(client: OpenAI) -> None:
    choice = complete(client, max_tokens=40, logprobs=0).choices[0]
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    word = next(token for token in choice.logprobs.tokens if len(token) > 1 and token.isalpha())
    assert choice.text.count(word) > 0 == text(client, {"bad_words": [word]}, max_tokens=40).count(word)
    assert set(tokens(client, {"allowed_token_ids": [70, 80, 90]})) <= {70, 80, 90}


def test_special_tokens_are_left_out_unless_asked_for(client: OpenAI) -> None:
    assert text(client, logit_bias={"0": 100}) == ""
    assert text(client, {"skip_special_tokens": False}, logit_bias={"0": 100}) == "<s>" * 12
    with_start = complete(client, max_tokens=1).usage
    without = complete(client, {"add_special_tokens": False}, max_tokens=1).usage
    assert with_start is not None and without is not None
    assert with_start.prompt_tokens == without.prompt_tokens + 1


def test_truncate_prompt_tokens_keeps_the_last(client: OpenAI) -> None:
    prompt = [*range(5, 30)]
    cut = complete(client, {"truncate_prompt_tokens": 4}, prompt=prompt, echo=True)
    assert cut.usage is not None and cut.usage.prompt_tokens == 4
    assert cut.choices[0].text == tiny_tokenizer().decode(prompt[-4:]) + text(client, prompt=prompt[-4:])


def test_priority_goes_first(server: Server) -> None:
    import asyncio

    from openai import AsyncOpenAI

    async def run() -> list[str]:
        """Which of 40 requests of low and 40 of high priority, sent in this order, ended first."""
        ended: list[str] = []
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as clients:

            async def one(priority: int) -> None:
                await clients.completions.create(
                    model=BASE, prompt=PROMPT, max_tokens=40, extra_body={"priority": priority, "ignore_eos": True}
                )
                ended.append("high" if priority < 0 else "low")

            await asyncio.gather(*(one(priority) for priority in [5] * 70 + [-5] * 30))
        return ended

    ended = asyncio.run(run())
    assert ended.index("high") < 70
    assert ended[-1] == "low"


def test_request_ids_are_echoed(client: OpenAI) -> None:
    assert complete(client, {"request_id": "mine-1"}).id == "cmpl-mine-1"
    raw = client.completions.with_raw_response.create(
        model=BASE, prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "outer"}
    )
    assert raw.headers["X-Request-Id"] == "outer"
    assert raw.parse().id == "cmpl-outer"


def test_streams_say_what_whole_answers_say(client: OpenAI) -> None:
    fields: dict[str, Any] = {"prompt": ["the fox", "best food"], "n": 2, "echo": True, "logprobs": 2, "max_tokens": 6}
    whole = complete(client, **fields)
    texts, names, scores, reasons = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)], [""] * 4  # type: ignore[var-annotated]
    usages = []
    for chunk in client.completions.create(
        model=BASE, temperature=0, stream=True, stream_options={"include_usage": True},
        extra_body={"ignore_eos": True}, **fields,
    ):  # fmt: skip
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs:
                names[choice.index] += choice.logprobs.tokens or []
                scores[choice.index] += choice.logprobs.token_logprobs or []
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert reasons[choice.index] == choice.finish_reason
        assert choice.logprobs is not None
        assert names[choice.index] == choice.logprobs.tokens
        assert scores[choice.index][1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)  # type: ignore[index]
    assert usages[-1] is not None and set(usages[:-1]) == {None}
    assert whole.usage is not None and usages[-1].completion_tokens == whole.usage.completion_tokens


def test_a_known_field_that_is_not_supported_is_named(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as raised:
        complete(client, best_of=3)
    assert raised.value.param == "best_of"
    assert complete(client, best_of=1, suffix=None).choices[0].text == text(client)


def test_log_probabilities_are_finite_whatever_is_forced(client: OpenAI) -> None:
    choice = complete(client, logprobs=3, logit_bias={"70": 100, "71": -100}).choices[0]
    assert choice.logprobs is not None and choice.logprobs.token_logprobs
    assert all(value is not None and math.isfinite(value) for value in choice.logprobs.token_logprobs)
