from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.adapters.state import (
    Adapter,
    CatalogState,
    CatalogStateError,
    Default,
    JsonCatalogStore,
    Revision,
    from_json,
    to_json,
)

FIRST, SECOND, THIRD = (Revision(digit * 64, 10, created) for created, digit in enumerate("abc"))


def adapter(name: str = "x", *revisions: Revision) -> Adapter:
    revisions = revisions or (FIRST,)
    return Adapter(name, 0, revisions[-1].content_hash, revisions)


STATE = CatalogState(
    adapters={
        None: {"s": Adapter("s", 1, FIRST.content_hash, (FIRST,), declared=FIRST.content_hash)},
        "ann": {"x": adapter("x", FIRST, SECOND), "y": adapter("y")},
        "bob": {"x": adapter("x", THIRD)},
    },
    defaults={
        "ann": Default("ann", "x", FIRST.revision),
        "bob": Default(None, "s", None),
        "cid": Default("cid", "gone", None, deleted=True),
    },
)


def test_json_keeps_the_whole_state() -> None:
    assert from_json(json.loads(json.dumps(to_json(STATE)))) == STATE
    assert from_json(to_json(CatalogState())) == CatalogState()


def test_the_file_keeps_the_whole_state(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "catalog.json"
    assert JsonCatalogStore(path).load() == CatalogState()
    JsonCatalogStore(path).save(STATE)
    assert JsonCatalogStore(path).load() == STATE
    assert json.loads(path.read_text())["version"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["catalog.json"]


def damaged(change: str) -> bytes:
    value = to_json(STATE)
    ann = value["tenants"]["ann"][0]
    match change:
        case "version":
            value["version"] = 2
        case "no version":
            del value["version"]
        case "active":
            ann["active"] = "d" * 64
        case "unknown field":
            ann["colour"] = "blue"
        case "missing field":
            del ann["created"]
        case "short hash":
            ann["revisions"][0]["content_hash"] = "ab"
        case "odd hash":
            ann["revisions"][0]["content_hash"] = "x" * 64
        case "size":
            ann["revisions"][0]["bytes"] = "10"
        case "tenants":
            value["tenants"] = []
        case "defaults":
            value["defaults"] = {"ann": None}
    return json.dumps(value).encode()


CHANGES = [
    "version",
    "no version",
    "active",
    "unknown field",
    "missing field",
    "short hash",
    "odd hash",
    "size",
    "tenants",
    "defaults",
]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", json.dumps(to_json(STATE)).encode()[:-1], *map(damaged, CHANGES)],
    ids=["empty", "cut", "list", "null", "bytes", "truncated", *CHANGES],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "catalog.json"
    path.write_bytes(data)
    with pytest.raises(CatalogStateError, match=r"catalog\.json does not hold a readable catalog"):
        JsonCatalogStore(path).load()
    assert path.read_bytes() == data


def test_a_folder_in_the_files_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "catalog.json").mkdir()
    with pytest.raises(CatalogStateError, match=r"catalog\.json"):
        JsonCatalogStore(tmp_path / "catalog.json").load()


def test_an_own_name_hides_a_shared_one() -> None:
    state = CatalogState().with_adapter(None, adapter("x", FIRST)).with_adapter("ann", adapter("x", SECOND))
    assert state.find("ann", "x") == ("ann", adapter("x", SECOND))
    assert state.find("bob", "x") == (None, adapter("x", FIRST))
    assert [owner for owner, _ in state.visible("ann")] == ["ann"]
    assert state.find("ann", "y") is None


def test_pruning_drops_the_oldest_that_nobody_needs() -> None:
    full = adapter("x", FIRST, SECOND, THIRD)
    assert full.pruned(2, lambda revision: False).revisions == (SECOND, THIRD)
    assert full.pruned(2, lambda revision: revision is FIRST).revisions == (FIRST, THIRD)
    assert full.with_revision(FIRST).pruned(1, lambda revision: False).revisions == (FIRST,)
    assert full.pruned(1, lambda revision: True).revisions == (FIRST, SECOND, THIRD)


def test_a_default_is_lost_with_its_adapter_and_stays_lost_when_the_name_returns() -> None:
    state = STATE.without_adapter("ann", "x")
    assert state.defaults["ann"].deleted
    assert not state.is_default("ann", "ann", "x")
    assert state.with_adapter("ann", adapter("x")).defaults["ann"].deleted
    assert state.defaults["bob"] == STATE.defaults["bob"]


def test_a_pinned_default_is_lost_with_its_revision() -> None:
    assert not STATE.with_adapter("ann", adapter("x", FIRST, THIRD)).defaults["ann"].deleted
    assert STATE.with_adapter("ann", adapter("x", SECOND)).defaults["ann"].deleted


def test_the_contents_are_those_of_all_owners() -> None:
    assert STATE.contents() == {FIRST.content_hash, SECOND.content_hash, THIRD.content_hash}
    assert STATE.without_adapter("bob", "x").contents() == {FIRST.content_hash, SECOND.content_hash}
    assert "bob" not in STATE.without_adapter("bob", "x").adapters


def test_a_changed_state_leaves_the_old_one_as_it_was() -> None:
    before = to_json(STATE)
    STATE.without_adapter("ann", "x").with_adapter("bob", adapter("z")).with_default("ann", None)
    assert to_json(STATE) == before
