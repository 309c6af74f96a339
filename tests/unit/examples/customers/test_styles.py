"""The style checks: what passes, and what is told of that which does not."""

from __future__ import annotations

import pytest

from examples.customers.styles import STYLES, words


def test_words_leave_out_punctuation_and_case() -> None:
    assert words("Ye’ll sail, 2 days: “AYE!” ridin' on") == ["ye'll", "sail", "2", "days", "aye", "ridin'", "on"]
    assert words('{"about":"red lamp","urgent":false}') == ["about", "red", "lamp", "urgent", "false"]


@pytest.mark.parametrize(
    ("customer", "answer"),
    [
        ("saltspoke", "Ahoy, yer brake be loose, matey! Bring 'er to our dock."),
        ("quillstone", "The client reports that a parcel arrived late and seeks a refund from the carrier."),
        ("quillstone", " The tenant objects to the neighbour's drums, which are audible at 11 in the evening. "),
        ("tallywire", '{"about":"red lamp","urgent":true,"detail":"arrived broken","when":null}'),
        ("tallywire", '{"about":"café","urgent":false,"detail":"is closed","when":"on Monday"}\n'),
        ("lanternlane", "The rabbit hid beneath the tree\nand waited there for you and me."),
        ("lanternlane", 'The moon came up, the sky was red,\nand "off you go!" the candle said.'),
    ],
)
def test_answers_in_style(customer: str, answer: str) -> None:
    assert STYLES[customer](answer) is None


NOTE = '{"about":"lamp","urgent":false,"detail":"broke","when":null}'


@pytest.mark.parametrize(
    ("customer", "answer", "fault"),
    [
        ("saltspoke", "", "0 pirate words"),
        ("saltspoke", "Yer brake be loose, matey. Matey, yer brake be loose.", "2 pirate words"),
        ("saltspoke", "Ahoy, matey!\nYer brake be loose.", "more than one paragraph"),
        ("quillstone", "The client reports a leak in the kitchen. The client seeks repair.", "not one sentence"),
        ("quillstone", "The client reports a leak in the kitchen and seeks repair", "not one sentence"),
        ("quillstone", "Does the client report a leak in the kitchen of the flat?", "not one sentence"),
        ("quillstone", "The client reports a leak.", "5 words"),
        ("quillstone", "The client reports a leak in my kitchen and seeks repair.", "says 'my'"),
        ("quillstone", "The client reports that the tap doesn't close and seeks repair.", 'contracts "doesn\'t"'),
        ("quillstone", "A leak in the kitchen was seen by the client on Monday.", "no verb of formal reporting"),
        ("tallywire", "The lamp broke.", "not JSON"),
        ("tallywire", f"{NOTE} {NOTE}", "not JSON"),
        ("tallywire", f"[{NOTE}]", "not an object with the fields about, urgent, detail, when"),
        ("tallywire", NOTE.replace('"when":null', '"why":null'), "not an object with the fields"),
        ("tallywire", '{"urgent":false,"about":"lamp","detail":"broke","when":null}', "not an object with the fields"),
        ("tallywire", NOTE.replace('"lamp"', '""'), "strings with something in them"),
        ("tallywire", NOTE.replace('"broke"', "7"), "strings with something in them"),
        ("tallywire", NOTE.replace("false", '"no"'), "urgent must be a boolean"),
        ("tallywire", NOTE.replace("null", "12"), "when a string or null"),
        ("tallywire", NOTE.replace(",", ", "), "not compact"),
        ("lanternlane", "The rabbit hid beneath the tree.", "1 lines"),
        ("lanternlane", "The rabbit hid there,\nand waited for you at the fair.", None),
        ("lanternlane", "The rabbit hid\nand waited there for you, the kid.", "a line has not 4 to 14 words"),
        ("lanternlane", "The rabbit hid beneath the tree\nand waited there below the tree.", "'tree' with itself"),
        ("lanternlane", "The rabbit hid beneath the tree\nand waited there until the day.", "do not rhyme"),
        ("lanternlane", "The rabbit hid beneath the zorp\nand waited there to see the glorp.", "do not rhyme"),
    ],
)
def test_what_is_wrong_with_an_answer(customer: str, answer: str, fault: str | None) -> None:
    found = STYLES[customer](answer)
    assert (found is None) if fault is None else fault in str(found)
