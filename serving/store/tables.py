"""The tables of the registry. Times are seconds since the epoch; the shared namespace's owner is the empty text.

Knows no connections. A change here needs a migration under `migrations/versions`, and a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

SHARED = ""
NAME, HASH = String(64), String(64)
# Names in the order of their characters' codes, as SQLite has them, whatever the language of a PostgreSQL.
SORTED_NAME = NAME.with_variant(String(64, collation="C"), "postgresql")
# SQLite counts rows by itself only in a plain INTEGER.
Serial = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Who may call. `quotas` holds the limits that differ from the server's, by name; `weight` is the share of tokens.
tenants = Table(
    "tenants",
    metadata,
    Column("name", NAME, primary_key=True),
    Column("role", String(16), nullable=False),
    Column("disabled", Boolean, nullable=False),
    Column("weight", Float, nullable=False),
    Column("quotas", JSON, nullable=False),
    Column("created", BigInteger, nullable=False),
)

# Keys are kept as their SHA-256 only; `prefix` are the first characters, to tell keys apart.
keys = Table(
    "keys",
    metadata,
    Column("id", NAME, primary_key=True),
    Column("tenant", NAME, ForeignKey("tenants.name", ondelete="CASCADE"), nullable=False),
    Column("hash", HASH, nullable=False, unique=True),
    Column("prefix", String(16), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("last_used", BigInteger),
    Column("revoked", BigInteger),
    Index(None, "tenant"),
)

# Of a base model: its adapters fit no other. `declared` is the content that the operator's command line or watched
# folder gave last; `watched` ones go when their folder does.
adapters = Table(
    "adapters",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("base", String(256), nullable=False),
    Column("owner", NAME, nullable=False),
    Column("name", SORTED_NAME, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("active", HASH, nullable=False),
    Column("declared", HASH),
    Column("watched", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("base", "owner", "name"),
)

revisions = Table(
    "revisions",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("adapter", Serial, ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False),
    Column("content_hash", HASH, nullable=False),
    Column("bank_hash", HASH, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created", BigInteger, nullable=False),
    UniqueConstraint("adapter", "content_hash"),
    Index(None, "content_hash"),
    Index(None, "bank_hash"),
)

# What a tenant's requests use when they name no adapter. `deleted` stays once what it names is gone.
defaults = Table(
    "defaults",
    metadata,
    Column("base", String(256), primary_key=True),
    Column("tenant", NAME, primary_key=True),
    Column("owner", NAME, nullable=False),
    Column("name", NAME, nullable=False),
    Column("revision", String(16)),
    Column("deleted", Boolean, nullable=False),
)

# Tokens by tenant, adapter and day (days since the epoch, UTC); `adapter` is empty for the base model.
usage = Table(
    "usage",
    metadata,
    Column("tenant", NAME, primary_key=True),
    Column("adapter", String(160), primary_key=True),
    Column("day", Integer, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("generated_tokens", BigInteger, nullable=False),
    Index(None, "day"),
)

# Every change: when, who, from where, what it did, to what. Never a key, never a text of a request.
audit = Table(
    "audit",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("actor", NAME, nullable=False),
    Column("address", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("tenant", NAME, nullable=False),
    Column("subject", Text, nullable=False),
)
