"""The HTTP API's listening socket and certificate.

A port and a private key are opened before the daemon gives up root, so that a port below 1024 and
a key that only root may read need no privilege later. Nothing is accepted before. Standard library
only: no part of the web framework is loaded here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from sandboxd.errors import Conflict, Denied, Invalid, KernelError, Unavailable
from sandboxd.paths import MAX_SOCKET_PATH
from sandboxd.policy.model import HttpSettings, Tls

__all__ = ["Listening", "open_listening"]

_BACKLOG = 256


@dataclass
class Listening:
    """An open socket and how it is spoken to; ``url`` is what clients use, ``path`` a socket's."""

    socket: socket.socket
    context: ssl.SSLContext | None
    url: str
    path: Path | None = None

    def close(self) -> None:
        """Close the socket and remove its path, where it has one of ours."""
        self.socket.close()
        if self.path is not None:
            with contextlib.suppress(OSError):  # of an earlier life, or the directory isn't ours
                self.path.unlink()


def open_listening(settings: HttpSettings) -> Listening:
    """Bind and listen as ``settings`` say; nothing is accepted yet.

    Raises Conflict where the address is taken, KernelError where it can't be had, Denied for a
    private key that others can read, and Invalid or Unavailable for a certificate that is none.
    """
    context = _context(settings.tls) if settings.tls is not None else None
    if settings.listen.startswith("unix:"):
        path = Path(settings.listen.removeprefix("unix:"))
        return Listening(_unix(path), None, f"unix:{path}", path)
    host, _, port = settings.listen.rpartition(":")
    listener = _tcp(host.strip("[]"), int(port))
    scheme = "https" if context is not None else "http"
    return Listening(listener, context, f"{scheme}://{host}:{listener.getsockname()[1]}")


def _tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # A restart must not wait for connections of the last life (TIME_WAIT, tcp(7)).
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as failure:
        listener.close()
        raise _refused(failure, f"{host}:{port}") from None
    return listener


def _unix(path: Path) -> socket.socket:
    """A socket that everybody may connect to, as to a port of loopback: the API key decides.

    Who may reach the path at all is up to the directory's permissions.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise Invalid(
            f"the socket path {path} is too long: {MAX_SOCKET_PATH} bytes at most (unix(7))",
            hint="choose a shorter one for http.listen in sandboxd.yaml",
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _clear(path)
        # bind(2) takes the mode of the socket's own inode: there is no name to be swapped.
        os.fchmod(listener.fileno(), 0o666)
        before = os.umask(0)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
    except OSError as failure:
        listener.close()
        raise _refused(failure, os.fspath(path)) from None
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: Path) -> None:
    """Remove a socket that nobody listens on; Conflict for anything else that is there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)
        if not stat.S_ISSOCK(found.st_mode) or probe.connect_ex(os.fspath(path)) in (
            0,
            errno.EAGAIN,
        ):
            raise Conflict(
                f"{path} is taken by something else",
                hint="stop what serves it, or name another path in http.listen",
            )
    path.unlink()


def _refused(failure: OSError, address: str) -> Conflict | KernelError:
    if failure.errno == errno.EADDRINUSE:
        return Conflict(
            f"another program listens on {address} already",
            hint="stop it, or choose another address: http: {listen: ADDRESS:PORT}",
        )
    hint = "choose another http.listen in sandboxd.yaml"
    if failure.errno in (errno.EACCES, errno.EPERM):
        hint += (
            ": its directory has to be one that the daemon's user may write"
            if address.startswith("/")
            else ": a port below 1024 needs CAP_NET_BIND_SERVICE (docs/systemd.md)"
        )
    return KernelError("bind", failure.errno or 0, address, hint=hint)


def _check_private(key: Path) -> None:
    """Links are followed, as certbot makes them; a group may read, as Debian's ssl-cert does."""
    status = key.stat()
    if status.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise Denied(f"the private key {key} is open to other users", hint=f"chmod o-rwx,g-w {key}")


def _context(tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        _check_private(Path(tls.key))
        # A key with a passphrase would ask on the terminal; this answers instead, wrongly.
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: b"")
    except FileNotFoundError as failure:
        missing = failure.filename or f"{tls.certificate} or {tls.key}"
        raise Unavailable(
            f"can't open {missing}", hint="http: {tls: {certificate: PATH, key: PATH}}"
        ) from None
    except (ssl.SSLError, OSError) as failure:
        reason = failure.reason if isinstance(failure, ssl.SSLError) else failure.strerror
        raise Invalid(
            f"{tls.certificate} and {tls.key} are no certificate with its key ({reason})",
            hint="both are PEM files, the key without a passphrase; the chain follows the "
            "certificate in its file",
        ) from None
    return context
