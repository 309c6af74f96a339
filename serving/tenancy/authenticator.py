"""From a request's credentials to a caller. Knows neither routes nor bodies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from serving.errors import InvalidApiKey, Unavailable
from serving.tenancy.directory import SqlTenantDirectory
from serving.tenancy.keys import KEY, hash_of
from serving.tenancy.last_used import LastUsed
from serving.tenancy.recent import Recent
from serving.tenancy.records import DEFAULT_TENANT, Tenant
from serving.types import Caller

_THREADS = 4
_log = logging.getLogger(__name__)


class OpenAuthenticator:
    """Open mode: whoever can reach the server is the tenant ``default``, with both roles; no header is read."""

    _caller = Caller(tenant=DEFAULT_TENANT, roles=frozenset({"tenant", "operator"}))

    async def authenticate(self, authorization: str | None) -> Caller:
        return self._caller


@dataclass(frozen=True, slots=True)
class _Identity:
    caller: Caller
    key_id: str | None


class KeyAuthenticator:
    """Keyed mode: ``Bearer`` and a key of the registry, or a token that `verify_token` takes.

    `verify_token` gives the name of a tenant, or raises `InvalidApiKey`. Whom a credential stands for is looked up off
    the event loop, by its hash, and remembered for a second; requests that come meanwhile wait for the same look-up.
    """

    def __init__(
        self,
        directory: SqlTenantDirectory,
        last_used: LastUsed,
        verify_token: Callable[[str], str] | None = None,
        recent: Recent[_Identity | None] | None = None,
    ) -> None:
        self._directory = directory
        self._last_used = last_used
        self._verify_token = verify_token
        self._recent: Recent[_Identity | None] = recent or Recent()
        self._asked: dict[str, asyncio.Future[_Identity | None]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="keys")

    async def authenticate(self, authorization: str | None) -> Caller:
        credential = _bearer(authorization)
        digest = hash_of(credential)
        try:
            identity = self._recent.get(digest)
        except KeyError:
            identity = await self._look_up(digest, credential)
        if identity is None:
            raise _refusal()
        if identity.key_id is not None:
            self._last_used.note(identity.key_id)
        return identity.caller

    def forget(self) -> None:
        """Remember nothing, after a change. From any thread."""
        self._directory.forget()
        self._recent.clear()

    def close(self) -> None:
        """End the threads. Nobody may authenticate any more."""
        self._threads.shutdown()

    async def _look_up(self, digest: str, credential: str) -> _Identity | None:
        asked = self._asked.get(digest)
        if asked is None:
            asked = asyncio.get_running_loop().run_in_executor(self._threads, self._find, digest, credential)
            self._asked[digest] = asked
            asked.add_done_callback(lambda done: self._answered(digest, done))
        return await asyncio.shield(asked)

    def _answered(self, digest: str, done: asyncio.Future[_Identity | None]) -> None:
        del self._asked[digest]
        if not done.cancelled():
            done.exception()  # known, even if all who asked are gone

    def _find(self, digest: str, credential: str) -> _Identity | None:
        asked = self._recent.now()
        try:
            identity = self._identify(digest, credential)
        except InvalidApiKey:
            identity = None
        except SQLAlchemyError as error:
            _log.warning("keys cannot be looked up: %s", type(error).__name__)
            raise Unavailable("the keys cannot be looked up now") from error
        self._recent.put(digest, identity, asked)
        return identity

    def _identify(self, digest: str, credential: str) -> _Identity | None:
        if KEY.fullmatch(credential):
            found = self._directory.find_key(digest)
            return _identity(found[1], found[0]) if found else None
        if self._verify_token is None:
            return None
        tenant = self._directory.tenant(self._verify_token(credential))
        return _identity(tenant, None) if tenant else None


def _bearer(authorization: str | None) -> str:
    scheme, _, credential = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not credential.strip():
        raise _refusal()
    return credential.strip()


def _identity(tenant: Tenant, key_id: str | None) -> _Identity | None:
    return None if tenant.disabled else _Identity(Caller(tenant.name, tenant.roles), key_id)


def _refusal() -> InvalidApiKey:
    """One wording for a credential that is missing, wrong, revoked or a disabled tenant's."""
    return InvalidApiKey("The API key is missing, wrong or disabled.")
