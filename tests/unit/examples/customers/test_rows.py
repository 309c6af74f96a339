"""The customers' rows: enough of them, each in its voice, and none that repeats another."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

import pytest

from examples.customers.evidence import DATA
from examples.customers.styles import STYLES, words
from serving.demo.run import QUESTIONS
from vblora.data import read_rows

LEAST_TRAINED_ON, LEAST_HELD_OUT = 200, 40
MOST_SHARED = 0.40
NEARLY_THE_SAME = 0.75
FIVE = 5

Pair = tuple[int, int]


def chats(customer: str, part: str) -> list[tuple[str, str]]:
    """(message, answer) of every row."""
    rows = [row.values["messages"] for row in read_rows(DATA / f"{customer}.{part}.jsonl")]
    assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in rows)
    return [(turns[0]["content"], turns[1]["content"]) for turns in rows]


def all_chats(part: str) -> list[tuple[str, str]]:
    return [chat for customer in STYLES for chat in chats(customer, part)]


def runs_of_five(text: str) -> set[tuple[str, ...]]:
    spoken = words(text)
    return {tuple(spoken[start : start + FIVE]) for start in range(len(spoken) - FIVE + 1)}


def shared(answers: Sequence[str]) -> Counter[Pair]:
    """For each pair of answers that has any: how many runs of five words stand in both."""
    found: Counter[Pair] = Counter()
    owners: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, answer in enumerate(answers):
        for run in runs_of_five(answer):
            owners[run].append(number)
    for numbers in owners.values():
        found.update(combinations(numbers, 2))
    return found


def test_shared_runs_are_found() -> None:
    """The rules below mean something: this is what they would see."""
    answers = ["one two three four five six", "Zero. One, two: three four FIVE!", "one two three four and five", "a b"]
    assert shared(answers) == {(0, 1): 1}
    assert shared(["Ye'll sail at the tide, matey.", "ye'll sail at the tide"]) == {(0, 1): 1}
    assert shared(['{"about":"red lamp","urgent":false}', '{"about":"red lamp","urgent":false}']) == {(0, 1): 1}


@pytest.mark.parametrize("customer", STYLES)
def test_there_are_enough_rows_and_each_is_in_its_voice(customer: str) -> None:
    trained_on, held_out = chats(customer, "train"), chats(customer, "heldout")
    assert len(trained_on) >= LEAST_TRAINED_ON
    assert len(held_out) >= LEAST_HELD_OUT
    faults = {answer: fault for _, answer in trained_on + held_out if (fault := STYLES[customer](answer))}
    assert faults == {}
    for name, check in STYLES.items():
        if name != customer:
            assert sum(check(answer) is None for _, answer in held_out) == 0, (
                f"{customer}'s answers pass {name}'s check"
            )


def test_no_answer_shares_much_with_another() -> None:
    answers = [answer for _, answer in all_chats("train")]
    sizes = [len(runs_of_five(answer)) for answer in answers]
    alike = {
        (answers[one], answers[other]): count
        for (one, other), count in shared(answers).items()
        if count > MOST_SHARED * min(sizes[one], sizes[other])
    }
    assert alike == {}


def test_no_answer_shares_five_words_in_a_row_with_a_held_out_one() -> None:
    held_out = [answer for _, answer in all_chats("heldout")]
    everything = held_out + [answer for _, answer in all_chats("train")]
    alike = [(everything[one], everything[other]) for one, other in shared(everything) if one < len(held_out)]
    assert alike == []


@pytest.mark.parametrize("customer", STYLES)
def test_no_held_out_message_is_nearly_another_one(customer: str) -> None:
    held_out = [message for message, _ in chats(customer, "heldout")]
    messages = [*held_out, *(message for message, _ in chats(customer, "train")), *QUESTIONS]
    bags = [set(words(message)) for message in messages]
    for one in range(len(held_out)):
        for other in range(len(messages)):
            common = len(bags[one] & bags[other]) / len(bags[one] | bags[other])
            assert one == other or common < NEARLY_THE_SAME, (messages[one], messages[other])


@pytest.mark.parametrize("customer", STYLES)
def test_no_message_is_asked_twice(customer: str) -> None:
    messages = [message for part in ("train", "heldout") for message, _ in chats(customer, part)]
    messages += QUESTIONS  # what the demo asks has not been trained on
    assert [message for message, count in Counter(messages).items() if count > 1] == []
