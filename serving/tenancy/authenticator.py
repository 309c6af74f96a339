"""From a request's credentials to a caller. Knows neither routes nor bodies."""

from __future__ import annotations

from typing import Protocol

from serving.types import Caller

DEFAULT_TENANT = "default"


class Authenticator(Protocol):
    """Decides who a caller is, from the ``Authorization`` header alone."""

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller. Raises `InvalidApiKey` when the credentials are missing, wrong or disabled."""


class OpenAuthenticator:
    """Open mode: whoever can reach the server is the tenant ``default``, with both roles; no header is read."""

    _caller = Caller(tenant=DEFAULT_TENANT, roles=frozenset({"tenant", "operator"}))

    def authenticate(self, authorization: str | None) -> Caller:
        return self._caller
