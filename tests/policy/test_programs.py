"""Programs and their interpreters: what is refused at load, and what is seen at launch."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import struct
from typing import Any

import pytest

from sandboxd.errors import Denied
from sandboxd.paths import shipped
from sandboxd.policy import ConfigErrors, load_config, programs
from sandboxd.policy.programs import hold_program


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("#!/no/such/sh", "wants the interpreter /no/such/sh, which is not there"),
        ("#!sh", "names its interpreter by a path that is not absolute"),
        ("#!", "begins with #! and names no interpreter"),
        ("#!" + "/x" * 200, "begins with #! and names no interpreter"),
        ("#!/usr/bin/env no-such-program", "no 'no-such-program' in /usr/local/bin:/usr/bin:"),
    ],
)
def test_a_script_that_can_not_start_is_refused(config: Any, line: str, problem: str) -> None:
    config.program("tools/echo/run", f"{line}\n")
    assert problem in config.problem()
    assert config.problem().startswith("tools/echo/tool.yaml:4:10: ")


def test_an_interpreter_that_others_can_write_is_refused(config: Any, tmp_path: Any) -> None:
    shell = config.program("tools/echo/shell", "\x7fELF")
    config.program("tools/echo/run", f"#!{shell}\n")
    assert config.load().tools["echo"].interpreters[0].path == shell
    outside = tmp_path / "shell"
    outside.write_text("\x7fELF")
    outside.chmod(0o755)
    config.program("tools/echo/run", f"#!{outside}\n")
    assert f"{outside} is not in the sandbox; mount what holds it" in config.problem()
    config.tool(f"mounts: [{{source: {outside}, target: {outside}}}]\n")
    assert config.load()
    outside.chmod(0o777)
    assert f"{outside} is writable by everybody" in config.problem()


def test_env_is_looked_through(config: Any) -> None:
    config.program("tools/echo/run", "#!/usr/bin/env sh\n")
    (found,) = config.load().tools["echo"].interpreters
    assert (found.name, found.argument) in (("/usr/bin/sh", ""), ("/bin/sh", ""))
    config.program("tools/echo/run", "#!/usr/bin/env -S sh -e\n")
    (found,) = config.load().tools["echo"].interpreters
    assert (found.name, found.argument) == ("/usr/bin/env", "-S sh -e")


def test_scripts_that_interpret_each_other_are_followed_but_not_for_ever(config: Any) -> None:
    last = "/bin/sh"
    for n in range(5):
        path = config.program(f"tools/echo/i{n}", f"#!{last} -{n}\n")
        last = str(path)
        config.tool(program=f"program: i{n}")
        if n < 4:
            chain = config.load().tools["echo"].interpreters
            assert [one.argument for one in chain] == [f"-{k}" for k in range(n, -1, -1)]
    assert "scripts, too many in a row" in config.problem()
    config.tool(program="program: i1")
    held = hold_program(config.load().tools["echo"])
    held.close()
    folder = config.path / "tools/echo"
    assert held.start == ("/bin/sh", "-0", f"{folder}/i0", "-1", f"{folder}/i1")


def test_what_the_kernel_may_not_start_is_a_warning(config: Any) -> None:
    config.program("tools/echo/run", "echo hello\n")
    (warning,) = [w for w in config.load().warnings if "echo/tool.yaml" in w]
    assert "neither a native program nor a script" in warning


def test_a_large_program_is_hashed_again_when_it_changed(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its size and its time of modification are what they were."""
    monkeypatch.setattr(programs, "_SETTLED_NS", -1)
    path = config.program("tools/echo/run", "#!/bin/sh\n" + "#" * (2 << 20))
    tool = config.load().tools["echo"]
    before = os.stat(path)
    known = len(programs._known)
    for _ in range(2):
        hold_program(tool).close()
    assert len(programs._known) == known + 1
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Denied, match="changed after the configuration was loaded"):
        hold_program(tool)


def test_a_file_that_just_changed_is_not_remembered(config: Any) -> None:
    config.program("tools/echo/run", "#!/bin/sh\n" + "#" * (2 << 20))
    tool = config.load().tools["echo"]
    known = len(programs._known)
    hold_program(tool).close()
    assert len(programs._known) == known


def test_a_program_in_what_sessions_write_is_refused(config: Any, tmp_path: Any) -> None:
    state = tmp_path / "state"
    program = config.program(str(state / "workspaces/coder/run"))
    config.tool(program=f"program: {program}")

    def problems() -> list[str]:
        try:
            load_config(
                config.path,
                shipped_policies=shipped("policies"),
                shipped_tools=shipped("tools"),
                private={"the daemon's state": state},
            )
        except ConfigErrors as refused:
            return [error.message for error in refused.errors]
        return []

    (problem,) = problems()
    assert problem.endswith(f"{program} is in the daemon's state, {state}, where sessions write")
    config.tool()
    assert problems() == []


def test_a_workspace_that_holds_an_interpreter_is_refused(config: Any, tmp_path: Any) -> None:
    place = tmp_path / "work"
    shell = config.program(str(place / "shell"), "\x7fELF")
    config.program("tools/echo/run", f"#!{shell}\n")
    config.tool(f"mounts: [{{source: {shell}, target: {shell}}}]\n")
    assert config.load()
    config.agent(f"workspace: {{path: {place}}}\n")
    assert f"{place} would let an agent change the program of echo" in config.problem()


def test_an_access_control_list_can_not_open_a_program(config: Any) -> None:
    """Its mask stands in the group's bits, which may seem to be the owner's private group's."""
    path = config.program("tools/echo/run")
    try:
        group = grp.getgrnam(pwd.getpwuid(os.geteuid()).pw_name)
    except KeyError:
        pytest.skip("this user has no private group")
    os.chown(path, -1, group.gr_gid)
    # version, then tag, permissions and id of each entry (acl(5), posix_acl_xattr.h)
    entries = ((1, 7, -1), (2, 7, 65_534), (4, 5, -1), (16, 7, -1), (32, 5, -1))
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", value)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system has no access control lists")
    assert path.stat().st_mode & 0o020, "the mask"
    assert config.problem().endswith("is writable by whom its access control list names")
    os.removexattr(path, "system.posix_acl_access")
    path.chmod(0o775)
    assert config.load(), "the owner's private group may write"
