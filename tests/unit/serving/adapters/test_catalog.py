"""What names mean, who may change that, and what a change leaves in the registry, the storage and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
from safetensors.torch import load, save
from sqlalchemy import delete

from serving.adapters.content import check_content
from serving.adapters.storage.objects import KINDS, Kind
from serving.errors import (
    IncompatibleAdapter,
    InvalidAdapter,
    InvalidValue,
    ModelNotFound,
    PermissionDenied,
)
from serving.store.tables import adapters
from serving.types import AdapterCatalog, Caller
from tests.adapters import (
    ANN,
    BOB,
    LAYOUT,
    OPERATOR,
    Site,
    adapter_files,
    small_checkpoint,
    statements,
    with_config,
    write_files,
)
from vblora.checkpoint import BANK_KEY, bank_hash


def add(site: Site, caller: Caller, name: str, seed: int, *, shared: bool = False) -> str:
    """Add the adapter of this seed; returns its revision."""
    _, revision, _ = site.catalog.add(caller, name, *adapter_files(seed), shared=shared)
    return revision.revision


def revisions(site: Site, tenant: str, name: str) -> list[str]:
    return [revision.revision for revision in site.catalog.get(tenant, name).revisions]


def test_an_added_adapter_is_active_resident_and_stored(site: Site) -> None:
    catalog: AdapterCatalog = site.catalog
    config, weights = adapter_files(1)
    info, revision, created = catalog.add(ANN, "x", config, weights)
    assert created
    assert (info.name, info.shared, info.is_default) == ("x", False, False)
    assert info.revisions == (revision,)
    assert info.active_revision == revision.revision
    assert revision.resident
    assert revision.bytes == len(config) + len(weights)
    assert catalog.get("ann", "x") == info
    assert site.stored() == {revision.revision}
    assert len(site.catalog) == 1


def test_a_pin_names_the_whole_content_and_keeps_it(site: Site) -> None:
    revision = add(site, ANN, "x", 1)
    pin = site.catalog.pin("ann", "x")
    assert (pin.name, pin.revision) == ("x", revision)
    assert pin.content_hash == check_content(*adapter_files(1), LAYOUT.compact, uploaded=True).content_hash
    assert site.residency.pins(pin.content_hash) == 1


def test_a_pin_is_released_once_however_often_and_by_whom(site: Site) -> None:
    add(site, ANN, "x", 1)
    kept, pin = site.catalog.pin("ann", "x"), site.catalog.pin("ann", "x")
    threads = [Thread(target=pin.release) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.residency.pins(kept.content_hash) == 1


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 64, "demo"])
def test_names_of_the_grammar_are_taken(site: Site, name: str) -> None:
    add(site, ANN, name, 1)
    assert site.catalog.pin("ann", name).name == name


BAD_NAMES = ["", ".", "..", "-a", "_a", "a/b", "a@b", "a:b", "a b", "a\n", "a\0", "é", "x" * 65, "%2e%2e", "base"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "tiny"])
def test_other_names_are_refused_before_anything_is_read(site: Site, name: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        site.catalog.add(ANN, name, b"", b"")
    assert caught.value.param == "name"
    with pytest.raises(InvalidValue) as caught:
        site.catalog.add_from_path(name, "/nowhere")
    assert caught.value.param == "lora_name"
    with pytest.raises(InvalidValue):
        site.catalog.register(name, Path("/nowhere"))
    with pytest.raises(ModelNotFound):
        site.catalog.pin("ann", name)


def test_content_that_fails_a_check_leaves_nothing(site: Site) -> None:
    add(site, ANN, "x", 1)
    before = site.catalog.list("ann"), site.stored(), site.residency.stats()
    with pytest.raises(InvalidAdapter):
        site.catalog.add(ANN, "x", adapter_files(2)[0], adapter_files(2)[1][:-1])
    with pytest.raises(InvalidAdapter, match="target_modules"):
        site.catalog.add(ANN, "y", *with_config(adapter_files(2), target_modules=r"(\w+\.?)+!"))
    with pytest.raises(IncompatibleAdapter):
        site.catalog.add(ANN, "y", *adapter_files(2, rank=9))
    assert (site.catalog.list("ann"), site.stored(), site.residency.stats()) == before


def test_a_second_content_becomes_the_active_revision(site: Site) -> None:
    first, second = add(site, ANN, "x", 1), add(site, ANN, "x", 2)
    assert site.catalog.pin("ann", "x").revision == second
    assert site.catalog.pin("ann", "x", first).revision == first
    assert revisions(site, "ann", "x") == [first, second]


def test_the_same_content_again_is_not_new_but_becomes_active(site: Site) -> None:
    first, second = add(site, ANN, "x", 1), add(site, ANN, "x", 2)
    before = site.catalog.get("ann", "x").revisions
    info, revision, created = site.catalog.add(ANN, "x", *adapter_files(1))
    assert not created
    assert revision.revision == info.active_revision == first
    assert info.revisions == before
    assert revisions(site, "ann", "x") == [first, second]


def test_a_colliding_revision_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter(["ab" * 32, "ab" * 31 + "cd"])
    monkeypatch.setattr("serving.adapters.content.content_hash", lambda checkpoint: next(hashes))
    revision = add(site, ANN, "x", 1)
    with pytest.raises(InvalidAdapter, match=revision):
        site.catalog.add(ANN, "x", *adapter_files(2))
    assert site.catalog.pin("ann", "x").content_hash == "ab" * 32
    assert site.stored() == {revision}


def test_tenants_do_not_see_each_other(site: Site) -> None:
    mine, theirs = add(site, ANN, "x", 1), add(site, BOB, "x", 2)
    add(site, BOB, "y", 3)
    assert site.catalog.pin("ann", "x").revision == mine
    assert site.catalog.pin("bob", "x").revision == theirs
    assert [info.name for info in site.catalog.list("ann")] == ["x"]
    with pytest.raises(ModelNotFound):
        site.catalog.pin("ann", "x", theirs)


def test_what_is_foreign_is_told_in_the_words_for_what_is_unknown(site: Site) -> None:
    def words(name: str) -> set[str]:
        calls: list[Callable[[], object]] = [
            lambda: site.catalog.pin("ann", name),
            lambda: site.catalog.get("ann", name),
            lambda: site.catalog.activate(ANN, name, "0" * 16),
            lambda: site.catalog.delete(ANN, name),
            lambda: site.catalog.delete_revision(ANN, name, "0" * 16),
            lambda: site.catalog.set_default("ann", name),
        ]
        messages = set()
        for call in calls:
            with pytest.raises(ModelNotFound) as caught:
                call()
            messages.add(caught.value.message)
        return messages

    unknown = words("secret")
    add(site, BOB, "secret", 1)
    assert words("secret") == unknown
    assert len(unknown) == 1


def test_equal_contents_of_two_tenants_are_stored_once_until_both_are_gone(site: Site) -> None:
    revision = add(site, ANN, "x", 1)
    assert add(site, BOB, "y", 1) == revision
    assert site.residency.stats().adapters == 1
    site.catalog.delete(ANN, "x")
    assert site.stored() == {revision}
    assert site.catalog.pin("bob", "y").revision == revision
    site.catalog.delete(BOB, "y")
    assert site.stored() == set()


def test_activation_rolls_back_and_forward(site: Site) -> None:
    first, second = add(site, ANN, "x", 1), add(site, ANN, "x", 2)
    assert site.catalog.activate(ANN, "x", first).active_revision == first
    assert site.catalog.pin("ann", "x").revision == first
    assert site.catalog.activate(ANN, "x", second).active_revision == second
    for unknown in ("0" * 16, first[:8], "", first.upper() + "x"):
        with pytest.raises(ModelNotFound):
            site.catalog.activate(ANN, "x", unknown)


def test_a_deleted_adapter_is_gone_for_new_requests_and_stays_for_running_ones(site: Site) -> None:
    add(site, ANN, "x", 1)
    pins = [site.catalog.pin("ann", "x") for _ in range(2)]
    site.catalog.delete(ANN, "x")
    with pytest.raises(ModelNotFound):
        site.catalog.pin("ann", "x")
    assert site.catalog.list("ann") == []
    pins[0].release()
    assert site.residency.get(pins[1].content_hash).rank == 2
    pins[1].release()
    assert site.residency.stats().adapters == 0
    assert site.residency.stats().banks == 0
    assert site.stored() == set()


def test_a_content_that_returns_while_an_old_request_runs_stays(site: Site) -> None:
    revision = add(site, ANN, "x", 1)
    pin = site.catalog.pin("ann", "x")
    site.catalog.delete(ANN, "x")
    add(site, ANN, "x", 1)
    pin.release()
    assert site.catalog.pin("ann", "x").revision == revision
    assert site.stored() == {revision}


def test_one_revision_can_be_deleted_but_not_the_active_one(site: Site) -> None:
    first, second = add(site, ANN, "x", 1), add(site, ANN, "x", 2)
    with pytest.raises(InvalidValue) as caught:
        site.catalog.delete_revision(ANN, "x", second)
    assert caught.value.param == "revision"
    site.catalog.delete_revision(ANN, "x", first)
    assert revisions(site, "ann", "x") == [second]
    assert site.stored() == {second}
    with pytest.raises(ModelNotFound):
        site.catalog.delete_revision(ANN, "x", first)


def test_old_revisions_go_unless_active_pinned_or_a_default(site: Site) -> None:
    site.keep_revisions = 3
    site.restart()
    made = [add(site, ANN, "x", seed) for seed in range(3)]
    site.catalog.set_default("ann", "x", made[0])
    pin = site.catalog.pin("ann", "x", made[1])
    made += [add(site, ANN, "x", seed) for seed in range(3, 6)]
    assert revisions(site, "ann", "x") == [made[0], made[1], made[5]]
    assert site.stored() == {made[0], made[1], made[5]}
    pin.release()
    site.catalog.set_default("ann", "x")
    made.append(add(site, ANN, "x", 6))
    assert revisions(site, "ann", "x") == [made[1], made[5], made[6]]
    site.catalog.activate(ANN, "x", made[1])
    made.append(add(site, ANN, "x", 7))
    assert revisions(site, "ann", "x") == [made[5], made[6], made[7]]


def test_another_tenants_default_keeps_a_shared_revision(site: Site) -> None:
    site.keep_revisions = 1
    site.restart()
    first = add(site, OPERATOR, "s", 1, shared=True)
    site.catalog.set_default("ann", "s", first)
    second = add(site, OPERATOR, "s", 2, shared=True)
    assert revisions(site, "bob", "s") == [first, second]


def test_shared_adapters_are_for_all_and_an_own_name_wins(site: Site) -> None:
    shared = add(site, OPERATOR, "s", 1, shared=True)
    assert site.catalog.pin("ann", "s").revision == shared
    assert [(info.name, info.shared) for info in site.catalog.list("bob")] == [("s", True)]
    own = add(site, ANN, "s", 2)
    assert site.catalog.pin("ann", "s").revision == own
    assert site.catalog.pin("bob", "s").revision == shared
    assert [info.shared for info in site.catalog.list("ann")] == [False]
    site.catalog.delete(ANN, "s")
    assert site.catalog.pin("ann", "s").revision == shared


def test_only_operators_change_shared_adapters(site: Site) -> None:
    first = add(site, OPERATOR, "s", 1, shared=True)
    second = add(site, OPERATOR, "s", 2, shared=True)
    for call in (
        lambda: site.catalog.add(ANN, "t", *adapter_files(3), shared=True),
        lambda: site.catalog.delete(ANN, "s"),
        lambda: site.catalog.activate(ANN, "s", first),
        lambda: site.catalog.delete_revision(ANN, "s", first),
    ):
        with pytest.raises(PermissionDenied):
            call()
    assert site.catalog.activate(OPERATOR, "s", first).active_revision == first
    site.catalog.delete_revision(OPERATOR, "s", second)
    site.catalog.delete(OPERATOR, "s")
    with pytest.raises(ModelNotFound):
        site.catalog.pin("ann", "s")


def test_unloading_never_touches_a_tenants_own(site: Site) -> None:
    add(site, ANN, "x", 1)
    with pytest.raises(ModelNotFound):
        site.catalog.delete_shared("x")
    add(site, OPERATOR, "x", 2, shared=True)
    site.catalog.delete_shared("x")
    assert not site.catalog.get("ann", "x").shared


# --- defaults ---------------------------------------------------------------------------------------------------


def default_revision(site: Site, tenant: str) -> str | None:
    pin = site.catalog.pin_default(tenant)
    return None if pin is None else pin.revision


def test_a_tenant_without_a_default_gets_the_base(site: Site) -> None:
    add(site, ANN, "x", 1)
    assert site.catalog.pin_default("ann") is None
    assert site.catalog.set_default("ann", None) is None


def test_a_bare_default_follows_activation_and_a_revision_pins(site: Site) -> None:
    first = add(site, ANN, "x", 1)
    default = site.catalog.set_default("ann", "x")
    assert default is not None
    assert (default.name, default.revision) == ("x", None)
    second = add(site, ANN, "x", 2)
    assert default_revision(site, "ann") == second
    site.catalog.set_default("ann", "x", first)
    assert default_revision(site, "ann") == first
    assert site.catalog.get("ann", "x").is_default
    assert site.catalog.pin_default("bob") is None
    site.catalog.set_default("ann", None)
    assert site.catalog.pin_default("ann") is None
    assert not site.catalog.get("ann", "x").is_default


def test_a_default_must_exist(site: Site) -> None:
    add(site, ANN, "x", 1)
    add(site, BOB, "y", 2)
    for name, revision in (("nothing", None), ("y", None), ("x", "0" * 16), ("base", None)):
        with pytest.raises(ModelNotFound):
            site.catalog.set_default("ann", name, revision)
    assert site.catalog.pin_default("ann") is None


@pytest.mark.parametrize("pinned", [False, True])
def test_a_deleted_default_is_not_found_until_set_again(site: Site, pinned: bool) -> None:
    revision = add(site, ANN, "x", 1)
    add(site, OPERATOR, "x", 2, shared=True)
    site.catalog.set_default("ann", "x", revision if pinned else None)
    site.catalog.delete(ANN, "x")
    for restarted in (False, True):
        if restarted:
            site.restart()
        with pytest.raises(ModelNotFound):
            site.catalog.pin_default("ann")
        assert not site.catalog.get("ann", "x").is_default
    add(site, ANN, "x", 1)
    with pytest.raises(ModelNotFound):
        site.catalog.pin_default("ann")
    site.catalog.set_default("ann", "x")
    assert default_revision(site, "ann") == revision


def test_a_pinned_default_ends_with_its_revision(site: Site) -> None:
    first = add(site, ANN, "x", 1)
    add(site, ANN, "x", 2)
    site.catalog.set_default("ann", "x", first)
    site.catalog.delete_revision(ANN, "x", first)
    with pytest.raises(ModelNotFound, match=first):
        site.catalog.pin_default("ann")


def test_a_shared_default_ends_for_every_tenant(site: Site) -> None:
    add(site, OPERATOR, "s", 1, shared=True)
    for tenant in ("ann", "bob"):
        site.catalog.set_default(tenant, "s")
        assert site.catalog.get(tenant, "s").is_default
    site.catalog.delete_shared("s")
    for tenant in ("ann", "bob"):
        with pytest.raises(ModelNotFound):
            site.catalog.pin_default(tenant)


# --- folders of the operator ------------------------------------------------------------------------------------


def test_a_folder_below_a_root_becomes_a_shared_adapter(site: Site, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "root" / "x", adapter_files(1))
    info, revision, created = site.catalog.add_from_path("x", str(folder))
    assert (info.shared, created) == (True, True)
    assert site.catalog.pin("ann", "x").revision == revision.revision


def test_a_loaded_name_is_refused_unless_replaced(site: Site, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "root" / "x", adapter_files(1))
    _, first, _ = site.catalog.add_from_path("x", str(folder))
    write_files(folder, adapter_files(2))
    with pytest.raises(InvalidValue, match="already loaded") as caught:
        site.catalog.add_from_path("x", str(folder))
    assert caught.value.param == "lora_name"
    info, second, created = site.catalog.add_from_path("x", str(folder), replace=True)
    assert created
    assert info.active_revision == second.revision != first.revision
    assert revisions(site, "ann", "x") == [first.revision, second.revision]


def test_a_name_of_a_tenant_does_not_count_as_loaded(site: Site, tmp_path: Path) -> None:
    add(site, ANN, "x", 2)
    folder = write_files(tmp_path / "root" / "x", adapter_files(1))
    _, revision, created = site.catalog.add_from_path("x", str(folder))
    assert created
    assert site.catalog.pin("bob", "x").revision == revision.revision


def test_a_path_outside_the_roots_stores_nothing(site: Site, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "elsewhere", adapter_files(1))
    (tmp_path / "root" / "link").symlink_to(folder)
    for path in (str(folder), str(tmp_path / "root" / "link"), f"{tmp_path}/root/../elsewhere"):
        with pytest.raises(InvalidValue) as caught:
            site.catalog.add_from_path("x", path)
        assert caught.value.param == "lora_path"
        assert str(tmp_path) not in caught.value.message
    assert site.stored() == set()


def test_operators_folders_may_name_targets_by_pattern(site: Site, tmp_path: Path) -> None:
    files = with_config(adapter_files(1), target_modules=r".*\.(q|v)_proj")
    folder = write_files(tmp_path / "root" / "x", files)
    assert site.catalog.add_from_path("x", str(folder))[2]


def test_a_registered_folder_may_lie_anywhere_and_is_copied(site: Site, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "elsewhere", adapter_files(1))
    info = site.catalog.register("x", folder)
    assert info.shared
    for file in folder.iterdir():
        file.unlink()
    site.restart()
    assert site.catalog.pin("ann", "x").revision == info.active_revision


def test_registering_the_same_again_changes_nothing(site: Site, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "elsewhere", adapter_files(1))
    site.catalog.register("x", folder)
    uploaded = add(site, OPERATOR, "x", 2, shared=True)
    before = site.tables()
    site.restart()
    assert site.catalog.register("x", folder).active_revision == uploaded
    assert site.tables() == before


def test_registering_another_folder_makes_that_active(site: Site, tmp_path: Path) -> None:
    one = write_files(tmp_path / "one", adapter_files(1))
    two = write_files(tmp_path / "two", adapter_files(2))
    first, second = (site.catalog.register("x", folder).active_revision for folder in (one, two))
    assert first != second
    assert site.catalog.register("x", one).active_revision == first
    assert revisions(site, "ann", "x") == [first, second]


def test_registering_a_folder_without_safetensors_says_so(site: Site, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "elsewhere", adapter_files(1))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match="safetensors"):
        site.catalog.register("x", folder)


# --- restart ----------------------------------------------------------------------------------------------------


def test_a_restart_serves_the_same_and_reads_when_asked(site: Site) -> None:
    first, second = add(site, ANN, "x", 1), add(site, ANN, "x", 2)
    site.catalog.activate(ANN, "x", first)
    site.catalog.set_default("ann", "x", second)
    add(site, OPERATOR, "s", 3, shared=True)
    before = site.catalog.list("ann")
    site.restart()
    after = site.catalog.list("ann")
    assert not any(revision.resident for info in after for revision in info.revisions)
    assert site.catalog.pin("ann", "x").revision == first
    assert default_revision(site, "ann") == second
    site.catalog.pin("bob", "s")
    assert site.catalog.list("ann") == before


def test_a_restart_and_a_sweep_remove_what_no_adapter_has_named_for_an_hour(site: Site) -> None:
    revision = add(site, ANN, "x", 1)
    (named,) = site.storage.sizes()
    young, old = "e" * 64, "f" * 64
    for sweep in (site.restart, lambda: site.catalog.sweep()):
        for content_hash, seconds in ((named, 4000), (young, 3500), (old, 3700)):
            site.storage.put(content_hash, *adapter_files(2))
            site.age(content_hash, seconds)
        sweep()
        assert site.stored() == {revision, young[:16]}


def test_a_lost_state_does_not_take_the_bytes_along(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    revision = add(site, ANN, "x", 1)
    (content_hash,) = site.storage.sizes()
    site.age(content_hash, 4000)
    with site.database.begin() as connection:
        connection.execute(delete(adapters))
    site.restart()
    assert "the registry knows no adapter" in caplog.text
    assert site.catalog.list("ann") == []
    other = add(site, ANN, "y", 2)
    site.catalog.sweep()
    assert site.stored() == {revision, other}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["missing", "damaged"])
def test_lost_or_rotten_bytes_are_the_trouble_of_that_adapter_alone(stored_site: Site, kind: Kind, word: str) -> None:
    site = stored_site
    config, weights = adapter_files(1, bank_seed=1)
    _, revision, _ = site.catalog.add(ANN, "x", config, weights)
    kept = add(site, ANN, "y", 2)
    pin = site.catalog.pin("ann", "x")
    digest = {"contents": pin.content_hash, "banks": site.residency.get(pin.content_hash).bank_hash}[kind]
    site.restart()
    if word == "missing":
        site.storage.delete(digest, kind)
    else:
        site.spoil(digest, kind)
    for _ in range(2):
        with pytest.raises(InvalidAdapter, match=f"are {word}: upload the adapter again, with its bank"):
            site.catalog.pin("ann", "x")
    assert site.catalog.pin("ann", "y").revision == kept
    assert [info.name for info in site.catalog.list("ann")] == ["x", "y"]
    again = site.catalog.add(ANN, "x", config, weights)
    assert (again[1].revision, again[2]) == (revision.revision, False)
    site.restart()
    assert site.catalog.pin("ann", "x").revision == revision.revision


def test_another_content_in_a_contents_place_is_damage(site: Site) -> None:
    """Sound by itself, but not what its name says."""
    add(site, ANN, "x", 1)
    content_hash = site.catalog.pin("ann", "x").content_hash
    site.restart()
    site.storage.put(content_hash, *adapter_files(2))
    with pytest.raises(InvalidAdapter, match="damaged"):
        site.catalog.pin("ann", "x")


# --- banks ------------------------------------------------------------------------------------------------------


def test_a_bank_goes_with_the_last_that_is_on_it(stored_site: Site) -> None:
    site = stored_site
    site.catalog.add(ANN, "x", *adapter_files(1))
    site.catalog.add(BOB, "y", *adapter_files(2))
    (bank,) = site.stored_banks()
    site.catalog.delete(ANN, "x")
    assert site.stored_banks() == {bank}
    site.restart()
    site.catalog.pin("bob", "y").release()
    site.catalog.delete(BOB, "y")
    assert site.stored_banks() == site.stored() == set()


def test_a_sweep_removes_old_banks_that_none_is_on(stored_site: Site) -> None:
    site = stored_site
    site.catalog.add(ANN, "x", *adapter_files(1))
    for bank_seed, seconds in ((1, 3500), (2, 4000)):
        content, bank = (f"{bank_seed}" * 64, bank_hash(small_checkpoint(bank_seed=bank_seed).bank))
        site.storage.put(content, *adapter_files(9, bank_seed=bank_seed))
        site.age(content, seconds)
        site.age(bank, seconds, "banks")
    (named,) = site.named_banks()
    site.age(named, 4000, "banks")
    site.catalog.sweep()
    assert site.stored_banks() == {named, bank_hash(small_checkpoint(bank_seed=1).bank)}
    assert site.stored() == site.named() | {"1" * 16}


def without_bank(files: tuple[bytes, bytes]) -> tuple[bytes, bytes, str]:
    """The two files without the bank, and what names it."""
    tensors = load(files[1])
    bank = tensors.pop(BANK_KEY)
    return files[0], save(tensors, {"format": "pt"}), f"sha256:{bank_hash(bank)}"


@pytest.mark.parametrize("whose", ["own", "shared"])
def test_an_upload_may_name_a_bank_instead_of_bringing_it(stored_site: Site, whose: str) -> None:
    site = stored_site
    caller, shared = (ANN, False) if whose == "own" else (OPERATOR, True)
    site.catalog.add(caller, "first", *adapter_files(1), shared=shared)
    config, weights, bank = without_bank(adapter_files(2))
    info, revision, created = site.catalog.add(ANN, "x", config, weights, bank=bank)
    assert created and info.name == "x"
    assert revision.bytes == sum(map(len, adapter_files(2)))  # as if the bank had come along
    assert len(site.stored_banks()) == 1
    site.restart()
    assert site.catalog.pin("ann", "x").revision == revision.revision
    _, same, created = site.catalog.add(ANN, "x", *adapter_files(2))
    assert (same.revision, created) == (revision.revision, False)


def test_a_bank_of_another_tenant_is_as_unknown_as_one_that_nobody_has(site: Site) -> None:
    site.catalog.add(BOB, "secret", *adapter_files(1))
    config, weights, foreign = without_bank(adapter_files(2))
    told = []
    for bank in (foreign, "sha256:" + "0" * 64):
        for content in (weights, adapter_files(2)[1], b"rotten"):
            with statements(site) as seen, pytest.raises(InvalidAdapter) as caught:
                site.catalog.add(ANN, "x", config, content, bank=bank)
            told.append((seen, caught.value.message, caught.value.param))
    assert all(entry == told[0] for entry in told)
    assert told[0][2] == "bank" and len(told[0][0]) == 1
    assert site.catalog.list("ann") == []
    site.catalog.add(BOB, "more", config, weights, bank=foreign)


@pytest.mark.parametrize(
    "bank", ["", "0" * 64, "sha256:", "sha256:" + "0" * 63, "sha256:" + "A" * 64, "md5:" + "0" * 64]
)
def test_what_cannot_be_a_hash_is_never_asked_for(site: Site, bank: str) -> None:
    with statements(site) as seen, pytest.raises(InvalidValue) as caught:
        site.catalog.add(ANN, "x", *adapter_files(1), bank=bank)
    assert caught.value.param == "bank"
    assert seen == []


def test_a_bank_is_named_or_brought_not_both(site: Site) -> None:
    site.catalog.add(ANN, "first", *adapter_files(1))
    config, weights, bank = without_bank(adapter_files(2))
    with pytest.raises(InvalidAdapter, match="hold a bank") as caught:
        site.catalog.add(ANN, "x", *adapter_files(2), bank=bank)
    assert caught.value.param == "bank"
    with pytest.raises(InvalidAdapter, match="is missing"):
        site.catalog.add(ANN, "x", config, weights)


@pytest.mark.parametrize("word", ["missing", "damaged"])
def test_a_bank_whose_bytes_are_lost_or_rotten_can_not_be_named(site: Site, word: str) -> None:
    site.catalog.add(ANN, "first", *adapter_files(1))
    config, weights, bank = without_bank(adapter_files(2))
    (digest,) = site.stored_banks()
    if word == "missing":
        site.storage.delete(digest, "banks")
    else:
        site.spoil(digest, "banks")
    with pytest.raises(InvalidAdapter, match=f"this bank are {word}") as caught:
        site.catalog.add(ANN, "x", config, weights, bank=bank)
    assert caught.value.param == "bank"
    site.catalog.add(ANN, "x", *adapter_files(2))  # which brings it
    site.catalog.add(ANN, "y", config, weights, bank=bank)


def test_lifecycle_on_either_storage(stored_site: Site) -> None:
    """Uploads, activation, removal, a restart and a sweep, as the tests above try one by one."""
    site = stored_site
    first, second = add(site, ANN, "x", 1), add(site, ANN, "x", 2)
    site.catalog.activate(ANN, "x", first)
    shared = add(site, OPERATOR, "s", 3, shared=True)
    site.restart()
    assert site.catalog.pin("ann", "x").revision == first
    assert site.catalog.pin("ann", "x", second).revision == second
    assert site.catalog.pin("bob", "s").revision == shared
    site.catalog.delete_revision(ANN, "x", second)
    assert site.stored() == {first, shared}
    site.age_all(4000)
    site.restart()
    assert site.stored() == site.named() == {first, shared}
    assert site.catalog.pin("ann", "x").revision == first
    site.catalog.delete(ANN, "x")
    site.catalog.delete_shared("s")
    assert site.stored() == site.stored_banks() == set()
