from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerFast

from serving.engine.grammar import MAX_MESSAGE, Grammars, Matcher, apply_mask, explain, masks
from serving.engine.vocabulary import Vocabulary
from serving.types import TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_CALL_MIDDLE, Structure
from tests.support import VOCAB_SIZE, tiny_tokenizer
from vblora import kernels

ENDS = (1, 2)
LOGITS = VOCAB_SIZE + 37  # a model has more logits than its tokenizer has tokens
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
NAME = {"properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Vocabulary(tiny_tokenizer(), LOGITS, frozenset(ENDS)))


def schema(value: object) -> Structure:
    return Structure("json_schema", json.dumps(value))


def tools(*, required: bool = False, parallel: bool = True, answer: object = None) -> Structure:
    known = [{"name": "count", "parameters": NUMBER}, {"name": "counter", "parameters": NAME}]
    wanted = {"tools": known, "required": required, "parallel": parallel, "answer": answer}
    return Structure("tools", json.dumps(wanted))


def call(name: str, arguments: str) -> str:
    return f"{TOOL_CALL_BEGIN}{json.dumps(name)}{TOOL_CALL_MIDDLE}{arguments}{TOOL_CALL_END}"


COUNT, COUNTER = call("count", '{"n": 1}'), call("counter", '{"name": "é 東"}')


def encode(text: str, tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    return list((tokenizer or tiny_tokenizer()).encode(text, add_special_tokens=False))


def allowed(matcher: Matcher) -> set[int]:
    row = torch.zeros(LOGITS)
    apply_mask(row, next(masks([matcher])))
    assert set(row.tolist()) <= {0.0, -torch.inf}
    return set(row.isfinite().nonzero().flatten().tolist())


def verdict(matcher: Matcher, tokens: Sequence[int]) -> str:
    """Whether an answer of these tokens is "whole", the "start" of one, or "wrong". Masks and `advance` must agree."""
    for token in tokens:
        if token not in allowed(matcher):
            return "wrong"
        goes_on = matcher.advance(token)
        assert matcher.error is None
        assert goes_on == (not allowed(matcher) <= set(ENDS))
    ends = allowed(matcher) & set(ENDS)
    assert ends in (set(), set(ENDS))
    return "whole" if ends else "start"


CASES = [
    (Structure("json_object"), ["{}", '{"a": 1, "b": [1, {"c": "x\\n"}]}'], ["", '{"a'], ["[", '{"a":1', '{ "', "1"]),
    (schema(NUMBER), ['{"n": 12}', '{"n": -3}'], ["{", '{"n": '], ['{"n": "', '{"m', '{"n": 1, ', "{}"]),
    (schema({"enum": ["a", 1, None]}), ['"a"', "1", "null"], ["nu"], ['"b', "2"]),
    (schema({"type": "string", "maxLength": 3}), ['"abc"', '"東京"', '""'], ['"ab'], ['"abcd']),
    (schema({"type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 12}}), ["[3, 12]"], ["["], ["[2]"]),
    (Structure("regex", r"[a-c]{2}/\d+(x|xy)?"), ["ab/1", "ab/12xy"], ["a", "cc/"], ["d", "ab/x"]),
    (Structure("regex", "^(a\nb|\\w+)$"), ["a\nb", "é"], [""], ["a\nc", " "]),
    (Structure("choice", '["yes", "yes please", "né\\"e\\\\\\n"]'), ["yes", "yes please", 'né"e\\\n'], ["ye"], ["no"]),
    (Structure("grammar", 'start: item ("," item)*\nitem: /[0-9]+/'), ["1", "1,23"], ["1,"], [",", "1,,"]),
    (Structure("grammar", 'root ::= item ("," item)*\nitem ::= [0-9]+'), ["1", "1,23"], ["1,"], [",", "1,,"]),
    (
        tools(),
        ["", "any text\n", "<tool_cal", "it's <b>", COUNT, f"first\n{COUNTER}", f"{COUNT}\n{COUNTER}\n{COUNT}"],
        ["text <tool_call>", f"{COUNT}\n", call("count", '{"n": ')[: -len(TOOL_CALL_END)]],
        ["<tool_call>x", f"{COUNT} ", f"{COUNT}\nx", call("county", ""), call("count", '{"name'), f"{COUNT}{COUNT}"],
    ),
    (tools(parallel=False), ["text", COUNT, f"text {COUNTER}"], [COUNT[:-1]], [f"{COUNT}\n"]),
    (tools(required=True), [COUNT, f"{COUNT}\n{COUNTER}"], ["", "<"], ["text", " <tool_call>", f"{COUNT}\ntext"]),
    (tools(required=True, parallel=False), [COUNTER], [""], [f"{COUNT}\n"]),
    (tools(answer=NUMBER), [COUNT, f"{COUNT}\n{COUNT}", '{"n": 7}'], ["", "{"], ["text", '{"name', f'{COUNT}{{"n']),
]  # fmt: skip


@pytest.mark.parametrize(("structure", "whole", "start", "wrong"), CASES, ids=[case[0].kind for case in CASES])
def test_each_kind_takes_what_it_should_and_no_more(
    grammars: Grammars, structure: Structure, whole: list[str], start: list[str], wrong: list[str]
) -> None:
    wanted = dict.fromkeys(whole, "whole") | dict.fromkeys(start, "start") | dict.fromkeys(wrong, "wrong")
    assert {text: verdict(grammars.matcher(structure), encode(text)) for text in wanted} == wanted


@pytest.mark.parametrize(("structure", "whole"), [case[:2] for case in CASES], ids=[case[0].kind for case in CASES])
def test_masks_allow_what_a_matcher_takes(grammars: Grammars, structure: Structure, whole: list[str]) -> None:
    """By brute force: every token of the vocabulary at every place of a text."""
    tokens = encode(max(whole, key=len))[:40]
    for place in range(0, len(tokens), 3):
        matcher = after(grammars, structure, tokens[:place])
        taken = {token for token in range(VOCAB_SIZE) if matcher.compiled.deep_copy().consume_token(token)}
        assert allowed(matcher) == taken


def after(grammars: Grammars, structure: Structure, tokens: Sequence[int]) -> Matcher:
    matcher = grammars.matcher(structure)
    for token in tokens:
        matcher.advance(token)
    return matcher


def test_masks_of_many_at_once_are_those_of_each(grammars: Grammars) -> None:
    def matchers() -> list[Matcher]:
        return [after(grammars, structure, encode(whole[0])[:2]) for structure, whole, *_ in CASES]

    together, alone = torch.stack(list(masks(matchers()))), [next(masks([matcher])) for matcher in matchers()]
    assert torch.equal(together, torch.stack(alone))
    assert list(masks([])) == []


def test_an_end_of_text_in_the_answer_ends_the_matcher(grammars: Grammars) -> None:
    matcher = grammars.matcher(Structure("regex", "a*"))
    assert matcher.advance(encode("a")[0])
    assert not matcher.advance(2)
    assert matcher.error is None


def test_matchers_of_one_structure_do_not_touch_each_other(grammars: Grammars) -> None:
    first, second = (grammars.matcher(Structure("regex", "ab")) for _ in range(2))
    first.advance(encode("a")[0])
    assert allowed(first) == set(encode("b")) and allowed(second) == set(encode("a"))


def test_after_an_error_nothing_is_allowed(grammars: Grammars) -> None:
    matcher = grammars.matcher(Structure("regex", "ab"))
    assert matcher.advance(encode("b")[0])  # or the answer would seem to have ended well
    assert matcher.error
    assert allowed(matcher) == set()


def test_a_limit_met_while_the_answer_grows_is_an_error(grammars: Grammars) -> None:
    matcher = grammars.matcher(schema({"properties": {f"p{number}": {} for number in range(3000)}, "type": "object"}))
    matcher.advance(encode("{")[0])
    allowed(matcher)
    assert matcher.error and "items" in matcher.error and len(matcher.error) <= MAX_MESSAGE
    assert allowed(matcher) == set()


@pytest.mark.parametrize(
    "structure", [Structure("regex", "("), Structure("json_schema", "{"), Structure("grammar", "root ::= (")]
)
def test_a_matcher_of_what_nobody_checked_may_be_in_error_but_is_there(
    grammars: Grammars, structure: Structure
) -> None:
    matcher = grammars.matcher(structure)
    assert matcher.error and matcher.advance(5) and allowed(matcher) == set()


def test_calls_may_use_a_models_own_tokens_for_the_tags() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<tool_call>", "</tool_call>")])
    own = Grammars(Vocabulary(tokenizer, LOGITS, frozenset(ENDS)))
    text = f"text\n{COUNT}\n{COUNTER}"
    assert set(encode(text, tokenizer)) >= {VOCAB_SIZE, VOCAB_SIZE + 1}
    for structure in (tools(), tools(required=True)):
        for tokens in (encode(text, tokenizer), encode(text)):
            wanted = "wrong" if "text" in text and json.loads(structure.text)["required"] else "whole"
            assert verdict(own.matcher(structure), tokens) == wanted
            assert verdict(own.matcher(structure), tokens[len(encode("text\n")) :]) == "whole"


def test_a_schemas_own_settings_for_llguidance_do_not_count(grammars: Grammars) -> None:
    lenient = grammars.matcher(schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}))
    assert lenient.error and "uniqueItems" in lenient.error
    spaced = grammars.matcher(schema({**NUMBER, "x-guidance": {"whitespace_pattern": " +"}}))
    assert verdict(spaced, encode('{ "')) == "wrong"


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applying_a_mask(monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: torch.dtype) -> None:
    """Rows shorter and longer than the mask, with the compiled kernel and without."""
    monkeypatch.setattr(kernels, "available", compiled and kernels.available)
    for size in (1, 31, 64, 300, 320, 357):
        generator = torch.Generator().manual_seed(size)
        bits = torch.randint(2, (10, 32), generator=generator, dtype=torch.int64)
        row = torch.randn(size, generator=generator).to(dtype)
        wanted = row.masked_fill(
            ~torch.cat([bits.flatten().bool(), torch.zeros(64, dtype=torch.bool)])[:size], -torch.inf
        )
        apply_mask(row, packed(bits))
        assert torch.equal(row, wanted)


def packed(bits: Tensor) -> Tensor:
    """(words, 32) of 0 and 1 → (words,) int32, the first bit the lowest."""
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (
            'at 1(8): invalid regex "(": regex parse error:\n  (\n  ^\nerror: unclosed group\n',
            "unclosed group",
        ),
        ('at 3(8): unknown name: "foo"\n   1 | start: foo\n', 'line 3, column 8: unknown name: "foo"'),
        ("NoExtensionBias\n<non-verbose/>", "nothing can match it"),
        ("thread panicked at /root/x/parser.rs:12:3", "it cannot be compiled"),
        ("", "it is empty"),
    ],
)
def test_what_strangers_are_told(error: str, wanted: str) -> None:
    assert explain(error) == wanted


def test_what_strangers_are_told_has_an_end() -> None:
    assert len(explain("x" * 10_000)) == MAX_MESSAGE
