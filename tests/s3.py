"""An S3 on loopback for tests: moto's server, on a thread of this process, so that tests can turn its clocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from serving.adapters.storage.revisions import RevisionStorage

BUCKET = "adapters"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
_numbers = count()


@dataclass(frozen=True)
class Bucket:
    """A place of a test's own in the bucket."""

    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    def open(self) -> RevisionStorage:
        from serving.adapters.storage.revisions import RevisionStorage  # late: they bring torch and obstore along
        from serving.adapters.storage.s3 import S3Objects

        return RevisionStorage(S3Objects(self.url))

    def age(self, key: str, then: float) -> None:
        """Let an object look as if it had been put at this time."""
        self._keys()[f"{self.prefix}/{key}"].last_modified = datetime.fromtimestamp(then, UTC).replace(tzinfo=None)

    def fill(self, key: str) -> None:
        """Put an object, without a request."""
        _backend().put_object(BUCKET, f"{self.prefix}/{key}", b"x")

    def held(self) -> set[str]:
        """All keys of this place."""
        return {key.removeprefix(f"{self.prefix}/") for key in self._keys() if key.startswith(f"{self.prefix}/")}

    def copy(self) -> Bucket:
        """Another place with the same objects."""
        from serving.adapters.storage.s3 import S3Objects

        other = new_bucket()
        here, there = S3Objects(self.url), S3Objects(other.url)
        for key in self.held():
            there.put(key, here.get(key))
        return other

    def _keys(self) -> Any:
        return _backend().buckets[BUCKET].keys


def new_bucket() -> Bucket:
    """A place where nothing is yet."""
    return Bucket(f"test{next(_numbers)}")


def _backend() -> Any:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


@contextmanager
def running() -> Iterator[None]:
    """Serve the bucket, and let the environment lead to it, until the block ends."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line a request

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        _backend().create_bucket(BUCKET, "us-east-1")
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
                monkeypatch.setenv(name, value)
            yield
    finally:
        server.stop()
