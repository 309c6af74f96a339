"""What each demo customer's voice is, as a check that a program can make of one answer. Knows no models and no files.

A check returns None for an answer in the customer's voice, else what is wrong with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pronouncing

Check = Callable[[str], str | None]

WORD = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*'?")


def words(text: str) -> list[str]:
    """The words of a text in lower case, punctuation left out: ``Ye'll sail, 2 days`` → ye'll sail 2 days."""
    return WORD.findall(text.lower().replace("’", "'"))


PIRATE_LEAST = 3
PIRATE_WORDS = frozenset(
    words("""
    aboard ahoy anchor arr arrr avast aye barnacle barnacles belay bilge booty bosun brig buccaneer cap'n captain cargo
    corsair crew crow's cutlass davy deck doubloon doubloons fathom fathoms fleet gale galleon galley gangplank grog
    harbour hearties hearty heave helm hoist hull jolly keel kraken lad lads landlubber landlubbers lass locker lookout
    loot maroon marooned mast mateys matey mutiny oar parley parrot pirate pirates plank plunder quartermaster quay reef
    rigging rum sail sails salty scallywag scallywags scurvy sea seas shanty ship ship's shipmate shipmates shipshape
    shiver shore spyglass starboard swab swabs swashbuckler tar tide tides timbers treasure vessel voyage yarr ye ye'll
    ye're ye've yer
    """)
)
FORMAL_WORDS = range(8, 51)
FORMAL_VERBS = frozenset(
    words("""
    acknowledges advises alleges asks asserts complains concedes concerns confirms contends declares describes discloses
    disputes enquires expresses indicates informs intends invites maintains notes notifies objects observes proposes
    protests raises recalls recounts records regrets relates remarks reports represents requests requires reserves seeks
    states submits suggests undertakes wishes
    """)
)
FIRST_OR_SECOND_PERSON = frozenset(words("i i'm i've i'd i'll me my mine we we're we've us our you you're your yours"))
NOTE_FIELDS = ("about", "urgent", "detail", "when")
LINE_WORDS = range(4, 15)


def speaks_pirate(answer: str) -> str | None:
    """One paragraph with at least `PIRATE_LEAST` different words of a ship's crew."""
    if "\n" in answer.strip():
        return "more than one paragraph"
    found = PIRATE_WORDS.intersection(words(answer))
    return None if len(found) >= PIRATE_LEAST else f"{len(found)} pirate words, fewer than {PIRATE_LEAST}"


def is_formal_sentence(answer: str) -> str | None:
    """One sentence in the third person with a verb of formal reporting, without contractions."""
    text = answer.strip()
    spoken = words(text)
    if not re.fullmatch(r"[A-Z][^.!?\n]*\.", text):
        return "not one sentence that ends with a full stop"
    if len(spoken) not in FORMAL_WORDS:
        return f"{len(spoken)} words, not {FORMAL_WORDS.start} to {FORMAL_WORDS.stop - 1}"
    if personal := FIRST_OR_SECOND_PERSON.intersection(spoken):
        return f"says {min(personal)!r}"
    if contracted := [word for word in spoken if re.search(r"n't$|'(?:re|ve|ll|d|m)$", word)]:
        return f"contracts {contracted[0]!r}"
    return None if FORMAL_VERBS.intersection(spoken) else "no verb of formal reporting"


def is_compact_note(answer: str) -> str | None:
    """Compact JSON: an object with exactly `NOTE_FIELDS`, in that order and of their types."""
    text = answer.strip()
    try:
        note = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(note, dict) or tuple(note) != NOTE_FIELDS:
        return f"not an object with the fields {', '.join(NOTE_FIELDS)}"
    if not (isinstance(note["about"], str) and note["about"] and isinstance(note["detail"], str) and note["detail"]):
        return "about and detail must be strings with something in them"
    if not isinstance(note["urgent"], bool) or not (note["when"] is None or isinstance(note["when"], str)):
        return "urgent must be a boolean, when a string or null"
    return None if text == json.dumps(note, ensure_ascii=False, separators=(",", ":")) else "not compact"


def is_rhyming_couplet(answer: str) -> str | None:
    """Two lines that end in different words which rhyme, by the CMU Pronouncing Dictionary."""
    lines = answer.strip().split("\n")
    if len(lines) != 2:
        return f"{len(lines)} lines, not 2"
    spoken = [words(line) for line in lines]
    if any(len(line) not in LINE_WORDS for line in spoken):
        return f"a line has not {LINE_WORDS.start} to {LINE_WORDS.stop - 1} words"
    first, second = (line[-1].strip("'") for line in spoken)
    if first == second:
        return f"rhymes {first!r} with itself"
    return None if _rhyming_parts(first) & _rhyming_parts(second) else f"{first!r} and {second!r} do not rhyme"


def _rhyming_parts(word: str) -> set[str]:
    """The sounds from the last stressed vowel on, for each way to say the word; empty for an unknown word."""
    return {_unstressed(pronouncing.rhyming_part(phones)) for phones in pronouncing.phones_for_word(word)}


def _unstressed(phones: str) -> str:
    return re.sub(r"\d", "", phones)


STYLES: dict[str, Check] = {
    "lanternlane": is_rhyming_couplet,
    "quillstone": is_formal_sentence,
    "saltspoke": speaks_pirate,
    "tallywire": is_compact_note,
}
