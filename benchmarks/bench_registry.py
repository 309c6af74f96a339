"""Seconds until a server is ready and until it has listed a page, with 10,000 adapters of 1,000 tenants registered.

Beside it the same server with the shipped adapters alone. `page` is of 100 entries, `full_page` of 1,000 (shared ones,
which come on top of the 10,000), `rss` is the server's memory in bytes after all lists have been read to their ends.
Wanted are 10 s and 100 ms.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import httpx
from sqlalchemy import Engine, func, insert, select

from benchmarks import sides
from benchmarks.bench_start import free_port, resident, wait_for_memory, wait_until_ready
from serving.adapters.records import SHARED
from serving.store.database import open_database, sqlite_url
from serving.store.tables import adapters, revisions

ASKED = 30


def register_many(database: Engine, base: str, tenants: int, each: int, shared: int = 0) -> None:
    """Add adapters ``a0`` … of tenants ``t0`` …, and shared ones. Their contents are those that are registered
    already, in turn."""
    names = [(f"t{tenant}", f"a{number}") for tenant in range(tenants) for number in range(each)]
    names += [(SHARED, f"shared{number}") for number in range(shared)]
    with database.begin() as connection:
        columns = revisions.c["content_hash", "bank_hash", "bytes", "created"]
        contents = cycle([row._asdict() for row in connection.execute(select(*columns).distinct())])
        first = (connection.scalar(select(func.max(adapters.c.id))) or 0) + 1_000_000
        kept = [
            {**content, "adapter": first + place} for place, content in zip(range(len(names)), contents, strict=False)
        ]
        rows = [
            {
                "id": row["adapter"],
                "base": base,
                "owner": owner,
                "name": name,
                "created": 1,
                "active": row["content_hash"],
            }
            for (owner, name), row in zip(names, kept, strict=True)
        ]
        connection.execute(insert(adapters), rows)
        connection.execute(insert(revisions), kept)


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    with tempfile.TemporaryDirectory() as folder:
        with running(options, folder):
            pass  # registers the shipped adapters, which are what all others hold
        if side == "many":
            database = open_database(sqlite_url(Path(folder) / "registry.db"))
            with database.begin() as connection:
                base = connection.scalar(select(adapters.c.base))
            register_many(database, str(base), options.tenants, options.adapters // options.tenants, shared=1000)
            database.dispose()
        began = time.perf_counter()
        with running(options, folder) as (client, process):
            start = time.perf_counter() - began
            values = {"start": start, "page": seconds(client, 100), "full_page": seconds(client, 1000)}
            wait_for_memory(process)
            values["rss"] = resident(process)
    return {f"{side}_{name}": value for name, value in values.items()}


@contextmanager
def running(options: argparse.Namespace, folder: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    port = free_port()
    command = [sys.executable, "-m", "serving.cli", "run", options.model, "--dtype", options.dtype]
    command += ["--port", str(port), "--data-dir", folder, "--log-level", "error"]
    server = subprocess.Popen(command)
    try:
        wait_until_ready(server, port)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client, server
    finally:
        server.terminate()
        server.wait()


def seconds(client: httpx.Client, limit: int) -> float:
    """The median time of a page, over as many pages as are asked for; from the end of a list on to its beginning."""
    times: list[float] = []
    after: dict[str, str] = {}
    while len(times) < ASKED:
        began = time.perf_counter()
        page = client.get("/v1/adapters", params={"limit": limit, **after}).raise_for_status().json()
        times.append(time.perf_counter() - began)
        after = {"after": page["last_id"]} if page["has_more"] else {}
    return statistics.median(times)


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--tenants", type=int, default=1_000)
    ratio = ("many_start", "few_start")
    sides.main("many registered", "benchmarks.bench_registry", parser, measure, ratio, ("many", "few"))


if __name__ == "__main__":
    main()
