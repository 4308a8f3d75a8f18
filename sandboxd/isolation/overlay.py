"""A copy-on-write view of a workspace, made once for a session and shown to all its sandboxes.

Two overlay mounts with one upper directory are undefined behaviour (Documentation/filesystems/
overlayfs.rst), so an agent and its tools must see the same mount. It is made in a mount namespace
that holds nothing else. The broker keeps that namespace as a descriptor, which lets nobody
without privileges do anything, and passes it along with each launch; the sandbox's own init then
copies the one mount out of it. When the last descriptor closes, the mount is gone: no process
has to live for it.

The marks of a deletion are in ``user.overlay`` attributes (``userxattr``, Linux 5.11), so that
whoever owns the layers can read them without privileges, and directories are never redirected.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from sandboxd.errors import KernelError
from sandboxd.isolation import kernel
from sandboxd.isolation.root import Root, mount_point
from sandboxd.isolation.wire import LaunchSpec, MountSpec, OverlaySpec

__all__ = ["LAYERS", "LOWER", "MERGED", "make"]

#: Where the parts are in the namespace.
LOWER, LAYERS, MERGED = "/lower", "/layers", "/merged"

_LOCKED = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
#: Bytes of memory for which one inode is allowed, as in the sandbox's other memory.
_BYTES_PER_INODE = 4096


def make(spec: LaunchSpec, overlay: OverlaySpec, channel: int, *, privileged: bool) -> None:
    """Make the view and send its mount namespace over the Unix socket ``channel``.

    Raises KernelError when this kernel or these file systems can't have it.
    """
    uid = spec.uid if privileged else os.geteuid()
    kernel.unshare(kernel.CLONE_NEWNS)
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    root = _Layers(spec, uid, inside_id=uid, privileged=privileged)
    root.make(overlay)
    root.pivot()
    with socket.socket(fileno=os.dup(channel)) as sock:
        try:
            socket.send_fds(sock, [b"n"], [namespace])
        except OSError as failure:
            raise KernelError("sendmsg", failure.errno or 0, "mount namespace") from None


class _Layers(Root):
    """The root directory of the namespace: lower, layers and merged, and nothing of the host."""

    def make(self, overlay: OverlaySpec) -> None:
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        lower = self._clone(MountSpec(overlay.lower, LOWER, readonly=True, idmap=True))
        layers = self._memory(overlay.size) if not overlay.layers else None
        if layers is None:
            layers = self._clone(MountSpec(overlay.layers, LAYERS, readonly=False, idmap=True))
        assert lower is not None  # not optional
        assert layers is not None
        self.fd = kernel.mount_filesystem("tmpfs", _LOCKED, mode="0755", size="65536")
        for name in (LOWER, LAYERS, MERGED):
            os.mkdir(name.strip("/"), 0o755, dir_fd=self.fd)
        kernel.move_mount(self.fd, kernel.AT_FDCWD, mount_point())
        os.fchdir(self.fd)
        kernel.move_mount(lower, self.fd, LOWER.strip("/"))
        kernel.move_mount(layers, self.fd, LAYERS.strip("/"))
        self._become_owner()
        _prepare(layers)
        merged = kernel.mount_filesystem(
            "overlay",
            _LOCKED,
            # Relative to the working directory: no path of the host, and no character to escape.
            lowerdir=LOWER.strip("/"),
            upperdir=f"{LAYERS.strip('/')}/upper",
            workdir=f"{LAYERS.strip('/')}/work",
            userxattr=None,
            index="off",
            xino="off",
        )
        if os.fstatvfs(merged).f_flag & os.ST_RDONLY:  # overlayfs's way to say no
            raise KernelError("fsmount", errno.EROFS, "overlay (its upper layer does not fit)")
        kernel.move_mount(merged, self.fd, MERGED.strip("/"))
        kernel.set_mount_attributes(self.fd, kernel.MOUNT_ATTR_RDONLY, recursive=False)
        for fd in (lower, layers, merged):
            os.close(fd)

    def _memory(self, size: int) -> int:
        """Layers that can't outgrow ``size``, in bytes and in inodes (tmpfs(5))."""
        inodes = max(1024, size // _BYTES_PER_INODE)
        return kernel.mount_filesystem(
            "tmpfs",
            _LOCKED,
            mode="0700",
            size=str(size),
            nr_inodes=str(inodes),
            uid=str(self.uid),
            gid=str(self.gid),
        )

    def _become_owner(self) -> None:
        """Act as the sandbox's user, with every capability: overlayfs goes on as who mounts it.

        The layers are mapped to this one id, so that nobody else, root included, could make a
        file there (EOVERFLOW).
        """
        if self.privileged:
            os.setgroups([])
            os.setegid(self.gid)
            os.seteuid(self.uid)
            kernel.set_effective_capabilities()


def _prepare(layers: int) -> None:
    """Both directories of the layers, made where they are missing; proof that they take marks."""
    for name in ("upper", "work"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755 if name == "upper" else 0o700, dir_fd=layers)
    upper = kernel.open_beneath(
        layers,
        "upper",
        os.O_RDONLY | os.O_DIRECTORY,
        resolve=kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS,
    )
    try:
        # Without them overlayfs would mount and then fail to replace a directory. In memory they
        # need Linux 6.6.
        os.setxattr(upper, "user.sandboxd.probe", b"1")
        os.removexattr(upper, "user.sandboxd.probe")
    except OSError as failure:
        what = "user attributes of the overlay's upper layer"
        raise KernelError("setxattr", failure.errno or 0, what) from None
    finally:
        os.close(upper)
