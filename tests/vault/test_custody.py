"""The master key: from a file, a credential or a passphrase, and only when it is safe there."""

from __future__ import annotations

import base64
import json
import os
import stat
from pathlib import Path

import pytest
from vault_support import everything

from sandboxd.errors import Conflict, Denied, Invalid, StoreError, Unavailable
from sandboxd.secret import Secret
from sandboxd.vault import KeySource, MasterKey, create_key_file, load_master_key


def from_file(path: Path) -> MasterKey:
    return load_master_key(KeySource("file", path))


def key_text(path: Path) -> bytes:
    """The secret part of a key file, to look for where it must not be."""
    return path.read_bytes().strip().removeprefix(b"sandboxd-key-1:")


class Asked:
    """Somebody at a terminal, who types what the test says."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.prompts = list(answers), []

    def __call__(self, prompt: str) -> Secret:
        self.prompts.append(prompt)
        return Secret(self.answers.pop(0))


def test_a_created_key_file_is_private_one_line_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = create_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert path.read_bytes().startswith(b"sandboxd-key-1:")
    assert path.read_bytes().count(b"\n") == 1
    assert len(base64.b64decode(key_text(path))) == 32
    assert from_file(path).derive("wrap") == made.derive("wrap")


def test_a_key_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        create_key_file(tmp_path / "key")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o400


def test_two_created_keys_differ(tmp_path: Path) -> None:
    assert create_key_file(tmp_path / "a").id != create_key_file(tmp_path / "b").id


def test_creating_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("key", "link"):
        with pytest.raises(Conflict, match="exists already"):
            create_key_file(tmp_path / name)
    assert (tmp_path / "key").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_creating_in_a_missing_directory_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't create the key file"):
        create_key_file(tmp_path / "none" / "key")


def test_a_key_that_can_not_be_written_leaves_nothing_and_shows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    written = []

    def full(fd: int, data: memoryview) -> int:
        written.append(bytes(data))
        real(fd, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        create_key_file(tmp_path / "key")
    assert os.listdir(tmp_path) == []
    secret = written[0].strip().removeprefix(b"sandboxd-key-1:").decode()
    assert len(secret) == 44
    assert secret not in everything(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o500])
def test_a_key_file_with_a_bad_mode_is_refused(tmp_path: Path, mode: int) -> None:
    create_key_file(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(Denied, match=f"has mode {mode:04o}") as caught:
        from_file(tmp_path / "key")
    assert "chmod 0600" in caught.value.hint


def test_a_key_file_of_another_user_is_refused_and_root_s_is_not(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives a file away")
    path = tmp_path / "key"
    create_key_file(path)
    tmp_path.chmod(0o711)
    os.chown(path, 12345, -1)
    with pytest.raises(Denied, match="belongs to user 12345"):
        from_file(path)


def test_a_symbolic_link_to_a_key_file_is_refused(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    (tmp_path / "link").symlink_to("key")
    with pytest.raises(Denied, match="is a symbolic link"):
        from_file(tmp_path / "link")


def test_a_missing_key_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not exist") as caught:
        from_file(tmp_path / "key")
    assert "sandboxctl init" in caught.value.hint


KEY = base64.b64encode(b"k" * 32)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hunter2",
        b"sandboxd-key-1:",
        b"sandboxd-key-1:hunter2!",
        b"sandboxd-key-1:" + base64.b64encode(b"hunter2" * 4),
        b"sandboxd-key-1:" + KEY[:-1],
        b"sandboxd-key-1:" + KEY + b"\n" + KEY,
        b"sandboxd-key-1: " + KEY,
        b"sandboxd-key-2:" + KEY,
        KEY,
        b"k" * 32,
        b"sandboxd-key-1:" + KEY + b"x" * 5000,
    ],
)
def test_a_malformed_key_file_is_a_store_error_that_shows_none_of_it(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match="does not hold a sandboxd key") as caught:
        from_file(path)
    shown = everything(caught.value)
    for part in (b"hunter2", KEY[:20], base64.b64encode(b"hunter2" * 4)):
        assert part.decode() not in shown


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_end_of_the_line_does_not_matter(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"sandboxd-key-1:" + KEY + end)
    path.chmod(0o600)
    assert from_file(path).id == MasterKey(Secret(b"k" * 32)).id


def test_sub_keys_differ_by_purpose_and_key_and_never_equal_the_master() -> None:
    key, other = MasterKey(Secret(b"k" * 32)), MasterKey(Secret(b"l" * 32))
    derived = {k.derive(p) for k in (key, other) for p in ("wrap", "audit", "fingerprint")}
    assert len(derived) == 6
    assert all(len(each) == 32 for each in derived)
    assert b"k" * 32 not in derived


def test_a_sub_key_is_what_hkdf_of_rfc_5869_gives() -> None:
    import hmac

    # Extract with a salt of zeros, then one block of expand.
    pseudorandom = hmac.digest(bytes(32), b"k" * 32, "sha256")
    expected = hmac.digest(pseudorandom, b"sandboxd 1 wrap\x01", "sha256")
    assert MasterKey(Secret(b"k" * 32)).derive("wrap") == expected


def test_a_master_key_shows_its_id_only() -> None:
    key = MasterKey(Secret(b"k" * 32))
    assert repr(key) == f"<MasterKey {key.id}>"
    assert len(key.id) == 16
    with pytest.raises(Invalid, match="32 bytes, not 31"):
        MasterKey(Secret(b"k" * 31))


def credential(directory: Path | None, name: str = "sandboxd-key") -> MasterKey:
    where = "" if directory is None else str(directory)
    return load_master_key(KeySource("credential", name=name), credentials=where)


def test_a_credential_is_read_from_the_directory_that_systemd_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create_key_file(tmp_path / "sandboxd-key")
    (tmp_path / "sandboxd-key").chmod(0o440)  # as systemd gives it to a User= service
    assert credential(tmp_path).id == made.id
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load_master_key(KeySource("credential", name="sandboxd-key")).id == made.id


def test_a_missing_credential_says_what_the_unit_needs(tmp_path: Path) -> None:
    for directory in (None, tmp_path, tmp_path / "none"):
        with pytest.raises(Unavailable) as caught:
            credential(directory)
        assert "LoadCredentialEncrypted=sandboxd-key:PATH" in caught.value.hint


@pytest.mark.parametrize("name", ["", ".", "..", "../key", "a/b", "/etc/shadow", "a\0b", "a b"])
def test_a_credential_s_name_can_not_leave_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid, match="credential's name"):
        credential(tmp_path, name)


def test_a_credential_that_is_a_link_or_malformed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sandboxd-key").symlink_to("/etc/hostname")
    with pytest.raises(Unavailable, match="can't open the credential"):
        credential(tmp_path)
    (tmp_path / "sandboxd-key").unlink()
    (tmp_path / "sandboxd-key").mkdir()
    with pytest.raises(Unavailable, match="can't read the credential"):
        credential(tmp_path)
    (tmp_path / "sandboxd-key").rmdir()
    (tmp_path / "sandboxd-key").write_text("hunter2")
    with pytest.raises(StoreError, match="does not hold a sandboxd key") as caught:
        credential(tmp_path)
    assert "hunter2" not in everything(caught.value)


GOOD = b"correct horse battery staple"


@pytest.fixture(scope="module")
def made_by_passphrase(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """The record that a first passphrase left, and the id of its key."""
    state = tmp_path_factory.mktemp("state")
    asked = Asked(GOOD, GOOD)
    key = load_master_key(KeySource("passphrase", state=state), ask=asked)
    assert asked.prompts == ["choose a passphrase for the store", "the same passphrase again"]
    assert stat.S_IMODE((state / "passphrase.json").stat().st_mode) == 0o600
    return (state / "passphrase.json").read_bytes(), key.id


@pytest.fixture
def state(tmp_path: Path, made_by_passphrase: tuple[bytes, str]) -> Path:
    (tmp_path / "passphrase.json").write_bytes(made_by_passphrase[0])
    (tmp_path / "passphrase.json").chmod(0o600)
    return tmp_path


def test_the_right_passphrase_gives_the_same_key_again(
    state: Path, made_by_passphrase: tuple[bytes, str]
) -> None:
    asked = Asked(GOOD)
    key = load_master_key(KeySource("passphrase", state=state), ask=asked)
    assert key.id == made_by_passphrase[1]
    assert asked.prompts == ["passphrase of the store"]


def test_a_passphrase_from_a_private_file_gives_the_same_key(
    state: Path, made_by_passphrase: tuple[bytes, str]
) -> None:
    file = state / "passphrase"
    file.write_bytes(GOOD + b"\n")
    file.chmod(0o600)
    key = load_master_key(KeySource("passphrase", file, state=state))
    assert key.id == made_by_passphrase[1]
    file.chmod(0o644)
    with pytest.raises(Denied, match=r"the passphrase file .* has mode 0644"):
        load_master_key(KeySource("passphrase", file, state=state))


def test_a_wrong_passphrase_is_denied_and_not_shown(state: Path) -> None:
    with pytest.raises(Denied, match="the passphrase is wrong") as caught:
        load_master_key(KeySource("passphrase", state=state), ask=Asked(b"hunter2-wrong"))
    assert "hunter2" not in everything(caught.value)


def test_the_record_holds_neither_passphrase_nor_key(made_by_passphrase: tuple[bytes, str]) -> None:
    record = json.loads(made_by_passphrase[0])
    assert set(record) == {"version", "kdf", "n", "r", "p", "salt", "verifier", "checksum"}
    assert record["n"] * record["r"] * 128 >= 128 << 20
    assert GOOD not in made_by_passphrase[0]


def test_a_flipped_byte_of_the_record_is_damage_and_not_a_wrong_passphrase(state: Path) -> None:
    path = state / "passphrase.json"
    good = path.read_bytes()
    for at in range(len(good)):
        if good[at : at + 1].isspace():
            continue
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(StoreError, match="is damaged"):
            load_master_key(KeySource("passphrase", state=state), ask=Asked())


@pytest.mark.parametrize(
    "change", [{"n": 1 << 30}, {"n": 1000}, {"r": 10_000}, {"p": 0}, {"version": 2}, {"salt": ""}]
)
def test_parameters_out_of_bounds_are_refused_even_with_a_good_checksum(
    state: Path, change: dict[str, object]
) -> None:
    from sandboxd.vault.custody import _checksum

    record = json.loads((state / "passphrase.json").read_bytes()) | change
    record["checksum"] = _checksum(record)
    (state / "passphrase.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match="is damaged"):
        load_master_key(KeySource("passphrase", state=state), ask=Asked(GOOD))


def test_without_its_record_an_existing_store_is_not_given_a_new_passphrase(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").touch()
    with pytest.raises(StoreError, match=r"passphrase\.json is missing"):
        load_master_key(KeySource("passphrase", state=tmp_path), ask=Asked(GOOD, GOOD))
    assert os.listdir(tmp_path) == ["store.sqlite"]


@pytest.mark.parametrize(
    ("answers", "why"),
    [((b"short",), "at least 8"), ((b"",), "at least 8"), ((GOOD, b"hunter2-other"), "differ")],
)
def test_a_first_passphrase_that_is_too_short_or_mistyped_is_refused(
    tmp_path: Path, answers: tuple[bytes, ...], why: str
) -> None:
    with pytest.raises(Invalid, match=why) as caught:
        load_master_key(KeySource("passphrase", state=tmp_path), ask=Asked(*answers))
    assert "hunter2" not in everything(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_passphrase_with_nobody_to_ask_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nobody to ask"):
        load_master_key(KeySource("passphrase", state=tmp_path))
