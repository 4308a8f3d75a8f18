"""sandboxctl --server: the same commands over HTTP, on a real daemon with real keys."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hook_servers import make_certificates
from real_daemon import RealDaemon, directories, until

PROJECT = Path(__file__).parents[2]


class Remote:
    """sandboxctl with one key in a file."""

    def __init__(self, daemon: RealDaemon, role: str, **more: Any) -> None:
        self.daemon = daemon
        made = daemon.call("keys.create", team="default", role=role, label=role, **more)
        self.key, self.id = made["secret"], made["key"]["id"]
        self.file = daemon.base / f"{self.id}.key"
        self.file.write_text(self.key + "\n")
        self.file.chmod(0o600)
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("SANDBOXD_")}
        self.environ["PYTHONPATH"] = str(PROJECT)

    @property
    def options(self) -> list[str]:
        ca = str(self.daemon.base / "ca.pem")
        return ["--server", self.daemon.url, "--key-file", str(self.file), "--ca", ca]

    def __call__(
        self, *args: str, status: int | None = 0, plain: bool = False, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "sandboxd.cli", *([] if plain else self.options), *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=self.daemon.base,
            env={**self.environ, **environ},
        )
        assert self.key not in done.stdout + done.stderr
        assert status is None or done.returncode == status, (done.stdout, done.stderr)
        return done

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "sandboxd.cli", *self.options, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environ,
        )


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealDaemon]:
    with directories() as made:
        for file in make_certificates(made.base):
            file.chmod(0o600)
        server = made.base / "server.pem"
        made.http(f"listen: 127.0.0.1:0\ntls: {{certificate: {server}, key: {server}}}")
        made.agent("hello", "echo out; echo err >&2; exit 3")
        made.agent("patient", "trap 'echo told; exit 7' INT; echo begun; while :; do sleep 1; done")
        made.write(
            "agents/missing.yaml", "version: 1\ndescription: x\ncommand: [/bin/no-such-program]\n"
        )
        made.start()
        made.set("hello", TOKEN="a-value-of-a-test")
        yield made


@pytest.fixture(scope="module")
def operator(daemon: RealDaemon) -> Remote:
    return Remote(daemon, "operator")


@pytest.mark.parametrize(
    "command",
    [
        "env list hello",
        "session list --all",
        "tools list",
        "policy explain hello shell {}",
    ],
)
def test_a_command_answers_as_it_does_on_the_socket(
    daemon: RealDaemon, operator: Remote, command: str
) -> None:
    words = [*command.split(), "--json"]
    there, here = operator(*words, status=None), daemon.ctl(*words)
    assert there.returncode == here.returncode
    answered, expected = json.loads(there.stdout), json.loads(here.stdout)
    if command == "tools list":  # a team reads about the tools that its agents list
        assert (len(answered["tools"]), len(expected["tools"])) == (0, 4)
    else:
        assert answered == expected


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("env set hello lower-case=x", 2),
        ("env remove hello NOT_THERE", 3),
        ("session stop s-0000000000000000", 3),
        ("session logs nonsense", 3),
        ("run missing", 127),
    ],
)
def test_an_error_reads_and_exits_as_it_does_on_the_socket(
    daemon: RealDaemon, operator: Remote, command: str, status: int
) -> None:
    there, here = operator(*command.split(), status=status), daemon.ctl(*command.split())
    assert (there.returncode, there.stderr) == (here.returncode, here.stderr)


def test_what_the_role_lacks_is_denied_and_recorded(daemon: RealDaemon, operator: Remote) -> None:
    viewer = Remote(daemon, "viewer")
    done = viewer("env", "set", "hello", "TOKEN=another-value-of-a-test", status=4)
    assert "may not call env.set: the role viewer does not have it" in done.stderr
    assert "hint: a key of one of these roles can: owner, operator, developer" in done.stderr
    (record,) = [
        r for r in daemon.audit() if r["event"] == "admin.denied" and viewer.id == r["key"]
    ]
    assert (record["method"], record["role"], record["team"]) == ("env.set", "viewer", "default")
    # The same words with a role that has it.
    operator("env", "set", "hello", "TOKEN=another-value-of-a-test")
    for host_only in (["reload"], ["config", "check"], ["audit", "verify"]):
        assert "on the admin socket" in operator(*host_only, status=4).stderr


def test_run_prints_what_the_agent_prints_and_exits_as_it_does(operator: Remote) -> None:
    done = operator("run", "hello", status=3)
    assert sorted(done.stdout.splitlines()) == ["err", "out"]
    assert done.stderr == ""


def test_run_says_what_cannot_work(operator: Remote) -> None:
    assert "no terminal" in operator("run", "-t", "hello", status=125).stderr
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as nothing:
        done = subprocess.run(
            [sys.executable, "-m", "sandboxd.cli", *operator.options, "run", "hello"],
            stdin=nothing.stdout,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=operator.environ,
        )
    assert (done.returncode, "standard input is not sent" in done.stderr) == (3, True)


def test_a_signal_goes_to_the_agent(operator: Remote) -> None:
    process = operator.start("run", "patient")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("told\n", "")
    assert process.returncode == 7


def test_a_session_ends_with_the_client_that_ran_it(daemon: RealDaemon, operator: Remote) -> None:
    process = operator.start("run", "patient")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    assert [s["agent"] for s in daemon.call("session.list")["sessions"]] == ["patient"]
    process.kill()
    process.communicate(timeout=30)
    until(lambda: not daemon.call("session.list")["sessions"])
    ended = [r for r in daemon.audit() if r["event"] == "session.ended"][-1]
    assert ended["reason"] == "its operator left"


@pytest.mark.parametrize("command", ["audit tail -n 1 -f", "session logs -f {id}"])
def test_following_ends_cleanly_on_interrupt(
    daemon: RealDaemon, operator: Remote, command: str
) -> None:
    id = operator("session", "start", "patient").stdout.strip()
    process = operator.start(*command.format(id=id).split())
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 130
    operator("session", "stop", "--grace", "0", id)


def test_a_stream_ends_with_its_key_and_says_so(daemon: RealDaemon) -> None:
    leaving = Remote(daemon, "viewer")
    process = leaving.start("audit", "tail", "-n", "1", "-f")
    assert process.stdout is not None
    assert process.stdout.readline()
    daemon.call("keys.deactivate", key=leaving.id)
    assert "not valid" in process.communicate(timeout=30)[1]
    assert process.returncode == 4
    leaving("status", status=4)


def test_the_key_is_read_from_a_private_file_or_the_environment(operator: Remote) -> None:
    url = operator.daemon.url
    ca = operator.options[4:]
    got = operator(*ca, "status", plain=True, SANDBOXD_SERVER=url, SANDBOXD_API_KEY=operator.key)
    assert "operator of team default" in got.stdout
    # A file goes before the environment.
    operator("status", SANDBOXD_API_KEY="an_sk_" + "0" * 64)
    done = operator("--server", url, "status", plain=True, status=4)
    assert "no API key" in done.stderr
    assert "--key-file FILE, or SANDBOXD_API_KEY" in done.stderr
    done = operator(
        "--server", url, *ca, "status", plain=True, status=4, SANDBOXD_API_KEY="an_sk_0"
    )
    assert "is not valid" in done.stderr
    done = operator("--server", url, "status", plain=True, status=2, SANDBOXD_API_KEY="two words")
    assert "holds no API key" in done.stderr


def test_a_key_file_that_others_can_read_is_refused(operator: Remote) -> None:
    operator.file.chmod(0o640)
    try:
        done = operator("status", status=4)
    finally:
        operator.file.chmod(0o600)
    assert "has mode 0640, not 0400 or 0600" in done.stderr
    operator("status")


def test_a_key_file_that_is_none_is_named(operator: Remote, tmp_path: Path) -> None:
    link, empty = tmp_path / "link", tmp_path / "empty"
    link.symlink_to(operator.file)
    empty.touch(mode=0o600)
    for path, status in ((link, 4), (empty, 2), (tmp_path / "missing", 2)):
        done = operator(
            "--server", operator.daemon.url, "--key-file", str(path), "status", plain=True,
            status=status,
        )  # fmt: skip
        assert "key file" in done.stderr


def test_a_named_runtime_directory_goes_before_a_server_of_the_environment(
    operator: Remote,
) -> None:
    runtime = str(operator.daemon.paths.runtime)
    got = operator("--runtime", runtime, "status", "--json", plain=True,
                   SANDBOXD_SERVER="https://nowhere.invalid")  # fmt: skip
    assert "pid" in json.loads(got.stdout)
    operator("status", plain=True, status=6, SANDBOXD_API_KEY=operator.key,
             SANDBOXD_SERVER="http://127.0.0.1:1")  # fmt: skip


def test_names_are_completed_over_http(operator: Remote, tmp_path: Path) -> None:
    assert operator("__complete", "agents").stdout.split() == ["hello", "missing", "patient"]
    assert operator("__complete", "variables", "hello").stdout.split() == ["TOKEN"]
    done = operator("__complete", "agents", plain=True, SANDBOXD_SERVER="http://127.0.0.1:1")
    assert (done.stdout, done.stderr) == ("", "")
    script = tmp_path / "completion.bash"
    script.write_text(operator("completion", "bash").stdout)
    program = tmp_path / "sandboxctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m sandboxd.cli "$@"\n')
    program.chmod(0o755)
    host, port = operator.daemon.url.removeprefix("https://").split(":")
    # As bash cuts it: COMP_WORDBREAKS has the colon.
    rest = [*operator.options[2:], "run", "h"]
    words = ["sandboxctl", "--server", "https", ":", f"//{host}", ":", port, *rest]
    for given in (words, ["sandboxctl", f"--server={operator.daemon.url}", *rest]):
        code = (
            f"source {script}; COMP_WORDS=({' '.join(map(repr, given))})\n"
            f'COMP_CWORD={len(given) - 1}; __sandboxctl; echo "${{COMPREPLY[*]}}"\n'
        )
        path = f"{tmp_path}:{os.environ['PATH']}"
        shell = subprocess.run(
            ["bash", "--norc", "--noprofile", "-c", code],
            env={**operator.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert shell.stdout.split() == ["hello"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_request_that_the_document_shows_works(operator: Remote, tmp_path: Path) -> None:
    document = (PROJECT / "docs/remote.md").read_text()
    (shown,) = [block for block in re.findall(r"```sh\n(.*?)```", document, re.DOTALL)
                if block.startswith("curl")]  # fmt: skip
    (tmp_path / "ann.key").write_text(operator.key)
    command = shown.replace("http://127.0.0.1:7621", operator.daemon.url)
    assert command != shown
    command = command.replace("curl", f"curl --cacert {operator.options[5]}")
    done = subprocess.run(
        ["sh", "-c", command.replace("reporter", "hello")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [row["name"] for row in json.loads(done.stdout)["variables"]] == ["TOKEN"]


def test_the_certificate_of_a_server_is_checked(operator: Remote) -> None:
    assert operator.daemon.url.startswith("https://")
    without = operator.options[:4]
    refused = operator(*without, "status", plain=True, status=4)
    assert "is not to be trusted" in refused.stderr
    assert "--ca FILE" in refused.stderr
    got = operator("status", "--json")
    assert json.loads(got.stdout)["role"] == "operator"
