"""A copy-on-write view of a workspace: made once, shared by sandboxes, bounded, or refused."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from isolation_support import Box, Result, needs_root

from sandboxd.errors import Invalid, KernelError
from sandboxd.isolation.overlay import LOWER, MERGED
from sandboxd.isolation.wire import LaunchSpec, MountSpec, OverlaySpec
from sandboxd.sessions import overlay
from sandboxd.sessions.trees import Trees

VIEW = MountSpec(MERGED, "/workspace", readonly=False, shared=True)


class View:
    """One view on the workspace, and sandboxes that see it."""

    def __init__(self, box: Box, workspace: Path, layers: Path, namespace: int) -> None:
        self.box, self.workspace, self.layers = box, workspace, layers
        self.namespace = namespace
        self.uid = box.uid()

    async def sh(self, script: str, *mounts: MountSpec) -> Result:
        return await self.box.sh(
            script,
            uid=self.uid,
            cwd="/workspace",
            mounts=mounts or (VIEW,),
            extra=(self.namespace,),
        )


async def namespace_of(box: Box, spec: OverlaySpec, uid: int) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        fd = theirs.fileno()
        launch = LaunchSpec(id="view", argv=(b"/nothing",), env=(), uid=uid, overlay=spec)
        process = await box.launcher.launch(launch, stdin=fd, stdout=fd, stderr=fd)
        assert (await process.wait()).code == 0
        _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
    return fds[0]


def own(workspace: Path) -> None:
    """Give what the test made to the workspace's owner."""
    owner = workspace.stat()
    for path in workspace.rglob("*"):
        os.chown(path, owner.st_uid, owner.st_gid)


@pytest.fixture
def layers(workspace: Path) -> Path:
    """Where the changes go: its owner need not be the workspace's."""
    path = workspace.parent / "layers"
    for made in (path, path / "upper", path / "work"):
        made.mkdir()
        os.chown(made, workspace.stat().st_uid, workspace.stat().st_gid)
    return path


@pytest.fixture(params=[0, 2 << 20], ids=["disk", "memory"])
async def view(
    request: pytest.FixtureRequest, box: Box, workspace: Path, layers: Path
) -> AsyncIterator[View]:
    made = View(box, workspace, layers, -1)
    (workspace / "lower").write_text("from below\n")
    (workspace / "tree").mkdir()
    (workspace / "tree/f").write_text("x")
    own(workspace)
    spec = OverlaySpec(str(workspace), "" if request.param else str(layers), request.param)
    made.namespace = await namespace_of(box, spec, made.uid)
    yield made
    os.close(made.namespace)


async def test_what_one_sandbox_writes_the_next_one_sees_and_nothing_lands(view: View) -> None:
    first = await view.sh(
        "echo more >> lower; rm -r tree; mkdir tree; echo y > tree/y; mkdir -p a/b; echo z > a/b/z"
    )
    assert (first.exit.code, first.err) == (0, b"")
    second = await view.sh("cat lower; ls tree; cat a/b/z; stat -c %u lower tree a/b/z")
    assert second.out.split() == b"from below more y z 1000 1000 1000".split()
    assert (view.workspace / "lower").read_text() == "from below\n"
    assert (view.workspace / "tree/f").exists()


async def test_sandboxes_that_run_at_once_share_the_view(view: View) -> None:
    wait = "while [ ! -e go ]; do sleep 0.01; done; cat go; echo seen > answer"
    env = ["PATH=/usr/bin:/bin"]
    async with view.box.start(
        *("/bin/sh", "-c", f"echo ready; {wait}"),
        env=env,
        uid=view.uid,
        cwd="/workspace",
        mounts=(VIEW,),
        extra=(view.namespace,),
    ) as waiting:
        await waiting.ready()
        assert (await view.sh("echo now > new; mv new go")).exit.code == 0
        assert (await waiting.end()).out == b"now\n"
    assert (await view.sh("cat answer")).out == b"seen\n"


async def test_a_read_only_share_cannot_be_written(view: View) -> None:
    readonly = MountSpec(MERGED, "/workspace", shared=True)
    done = await view.sh("cat lower; echo x > lower", readonly)
    assert done.out == b"from below\n"
    assert b"Read-only file system" in done.err
    assert (await view.sh("echo x > lower")).exit.code == 0


async def test_a_program_gets_no_descriptor_of_the_view(view: View) -> None:
    done = await view.sh("ls /proc/self/fd")
    assert done.out.split() == [b"0", b"1", b"2", b"3"]  # 3 is of ls itself


async def test_the_namespace_holds_nothing_of_the_host(view: View) -> None:
    for path in ("/etc", "/usr", "/tmp"):
        with pytest.raises(KernelError) as caught:
            await view.sh("true", MountSpec(path, "/workspace", shared=True))
        assert caught.value.syscall == "open_tree"
    lower = await view.sh("echo x > lower", MountSpec(LOWER, "/workspace", False, shared=True))
    assert b"Read-only file system" in lower.err


async def test_the_marks_of_the_overlay_cannot_be_forged(view: View) -> None:
    probe = """
def mark(path, name):
    return attempt(os.setxattr, path, name, b"y")
os.makedirs("/workspace/d", exist_ok=True)
tell(
    opaque=mark("/workspace/d", "user.overlay.opaque"),
    whiteout=mark("/workspace/lower", "user.overlay.whiteout"),
    node=attempt(os.mknod, "/workspace/w", 0o20000, 0),
    control=mark("/workspace/lower", "user.control"),
)
"""
    argv, more = view.box.python(probe, mounts=(VIEW,), uid=view.uid)
    done = await view.box.run(*argv, **more, extra=(view.namespace,))
    facts = json.loads(done.out)
    assert facts["control"] == "ok"
    assert facts["node"] in ("EPERM", "EACCES")  # overlayfs, or Landlock before it
    # A kernel either refuses them or stores them under another name (Linux 6.7).
    assert (await view.sh("ls d; cat lower")).out == b"from below\n"


async def test_devices_and_setuid_programs_gain_nothing(view: View) -> None:
    done = await view.sh(
        "cp /usr/bin/id own-id; chmod 6755 own-id; ./own-id -u; grep workspace /proc/self/mounts"
    )
    uid, mounts = done.out.split(b"\n", 1)
    assert uid == b"1000"
    assert b"nosuid,nodev" in mounts


async def test_a_quota_is_a_hard_limit_of_bytes_and_inodes(box: Box, workspace: Path) -> None:
    view = View(box, workspace, workspace, -1)
    view.namespace = await namespace_of(box, OverlaySpec(str(workspace), "", 1 << 20), view.uid)
    try:
        big = await view.sh("head -c 2000000 /dev/zero > big; stat -c %s big; rm big")
        assert b"No space left" in big.err
        assert 0 < int(big.out) <= 1 << 20
        many = await view.sh("i=0; while (: > $i); do i=$((i+1)); done 2>/dev/null; echo $i")
        assert 0 < int(many.out) <= 1024
    finally:
        os.close(view.namespace)


@needs_root
async def test_files_belong_to_the_layers_owner_on_disk(
    box: Box, workspace: Path, layers: Path
) -> None:
    if not box.launcher.privileged:
        pytest.skip("everything belongs to one user")
    for made in (layers, layers / "upper", layers / "work"):
        os.chown(made, 64999, 64999)
    view = View(box, workspace, layers, -1)
    (workspace / "gone").touch()
    own(workspace)
    spec = OverlaySpec(str(workspace), str(layers))
    view.namespace = await namespace_of(box, spec, view.uid)
    try:
        assert (await view.sh("mkdir d; echo x > d/f; rm gone")).exit.code == 0
    finally:
        os.close(view.namespace)
    upper = layers / "upper"
    assert {p.lstat().st_uid for p in upper.rglob("*")} == {64999}
    assert stat.S_ISCHR((upper / "gone").lstat().st_mode)
    with Trees(str(upper), str(workspace)) as trees:
        told = [f"{c.change} {c.path}" for c in overlay.diff(trees, 0)]
    assert told == ["added d", "added d/f", "deleted gone"]


@pytest.mark.parametrize("view", [0], indirect=True, ids=["disk"])
async def test_real_marks_are_read_as_what_they_are(view: View) -> None:
    await view.sh("rm -r tree; mkdir tree; echo y > tree/y; mv lower moved; mkdir m; rmdir m")
    with Trees(str(view.layers / "upper"), str(view.workspace)) as trees:
        told = [f"{c.change} {c.path}" for c in overlay.diff(trees, 2**63)]
    assert told == ["deleted lower", "added moved", "added tree/y", "deleted tree/f"]


@pytest.mark.parametrize("missing", ["lower", "layers"])
async def test_a_missing_directory_is_named(
    box: Box, workspace: Path, layers: Path, missing: str
) -> None:
    paths = {"lower": str(workspace), "layers": str(layers), missing: "/nonexistent/directory"}
    with pytest.raises(KernelError) as caught:
        await namespace_of(box, OverlaySpec(**paths), box.uid())
    assert (caught.value.syscall, caught.value.path) == ("openat2", "/nonexistent/directory")


async def test_a_link_in_place_of_the_layers_is_not_followed(
    box: Box, workspace: Path, layers: Path
) -> None:
    link = layers.parent / "link"
    link.symlink_to(layers)
    with pytest.raises(KernelError, match="ELOOP"):
        await namespace_of(box, OverlaySpec(str(workspace), str(link)), box.uid())


async def test_layers_on_a_file_system_that_does_not_do_are_refused(
    box: Box, workspace: Path
) -> None:
    with pytest.raises(KernelError, match="proc"):
        await namespace_of(box, OverlaySpec(str(workspace), "/proc/self"), box.uid())


async def test_shared_mounts_want_exactly_one_namespace(box: Box) -> None:
    for extra in ((), (0, 0)):
        with pytest.raises(Invalid, match="one descriptor for each"):
            await box.run("/bin/true", mounts=(VIEW,), extra=extra)
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(KernelError) as caught:
            await box.run("/bin/true", mounts=(VIEW,), extra=(null,))
        assert caught.value.syscall == "setns"
    finally:
        os.close(null)
