"""`vblora-serve`: start the server. Knows settings, not how they work.

The commands that manage adapters and tenants are in `serving/adapter_cli.py` and `serving/tenant_cli.py`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic.fields import FieldInfo

from serving.adapter_cli import adapter_app
from serving.errors import StartupError
from serving.logs import configure_logs
from serving.settings import ServerSettings, SettingsError, flag_of, load_settings
from serving.settings_reference import default_text, is_list, settings_reference
from serving.tenant_cli import tenant_app

FAILED, WRONG_USAGE = 1, 2

app = typer.Typer(
    name="vblora-serve",
    help="One base model, many VB-LoRA adapters, OpenAI's routes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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
