from __future__ import annotations

import logging

import pytest

from serving.api import fields
from serving.api.fields import check_fields, has_no_effect
from serving.api.schemas import ChatBody, CompletionBody, GenerationBody, TokenizeBody
from serving.errors import InvalidValue


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "_logged", set())


@pytest.mark.parametrize("model", [CompletionBody, ChatBody, TokenizeBody])
def test_each_listed_field_is_refused_but_for_its_harmless_values(model: type[GenerationBody]) -> None:
    for name, accepted in model.unsupported.items():
        assert name not in model.model_fields
        for harmless in (None, *accepted):
            check_fields(model, {name: harmless})
        with pytest.raises(InvalidValue, match=f"{name} is not supported") as caught:
            check_fields(model, {name: "anything else"})
        assert caught.value.param == name


def test_values_are_compared_with_their_types() -> None:
    assert has_no_effect(False, (False,))
    assert not has_no_effect(0, (False,))
    assert not has_no_effect(True, (1,))
    assert not has_no_effect(1.0, (1,))


def test_an_unknown_field_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            check_fields(CompletionBody, {"made_up": "secret text"})
    assert [record.__dict__["field"] for record in caplog.records] == ["made_up"]
    assert "secret" not in caplog.text


def test_at_most_a_hundred_short_names_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_fields(CompletionBody, {f"{number:03}\n" + "x" * 500: 1 for number in range(300)})
    assert len(caplog.records) == 100
    assert max(len(record.__dict__["field"]) for record in caplog.records) < 100
    assert not any("\n" in record.__dict__["field"] for record in caplog.records)
