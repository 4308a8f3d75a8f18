"""Mounts of host directories and files delivered in memory."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from isolation_support import ORDINARY_UID, Box, needs_root, read

from sandboxd.errors import KernelError
from sandboxd.isolation.wire import FileSpec, MountSpec

Outside = Callable[..., dict[str, Any]]


def rw(source: Path | str, target: str = "/workspace", **more: Any) -> MountSpec:
    return MountSpec(str(source), target, readonly=False, idmap=True, **more)


def give(path: Path, owner: int) -> None:
    """Make ``path`` somebody's, where this process may."""
    if os.geteuid() == 0:
        os.chown(path, owner, owner)


def owner(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid


async def test_what_the_sandbox_writes_belongs_to_the_workspaces_owner(
    box: Box, workspace: Path
) -> None:
    result = await box.sh("echo new >/workspace/new; mkdir /workspace/dir; ls -n /workspace",
                          mounts=(rw(workspace),))  # fmt: skip
    assert result.exit.code == 0, result.err
    assert {line.split()[2] for line in result.out.decode().splitlines()[1:]} == {"1000"}
    for name in ("new", "dir"):
        assert owner(workspace / name) == owner(workspace)
    assert read(workspace / "new") == "new\n"


async def test_the_owners_private_files_can_be_read_and_others_can_not(
    box: Box, workspace: Path
) -> None:
    for name, uid in (("own", box.user), ("foreign", ORDINARY_UID + 1), ("roots", 0)):
        (workspace / name).write_text(name)
        (workspace / name).chmod(0o600)
        give(workspace / name, uid)
    seen = await box.probe(
        """tell(**{n: attempt(open, "/workspace/" + n) for n in ("own", "foreign", "roots")})""",
        mounts=(rw(workspace),),
    )
    assert seen["own"] == "ok"
    if os.geteuid() == 0:
        assert (seen["foreign"], seen["roots"]) == ("EACCES", "EACCES")


@needs_root
async def test_a_workspace_of_roots_is_refused_with_the_way_out(box: Box, workspace: Path) -> None:
    os.chown(workspace, 0, 0)
    if not box.launcher.privileged:  # maps no ids; then it is simply somebody else's
        write = "tell(write=attempt(open, '/workspace/new', 'w'))"
        assert await box.probe(write, mounts=(rw(workspace),)) == {"write": "EACCES"}
        return
    with pytest.raises(KernelError, match="belongs to root") as refusal:
        await box.run("/bin/true", mounts=(rw(workspace),))
    assert (refusal.value.syscall, refusal.value.errno) == ("idmap", errno.EPERM)
    assert "chown" in refusal.value.hint
    os.chown(workspace, box.user, box.user)
    assert (await box.run("/bin/true", mounts=(rw(workspace),))).exit.code == 0


@pytest.fixture
def ramfs(workspace: Path, box: Box) -> Iterator[Path]:
    """A file system that has no id-mapped mounts."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = os.fsencode(workspace)
    assert libc.mount(b"test", place, b"ramfs", 0, None) == 0
    try:
        give(workspace, box.user)
        yield workspace
    finally:
        assert libc.umount2(place, 2) == 0


@needs_root
async def test_a_file_system_that_can_not_map_ids_is_named(box: Box, ramfs: Path) -> None:
    if not box.launcher.privileged:
        assert (await box.run("/bin/true", mounts=(rw(ramfs),))).exit.code == 0
        return
    with pytest.raises(KernelError) as refusal:
        await box.run("/bin/true", mounts=(rw(ramfs),))
    assert (refusal.value.syscall, refusal.value.errno) == ("mount_setattr", errno.EINVAL)
    assert str(ramfs) in refusal.value.hint


async def test_a_read_only_mount_refuses_writes_and_a_noexec_one_programs(
    box: Box, workspace: Path
) -> None:
    program = workspace / "program"
    program.write_text("#!/bin/sh\necho ran\n")
    program.chmod(0o755)
    give(program, box.user)
    probe = """tell(write=attempt(open, "/workspace/new", "w"),
        run=attempt(lambda: os.waitpid(os.posix_spawn("/workspace/program", ["p"], {},
            file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)]), 0)))"""
    plain = await box.probe(probe, mounts=(rw(workspace),))
    locked = await box.probe(
        probe, mounts=(MountSpec(str(workspace), "/workspace", noexec=True, idmap=True),)
    )
    assert plain == {"write": "ok", "run": "ok"}
    assert locked == {"write": "EROFS", "run": "EACCES"}


async def test_a_writable_source_is_not_reached_through_a_link(box: Box, workspace: Path) -> None:
    real = workspace / "real"
    real.mkdir()
    give(real, box.user)
    (workspace / "link").symlink_to("real")
    (workspace / "over").symlink_to(workspace)
    assert (await box.run("/bin/true", mounts=(rw(real),))).exit.code == 0
    for path in (workspace / "link", workspace / "over" / "real"):
        for mount in (rw(path), MountSpec(str(path), "/workspace", idmap=True)):
            with pytest.raises(KernelError) as refusal:
                await box.run("/bin/true", mounts=(mount,))
            assert (refusal.value.syscall, refusal.value.errno) == ("openat2", errno.ELOOP)
            assert refusal.value.path == str(path)


async def test_a_target_inside_a_workspace_is_not_reached_through_a_link(
    box: Box, workspace: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "inner").write_text("mounted")
    (workspace / "real").mkdir()
    give(workspace / "real", box.user)
    (workspace / "link").symlink_to("/tmp")
    (workspace / "file").symlink_to("/etc/passwd")

    async def mount(source: Path, target: str) -> bytes:
        mounts = (rw(workspace), MountSpec(str(source), target))
        return (await box.run("/bin/cat", target, f"{target}/inner", mounts=mounts)).out

    assert await mount(source, "/workspace/real") == b"mounted"
    for place, target in ((source, "link"), (source, "link/x"), (source / "inner", "file")):
        with pytest.raises(KernelError) as refusal:
            await mount(place, f"/workspace/{target}")
        assert (refusal.value.syscall, refusal.value.errno) in (
            ("openat2", errno.ELOOP),
            ("openat2", errno.ENOTDIR),
        )


async def test_a_planted_fifo_does_not_hold_up_a_launch(
    box: Box, workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "source").write_text("mounted")
    os.mkfifo(workspace / "place")
    give(workspace / "place", box.user)
    mounts = (rw(workspace), MountSpec(str(tmp_path / "source"), "/workspace/place"))
    assert (await box.run("/bin/cat", "/workspace/place", mounts=mounts)).out == b"mounted"


async def test_an_absent_source_is_named_unless_it_is_optional(box: Box, workspace: Path) -> None:
    absent = str(workspace / "absent")
    with pytest.raises(KernelError) as refusal:
        await box.run("/bin/true", mounts=(MountSpec(absent, "/x"),))
    assert (refusal.value.syscall, refusal.value.errno) == ("openat2", errno.ENOENT)
    assert absent in str(refusal.value)
    optional = MountSpec(absent, "/x", optional=True)
    assert (await box.run("/bin/true", mounts=(optional,))).exit.code == 0


async def test_a_socket_can_be_mounted_and_connected_to(box: Box, workspace: Path) -> None:
    path = workspace / "broker.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o666)
        server.listen()
        seen = await box.probe(
            """
def connect():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("/run/sandboxd/broker.sock")
tell(connect=attempt(connect), kind=os.stat("/run/sandboxd/broker.sock").st_mode >> 12)""",
            mounts=(MountSpec(str(path), "/run/sandboxd/broker.sock"),),
        )
    assert seen == {"connect": "ok", "kind": 0o14}


async def test_a_delivered_file_is_its_users_alone_and_gone_afterwards(
    box: Box, outside: Outside
) -> None:
    before = read("/proc/self/mountinfo")
    content = bytes(range(256)) * 9
    probe = """
seen = os.stat("/run/secrets/TOKEN")
tell(content=open("/run/secrets/TOKEN", "rb").read().hex(), mode=oct(seen.st_mode),
     owner=[seen.st_uid, seen.st_gid], me=[os.getuid(), os.getgid()],
     write=attempt(open, "/run/secrets/TOKEN", "wb"), new=attempt(open, "/run/secrets/x", "w"))"""
    files = (FileSpec("/run/secrets/TOKEN", content),)
    assert await box.probe(probe, files=files) == {
        "content": content.hex(),
        "mode": "0o100400",
        "owner": [1000, 1000],
        "me": [1000, 1000],
        "write": "EROFS",
        "new": "EROFS",
    }
    gone = "tell(there=os.path.lexists('/run/secrets/TOKEN'))"
    assert await box.probe(gone) == {"there": False}
    assert outside(gone) == {"there": False}
    assert read("/proc/self/mountinfo") == before


async def test_a_delivered_program_can_be_run(box: Box) -> None:
    files = (FileSpec("/run/sandboxd/bin/tool", b"#!/bin/sh\necho $0\n", 0o555),)
    result = await box.run("/run/sandboxd/bin/tool", files=files)
    assert result.out == b"/run/sandboxd/bin/tool\n"


async def test_a_file_is_never_delivered_onto_the_hosts_disk(box: Box, workspace: Path) -> None:
    with pytest.raises(KernelError) as refusal:
        await box.run(
            "/bin/true",
            mounts=(rw(workspace),),
            files=(FileSpec("/workspace/TOKEN", b"secret"),),
        )
    assert (refusal.value.errno, refusal.value.path) == (errno.EXDEV, "/workspace/TOKEN")
    assert os.listdir(workspace) == []
    kept = (FileSpec("/home/agent/.config/TOKEN", b"kept"),)
    assert (await box.run("/bin/cat", "/home/agent/.config/TOKEN", files=kept)).out == b"kept"


async def test_directories_made_in_home_belong_to_the_user(box: Box, workspace: Path) -> None:
    result = await box.sh("echo x >/home/agent/.config/own && echo ok",
                          files=(FileSpec("/home/agent/.config/app/settings", b""),))  # fmt: skip
    assert result.out == b"ok\n", result.err


async def test_a_file_does_not_replace_another(box: Box) -> None:
    with pytest.raises(KernelError) as refusal:
        await box.run("/bin/true", files=(FileSpec("/etc/passwd", b"root::0:0::/:/bin/sh\n"),))
    assert (refusal.value.errno, refusal.value.path) == (errno.EEXIST, "/etc/passwd")
