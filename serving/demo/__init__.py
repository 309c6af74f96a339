"""The demo: adapters that come with the product. Knows their files, not how they are served."""

from __future__ import annotations

from pathlib import Path

ADAPTERS = Path(__file__).parent / "adapters"
CUSTOMERS = {
    "lanternlane": "a storyteller for small children, in rhyme",
    "quillstone": "a law firm's file notes, one formal sentence each",
    "saltspoke": "the support desk of a bicycle shop by the sea",
    "tallywire": "a dispatch service for machines, in compact JSON",
}
"""Who the adapters are for: name → what one hears in its answers."""


def demo_adapters() -> dict[str, Path]:
    """The shipped adapters: name → folder, sorted by name."""
    return {config.parent.name: config.parent for config in sorted(ADAPTERS.glob("*/adapter_config.json"))}
