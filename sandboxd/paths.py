"""Where configuration, state and sockets live: system paths for root, XDG for everybody else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandboxd.errors import Invalid

__all__ = ["MAX_SOCKET_PATH", "Paths", "shipped"]

#: Longest path of a Unix socket, without its final NUL (unix(7): sun_path is 108 bytes).
MAX_SOCKET_PATH = 107


@dataclass(frozen=True)
class Paths:
    """The three directories of one daemon.

    ``config`` is read, ``state`` survives a reboot, ``runtime`` holds sockets and does not.
    """

    config: Path
    state: Path
    runtime: Path

    @property
    def admin_socket(self) -> Path:
        return self.runtime / "admin.sock"

    @property
    def store(self) -> Path:
        return self.state / "store.sqlite"

    @property
    def audit(self) -> Path:
        return self.state / "audit"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def sessions(self) -> Path:
        """One directory per session: its broker socket (runtime)."""
        return self.runtime / "sessions"

    @property
    def logs(self) -> Path:
        """One directory per session: its recorded output (state)."""
        return self.state / "sessions"

    @property
    def workspaces(self) -> Path:
        """Default workspaces, one per agent, for agents that name no path of their own."""
        return self.state / "workspaces"

    @classmethod
    def resolve(
        cls,
        *,
        config: str | os.PathLike[str] | None = None,
        state: str | os.PathLike[str] | None = None,
        runtime: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] = os.environ,
        uid: int | None = None,
    ) -> Paths:
        """Explicit arguments first, then ``SANDBOXD_CONFIG|STATE|RUNTIME``, then the defaults.

        Root gets /etc, /var/lib and /run; others XDG_CONFIG_HOME, XDG_STATE_HOME and
        XDG_RUNTIME_DIR (XDG Base Directory Specification 0.8), the last falling back to
        ``<state>/run`` where no session manager made one.
        """
        if (os.geteuid() if uid is None else uid) == 0:
            default = (Path("/etc/sandboxd"), Path("/var/lib/sandboxd"), Path("/run/sandboxd"))
        else:
            home = Path(environ.get("HOME") or "/nonexistent")
            state_home = Path(environ.get("XDG_STATE_HOME") or home / ".local/state")
            run = environ.get("XDG_RUNTIME_DIR")
            default = (
                Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "sandboxd",
                state_home / "sandboxd",
                Path(run) / "sandboxd" if run else state_home / "sandboxd" / "run",
            )
        chosen = [
            Path(given or environ.get(variable) or fallback).absolute()
            for given, variable, fallback in zip(
                (config, state, runtime),
                ("SANDBOXD_CONFIG", "SANDBOXD_STATE", "SANDBOXD_RUNTIME"),
                default,
                strict=True,
            )
        ]
        return cls(*chosen)

    def check_sockets(self) -> None:
        """Refuse a runtime directory whose longest socket path the kernel can't take."""
        longest = self.sessions / ("s-" + "0" * 16) / "broker.sock"
        length = len(os.fsencode(longest))
        if length > MAX_SOCKET_PATH:
            raise Invalid(
                f"the runtime directory {self.runtime} is {length - MAX_SOCKET_PATH} bytes too "
                f"long: a socket path may have {MAX_SOCKET_PATH} bytes (unix(7))",
                hint="choose a shorter one: --runtime DIR or SANDBOXD_RUNTIME=DIR",
            )


def shipped(kind: str) -> Path:
    """The folder of shipped ``tools``, ``policies`` or ``systemd`` files, installed or in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "shipped" / kind
    return installed if installed.is_dir() else package.parent / kind
