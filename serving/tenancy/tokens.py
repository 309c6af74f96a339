"""JSON Web Tokens of an operator's identity provider: checked, and read for the name of a tenant. Knows no registry."""

from __future__ import annotations

import jwt

from serving.errors import InvalidApiKey
from serving.tenancy.jwks import ALGORITHMS, Jwks

LEEWAY_SECONDS = 10
_LONGEST = 16 * 2**10


class TokenVerifier:
    """Takes tokens of one issuer for one audience, signed with a key of `jwks`, that have not expired."""

    def __init__(self, jwks: Jwks, issuer: str, audience: str, claim: str) -> None:
        """`claim` names the tenant."""
        self._jwks = jwks
        self._issuer = issuer
        self._audience = audience
        self._claim = claim

    def __call__(self, token: str) -> str:
        """The tenant's name. Raises `InvalidApiKey`. May read the keys anew: off the event loop."""
        try:
            tenant = self._claims(token).get(self._claim)
        except jwt.PyJWTError as error:
            raise InvalidApiKey("the token is not valid") from error
        if not isinstance(tenant, str):
            raise InvalidApiKey("the token names no tenant")
        return tenant

    def _claims(self, token: str) -> dict[str, object]:
        if len(token) > _LONGEST:
            raise jwt.InvalidTokenError("too long")
        header = jwt.get_unverified_header(token)
        key = self._jwks.find(header.get("kid"))
        # The key says what it signs with; a token that says otherwise is none of its owner's.
        if key is None or header.get("alg") != key.algorithm_name:
            raise jwt.InvalidTokenError("no such key")
        claims: dict[str, object] = jwt.decode(
            token,
            key,
            algorithms=list(ALGORITHMS),
            issuer=self._issuer,
            audience=self._audience,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp", "iss", "aud"]},
        )
        return claims
