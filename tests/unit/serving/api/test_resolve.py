from __future__ import annotations

import pytest

from serving.api.resolve import AdapterRef, parse_model


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [("a", "a", None), ("a@1", "a", "1"), ("a@b@1", "a@b", "1"), ("a@", "a", ""), ("@1", "", "1"), ("", "", None)],
)
def test_a_name_splits_at_the_last_at(text: str, name: str, revision: str | None) -> None:
    assert AdapterRef.parse(text) == AdapterRef(name, revision)


@pytest.mark.parametrize("base_id", ["base-1", "org/base:v1", "odd@base"])
def test_the_base_id_comes_first_then_its_prefix(base_id: str) -> None:
    assert parse_model(base_id, base_id) is None
    assert parse_model(f"{base_id}:a", base_id) == AdapterRef("a", None)
    assert parse_model(f"{base_id}:a@1", base_id) == AdapterRef("a", "1")
    assert parse_model("a@1", base_id) == AdapterRef("a", "1")
    assert parse_model(f"{base_id}x", base_id) is not None
