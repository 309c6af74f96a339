"""What all clients are asked, and where the server is. Knows no client."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BASE_URL = os.environ["BASE_URL"]
MODEL = os.environ["MODEL"]
ASKED: Mapping[str, Any] = json.loads((Path(__file__).parents[1] / "asked.json").read_text())
TOOL: Mapping[str, Any] = ASKED["tool"]


def assert_same_text(parts: Sequence[str], whole: str) -> None:
    """An answer in parts must have more than a few, and be together the answer in one piece."""
    assert len(whole) > 20, "a short answer shows little"
    assert len([part for part in parts if part]) > 5
    assert "".join(parts) == whole


def assert_arguments(arguments: Mapping[str, Any]) -> None:
    """Parsed arguments of a call of the tool must match its schema."""
    assert arguments.keys() == {"part", "day"}
    assert arguments["part"] in TOOL["parameters"]["properties"]["part"]["enum"]
    assert type(arguments["day"]) is int and 1 <= arguments["day"] <= 28
