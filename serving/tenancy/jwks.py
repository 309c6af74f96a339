"""The public keys of whoever issues tokens: a JWKS, from a file or an https address. Knows no tokens."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

import httpx
import jwt

ALGORITHMS = ("RS256", "ES256", "EdDSA")
FRESH_SECONDS = 300.0
RETRY_SECONDS = 10.0
TIMEOUT_SECONDS = 5.0
MAX_BYTES = 2**20
_log = logging.getLogger(__name__)


class JwksError(Exception):
    """The keys cannot be had; the message is for the operator."""


class Jwks:
    """Keys by their id, read anew after five minutes, and sooner for an id that is not there, at most every ten
    seconds. What cannot be read leaves the keys that were read before. Thread-safe; one thread reads, none waits."""

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`source` is a file or an https address. `JwksError` for a file that does not hold keys, and for another
        kind of address; an address that does not answer is asked again later."""
        if "://" in source and not source.startswith("https://"):
            raise JwksError("the address of the JWKS must begin with https://")
        self._source = source
        self._clock = clock
        self._reading = Lock()
        self._keys: Mapping[str | None, jwt.PyJWK] = {}
        self._read_at = self._tried_at = float("-inf")
        try:
            self._read()
        except JwksError as error:
            if not self._remote:
                raise
            _log.warning("tokens are refused until the JWKS can be read: %s", error)

    def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """The key of that id; for None the only one. None if there is none such."""
        now = self._clock()
        late = now - self._read_at >= FRESH_SECONDS or key_id not in self._keys
        if late and now - self._tried_at >= RETRY_SECONDS and self._reading.acquire(blocking=False):
            try:
                self._read()
            except JwksError as error:
                _log.warning("the JWKS cannot be read now: %s", error)
            finally:
                self._reading.release()
        return self._keys.get(key_id)

    @property
    def _remote(self) -> bool:
        return self._source.startswith("https://")

    def _read(self) -> None:
        self._tried_at = self._clock()
        self._keys = _parse(_fetch(self._source) if self._remote else _read_file(self._source))
        self._read_at = self._tried_at


def _read_file(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise JwksError(f"{path}: {error.strerror}") from error


def _fetch(url: str) -> bytes:
    """At most one byte more than is allowed. No redirects: what is configured is asked, nobody else."""
    content = b""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        headers = {"Accept-Encoding": "identity"}
        with httpx.stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=False) as reply:
            if reply.status_code != httpx.codes.OK:
                raise JwksError(f"{url} answered {reply.status_code}")
            for part in reply.iter_raw():
                content += part
                if len(content) > MAX_BYTES or time.monotonic() > deadline:
                    raise JwksError(f"{url} sends too much, or too slowly")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise JwksError(f"{url}: {error}") from error
    return content


def _parse(content: bytes) -> dict[str | None, jwt.PyJWK]:
    """Public keys of the algorithms that are allowed, by id; a single one under None too."""
    try:
        entries = [entry for entry in json.loads(content)["keys"] if entry.get("use", "sig") == "sig"]
        keys = [key for key in map(_key, entries) if key is not None]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise JwksError("this is no JWKS") from error
    if len(content) > MAX_BYTES or not keys:
        raise JwksError("there is no usable key in it: it must hold public RSA, P-256 or Ed25519 keys")
    found: dict[str | None, jwt.PyJWK] = {key.key_id: key for key in keys if key.key_id}
    return found | ({None: keys[0]} if len(keys) == 1 else {})


def _key(entry: dict[str, object]) -> jwt.PyJWK | None:
    """None for a kind of key that is not allowed, a secret one above all."""
    try:
        key = jwt.PyJWK(entry)
    except jwt.PyJWTError:
        return None
    return key if key.algorithm_name in ALGORITHMS else None
