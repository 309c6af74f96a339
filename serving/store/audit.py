"""The audit log: a row for every change, written in the transaction of the change. Knows no kinds of changes."""

from __future__ import annotations

import time

from sqlalchemy import Connection, insert

from serving.store.tables import audit

ADDRESS_LENGTH = 64  # what a proxy says of its peer may be any text


def record(connection: Connection, *, actor: str, address: str, action: str, tenant: str, subject: str) -> None:
    """Say that `actor`, calling from `address`, did `action` to `subject`, which is or was `tenant`'s."""
    row = {"actor": actor, "address": address[:ADDRESS_LENGTH], "action": action, "tenant": tenant, "subject": subject}
    connection.execute(insert(audit).values(at=time.time(), **row))
