"""Objects in a bucket of S3, or of what speaks its language. It needs the extra `s3`, and knows no files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

from serving.adapters.storage.objects import Kind, Stored, is_hash

# A request waits for these: better a refusal than three minutes of silence, which are the library's own choice.
_CONNECT = timedelta(seconds=5)
_TIMEOUT = timedelta(seconds=30)
_RETRIES = 3
_NOT_FOUND = NotFoundError, FileNotFoundError  # what the library documents, and what it raises


class S3Objects:
    """`Objects` under `s3://bucket/prefix`.

    Endpoint, region and credentials are those of the environment, under their usual names (`AWS_ACCESS_KEY_ID`,
    `AWS_ENDPOINT_URL`, …); plain HTTP only with `AWS_ALLOW_HTTP`. Nothing is asked before the first call.
    """

    def __init__(self, url: str) -> None:
        """Raises `OSError` for an address or an environment that cannot be used."""
        with _as_os_error():
            self._store = S3Store.from_url(
                url,
                client_options={"connect_timeout": _CONNECT, "timeout": _TIMEOUT, "allow_http": _allow_http()},
                retry_config={"max_retries": _RETRIES, "retry_timeout": _TIMEOUT},
            )

    def put(self, key: str, data: bytes) -> None:
        with _as_os_error():
            obstore.put(self._store, key, data, use_multipart=False)

    def get(self, key: str) -> bytes:
        with _as_os_error():
            try:
                return obstore.get(self._store, key).bytes().to_bytes()
            except _NOT_FOUND:
                raise KeyError(key) from None

    def delete(self, key: str) -> None:
        with _as_os_error():
            obstore.delete(self._store, key)

    def modified(self, key: str) -> float | None:
        with _as_os_error():
            try:
                return obstore.head(self._store, key)["last_modified"].timestamp()
            except _NOT_FOUND:
                return None

    def list(self, kind: Kind) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        with _as_os_error():
            for page in obstore.list(self._store, kind):
                for entry in page:
                    name = entry["path"].rpartition("/")[2]
                    if is_hash(name):
                        found[name] = Stored(entry["size"], entry["last_modified"].timestamp())
        return found


def _allow_http() -> bool:
    """The library reads this from the environment too, but not where any option of the client is given."""
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise OSError(f"S3: {error}") from error
