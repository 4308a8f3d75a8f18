"""The program that runs is the file that was hashed, whatever is put in its place meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broker_parts import Broker

from sandboxd.broker.result import CallResult

ROOT = os.geteuid() == 0
MODES = ["root", "user"] if ROOT else ["user"]
SHELL = os.path.realpath("/bin/sh")
SCRIPT = "#!/bin/sh\necho good $(cat $(dirname $0)/beside)\n"


def native(broker: Broker, name: str) -> Path:
    """A tool whose program is a native one in its folder: a copy of echo."""
    broker.tool(name, program="program", argv=["good"], beside={"program": "#!/bin/sh\n"})
    program = broker.config_dir / "tools" / name / "program"
    shutil.copy("/bin/echo", program)
    return program


def script(broker: Broker, name: str) -> Path:
    broker.tool(name, program="program", argv=[], beside={"program": SCRIPT, "beside": "dog"})
    return broker.config_dir / "tools" / name / "program"


def python(broker: Broker, name: str) -> Path:
    code = "import pathlib\nprint('good', pathlib.Path(__file__).with_name('beside').read_text())\n"
    beside = {"program": code, "beside": "dog"}
    broker.tool(name, program="program", runtime="python", argv=[], beside=beside)
    return broker.config_dir / "tools" / name / "program"


def elsewhere(broker: Broker, name: str) -> Path:
    """A tool whose native program is outside of its folder, and not one of the system's."""
    program = broker.root / "opt" / "program"
    program.parent.mkdir(exist_ok=True)
    shutil.copy("/bin/echo", program)
    program.chmod(0o755)
    broker.tool(name, program=str(program), argv=["good"])
    return program


KINDS = [native, script, python, elsewhere]
#: An ordinary user may be kept from the interpreter that root's tests run with.
CASES = [
    (kind, mode) for kind in KINDS for mode in MODES if (kind, mode, ROOT) != (python, "user", True)
]


def replace(program: Path) -> None:
    """Put another file in the program's place, as an upgrade does."""
    new = program.with_name(".new")
    new.write_text("#!/bin/sh\necho evil\n")
    new.chmod(0o755)
    new.rename(program)


def overwrite(program: Path) -> None:
    """Change the very file, as an editor may; its time of modification shows nothing of it."""
    before = program.stat()
    with program.open("r+b") as stream:
        stream.write(b"#!/bin/sh\necho evil\nexit\n")
    os.utime(program, ns=(before.st_atime_ns, before.st_mtime_ns))


def swapping(broker: Broker, monkeypatch: pytest.MonkeyPatch, swap: Callable[[], None]) -> None:
    """Let ``swap`` happen after the program was found to be right, before the sandbox is built."""
    launch = broker.launcher.launch

    async def swapped(*args: Any, **options: Any) -> Any:
        swap()
        return await launch(*args, **options)

    monkeypatch.setattr(broker.launcher, "launch", swapped)


@pytest.mark.parametrize(("kind", "mode"), CASES)
async def test_a_program_runs_under_its_own_path_beside_its_files(
    mode: str, kind: Callable[[Broker, str], Path], open_broker: Callable[..., Any]
) -> None:
    async with open_broker(mode) as broker:
        kind(broker, "tool")
        for _ in range(2):  # in a new sandbox, and in one that is kept ready
            result = await broker.call("tool")
            assert result.stdout.split()[:1] == [b"good"], result
            if kind in (script, python):
                assert result.stdout == b"good dog\n"


@pytest.mark.parametrize(("kind", "mode"), CASES)
async def test_what_takes_the_program_s_place_after_the_check_never_runs(
    mode: str,
    kind: Callable[[Broker, str], Path],
    open_broker: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_broker(mode) as broker:
        program = kind(broker, "tool")
        broker.session()
        swapping(broker, monkeypatch, lambda: replace(program))
        result = await broker.call("tool")
        assert result.outcome == "failed"
        assert result.message == (f"tool could not run: open: ESTALE ({os.strerror(errno.ESTALE)})")
        assert result.stdout == b""
        monkeypatch.undo()
        again = await broker.call("tool")
        assert again.outcome == "denied"
        assert "changed after the configuration was loaded" in again.message


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_written_into_the_program_after_the_check_never_runs(
    kind: Callable[[Broker, str], Path], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = kind(broker, "tool")
    broker.session()
    swapping(broker, monkeypatch, lambda: overwrite(program))
    for _ in range(2):  # where no sandbox is ready, and where one might be
        result = await broker.call("tool")
        assert result.stdout == b""
        assert "ESTALE" in result.message or "changed after" in result.message, result


@pytest.mark.parametrize("kind", KINDS)
async def test_a_sandbox_that_is_kept_ready_keeps_the_program_that_was_checked(
    kind: Callable[[Broker, str], Path], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = kind(broker, "tool")
    assert (await broker.call("tool")).stdout.startswith(b"good")
    swapping(broker, monkeypatch, lambda: replace(program))
    result = await broker.call("tool")
    assert b"evil" not in result.stdout
    # What was hashed is still mounted there; or it was seen that it isn't any more.
    assert result.stdout.startswith(b"good") or "ESTALE" in result.message, result


async def test_a_system_s_program_is_executed_by_its_descriptor(broker: Broker) -> None:
    """/bin/sh, by the name that the manifest gives it: programs of many names look at that."""
    result = await broker.run("tr '\\0' ' ' < /proc/$$/cmdline; readlink /proc/$$/exe")
    words = result.stdout.decode().split()
    assert words[:2] == ["/bin/sh", "-c"]
    assert words[-1] == SHELL


async def test_a_system_s_program_with_another_digest_is_denied(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.tool("tool", "echo ran")
    session = broker.session()
    tool = session.config.tools["tool"]
    object.__setattr__(tool, "digest", "0" * 64)
    result = await broker.call("tool", session=session)
    assert result.outcome == "denied"
    assert "the program of tool changed after" in result.message


@pytest.fixture
def own_shell(broker: Broker) -> Path:
    """An interpreter that is this test's own, trusted like a program."""
    shell = broker.config_dir / "tools" / "tool" / "shell"
    broker.tool(
        "tool",
        program="program",
        argv=["{word}"],
        beside={"program": f"#! {shell} \t-e  \nfalse; echo $0 $1\n", "shell": ""},
    )
    shutil.copy(SHELL, shell)
    return shell


async def test_a_script_is_started_as_the_kernel_would(broker: Broker, own_shell: Path) -> None:
    result = await broker.call("tool", {"word": "x"})
    assert (result.outcome, result.exit_code, result.stdout) == ("failed", 1, b""), "by -e"
    program = own_shell.with_name("program")
    program.write_text(program.read_text().replace("false; ", ""))
    broker._config = None
    result = await broker.call("tool", {"word": "x"})
    assert result.stdout.decode() == f"{program} x\n"


async def test_an_interpreter_that_changed_is_denied(broker: Broker, own_shell: Path) -> None:
    session = broker.session()
    with own_shell.open("ab") as stream:
        stream.write(b"x")
    result: CallResult = await broker.call("tool", session=session)
    assert result.outcome == "denied"
    assert f"the interpreter {own_shell} of tool changed after" in result.message
    assert result.rule == "" or "program" in result.rule


async def test_an_interpreter_that_is_replaced_after_the_check_never_runs(
    broker: Broker, own_shell: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.session()
    swapping(broker, monkeypatch, lambda: replace(own_shell))
    result = await broker.call("tool", {"word": "x"})
    assert "ESTALE" in result.message
    assert result.stdout == b""
