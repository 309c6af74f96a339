"""`vblora-serve tenant …` on a registry of its own: one line on standard output, the key, and all else beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.settings import ENV_PREFIX
from serving.store.database import open_database, sqlite_url
from serving.tenancy import keys
from serving.tenancy.directory import SqlTenantDirectory
from serving.tenancy.records import TenantChange
from serving.tenancy.tenants import TenantRegistry
from serving.types import Caller

KEY_LINE = re.compile(r"vbk_[A-Za-z0-9_-]{43}\n")


def invoke(*arguments: str, **environment: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["tenant", *arguments], env={"COLUMNS": "200", **environment})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TenantRegistry:
    """The registry under the folder that the commands of the test work on."""
    monkeypatch.delenv(f"{ENV_PREFIX}DATABASE_URL", raising=False)
    monkeypatch.setenv(f"{ENV_PREFIX}DATA_DIR", str(tmp_path))
    return TenantRegistry(open_database(sqlite_url(tmp_path / "registry.db")))


def caller_of(registry: TenantRegistry, line: str) -> str | None:
    found = SqlTenantDirectory(registry._engine).find_key(keys.hash_of(line.strip()))
    return found[1].name if found else None


def test_a_key_is_all_of_standard_output(registry: TenantRegistry) -> None:
    status, first, said = invoke("add", "ops", "--role", "operator")
    assert status == 0 and KEY_LINE.fullmatch(first) and first.strip() not in said
    assert "restart" in said
    status, second, said = invoke("add", "acme")
    assert status == 0 and KEY_LINE.fullmatch(second)
    assert "restart" not in said
    assert (caller_of(registry, first), caller_of(registry, second)) == ("ops", "acme")
    assert [(tenant.name, tenant.role) for tenant in registry.tenants(9)] == [("acme", "tenant"), ("ops", "operator")]


def test_rotation_prints_the_new_key_alone(registry: TenantRegistry) -> None:
    _, old, _ = invoke("add", "acme")
    status, new, said = invoke("rotate-key", "acme")
    assert status == 0 and KEY_LINE.fullmatch(new) and new.strip() not in said and new != old
    assert (caller_of(registry, old), caller_of(registry, new)) == (None, "acme")


def test_tenants_are_disabled_enabled_and_listed(registry: TenantRegistry) -> None:
    assert invoke("list") == (0, "", "")
    for name in ("b", "a"):
        invoke("add", name)
    assert invoke("disable", "a") == (0, "", "vblora-serve: tenant a disabled\n")
    caller = Caller("x", frozenset())
    registry.change(caller, "b", TenantChange(weight=2.5, quotas={"adapters": 3}))
    assert invoke("list") == (0, "a  tenant  weight=1  disabled\nb  tenant  weight=2.5  adapters=3\n", "")
    assert invoke("enable", "a")[0] == 0
    assert not registry.get("a").disabled


def test_long_lists_are_whole(registry: TenantRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.tenant_cli.PAGE", 2)
    for name in "abcde":
        invoke("add", name)
    assert [line[0] for line in invoke("list")[1].splitlines()] == list("abcde")


def test_what_cannot_be_done_is_one_line_and_prints_no_key(registry: TenantRegistry) -> None:
    invoke("add", "ops", "--role", "operator")
    for arguments, words in [
        (("add", "ops"), "already"),
        (("add", "default"), "reserved"),
        (("add", "a/b"), "letters"),
        (("disable", "nobody"), "no such tenant"),
        (("enable", "nobody"), "no such tenant"),
        (("rotate-key", "nobody"), "no such tenant"),
        (("disable", "ops"), "last operator"),
        (("list", "--database-url", "mysql://u:secret@h/d"), "sqlite and postgresql"),
        (("add", "x", "--data-dir", "/dev/null"), "cannot be used"),
    ]:
        status, output, said = invoke(*arguments)
        assert (status, output, said.count("\n"), words in said) == (1, "", 1, True), said
        assert "secret" not in said
    assert invoke("add", "x", "--role", "king")[0] == 2


def test_flags_win_over_the_environment(registry: TenantRegistry, tmp_path: Path) -> None:
    other = TenantRegistry(open_database(sqlite_url(tmp_path / "other" / "registry.db")))
    invoke("add", "a", "--data-dir", str(tmp_path / "other"))
    invoke("add", "b", "--database-url", f"sqlite:///{tmp_path}/other/registry.db")
    invoke("add", "c", VBLORA_DATABASE_URL=f"sqlite:///{tmp_path}/other/registry.db")
    assert [tenant.name for tenant in other.tenants(9)] == ["a", "b", "c"]
    assert not registry


def test_the_log_says_that_it_was_the_command_line(registry: TenantRegistry) -> None:
    invoke("add", "acme")
    assert {(entry.actor, entry.address) for entry in registry.audit(9)} == {("command line", "")}
