"""A stranger's files, changed at random: they are refused in words, or what comes of them is sound."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.adapters.content import Content, check_content
from serving.errors import IncompatibleAdapter, InvalidAdapter
from tests.adapters import LAYOUT, adapter_files

CONFIG, WEIGHTS = adapter_files(1)
HEADER_BYTES = struct.unpack("<Q", WEIGHTS[:8])[0]
HEADER: dict[str, Any] = json.loads(WEIGHTS[8 : 8 + HEADER_BYTES])
TENSORS = sorted(set(HEADER) - {"__metadata__"})

NUMBERS = st.sampled_from([-1, 0, 1, 2, 16, 2**31, 2**63, 2**64, 1e99, 0.5, None, True, "1", [], {}])
DTYPES = st.sampled_from(
    ["F32", "F16", "BF16", "F64", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "X", "", 7, None, []]
)
VALUES = [b"\xff" * 4, b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\0\0\xc0\x7f", b"\x7f" * 4, b"\x10", b"\x7f", b"\xff"]
SPOTS = st.integers(0, len(WEIGHTS) - 1)


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """A piece of the file replaced by other bytes, fewer or more; header, tensors or both."""
    start = draw(st.one_of(SPOTS, st.integers(0, HEADER_BYTES + 8)))
    length = draw(st.sampled_from([0, 1, 2, 4, 8, 64, len(WEIGHTS)]))
    return WEIGHTS[:start] + draw(st.binary(max_size=16)) + WEIGHTS[start + length :]


@st.composite
def changed_values(draw: st.DrawFn) -> bytes:
    """Values of a tensor replaced by what is not a number, infinite, negative, huge, or another index."""
    value = draw(st.sampled_from(VALUES))
    start, end = HEADER[draw(st.sampled_from(TENSORS))]["data_offsets"]
    place = 8 + HEADER_BYTES + start + draw(st.integers(0, max(0, (end - start) // len(value) - 1))) * len(value)
    return WEIGHTS[:place] + value + WEIGHTS[place + len(value) :]


@st.composite
def changed_header(draw: st.DrawFn) -> bytes:
    """A well-formed header that says something else of a tensor or two, over the same bytes or some more."""
    header = json.loads(json.dumps(HEADER))
    for name in draw(st.lists(st.sampled_from(TENSORS), min_size=1, max_size=2, unique=True)):
        entry = header[name]
        match draw(st.sampled_from(["dtype", "shape", "offsets", "gone", "renamed", "extra", "other"])):
            case "dtype":
                entry["dtype"] = draw(DTYPES)
            case "shape":
                entry["shape"] = draw(st.lists(NUMBERS, max_size=5))
            case "offsets":
                entry["data_offsets"] = draw(st.lists(NUMBERS, max_size=3))
            case "gone":
                del header[name]
            case "renamed":
                header[draw(st.text(max_size=8))] = header.pop(name)
            case "extra":
                header[name + draw(st.sampled_from(["x", ".", "_", "\0"]))] = entry
            case "other":
                header[name] = draw(st.one_of(NUMBERS, st.just(HEADER[draw(st.sampled_from(TENSORS))])))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + WEIGHTS[8 + HEADER_BYTES :] + draw(st.binary(max_size=4))


@st.composite
def changed_config(draw: st.DrawFn) -> bytes:
    config = json.loads(CONFIG)
    for name in draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3, unique=True)):
        config[name] = draw(st.one_of(NUMBERS, DTYPES, st.text(max_size=5), st.lists(st.text(max_size=3), max_size=2)))
    return json.dumps(config).encode()


def outcome(config: bytes, weights: bytes) -> Content | None:
    """None for what is refused; any other exception is the test's failure."""
    try:
        return check_content(config, weights, LAYOUT.compact, uploaded=True)
    except (InvalidAdapter, IncompatibleAdapter):
        return None


def assert_sound(content: Content) -> None:
    compact = content.compact
    assert torch.isfinite(compact.bank).all() and torch.isfinite(compact.weights).all()
    assert (compact.weights >= 0).all() and (compact.weights.sum(-1) <= 1 + 1e-3).all()
    assert 0 <= int(compact.indices.min()) <= int(compact.indices.max()) < compact.bank.shape[0]
    assert torch.isfinite(compact.compose()).all()


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(
    config=st.one_of(st.just(CONFIG), changed_config()),
    weights=st.one_of(changed_bytes(), changed_values(), changed_header()),
)
def test_files_changed_at_random_are_refused_or_sound(config: bytes, weights: bytes) -> None:
    """SECURITY.md, "malformed safetensors". Seen to fail without the check of indices in `vblora/checkpoint.py`, and
    without that of finite values."""
    content = outcome(config, weights)
    if content is not None:
        assert_sound(content)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(config=st.one_of(changed_config(), st.binary(max_size=64), st.text(max_size=64).map(str.encode)))
def test_configurations_changed_at_random_are_refused_or_sound(config: bytes) -> None:
    """Seen to fail where `parse_json` lets an error of `json` through."""
    content = outcome(config, WEIGHTS)
    if content is not None:
        assert_sound(content)


def test_the_files_themselves_are_sound() -> None:
    content = outcome(CONFIG, WEIGHTS)
    assert content is not None
    assert_sound(content)
