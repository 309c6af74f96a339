from __future__ import annotations

from pathlib import Path

from serving.settings import ServerSettings, flag_of
from serving.settings_reference import is_list, settings_reference

DOCUMENT = Path(__file__).parents[3] / "docs" / "settings.md"


def test_every_setting_is_documented() -> None:
    assert all(field.description for field in ServerSettings.model_fields.values())
    assert DOCUMENT.read_text(encoding="utf-8") == settings_reference(), "vblora-serve settings > docs/settings.md"


def test_names_of_flags() -> None:
    assert flag_of("max_rank") == "--max-rank"
    lists = {name for name, field in ServerSettings.model_fields.items() if is_list(field)}
    assert lists == {"adapter", "adapter_root", "allowed_hosts", "cors_origins"}
