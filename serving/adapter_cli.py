"""`vblora-serve adapter …`: adapters of a running server, through its HTTP API. Knows no files of the server's.

Results go to standard output, one line each; a failure is one line on standard error and status 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import httpx
import typer

from serving.settings import ENV_PREFIX

FAILED = 1
TIMEOUT_SECONDS = 60
PAGE = 500
KEY = f"{ENV_PREFIX}API_KEY"
Url = Annotated[str, typer.Option("--url", envvar=f"{ENV_PREFIX}URL", help="Address of the server.")]
LOCAL = "http://127.0.0.1:8000"

adapter_app = typer.Typer(
    help=f"Manage the adapters of a running server; {KEY} is the key, where it asks for one.", no_args_is_help=True
)


@adapter_app.command("push")
def push_adapter(name: str, directory: Path, url: Url = LOCAL) -> None:
    """Upload the adapter in DIRECTORY under NAME and make it active."""
    try:
        config = (directory / "adapter_config.json").read_bytes()
        weights = (directory / "adapter_model.safetensors").read_bytes()
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")
    reply = _call("POST", url, "/v1/adapters", data={"name": name}, files={"config": config, "weights": weights}).json()
    typer.echo(f"{reply['name']}@{reply['revision']}  {reply['bytes']} bytes")


@adapter_app.command("list")
def list_adapters(url: Url = LOCAL) -> None:
    """One line an adapter: name@revision, bytes, revisions."""
    for entry in _entries(url):
        marks = [mark for mark in ("shared", "is_default", "resident") if entry[mark]]
        typer.echo(
            f"{entry['name']}@{entry['active_revision']}  {entry['bytes']} bytes  "
            f"{len(entry['revisions'])} revisions  {' '.join(marks)}".rstrip()
        )


@adapter_app.command("activate")
def activate_adapter(name: str, revision: str, url: Url = LOCAL) -> None:
    """Make NAME mean REVISION."""
    reply = _call("POST", url, f"/v1/adapters/{quote(name, safe='')}/activate", json={"revision": revision}).json()
    typer.echo(f"{reply['name']}@{reply['active_revision']}")


@adapter_app.command("delete")
def delete_adapter(name: str, url: Url = LOCAL) -> None:
    """Remove NAME; requests that run on it finish."""
    _call("DELETE", url, f"/v1/adapters/{quote(name, safe='')}")


def _entries(url: str) -> Iterator[dict[str, Any]]:
    """Every adapter, page by page."""
    query: dict[str, Any] = {"limit": PAGE}
    while True:
        page = _call("GET", url, "/v1/adapters", params=query).json()
        yield from page["data"]
        if not page["has_more"]:
            return
        query["after"] = page["last_id"]


def _call(method: str, url: str, path: str, **arguments: Any) -> httpx.Response:
    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.request(method, url.rstrip("/") + path, headers=headers, timeout=TIMEOUT_SECONDS, **arguments)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
        _fail(f"{url}: {error}")
    if not reply.is_success:
        _fail(_error_message(reply))
    return reply


def _error_message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {reply.status_code}"


def _fail(message: str) -> NoReturn:
    typer.echo(f"vblora-serve: {message}", err=True)
    raise typer.Exit(FAILED)
