"""Custody of the master key: a key file, a systemd credential or a passphrase.

Whatever the source, the result is a :class:`MasterKey`. It never seals a value itself; it wraps
the store's own keys.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from sandboxd.errors import Conflict, Denied, Invalid, StoreError, Unavailable
from sandboxd.files import fsync_directory, open_private, read_all, replace_file, write_all
from sandboxd.secret import Secret
from sandboxd.vault.envelope import KEY_SIZE

__all__ = ["KeySource", "MasterKey", "create_key_file", "load_master_key"]

#: What ``systemd.exec(5)`` accepts as a credential's name, less what only paths need.
_CREDENTIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_PREFIX = b"sandboxd-key-1:"
_MAX_FILE = 4096

#: scrypt (RFC 7914): 128 MiB and about half a second; OWASP's first choice of parameters.
_COST = {"n": 1 << 17, "r": 8, "p": 1}
_RECORD = "passphrase.json"
_MIN_PASSPHRASE = 8

Ask = Callable[[str], Secret]


@dataclass(frozen=True)
class KeySource:
    """Where the master key comes from.

    ``file``: ``path`` is the key file. ``credential``: ``name`` is a file in
    $CREDENTIALS_DIRECTORY. ``passphrase``: ``state`` is the state directory, which keeps salt and
    parameters, and ``path`` an optional file that holds the passphrase.
    """

    kind: Literal["file", "credential", "passphrase"]
    path: Path | None = None
    name: str = ""
    state: Path | None = None


class MasterKey:
    """32 secret bytes that only ever become sub-keys."""

    __slots__ = ("_key",)

    def __init__(self, key: Secret) -> None:
        if len(key) != KEY_SIZE:
            raise Invalid(f"a master key has {KEY_SIZE} bytes, not {len(key)}")
        self._key = key

    def derive(self, purpose: str) -> bytes:
        """The sub-key for one purpose (HKDF-SHA256, RFC 5869); useless for any other purpose."""
        info = b"sandboxd 1 " + purpose.encode()
        hkdf = HKDF(algorithm=hashes.SHA256(), length=KEY_SIZE, salt=None, info=info)
        return hkdf.derive(self._key.reveal())

    @property
    def id(self) -> str:
        """A public short name of this key, to tell it from another."""
        return self.derive("id")[:8].hex()

    def __repr__(self) -> str:
        return f"<MasterKey {self.id}>"


def load_master_key(
    source: KeySource, *, ask: Ask | None = None, credentials: str | None = None
) -> MasterKey:
    """The master key from its source.

    ``credentials`` stands in for $CREDENTIALS_DIRECTORY. A passphrase comes from its file or from
    ``ask``; the first one ever is accepted as it is (asked twice) and remembered by a verifier.
    Raises :class:`Denied` when a file isn't private or the passphrase is wrong,
    :class:`Unavailable` when there is nothing to load from, and :class:`StoreError` when what is
    there is damaged.
    """
    if source.kind == "file":
        if source.path is None:
            raise Invalid("a key file needs a path")
        return _parse(_read(source.path, "the key file"), f"the key file {source.path}")
    if source.kind == "credential":
        if credentials is None:
            credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")
        return _from_credential(source.name, credentials)
    if source.state is None:
        raise Invalid("a passphrase needs the state directory that keeps its salt")
    return _from_passphrase(source.state, source.path, ask)


def create_key_file(path: Path) -> MasterKey:
    """A new random key in a new file, mode 0400, durable when it returns.

    Raises :class:`Conflict` when the file exists and :class:`StoreError` when it can't be written;
    then nothing is left behind.
    """
    key = MasterKey(Secret(secrets.token_bytes(KEY_SIZE)))
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o400)
    except FileExistsError:
        raise Conflict(
            f"{path} exists already",
            hint="what a lost key sealed is lost: move the file away before making another",
        ) from None
    except OSError as error:
        raise StoreError(f"can't create the key file {path}: {error.strerror}") from None
    problem = ""
    try:
        os.fchmod(fd, 0o400)
        write_all(fd, _PREFIX + base64.b64encode(key._key.reveal()) + b"\n")
        os.fsync(fd)
        fsync_directory(path.parent)
    except OSError as error:
        problem = error.strerror or str(error)
        with contextlib.suppress(OSError):
            path.unlink()
    finally:
        os.close(fd)
    if problem:
        # Raised outside the handler: the chained frames hold the key's text.
        raise StoreError(f"can't write the key file {path}: {problem}")
    return key


def _read(path: Path, what: str) -> Secret:
    """A small private file's content."""
    try:
        fd = open_private(path, os.O_RDONLY, what)
    except FileNotFoundError:
        raise Unavailable(
            f"{what} {path} does not exist", hint="sandboxctl init makes one"
        ) from None
    except OSError as error:
        raise Unavailable(f"can't open {what} {path}: {error.strerror}") from None
    try:
        return Secret(read_all(fd, _MAX_FILE))
    finally:
        os.close(fd)


def _parse(content: Secret, where: str) -> MasterKey:
    """The key in one line ``sandboxd-key-1:BASE64``."""
    key = _decoded(content)
    if key is None:
        raise StoreError(
            f"{where} does not hold a sandboxd key",
            hint="it is one line: sandboxd-key-1: and 44 characters of base64",
        )
    return MasterKey(key)


def _decoded(content: Secret) -> Secret | None:
    if not content.reveal().startswith(_PREFIX):
        return None
    try:
        key = Secret(
            base64.b64decode(content.reveal()[len(_PREFIX) :].rstrip(b"\r\n"), validate=True)
        )
    except binascii.Error:
        return None
    return key if len(key) == KEY_SIZE else None


def _from_credential(name: str, directory: str) -> MasterKey:
    """systemd already keeps it private (systemd.exec(5), CREDENTIALS): its mode is systemd's."""
    if not _CREDENTIAL.fullmatch(name):
        raise Invalid("a credential's name has letters, digits, '.', '_' and '-'")
    if not directory:
        raise Unavailable(
            f"the credential {name} is not there: $CREDENTIALS_DIRECTORY is not set",
            hint=f"the unit needs LoadCredentialEncrypted={name}:PATH (systemd-creds(1))",
        )
    path = Path(directory) / name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Unavailable(
            f"can't open the credential {name}: {error.strerror}",
            hint=f"the unit needs LoadCredentialEncrypted={name}:PATH (systemd-creds(1))",
        ) from None
    try:
        content = Secret(read_all(fd, _MAX_FILE))
    except OSError as error:
        raise Unavailable(f"can't read the credential {name}: {error.strerror}") from None
    finally:
        os.close(fd)
    return _parse(content, f"the credential {name}")


def _from_passphrase(state: Path, file: Path | None, ask: Ask | None) -> MasterKey:
    record = _load_record(state)
    if record is None:
        return _first_passphrase(state, file, ask)
    key = _stretch(_passphrase(file, ask, "passphrase of the store"), record)
    verifier = base64.b64encode(key.derive("verifier")).decode()
    if not hmac.compare_digest(verifier, record["verifier"]):
        raise Denied(
            "the passphrase is wrong",
            hint="the store was made with another one; there is no way around it",
        )
    return key


def _first_passphrase(state: Path, file: Path | None, ask: Ask | None) -> MasterKey:
    if (state / "store.sqlite").exists():
        raise StoreError(
            f"{state / _RECORD} is missing, and without its salt no passphrase opens the store",
            hint="restore that file from a backup",
        )
    passphrase = _passphrase(file, ask, "choose a passphrase for the store")
    if len(passphrase) < _MIN_PASSPHRASE:
        raise Invalid(
            f"a passphrase has at least {_MIN_PASSPHRASE} characters",
            hint="several random words make a good one",
        )
    if file is None and passphrase != _passphrase(None, ask, "the same passphrase again"):
        raise Invalid("the two passphrases differ")
    record: dict[str, Any] = {
        "version": 1,
        "kdf": "scrypt",
        **_COST,
        "salt": base64.b64encode(secrets.token_bytes(32)).decode(),
    }
    key = _stretch(passphrase, record)
    record["verifier"] = base64.b64encode(key.derive("verifier")).decode()
    record["checksum"] = _checksum(record)
    try:
        replace_file(state / _RECORD, json.dumps(record, indent=1).encode() + b"\n")
    except OSError as error:
        raise StoreError(f"can't write {state / _RECORD}: {error.strerror}") from None
    return key


def _passphrase(file: Path | None, ask: Ask | None, prompt: str) -> Secret:
    if file is not None:
        content = _read(file, "the passphrase file")
        return Secret(content.reveal().removesuffix(b"\n").removesuffix(b"\r"))
    if ask is None:
        raise Unavailable(
            "the store needs a passphrase and there is nobody to ask",
            hint="start sandboxd in a terminal, or name a file that holds the passphrase",
        )
    return ask(prompt)


def _stretch(passphrase: Secret, record: Mapping[str, Any]) -> MasterKey:
    scrypt = Scrypt(
        salt=base64.b64decode(record["salt"]),
        length=KEY_SIZE,
        n=record["n"],
        r=record["r"],
        p=record["p"],
    )
    try:
        return MasterKey(Secret(scrypt.derive(passphrase.reveal())))
    except MemoryError:
        pass
    raise Unavailable(f"not enough memory to try the passphrase: {record['n'] >> 10} MiB needed")


def _load_record(state: Path) -> dict[str, Any] | None:
    """Salt, parameters and verifier, whole and within bounds; None before the first passphrase."""
    path = state / _RECORD
    try:
        fd = open_private(path, os.O_RDONLY, "the passphrase record")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"can't open {path}: {error.strerror}") from None
    try:
        raw = read_all(fd, _MAX_FILE)
    finally:
        os.close(fd)
    try:
        record = json.loads(raw)
        if record.pop("checksum") == _checksum(record) and _sane(record):
            return dict(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise StoreError(f"{path} is damaged", hint="restore that file from a backup")


def _sane(record: Mapping[str, Any]) -> bool:
    """The checksum tells damage, not malice: parameters that eat all memory are refused too."""
    n, r, p = record["n"], record["r"], record["p"]
    return (
        (record["version"], record["kdf"]) == (1, "scrypt")
        and n & (n - 1) == 0
        and 1 << 14 <= n <= 1 << 20
        and 1 <= r <= 16
        and 1 <= p <= 16
        and len(base64.b64decode(record["salt"], validate=True)) >= 16
        and isinstance(record["verifier"], str)
    )


def _checksum(record: Mapping[str, Any]) -> str:
    fields = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
