"""What the registry tells of adapters: their revisions and the defaults that name them.

It does not know where this is kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

REVISION_DIGITS = 16
SHARED = ""
"""The owner of the shared namespace; any other owner is a tenant's name."""


def shown_revision(content_hash: str) -> str:
    """The digits of a content hash that clients see."""
    return content_hash[:REVISION_DIGITS]


@dataclass(frozen=True, slots=True)
class Revision:
    """One content under one name. `bytes` is what its two files took when they came, `created` seconds since the
    epoch."""

    content_hash: str
    bank_hash: str
    bytes: int
    created: int

    @property
    def revision(self) -> str:
        return shown_revision(self.content_hash)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name and its revisions, the oldest first. `active` and `declared` are content hashes.

    `declared` is the content that the operator's command line or watched folder gave last, None where neither gave
    any; `watched` says that it was the folder. `is_default` is of the tenant that asked.
    """

    id: int
    owner: str
    name: str
    created: int
    active: str
    declared: str | None
    watched: bool
    is_default: bool
    revisions: tuple[Revision, ...]

    @property
    def shared(self) -> bool:
        return self.owner == SHARED

    def find(self, revision: str | None) -> Revision | None:
        """The revision with these 16 digits, the active one for None."""
        wanted = shown_revision(self.active) if revision is None else revision
        return next((known for known in self.revisions if known.revision == wanted), None)

    def surplus(self, keep: int, needed: Collection[str]) -> list[Revision]:
        """What is more than `keep` revisions, the oldest first, but never the active one or a content of `needed`."""
        spare = [known for known in self.revisions if known.content_hash not in {self.active, *needed}]
        return spare[: max(len(self.revisions) - keep, 0)]


@dataclass(frozen=True, slots=True)
class Default:
    """What a tenant set as its default: an adapter of its own or a shared one.

    `revision` None follows activation. `adapter` is None once it is gone, and stays so until the tenant sets anew.
    """

    name: str
    revision: str | None
    adapter: Adapter | None
