"""What the vault promises: values go in and come out by unseal alone; a change is a version."""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from vault_support import PLAINTEXT, everything

from sandboxd.errors import Denied, Invalid, NotFound, StoreError
from sandboxd.names import MAX_ENV_STRING
from sandboxd.secret import Secret
from sandboxd.vault import MasterKey, Vault

VALUE = Secret(PLAINTEXT)


@pytest.fixture
def path(in_memory: Path) -> Path:
    return in_memory / "store.sqlite"


def value_of(vault: Vault, agent: str, name: str) -> bytes:
    return vault.unseal(vault.of("default").snapshot(agent).variables[name]).reveal()


def all_bytes(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.iterdir()))


def test_a_set_value_comes_back_after_a_restart(reopen: Callable[..., Vault]) -> None:
    assert reopen().of("default").set("bot", {"API_KEY": VALUE, "URL": Secret(b"x")}, by="ann") == {
        "API_KEY": 1,
        "URL": 1,
    }
    assert value_of(reopen(), "bot", "API_KEY") == PLAINTEXT


def test_the_files_are_private_and_hold_no_plaintext(vault: Vault, path: Path) -> None:
    vault.of("default").set("bot", {"API_KEY": VALUE}, by="ann")
    names = {each.name for each in path.parent.iterdir()}
    assert names >= {"store.sqlite", "store.sqlite.guard", "store.sqlite-wal"}
    assert all(stat.S_IMODE(each.stat().st_mode) == 0o600 for each in path.parent.iterdir())
    stored = all_bytes(path.parent)
    assert b"API_KEY" in stored  # the control: names are stored as they are
    assert b"hunter2" not in stored


def test_listing_tells_everything_but_the_value(reopen: Callable[..., Vault]) -> None:
    vault = reopen(clock=lambda: 1000.5)
    vault.of("default").set("bot", {"B": VALUE, "A": Secret(b"")}, by="ann")
    first, second = vault.of("default").list("bot")
    assert (first.name, first.version, first.set_at, first.set_by) == ("A", 1, 1000.5, "ann")
    assert (first.last_used_at, first.size, first.revoked) == (None, 0, False)
    assert (second.name, second.size) == ("B", len(PLAINTEXT))
    assert len(second.fingerprint) == 16
    assert "hunter2" not in repr([first, second])


def test_an_agent_sees_its_own_variables_only(vault: Vault) -> None:
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    assert vault.of("default").list("other") == []
    assert vault.of("default").snapshot("other").variables == {}


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\n",
        b"-----BEGIN KEY-----\nhunter2\n-----END KEY-----\n",
        bytes(range(1, 256)),
        b"\xff\xfe" * 100,
        b"v" * (MAX_ENV_STRING - len("NAME=") - 1),
    ],
    ids=["empty", "newline", "multi-line", "every byte but NUL", "not UTF-8", "the longest"],
)
def test_any_value_that_an_environment_can_carry_comes_back_exactly(
    vault: Vault, value: bytes
) -> None:
    vault.of("default").set("bot", {"NAME": Secret(value)}, by="ann")
    assert value_of(vault, "bot", "NAME") == value
    assert vault.of("default").list("bot")[0].size == len(value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"hunter2\0", "NUL byte"),
        (b"hunter2" + b"v" * (MAX_ENV_STRING - len("NAME=hunter2")), "1 bytes too long"),
    ],
)
def test_any_other_value_is_refused_whole_and_not_shown(
    vault: Vault, value: bytes, why: str
) -> None:
    with pytest.raises(Invalid, match=why) as caught:
        vault.of("default").set("bot", {"GOOD": VALUE, "NAME": Secret(value)}, by="ann")
    assert "hunter2" not in everything(caught.value)
    assert vault.of("default").list("bot") == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LD_PRELOAD", "the dynamic loader obeys it"),
        ("BASH_ENV", "a shell runs"),
        ("PYTHONPATH", "the Python interpreter loads"),
        ("https_proxy", "the tool's traffic"),
        ("NOTIFY_SOCKET", "belongs to the daemon"),
    ],
)
def test_a_loader_variable_is_refused_with_its_reason(vault: Vault, name: str, reason: str) -> None:
    with pytest.raises(Invalid, match=f"^{name} can't be set: .*{reason}") as caught:
        vault.of("default").set("bot", {"GOOD": VALUE, name: VALUE}, by="ann")
    assert "another name" in caught.value.hint
    assert vault.of("default").list("bot") == []


@pytest.mark.parametrize(
    ("agent", "name", "by"),
    [
        ("Bot", "A", "ann"),
        ("", "A", "ann"),
        ("bot", "A-B", "ann"),
        ("bot", "", "ann"),
        ("bot", "A", ""),
        ("bot", "A", "ann\nbob"),
        ("bot", "A", "x" * 201),
    ],
)
def test_bad_names_are_refused(vault: Vault, agent: str, name: str, by: str) -> None:
    before = vault.generation
    with pytest.raises(Invalid) as caught:
        vault.of("default").set(agent, {name: VALUE}, by=by)
    assert "hunter2" not in everything(caught.value)
    assert vault.generation == before  # nothing was written


def test_setting_nothing_changes_nothing(vault: Vault) -> None:
    before = vault.generation
    assert vault.of("default").set("bot", {}, by="ann") == {}
    assert vault.of("default").remove("bot", [], by="ann") == {}
    assert vault.generation == before


def test_each_set_makes_the_next_version_and_only_of_its_name(vault: Vault) -> None:
    vault.of("default").set("bot", {"A": Secret(b"1"), "B": Secret(b"1")}, by="ann")
    assert vault.of("default").set("bot", {"A": Secret(b"2")}, by="bob") == {"A": 2}
    assert [(v.name, v.version, v.set_by) for v in vault.of("default").list("bot")] == [
        ("A", 2, "bob"),
        ("B", 1, "ann"),
    ]


def test_a_snapshot_keeps_its_versions_while_new_ones_are_set(vault: Vault) -> None:
    vault.of("default").set("bot", {"A": Secret(b"old")}, by="ann")
    before = vault.of("default").snapshot("bot")
    vault.of("default").set("bot", {"A": Secret(b"new"), "B": Secret(b"b")}, by="ann")
    assert set(before.variables) == {"A"}
    assert vault.unseal(before.variables["A"]).reveal() == b"old"
    vault.of("default").remove("bot", ["A"], by="ann")
    assert vault.unseal(before.variables["A"]).reveal() == b"old"


def test_a_snapshot_holds_ciphertext_only_and_can_not_be_changed(vault: Vault) -> None:
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    snapshot = vault.of("default").snapshot("bot")
    sealed = snapshot.variables["A"]
    assert b"hunter2" not in sealed.ciphertext
    assert repr(sealed) == "Sealed(team='default', agent='bot', name='A', version=1, key_id=1)"
    with pytest.raises(TypeError):
        snapshot.variables["A"] = sealed  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        sealed.version = 2  # type: ignore[misc]


def test_removing_is_all_or_nothing_and_names_what_is_missing(vault: Vault) -> None:
    vault.of("default").set("bot", {"A": VALUE, "B": VALUE}, by="ann")
    with pytest.raises(NotFound, match="no variable 'C', 'D'; nothing was removed"):
        vault.of("default").remove("bot", ["A", "C", "D"], by="ann")
    assert [v.name for v in vault.of("default").list("bot")] == ["A", "B"]
    assert vault.of("default").remove("bot", ["A", "A"], by="ann") == {"A": 1}
    assert [v.name for v in vault.of("default").list("bot")] == ["B"]
    with pytest.raises(NotFound):
        vault.of("default").remove("bot", ["A"], by="ann")


def test_a_removed_name_set_again_gets_a_version_never_used(vault: Vault) -> None:
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    vault.of("default").remove("bot", ["A"], by="ann")
    assert vault.of("default").set("bot", {"A": VALUE}, by="ann") == {"A": 2}


def test_replaced_and_removed_ciphertext_is_gone_from_every_file(vault: Vault, path: Path) -> None:
    sealed = []
    for _ in range(2):
        vault.of("default").set("bot", {"A": VALUE}, by="ann")
        sealed.append(vault.of("default").snapshot("bot").variables["A"].ciphertext)
    assert sealed[1] in all_bytes(path.parent)  # the control
    assert sealed[0] not in all_bytes(path.parent)
    vault.of("default").remove("bot", ["A"], by="ann")
    assert sealed[1] not in all_bytes(path.parent)


def test_a_fingerprint_tells_equal_values_of_one_agent_and_nothing_across_agents(
    reopen: Callable[..., Vault], tmp_path: Path, key: MasterKey
) -> None:
    vault = reopen()

    def fingerprint(agent: str, value: bytes) -> str:
        vault.of("default").set(agent, {"A": Secret(value)}, by="ann")
        return vault.of("default").list(agent)[0].fingerprint

    first = fingerprint("bot", b"same")
    assert fingerprint("bot", b"different") != first
    assert fingerprint("bot", b"same") == first
    assert fingerprint("other", b"same") != first
    # Keyed by the store: another store with the same master key gives another one.
    with_other = Vault.open(tmp_path / "other.sqlite", key)
    with_other.of("default").set("bot", {"A": Secret(b"same")}, by="ann")
    assert with_other.of("default").list("bot")[0].fingerprint != first
    with_other.close()


def test_a_revoked_version_is_denied_at_once_and_after_a_restart(
    reopen: Callable[..., Vault],
) -> None:
    vault = reopen()
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    old = vault.of("default").snapshot("bot").variables["A"]
    vault.of("default").set("bot", {"A": Secret(b"new")}, by="ann")
    assert not vault.is_revoked(old)
    vault.of("default").revoke("bot", "A", up_to=1)
    for restarted in (False, True):
        each = reopen() if restarted else vault
        assert each.is_revoked(old)
        with pytest.raises(Denied, match="variable A of agent bot, version 1, is revoked"):
            each.unseal(old)
        assert value_of(each, "bot", "A") == b"new"
        assert each.of("default").list("bot")[0].revoked is False


def test_a_revocation_outlives_removal_and_is_never_taken_back(
    reopen: Callable[..., Vault],
) -> None:
    vault = reopen()
    for _ in range(3):
        vault.of("default").set("bot", {"A": VALUE}, by="ann")
    current = vault.of("default").snapshot("bot").variables["A"]
    vault.of("default").revoke("bot", "A", up_to=3)
    vault.of("default").revoke("bot", "A", up_to=1)
    assert vault.of("default").list("bot")[0].revoked is True
    vault.of("default").remove("bot", ["A"], by="ann")
    vault.of("default").set("bot", {"A": Secret(b"new")}, by="ann")
    for restarted in (False, True):
        each = reopen() if restarted else vault
        assert each.is_revoked(current)
        assert value_of(each, "bot", "A") == b"new"


def test_revoking_what_was_never_given_out_is_refused(vault: Vault) -> None:
    with pytest.raises(NotFound):
        vault.of("default").revoke("bot", "A", up_to=1)
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    with pytest.raises(Invalid, match="no version 2 yet"):
        vault.of("default").revoke("bot", "A", up_to=2)
    vault.of("default").revoke("bot", "A", up_to=0)
    assert value_of(vault, "bot", "A") == PLAINTEXT


@pytest.mark.parametrize(
    "change",
    [
        {"agent": "other"},
        {"name": "B"},
        {"version": 2},
        {"key_id": 2},
        {"nonce": bytes(12)},
        {"nonce": b""},
        {"ciphertext": b""},
    ],
)
def test_ciphertext_that_claims_to_be_something_else_does_not_open(
    vault: Vault, change: dict[str, object]
) -> None:
    vault.of("default").set("bot", {"A": VALUE, "B": VALUE}, by="ann")
    vault.of("default").set("other", {"A": VALUE}, by="ann")
    sealed = vault.of("default").snapshot("bot").variables["A"]
    with pytest.raises(StoreError, match="does not authenticate") as caught:
        vault.unseal(dataclasses.replace(sealed, **change))  # type: ignore[arg-type]
    assert "hunter2" not in everything(caught.value)


def test_unsealing_needs_neither_disk_nor_lock(vault: Vault, path: Path) -> None:
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    sealed = vault.of("default").snapshot("bot").variables["A"]
    for each in path.parent.iterdir():
        each.unlink()
    unsealed: list[Secret] = []
    with vault._ledger.lock:
        thread = threading.Thread(target=lambda: unsealed.append(vault.unseal(sealed)))
        thread.start()
        thread.join(10)
    assert unsealed == [VALUE]


def test_a_closed_vault_gives_nothing_and_closing_twice_is_fine(vault: Vault) -> None:
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    sealed = vault.of("default").snapshot("bot").variables["A"]
    vault.close()
    vault.close()
    with pytest.raises(StoreError):
        vault.unseal(sealed)
    with pytest.raises(StoreError):
        vault.of("default").set("bot", {"A": VALUE}, by="ann")
    with pytest.raises(StoreError):
        vault.of("default").list("bot")


def test_last_use_is_noted_for_the_current_version_only(reopen: Callable[..., Vault]) -> None:
    vault = reopen()
    vault.of("default").set("bot", {"A": VALUE, "B": VALUE}, by="ann")
    vault.of("default").set("bot", {"B": VALUE}, by="ann")
    vault.of("default").touch(
        [("bot", "A", 1), ("bot", "B", 1), ("bot", "C", 1), ("bot", "A", 1)], 2000
    )
    vault.of("default").touch([("bot", "A", 1)], 1500.0)  # a clock set back, or a late report
    vault = reopen()
    assert [(v.name, v.last_used_at) for v in vault.of("default").list("bot")] == [
        ("A", 2000.0),
        ("B", None),
    ]
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    assert vault.of("default").list("bot")[0].last_used_at is None


def test_a_new_master_key_opens_the_store_and_the_old_one_no_longer(
    reopen: Callable[..., Vault], key: MasterKey, other_key: MasterKey
) -> None:
    vault = reopen()
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    sealed, listed, subkey = (
        vault.of("default").snapshot("bot"),
        vault.of("default").list("bot"),
        vault.subkey("audit"),
    )
    vault.rekey(other_key)
    assert vault.unseal(sealed.variables["A"]) == VALUE
    vault.of("default").set("bot", {"B": VALUE}, by="ann")
    vault.rotate_data_key()
    vault = reopen(other_key)
    assert value_of(vault, "bot", "A") == value_of(vault, "bot", "B") == PLAINTEXT
    assert vault.of("default").list("bot")[0] == listed[0]
    assert vault.subkey("audit") == subkey
    vault.close()
    with pytest.raises(StoreError, match="wrong key"):
        reopen(key)


def test_a_rotated_data_key_seals_everything_again_and_live_snapshots_still_open(
    reopen: Callable[..., Vault], path: Path
) -> None:
    vault = reopen()
    vault.of("default").set("bot", {"A": VALUE, "B": Secret(b"")}, by="ann")
    vault.of("default").set("other", {"A": VALUE, "GONE": VALUE}, by="ann")
    vault.of("default").remove("other", ["GONE"], by="ann")
    before = vault.of("default").snapshot("bot").variables["A"]
    listed = vault.of("default").list("bot")
    vault.rotate_data_key()
    after = vault.of("default").snapshot("bot").variables["A"]
    assert (before.key_id, after.key_id) == (1, 2)
    assert before.ciphertext not in all_bytes(path.parent)
    assert vault.unseal(before) == vault.unseal(after) == VALUE
    assert vault.of("default").list("bot") == listed
    vault = reopen()
    assert vault.unseal(after) == VALUE
    assert value_of(vault, "other", "A") == PLAINTEXT
    with pytest.raises(StoreError, match="does not authenticate"):
        vault.unseal(before)  # its key is gone for good


def test_concurrent_sets_give_every_version_once(vault: Vault) -> None:
    given: list[int] = []

    def setter(number: int) -> None:
        for _ in range(10):
            versions = vault.of("default").set(
                "bot", {"A": Secret(b"%d" % number), "B": VALUE}, by="ann"
            )
            given.append(versions["A"])
            value_of(vault, "bot", "B")

    threads = [threading.Thread(target=setter, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == list(range(1, 41))
    assert vault.generation == 1 + 40


def test_two_vaults_on_one_store_see_each_other_s_changes(
    vault: Vault, path: Path, key: MasterKey
) -> None:
    other = Vault.open(path, key)
    try:
        vault.of("default").set("bot", {"A": Secret(b"1")}, by="ann")
        assert other.of("default").set("bot", {"A": Secret(b"2")}, by="ann") == {"A": 2}
        other.rotate_data_key()
        assert value_of(vault, "bot", "A") == b"2"
        assert vault.of("default").set("bot", {"A": Secret(b"3")}, by="ann") == {"A": 3}
        assert value_of(other, "bot", "A") == b"3"
    finally:
        other.close()


def test_no_descriptor_is_left_open_or_inherited(path: Path, key: MasterKey) -> None:
    def open_files() -> list[int]:
        return [int(fd) for fd in os.listdir("/proc/self/fd")]

    before = len(open_files())
    vault = Vault.open(path, key)
    vault.of("default").set("bot", {"A": VALUE}, by="ann")
    assert len(open_files()) > before
    mine = [
        fd
        for fd in open_files()
        if os.path.exists(f"/proc/self/fd/{fd}")
        and os.readlink(f"/proc/self/fd/{fd}").startswith(str(path))
    ]
    assert mine
    assert not any(os.get_inheritable(fd) for fd in mine)
    vault.close()
    assert len(open_files()) == before
