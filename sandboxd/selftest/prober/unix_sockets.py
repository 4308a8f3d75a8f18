"""Unix sockets of the host: those that everybody has, and the daemon's own."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: S108

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable

from sandboxd.selftest.prober.probe import AGENT, HOST, TOOL, Plan, add
from sandboxd.trial.mcp import Client

_THREAT = "Escape: Unix sockets"
_BROKER = "Secret: through the broker's socket"


def connect(path: str) -> None:
    """Stream or datagram, whatever listens there."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.settimeout(2)
            try:
                sock.connect(path)
            except OSError as failure:
                if failure.errno != 91:  # EPROTOTYPE: the other kind
                    raise
            else:
                return


def own_socket(plan: Plan) -> None:
    path = f"/tmp/own-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        connect(path)


def _to(path: str) -> Callable[[Plan], None]:
    return lambda plan: connect(path)


for _name in ("admin socket", "bait socket", "another session's socket"):
    add(f"connect to the {_name}", _THREAT, lambda plan, name=_name: connect(plan.paths[name]),
        "ENOENT", outside=HOST, says="the same outside")  # fmt: skip
for _name, _path in (
    ("docker", "/var/run/docker.sock"),
    ("docker", "/run/docker.sock"),
    ("containerd", "/run/containerd/containerd.sock"),
    ("podman", "/run/podman/podman.sock"),
    ("cri-o", "/run/crio/crio.sock"),
    ("D-Bus", "/run/dbus/system_bus_socket"),
    ("systemd", "/run/systemd/private"),
    ("systemd notify", "/run/systemd/notify"),
    ("journal", "/run/systemd/journal/stdout"),
    ("syslog", "/dev/log"),
    ("X11", "/tmp/.X11-unix/X0"),
    ("name service cache", "/run/nscd/socket"),
    ("sandboxd", "/run/sandboxd/admin.sock"),
    ("user bus", "/run/user/1000/bus"),
    ("ssh-agent", "/run/user/1000/openssh_agent"),
    ("gpg-agent", "/run/user/1000/gnupg/S.gpg-agent"),
):
    add(f"{_name}: {_path}", _THREAT, _to(_path), "ENOENT", outside=HOST, fallback=own_socket,
        says="outside; an own socket inside")  # fmt: skip
for _name in ("/tmp/.X11-unix/X0", "/containerd-shim", "/tmp/dbus-session"):
    add(f"abstract {_name}", _THREAT, _to("\0" + _name), "ECONNREFUSED", outside=HOST,
        fallback=own_socket, says="outside; an own socket inside")  # fmt: skip


def _variables(plan: Plan) -> str:
    names = [name for name in ("SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "BAIT",
                               "NOTIFY_SOCKET", "LISTEN_FDS", "CREDENTIALS_DIRECTORY",
                               "GPG_AGENT_INFO", "DOCKER_HOST", "XDG_RUNTIME_DIR")
             if name in os.environ]  # fmt: skip
    return f"{len(names)} names"


def _sees_variable(plan: Plan) -> str:
    os.environ["BAIT"] = "1"
    return "ok" if _variables(plan) == "1 names" else "missed"


add("variables that lead to sockets", _THREAT, _variables, "0 names", inside=_sees_variable,
    says="a planted one is seen")  # fmt: skip


# The broker's socket: an agent's has tools and nothing else, a tool has none.


def _asks(method: str, **params: object) -> Callable[[Plan], str]:
    def attack(plan: Plan) -> str:
        client = Client({})
        message = client.request(method, **params)
        client.close()
        error = message.get("error")
        if error is not None:
            return f"error {error['code']}"
        if message["result"].get("isError"):
            text = json.dumps(message["result"])
            return "refused" if "not" in text or "no " in text else text[:80]
        return "ok"

    return attack


_lists_tools = _asks("tools/list")
for _method, _params in (
    ("env.list", {"agent": "selftest"}),
    ("session.list", {"all": True}),
    ("session.start", {"agent": "selftest"}),
    ("audit.tail", {"n": 10}),
    ("status", {}),
    ("resources/list", {}),
    ("prompts/list", {}),
):
    add(f"ask the broker for {_method}", _BROKER, _asks(_method, **_params), "error -32601",
        inside=_lists_tools, places=(AGENT,), says="tools/list is answered")  # fmt: skip
add("call a tool of another agent", _BROKER, _asks("tools/call", name="foreign", arguments={}),
    "refused", "error -32602", inside=_lists_tools, places=(AGENT,),
    says="tools/list is answered")  # fmt: skip
add("the broker's socket from a tool", _BROKER, _to("/run/sandboxd/broker.sock"), "ENOENT",
    inside=own_socket, places=(TOOL,), says="an own socket answers")  # fmt: skip
