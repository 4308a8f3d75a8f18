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
    def pins(self) -> Path:
        """What operators accepted of MCP servers."""
        return self.state / "accepted-tools"

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
        ``<state>/run`` where no session manager made one. A relative XDG path is ignored, as the
        specification demands; a relative path of ours starts at the working directory, and
        :class:`Invalid` is raised when that directory is gone.
        """
        if (os.geteuid() if uid is None else uid) == 0:
            default = (Path("/etc/sandboxd"), Path("/var/lib/sandboxd"), Path("/run/sandboxd"))
        else:
            home = Path(environ.get("HOME") or "/nonexistent")
            state_home = _xdg(environ, "XDG_STATE_HOME") or home / ".local/state"
            run = _xdg(environ, "XDG_RUNTIME_DIR")
            default = (
                (_xdg(environ, "XDG_CONFIG_HOME") or home / ".config") / "sandboxd",
                state_home / "sandboxd",
                run / "sandboxd" if run else state_home / "sandboxd" / "run",
            )
        chosen = [
            _absolute(Path(given or environ.get(variable) or fallback))
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
    """The folder of shipped ``tools``, ``policies``, ``schemas`` or ``systemd`` files.

    An installed package carries them below itself, a checkout beside itself.
    """
    package = Path(__file__).resolve().parent
    installed = package / "shipped" / kind
    return installed if installed.is_dir() else package.parent / kind


def _xdg(environ: Mapping[str, str], variable: str) -> Path | None:
    path = Path(environ.get(variable) or ".")
    return path if path.is_absolute() else None


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except OSError:  # getcwd(2): ENOENT once the working directory is deleted
        raise Invalid(
            f"{path} is relative and the working directory is gone",
            hint="change to a directory that exists, or give absolute paths",
        ) from None
