"""API keys: made, kept as their hash, found, revoked. Functions over an open connection; knows no callers.

A key is ``vbk_`` and 256 random bits. So many need no slow hash: nobody finds one by trying, whoever has the hashes.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from serving.store.tables import keys, tenants
from serving.tenancy.records import IssuedKey, Key, Tenant

KEY = re.compile(r"vbk_[A-Za-z0-9_-]{43}")
_PREFIX_LENGTH = 8
_COLUMNS = (keys.c.id, keys.c.prefix, keys.c.created, keys.c.last_used, keys.c.revoked)


def hash_of(secret: str) -> str:
    """What is kept of a key: its SHA-256 in hexadecimal digits."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def issue(connection: Connection, tenant: str) -> IssuedKey:
    """Make a key of `tenant`, which must exist."""
    secret = "vbk_" + secrets.token_urlsafe(32)
    key = Key(secrets.token_hex(8), secret[:_PREFIX_LENGTH], int(time.time()))
    row = {"id": key.id, "tenant": tenant, "hash": hash_of(secret), "prefix": key.prefix, "created": key.created}
    connection.execute(insert(keys).values(row))
    return IssuedKey(key, secret)


def revoke(connection: Connection, tenant: str, key_id: str | None = None) -> int:
    """Revoke one key of `tenant`, or all; how many were revoked by this."""
    which = (keys.c.tenant == tenant) & keys.c.revoked.is_(None)
    if key_id is not None:
        which &= keys.c.id == key_id
    return connection.execute(update(keys).where(which).values(revoked=int(time.time()))).rowcount


def keys_of(connection: Connection, tenant: str, limit: int, after: str | None) -> Sequence[Key]:
    """The keys of `tenant` by id."""
    query = select(*_COLUMNS).where(keys.c.tenant == tenant, keys.c.id > (after or "")).order_by(keys.c.id).limit(limit)
    return [Key(*row) for row in connection.execute(query)]


def find(connection: Connection, digest: str) -> tuple[str, Tenant] | None:
    """The id and the tenant of the key with this hash, None if there is none or it is revoked. One query."""
    query = select(keys.c.id, keys.c.hash, tenants).join(tenants, keys.c.tenant == tenants.c.name)
    row = connection.execute(query.where(keys.c.hash == digest, keys.c.revoked.is_(None))).one_or_none()
    if row is None or not hmac.compare_digest(row.hash, digest):
        return None
    return row.id, tenant_of(row)


def tenant_of(row: Row[Any]) -> Tenant:
    """A row with the columns of `tenants`."""
    return Tenant(row.name, row.role, row.disabled, row.weight, row.quotas, row.created)
