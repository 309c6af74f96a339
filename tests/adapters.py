"""Small sound adapters as bytes, and a catalog on a folder, for the tests of `serving/adapters`."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Engine as Database
from sqlalchemy import event, select

from serving.adapters.catalog import Catalog
from serving.adapters.records import shown_revision
from serving.adapters.registry import Registry
from serving.adapters.residency import Residency
from serving.adapters.storage.folder import open_folder
from serving.adapters.storage.objects import KINDS, Kind
from serving.adapters.storage.revisions import RevisionStorage
from serving.store.database import open_database, sqlite_url
from serving.store.tables import adapters, audit, metadata, revisions
from serving.types import Caller
from tests.s3 import Bucket
from vblora.checkpoint import CONFIG_FILE, WEIGHTS_FILE, AdapterCheckpoint, TopKModule, write_adapter
from vblora.compact import SlotLayout
from vblora.config import VBLoRAConfig
from vblora.mixture import ModuleShape, topk_mixture

LAYOUT = SlotLayout({"layers.0.q_proj": ModuleShape(16, 8), "layers.0.v_proj": ModuleShape(16, 16)}, max_rank=8)
ANN = Caller("ann", frozenset({"tenant"}))
BOB = Caller("bob", frozenset({"tenant"}))
OPERATOR = Caller("boss", frozenset({"tenant", "operator"}))

BASE = "tiny"
Files = tuple[bytes, bytes]


def small_checkpoint(seed: int = 0, *, rank: int = 2, bank_seed: int = 0) -> AdapterCheckpoint:
    """A top-k adapter that fits `LAYOUT` up to rank 8; adapters of one `bank_seed` share a bank of 16 vectors of 8."""
    generator = torch.Generator().manual_seed(seed)
    bank = torch.rand(16, 8, generator=torch.Generator().manual_seed(1000 + bank_seed)) - 0.5
    modules = {
        name: TopKModule(
            a=topk_mixture(torch.randn(rank, shape.in_features // 8, 16, generator=generator), 2),
            b=topk_mixture(torch.randn(shape.out_features // 8, rank, 16, generator=generator), 2),
        )
        for name, shape in LAYOUT.modules.items()
    }
    config = VBLoRAConfig(
        r=rank,
        num_vectors=16,
        vector_length=8,
        topk=2,
        target_modules=["q_proj", "v_proj"],
        save_only_topk_weights=True,
    )
    return AdapterCheckpoint(config=config, bank=bank, modules=modules, extras={}).topk()


@cache
def adapter_files(seed: int = 0, *, rank: int = 2, bank_seed: int = 0) -> Files:
    """The bytes of config and weights of `small_checkpoint`."""
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), small_checkpoint(seed, rank=rank, bank_seed=bank_seed))
        return (Path(folder) / CONFIG_FILE).read_bytes(), (Path(folder) / WEIGHTS_FILE).read_bytes()


def with_config(files: Files, **changes: object) -> Files:
    """The same files with entries of the configuration changed."""
    return json.dumps({**json.loads(files[0]), **changes}).encode(), files[1]


def write_files(folder: Path, files: Files) -> Path:
    """Write the two files into `folder`, which it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(files[0])
    (folder / WEIGHTS_FILE).write_bytes(files[1])
    return folder


@dataclass
class Site:
    """A data folder and the parts of a catalog on it; `restart` opens the same folder with an empty memory."""

    data: Path
    roots: tuple[Path, ...] = ()
    keep_revisions: int = 10
    memory_bytes: int | None = None
    url: str = ""  # of the database; by default a file in `data`
    bucket: Bucket | None = None  # where the bytes are; by default in `data`
    database: Database = field(init=False)
    residency: Residency = field(init=False)
    storage: RevisionStorage = field(init=False)
    catalog: Catalog = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> Catalog:
        self.close()
        self.database = open_database(self.url or sqlite_url(self.data / "registry.db"))
        self.residency = Residency(self.memory_bytes)
        self.storage = open_folder(self.data / "adapters") if self.bucket is None else self.bucket.open()
        self.catalog = Catalog(
            Registry(self.database, BASE),
            self.storage,
            self.residency,
            LAYOUT.compact,
            adapter_roots=self.roots,
            reserved={BASE},
            keep_revisions=self.keep_revisions,
        )
        return self.catalog

    def close(self) -> None:
        """Let go of the database, as the end of a process does."""
        if hasattr(self, "database"):
            self.database.dispose()

    def tables(self) -> dict[str, list[tuple[object, ...]]]:
        """All rows of the database."""
        with self.database.execution_options(readonly=True).begin() as connection:
            return {
                table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key))]
                for table in metadata.sorted_tables
            }

    def age(self, digest: str, seconds: float, kind: Kind = "contents") -> None:
        """Let a stored content, or a bank, look as if it had been put so long ago."""
        then = time.time() - seconds
        if self.bucket is None:
            os.utime(self.data / "adapters" / kind / digest, (then, then))
        else:
            self.bucket.age(f"{kind}/{digest}", then)

    def age_all(self, seconds: float) -> None:
        """The same for all that is stored."""
        for kind in KINDS:
            for digest in self.storage.sizes(kind):
                self.age(digest, seconds, kind)

    def spoil(self, digest: str, kind: Kind = "contents") -> None:
        """Change one bit at the end of a stored content, or of a bank."""
        objects = self.storage._objects
        data = bytearray(objects.get(f"{kind}/{digest}"))
        data[-1] ^= 1
        objects.put(f"{kind}/{digest}", bytes(data))

    def named(self) -> set[str]:
        """The revisions that adapters have."""
        return {shown_revision(row[2]) for row in self.tables()["revisions"]}  # type: ignore[arg-type]

    def named_banks(self) -> set[str]:
        """The banks that adapters are on."""
        return {row[3] for row in self.tables()["revisions"]}  # type: ignore[misc]

    def stored_banks(self) -> set[str]:
        """The banks in the storage."""
        return set(self.storage.sizes("banks"))

    def stored(self) -> set[str]:
        """The revisions whose bytes are in the storage."""
        return {content_hash[:16] for content_hash in self.storage.sizes()}


@contextmanager
def statements(site: Site) -> Iterator[list[str]]:
    """The statements that its database gets while the block runs, transactions' beginnings and ends left out."""
    seen: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if not statement.startswith("BEGIN"):
            seen.append(statement)

    event.listen(site.database, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(site.database, "before_cursor_execute", note)


Shown = tuple[str, frozenset[str]]
"""The active revision of an adapter and all its revisions."""


def registered(site: Site) -> dict[str, Shown]:
    """What the tables say of every adapter, by ``owner/name``."""
    with site.database.execution_options(readonly=True).begin() as connection:
        rows = connection.execute(
            select(adapters.c.owner, adapters.c.name, adapters.c.active, revisions.c.content_hash).join_from(
                adapters, revisions, isouter=True
            )
        ).all()
    found: dict[str, Shown] = {}
    for row in rows:
        key = f"{row.owner}/{row.name}"
        _, known = found.get(key, ("", frozenset()))
        found[key] = shown_revision(row.active), known | {shown_revision(row.content_hash)}
    return found


def replayed(site: Site) -> dict[str, Shown]:
    """What the audit log says that they must be."""
    with site.database.execution_options(readonly=True).begin() as connection:
        lines = connection.execute(select(audit.c.action, audit.c.tenant, audit.c.subject).order_by(audit.c.id)).all()
    found: dict[str, Shown] = {}
    for action, owner, subject in lines:
        name, _, revision = subject.partition("@")
        active, known = found.get(f"{owner}/{name}", ("", frozenset()))
        if action == "adapter.delete":
            del found[f"{owner}/{name}"]
        elif action == "adapter.delete_revision":
            found[f"{owner}/{name}"] = active, known - {revision}
        elif action in ("adapter.add", "adapter.activate"):
            found[f"{owner}/{name}"] = revision, known | {revision}
    return found
