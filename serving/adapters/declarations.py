"""Shared adapters that an operator declares by folders: on the command line, or in a folder that is watched.

It does not know when, nor who looks after the watched folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from serving.adapters.content import Compact, check_content, read_folder
from serving.adapters.records import SHARED, Adapter
from serving.adapters.registry import Registry
from serving.adapters.writer import Writer
from serving.errors import InvalidValue
from serving.types import Caller

Files = tuple[bytes, bytes]
# No tenant's name has a space.
COMMAND_LINE = Caller("command line", frozenset({"operator"}))
WATCHED_FOLDER = Caller("watched folder", frozenset({"operator"}))


class Declarations:
    """Adapters of the shared namespace, as folders declare them.

    A declaration that changed since the last one is made active; the same one again changes nothing, so that what was
    activated or uploaded under this name in the meantime survives a restart.
    """

    def __init__(
        self, registry: Registry, writer: Writer, compact: Compact, check_name: Callable[[str, str], None]
    ) -> None:
        """`check_name` raises `InvalidValue` with the given param for a name that no adapter may have."""
        self._registry = registry
        self._writer = writer
        self._compact = compact
        self._check_name = check_name

    def register(self, name: str, directory: Path) -> Adapter:
        """Declare an adapter from any folder; one that came from the watched folder is the command line's from now on.

        Raises `InvalidValue` for the name, `InvalidAdapter` and `IncompatibleAdapter` for the content.
        """
        return self._declare(COMMAND_LINE, name, lambda: read_folder(directory))[0]

    def watch(self, name: str, read: Callable[[], Files]) -> bool:
        """Declare an adapter by its two files, as found in the watched folder; whether that changed anything.

        Raises what `register` and `read` do, and `InvalidValue` for a name that was registered in another way.
        """
        return self._declare(WATCHED_FOLDER, name, read)[1]

    def watched(self) -> set[str]:
        """The names that came from the watched folder."""
        return self._registry.watched()

    def unwatch(self, name: str) -> None:
        """Remove an adapter whose folder is gone; one that did not come from there stays."""
        with self._writer.changing(WATCHED_FOLDER) as change:
            adapter = change.find_of(SHARED, name)
            if adapter is not None and adapter.watched:
                change.remove(adapter)

    def _declare(self, caller: Caller, name: str, read: Callable[[], Files]) -> tuple[Adapter, bool]:
        watched = caller is WATCHED_FOLDER
        self._check_name(name, "name")
        known = self._registry.find(SHARED, name)
        _check_free(known, watched)
        content = check_content(*read(), self._compact, uploaded=False)
        if known is not None and (known.declared, known.watched) == (content.content_hash, watched):
            return known, False
        with self._writer.adding(caller, content) as change:
            _check_free(change.find_of(SHARED, name), watched)
            adapter, _, _ = self._writer.install(change, SHARED, name, content)
            change.declare(adapter, content.content_hash, watched=watched)
        return adapter, True


def _check_free(known: Adapter | None, watched: bool) -> None:
    if watched and known is not None and not known.watched:
        raise InvalidValue(f"An adapter named {known.name!r} was registered in another way.", param="name")
