"""`vblora-serve`: start the server, and manage its adapters through its HTTP API. Knows settings, not how they work.

The commands that manage tenants are in `serving/tenant_cli.py`.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import httpx
import typer
from pydantic.fields import FieldInfo

from serving.errors import StartupError
from serving.logs import configure_logs
from serving.settings import (
    ServerSettings,
    SettingsError,
    default_text,
    flag_of,
    is_list,
    load_settings,
    settings_reference,
)
from serving.tenant_cli import tenant_app

FAILED, WRONG_USAGE = 1, 2
Url = Annotated[str, typer.Option("--url", envvar="VBLORA_URL", help="Address of the server.")]

app = typer.Typer(
    name="vblora-serve",
    help="One base model, many VB-LoRA adapters, OpenAI's routes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
adapter_app = typer.Typer(help="Manage the adapters of a running server.", no_args_is_help=True)
app.add_typer(adapter_app, name="adapter")
app.add_typer(tenant_app, name="tenant")


def main() -> None:
    """The console script."""
    app()


def run(config: Path | None, **flags: Any) -> None:
    """Start the server: MODEL is a hub id, a folder, a .gguf file or `demo`."""
    try:
        settings = load_settings(flags, config)
    except SettingsError as error:
        _fail(str(error), WRONG_USAGE)
    configure_logs(settings.log_level)
    from serving.app import serve  # loads torch, which the other commands do without

    try:
        serve(settings)
    except SettingsError as error:
        _fail(str(error), WRONG_USAGE)
    except StartupError as error:
        _fail(str(error), FAILED)


@app.command("settings")
def show_settings() -> None:
    """Print the reference of all settings, in Markdown."""
    typer.echo(settings_reference(), nl=False)


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="End after the answers.")] = False,
    port: Annotated[int, typer.Option(help="Port of the server.")] = 8000,
) -> None:
    """Serve the demo model, ask its adapters the same questions, and show the answers side by side."""
    from serving.demo.run import run_demo

    raise typer.Exit(run_demo(once=once, port=port))


@adapter_app.command("push")
def push_adapter(name: str, directory: Path, url: Url = "http://127.0.0.1:8000") -> None:
    """Upload the adapter in DIRECTORY under NAME and make it active."""
    try:
        config = (directory / "adapter_config.json").read_bytes()
        weights = (directory / "adapter_model.safetensors").read_bytes()
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}", FAILED)
    reply = _call("POST", url, "/v1/adapters", data={"name": name}, files={"config": config, "weights": weights}).json()
    typer.echo(f"{reply['name']}@{reply['revision']}  {reply['bytes']} bytes")


@adapter_app.command("list")
def list_adapters(url: Url = "http://127.0.0.1:8000") -> None:
    """One line an adapter: name@revision, bytes, revisions."""
    for entry in _call("GET", url, "/v1/adapters").json()["data"]:
        marks = [mark for mark in ("shared", "is_default", "resident") if entry[mark]]
        typer.echo(
            f"{entry['name']}@{entry['active_revision']}  {entry['bytes']} bytes  "
            f"{len(entry['revisions'])} revisions  {' '.join(marks)}".rstrip()
        )


@adapter_app.command("activate")
def activate_adapter(name: str, revision: str, url: Url = "http://127.0.0.1:8000") -> None:
    """Make NAME mean REVISION."""
    reply = _call("POST", url, f"/v1/adapters/{quote(name, safe='')}/activate", json={"revision": revision}).json()
    typer.echo(f"{reply['name']}@{reply['active_revision']}")


@adapter_app.command("delete")
def delete_adapter(name: str, url: Url = "http://127.0.0.1:8000") -> None:
    """Remove NAME; requests that run on it finish."""
    _call("DELETE", url, f"/v1/adapters/{quote(name, safe='')}")


def _call(method: str, url: str, path: str, **arguments: Any) -> httpx.Response:
    key = os.environ.get("VBLORA_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.request(method, url.rstrip("/") + path, headers=headers, timeout=60, **arguments)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _fail(f"{url}: {error}", FAILED)
    if reply.is_error:
        _fail(_error_message(reply), FAILED)
    return reply


def _error_message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {reply.status_code}"


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"vblora-serve: {message}", err=True)
    raise typer.Exit(status)


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """A setting as an option of `run`. Values go to the settings as text: they know the types."""
    kind: Any = bool | None if field.annotation is bool else list[str] | None if is_list(field) else str | None
    if name == "model":
        declaration: Any = typer.Argument(help=field.description, metavar="MODEL", show_default=False)
    else:
        flag = flag_of(name)
        text = f"{field.description} Default: {default_text(field)}."
        spelling = f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag
        declaration = typer.Option(spelling, help=text, show_default=False)
    return _keyword(name, Annotated[kind, declaration])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)


def _declare_run() -> None:
    """`run` takes an option for each setting, so the settings are listed in one place only."""
    config = typer.Option("--config", help="YAML file of settings.", show_default=False)
    parameters = [
        *(_option(name, field) for name, field in ServerSettings.model_fields.items()),
        _keyword("config", Annotated[Path | None, config]),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command("run")(run)


_declare_run()

if __name__ == "__main__":
    main()
