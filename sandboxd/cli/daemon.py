"""How a command finds its daemon: the admin socket of this host, or a server that is named."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.admin.client import AdminClient
from sandboxd.errors import Denied, Invalid
from sandboxd.paths import Paths

if TYPE_CHECKING:
    from sandboxd.admin.client import Client
    from sandboxd.admin.remote import RemoteClient
    from sandboxd.secret import Secret

__all__ = ["connect", "connect_here", "paths", "server_of"]

_SYSTEM_RUNTIME = Path("/run/sandboxd")

#: Longest key or token; anything longer is another file.
_LONGEST_KEY = 8192


def paths(args: argparse.Namespace) -> Paths:
    """The directories that the options, the environment and the defaults give."""
    return Paths.resolve(config=args.config, state=args.state, runtime=args.runtime)


def server_of(args: argparse.Namespace) -> str:
    """The server that was named, "" for the admin socket.

    An option goes before the environment: ``--runtime`` means the socket there.
    """
    if args.server_url is not None:
        return str(args.server_url)
    return "" if args.runtime else os.environ.get("SANDBOXD_SERVER", "")


def connect(args: argparse.Namespace, *, timeout: float | None = None) -> Client:
    """Connect to the daemon. Raises Unavailable with what to do when there is none.

    With a server, ``timeout`` bounds the seconds that connecting to it may take.
    """
    return _remote(args, server, timeout) if (server := server_of(args)) else connect_here(args)


def connect_here(args: argparse.Namespace) -> AdminClient:
    """Connect to the admin socket. Raises Unavailable with what to do when there is none.

    An ordinary user who named no runtime directory and runs no daemon means the host's.
    """
    chosen = paths(args)
    named = args.runtime or os.environ.get("SANDBOXD_RUNTIME")
    system = Paths(chosen.config, chosen.state, _SYSTEM_RUNTIME)
    if not named and not _exists(chosen.admin_socket) and _exists(system.admin_socket):
        return AdminClient.connect(system)
    return AdminClient.connect(chosen)


def _remote(args: argparse.Namespace, url: str, timeout: float | None) -> RemoteClient:
    from sandboxd.admin.remote import CONNECT_SECONDS, RemoteClient, Server

    server = Server(url, ca=None if args.ca is None else Path(args.ca))
    return RemoteClient(server, _key(args), timeout=timeout or CONNECT_SECONDS)


def _key(args: argparse.Namespace) -> Secret:
    """The API key or token, from a file that only its owner can read or from the environment."""
    from sandboxd.secret import Secret

    if args.key_file is not None:
        key, where = _key_file(Path(args.key_file)), "the key file"
    else:
        key, where = os.environb.get(b"SANDBOXD_API_KEY", b""), "SANDBOXD_API_KEY"
    key = key.strip()
    if not key and args.key_file is None:
        raise Denied(
            "a server is named, but no API key",
            hint="--key-file FILE, or SANDBOXD_API_KEY; an owner makes one: sandboxctl keys create",
        )
    # What may stand in a header as it is, and in any key or token (RFC 6750, 2.1).
    fits = 0 < len(key) <= _LONGEST_KEY and all(33 <= byte <= 126 for byte in key)
    secret = Secret(key)
    del key  # a traceback that shows locals must not show it
    if not fits:
        raise Invalid(f"{where} holds no API key and no token", hint="one line, and nothing else")
    return secret


def _key_file(path: Path) -> bytes:
    from sandboxd.files import open_private, read_all

    try:
        fd = open_private(path, os.O_RDONLY, "the key file")
    except OSError as error:
        raise Invalid(f"can't open the key file {path}: {error.strerror}") from None
    try:
        return read_all(fd, _LONGEST_KEY + 2)
    finally:
        os.close(fd)


def _exists(path: Path) -> bool:
    """Whether it is there; what lies in a directory closed to us is not, for us."""
    try:
        return path.exists()
    except OSError:
        return False
