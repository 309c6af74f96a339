"""The demo: adapters that come with the product. Knows their files, not how they are served."""

from __future__ import annotations

from pathlib import Path

ADAPTERS = Path(__file__).parent / "adapters"


def demo_adapters() -> dict[str, Path]:
    """The shipped adapters: name → folder, sorted by name."""
    return {config.parent.name: config.parent for config in sorted(ADAPTERS.glob("*/adapter_config.json"))}
