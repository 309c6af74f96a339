"""A process that changes adapters until it is killed, for tests of durability."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from serving.errors import ServingError
from tests.adapters import ANN, BOB, OPERATOR, Site, adapter_files

SEEDS = range(6)


def change_forever(data: Path, url: str, seed: int, ready: Connection) -> None:
    """Make one change after the other, picked by `seed`, and say when the first is made."""
    catalog = Site(data, keep_revisions=2, url=url).catalog
    pick = random.Random(seed)
    files = [adapter_files(number) for number in SEEDS]
    catalog.add(ANN, "x", *files[0])
    ready.send("changing")
    while True:
        caller = pick.choice((ANN, BOB, OPERATOR))
        shared = caller is OPERATOR
        owner, name = caller.tenant, pick.choice(("x", "y"))
        held = {info.name: info for info in catalog.list(owner)}
        revision = pick.choice(held[name].revisions).revision if name in held else "0" * 16
        changes: list[Callable[[], object]] = [
            *[partial(catalog.add, caller, name, *pick.choice(files), shared=shared)] * 3,
            partial(catalog.activate, caller, name, revision),
            partial(catalog.delete_revision, caller, name, revision),
            partial(catalog.delete, caller, name),
            partial(catalog.set_default, owner, name, pick.choice((None, revision))),
        ]
        with suppress(ServingError):  # what it asks for is not there, or not its own
            pick.choice(changes)()
