"""``doctor``, ``demo``, ``install``, ``uninstall``: commands that need no running daemon."""

from __future__ import annotations

import argparse

from sandboxd.cli.daemon import paths
from sandboxd.cli.parser import Commands, command

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    _ADD[name](commands, name, line)


def _add_doctor(commands: Commands, name: str, line: str) -> None:
    command(
        commands,
        name,
        doctor,
        help=line,
        description="Try what this kernel and host offer (namespaces, Landlock, seccomp, cgroups, "
        "user namespace limits, systemd, key custody), and say for each missing piece what it "
        "costs in isolation and how to get it. Exits with 6 when sandboxd can't run here.",
        examples=[("sandboxctl doctor", "after installing, or when a session fails to start")],
    )


def _add_demo(commands: Commands, name: str, line: str) -> None:
    parser = command(
        commands,
        name,
        demo,
        help=line,
        description="Start a real daemon in a temporary directory, set a secret, launch an agent "
        "that tries to find it and calls a tool that uses it, and print what happened. Needs no "
        "root and no configuration. Exits with 1 when an attempt succeeds or a control fails.",
        examples=[("sandboxctl demo", "takes a few seconds")],
    )
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory")


def _add_install(commands: Commands, name: str, line: str) -> None:
    from sandboxd import host

    parser = command(
        commands,
        name,
        install if name == "install" else uninstall,
        help=line,
        description="Install units, user and directories for systemd. Nothing is started."
        if name == "install"
        else "Remove what install put there. Configuration and state stay.",
        examples=[(f"sandboxctl {name} --dry-run", "say what would be done, change nothing")],
        conflict_handler="resolve",
    )
    if name == "install":
        host.add_install_arguments(parser)
    else:
        host.add_uninstall_arguments(parser)


def doctor(args: argparse.Namespace) -> int:
    from sandboxd import doctor as checks

    return checks.run(args.json, paths(args))


def demo(args: argparse.Namespace) -> int:
    from sandboxd.demo import main

    return main(args)


def install(args: argparse.Namespace) -> int:
    from sandboxd import host

    return host.install(args)


def uninstall(args: argparse.Namespace) -> int:
    from sandboxd import host

    return host.uninstall(args)


_ADD = {
    "doctor": _add_doctor,
    "demo": _add_demo,
    "install": _add_install,
    "uninstall": _add_install,
}
