"""10,000 adapters come and go beside requests: memory, open files and threads must not grow.

Every cycle uploads one of a few contents under a new name, every tenth answers a request on it, and then it is deleted.
The process is looked at when a tenth of the cycles has passed and at the end. The exit status is 1 if it grew by 10 MB
or more, or has more open files or threads. `--leak` keeps something of every cycle: it must be caught. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

from benchmarks.bench_memory import resident_bytes
from benchmarks.workload import machine, random_adapter, started_engine
from serving.adapters.catalog import Catalog
from serving.adapters.registry import Registry
from serving.adapters.storage.folder import open_folder
from serving.engine import Engine
from serving.store.database import open_database, sqlite_url
from serving.types import Caller, EngineSettings, GenerationRequest, SamplingParams
from vblora.checkpoint import CONFIG_FILE, WEIGHTS_FILE, AdapterCheckpoint, write_adapter

GROWTH_BYTES = 10 * 2**20
LEAKED_BYTES = 2**17
CONTENTS, ASKED_EVERY = 8, 10
CALLER = Caller("acme", frozenset({"tenant"}))
Contents = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Footprint:
    """What a process holds: resident bytes, open files, threads."""

    bytes: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        return cls(resident_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count())

    def faults(self, later: Footprint) -> list[str]:
        """In what the process has grown since."""
        found = []
        if later.bytes - self.bytes >= GROWTH_BYTES:
            found.append(f"the process grew from {self.bytes:,} to {later.bytes:,} bytes")
        if later.files > self.files:
            found.append(f"{later.files} files are open, before {self.files}")
        if later.threads > self.threads:
            found.append(f"{later.threads} threads run, before {self.threads}")
        return found


@contextmanager
def opened(engine: Engine, folder: Path) -> Iterator[Catalog]:
    """A catalog of the engine's adapters in an empty folder."""
    database = open_database(sqlite_url(folder / "registry.db"))
    storage = open_folder(folder / "revisions")
    yield Catalog(Registry(database, engine.card.base_id), storage, engine.residency, engine.layout.compact)
    database.dispose()


def contents(make: Callable[[int], AdapterCheckpoint]) -> Contents:
    """The files of a few adapters."""
    found = []
    for number in range(CONTENTS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_adapter(folder, make(number), topk_only=True)
            found.append(((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()))
    return found


def cycle(engine: Engine, catalog: Catalog, files: Contents, count: int, kept: list[Any] | None = None) -> None:
    """`count` adapters come and go; `kept` leaks something of each."""
    for number in range(count):
        name = f"a{number}"
        catalog.add(CALLER, name, *files[number % len(files)])
        if number % ASKED_EVERY == 0:
            pin = catalog.pin(CALLER.tenant, name)
            prompt = tuple(range(3, 3 + number % 50 + 1))
            sampling = SamplingParams(max_tokens=4, ignore_eos=True)
            engine.generate([GenerationRequest(name, CALLER.tenant, prompt, sampling, pin.content_hash)])
            pin.release()
        catalog.delete(CALLER, name)
        if kept is not None:
            page = mmap(-1, LEAKED_BYTES)  # of its own: what malloc gives may be memory that was freed before
            page.write(os.urandom(LEAKED_BYTES))
            kept.append((page, os.open(os.devnull, os.O_RDONLY)))


def measure(engine: Engine, catalog: Catalog, files: Contents, count: int, kept: list[Any] | None = None) -> list[str]:
    """The faults of `count` cycles after a tenth of them."""
    cycle(engine, catalog, files, count // 10)
    before = Footprint.now()
    cycle(engine, catalog, files, count, kept)
    after = Footprint.now()
    print(json.dumps({"leaks": count, "before": asdict(before), "after": asdict(after)} | machine()))
    return before.faults(after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--leak", action="store_true")
    options = parser.parse_args()
    engine = started_engine(EngineSettings(model=options.model, kv_cache_bytes=1 << 28))
    with tempfile.TemporaryDirectory() as folder, opened(engine, Path(folder)) as catalog:
        files = contents(lambda seed: random_adapter(engine, seed))
        faults = measure(engine, catalog, files, options.cycles, [] if options.leak else None)
    engine.close()
    for fault in faults:
        print(f"not good enough: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
