"""The file system that a sandboxed program sees: built in memory, then pivoted into.

Everything comes from one list that can be read from top to bottom: a read-only view of the
system's programs and libraries, a handful of files in /etc, a /dev of six devices, a /proc of the
sandbox's own processes with the kernel's knobs masked, private memory for /tmp and HOME, and what
the launch spec mounts. The host's other files aren't hidden: they aren't there.

Standard library only.
"""

from __future__ import annotations

import errno
import os
import stat

from sandboxd.errors import KernelError
from sandboxd.isolation import kernel
from sandboxd.isolation.wire import LaunchSpec, MountSpec

__all__ = ["Root"]

#: Programs and libraries. A host path that is a symbolic link (/bin -> usr/bin on merged-/usr
#: systems) is copied as a link.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")

#: What programs need of /etc to find libraries, alternatives, certificates and the time zone.
_ETC = (
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/pki/tls",
    "/etc/pki/ca-trust",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
)

#: Only where the sandbox shares the host's network, and so its resolver.
_ETC_NETWORK = ("/etc/hosts", "/etc/resolv.conf", "/etc/gai.conf", "/etc/host.conf")

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}

#: Kernel knobs, read-only; and files that tell of the host or its memory, masked (as in the
#: runtime specification's maskedPaths and readonlyPaths).
_PROC_READONLY = ("sys", "bus", "fs", "irq")
_PROC_MASKED_FILES = (
    "kcore",
    "keys",
    "key-users",
    "kallsyms",
    "kmsg",
    "kpagecount",
    "kpageflags",
    "kpagecgroup",
    "latency_stats",
    "sched_debug",
    "sysrq-trigger",
    "timer_list",
    "interrupts",
)
_PROC_MASKED_DIRECTORIES = ("acpi", "asound", "scsi")

_LOCKED = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
_BENEATH = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS


class Root:
    """One sandbox's root directory. Call :meth:`build`, then :meth:`pivot`."""

    def __init__(self, spec: LaunchSpec, uid: int, *, inside_id: int, privileged: bool) -> None:
        self.spec, self.uid, self.inside_id = spec, uid, inside_id
        self.privileged = privileged
        self.fd = -1

    def build(self) -> int:
        """Build the tree. Returns /proc/sys as a writable descriptor, which the caller closes."""
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        # Every host path is opened before the new root covers anything of the host's tree.
        trees = [(m, tree) for m in self._mounts() if (tree := self._clone(m)) is not None]
        devices = [(name, _open_device(name)) for name in _DEVICES]
        links = [(path, os.readlink(path)) for path in _SYSTEM if os.path.islink(path)]
        root = kernel.mount_filesystem(
            "tmpfs", _LOCKED, mode="0755", size=str(32 << 20), nr_inodes="4096"
        )
        kernel.move_mount(root, kernel.AT_FDCWD, _mount_point())
        self.fd = root
        self._private("tmp", self.spec.limits.tmp_size, 0o1777)
        self._private(f"home/{self.spec.user}", self.spec.limits.tmp_size, 0o700)
        for path, target in links:
            os.symlink(target, path.lstrip("/"), dir_fd=root)
        self._devices(devices)
        sysctl = self._proc()
        self._etc()
        for mount, tree in trees:
            is_directory = stat.S_ISDIR(os.fstat(tree).st_mode)
            self._place(tree, mount.target, directory=is_directory)
        for file in self.spec.files:
            self._file(file.path, file.content, file.mode, owner=self.uid)
        kernel.set_mount_attributes(root, kernel.MOUNT_ATTR_RDONLY, recursive=False)
        return sysctl

    def pivot(self) -> None:
        """Make the built tree the root and forget the host's (pivot_root(2), NOTES)."""
        os.fchdir(self.fd)
        kernel.pivot_root(".", ".")
        kernel.umount_detached(".")
        os.chdir("/")
        os.close(self.fd)

    def _mounts(self) -> list[MountSpec]:
        system = [MountSpec(p, p) for p in _SYSTEM if os.path.isdir(p) and not os.path.islink(p)]
        etc = _ETC + (_ETC_NETWORK if self.spec.network == "host" else ())
        return [*system, *(MountSpec(p, p, optional=True) for p in etc), *self.spec.mounts]

    def _clone(self, mount: MountSpec) -> int | None:
        """A detached, locked-down copy of a host path; None for an absent optional one."""
        # What an operator names may pass through links (/etc/localtime is one); what belongs to
        # an agent may not, for the agent could turn it while we look.
        resolve = kernel.RESOLVE_NO_MAGICLINKS
        if not mount.readonly or mount.idmap:
            resolve |= kernel.RESOLVE_NO_SYMLINKS
        try:
            source = kernel.open_beneath(kernel.AT_FDCWD, mount.source, os.O_PATH, resolve=resolve)
        except KernelError as failure:
            if mount.optional and failure.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                return None
            raise
        userns = self._idmap(source, mount) if mount.idmap and self.privileged else -1
        # A user namespace may not leave out mounts below the source (they could be what hides a
        # directory), an id-mapped copy must: their file systems need not support the mapping.
        recursive = userns < 0
        tree = kernel.clone_tree(source, recursive=recursive, path=mount.source)
        os.close(source)
        attributes = _LOCKED
        attributes |= kernel.MOUNT_ATTR_RDONLY if mount.readonly else 0
        attributes |= kernel.MOUNT_ATTR_NOEXEC if mount.noexec else 0
        kernel.set_mount_attributes(tree, attributes, recursive=recursive, path=mount.source)
        if userns >= 0:
            kernel.set_mount_attributes(
                tree,
                kernel.MOUNT_ATTR_IDMAP,
                recursive=False,
                userns=userns,
                path=mount.source,
            )
            os.close(userns)
        return tree

    def _idmap(self, source: int, mount: MountSpec) -> int:
        """A user namespace that maps the source's owner to this sandbox's user, or -1 if equal."""
        status = os.fstat(source)
        if status.st_uid == 0:
            raise KernelError("idmap", errno.EPERM, f"{mount.source} (it belongs to root)")
        if status.st_uid == self.uid:
            return -1
        return _mapping_namespace(status.st_uid, status.st_gid, self.uid)

    def _private(self, path: str, size: int, mode: int) -> None:
        """Memory of the sandbox's own at ``path``, bounded in bytes and inodes (tmpfs(5))."""
        tree = kernel.mount_filesystem(
            "tmpfs",
            _LOCKED,
            mode=f"{mode:04o}",
            size=str(size),
            nr_inodes=str(max(1024, size >> 12)),
            uid=str(self.uid),
            gid=str(self.uid if self.privileged else os.getegid()),
        )
        self._place(tree, path, directory=True)

    def _devices(self, devices: list[tuple[str, int]]) -> None:
        dev = kernel.mount_filesystem("tmpfs", _LOCKED, mode="0755", size="65536", nr_inodes="64")
        self._place(dev, "dev", directory=True, close=False)
        for name, device in devices:
            self._place(device, f"dev/{name}", directory=False)
        for name, target in _DEVICE_LINKS.items():
            os.symlink(target, name, dir_fd=dev)
        self._private("dev/shm", self.spec.limits.tmp_size, 0o1777)
        pts = kernel.mount_filesystem(
            "devpts", kernel.MOUNT_ATTR_NOSUID, newinstance=None, ptmxmode="0666", mode="0620"
        )
        self._place(pts, "dev/pts", directory=True)
        kernel.set_mount_attributes(dev, kernel.MOUNT_ATTR_RDONLY, recursive=False)
        os.close(dev)

    def _proc(self) -> int:
        try:
            proc = kernel.mount_filesystem("proc", _LOCKED | kernel.MOUNT_ATTR_NOEXEC)
        except KernelError as failure:
            if failure.errno != errno.EPERM:
                raise
            raise KernelError(
                "fsmount",
                errno.EPERM,
                "proc (a container that masks /proc forbids a new one; see sandboxctl doctor)",
            ) from None
        self._place(proc, "proc", directory=True, close=False)
        sysctl = os.open("sys", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
        for name in _PROC_READONLY:
            if (source := _open_path(proc, name)) is not None:
                tree = kernel.clone_tree(source, recursive=True, path=f"/proc/{name}")
                kernel.set_mount_attributes(
                    tree, _LOCKED | kernel.MOUNT_ATTR_RDONLY, recursive=True
                )
                kernel.move_mount(tree, source)
                os.close(tree)
                os.close(source)
        for name in _PROC_MASKED_FILES:
            if (target := _open_path(proc, name)) is not None:
                null = _open_device("null")
                kernel.set_mount_attributes(null, kernel.MOUNT_ATTR_RDONLY, recursive=False)
                kernel.move_mount(null, target)
                os.close(null)
                os.close(target)
        for name in _PROC_MASKED_DIRECTORIES:
            if (target := _open_path(proc, name)) is not None:
                empty = kernel.mount_filesystem(
                    "tmpfs", _LOCKED | kernel.MOUNT_ATTR_RDONLY, mode="0555", size="4096"
                )
                kernel.move_mount(empty, target)
                os.close(empty)
                os.close(target)
        os.close(proc)
        return sysctl

    def _etc(self) -> None:
        user, number = self.spec.user, self.inside_id
        self._file("etc/passwd", _passwd(user, number), 0o444)
        self._file("etc/group", f"{user}:x:{number}:\nnogroup:x:65534:\n".encode(), 0o444)
        databases = "files dns" if self.spec.network == "host" else "files"
        nsswitch = f"passwd: files\ngroup: files\nhosts: {databases}\n"
        self._file("etc/nsswitch.conf", nsswitch.encode(), 0o444)
        self._file("etc/hostname", f"{self.spec.hostname}\n".encode(), 0o444)
        if self.spec.network != "host":
            hosts = f"127.0.0.1 localhost {self.spec.hostname}\n::1 localhost\n"
            self._file("etc/hosts", hosts.encode(), 0o444)

    def _file(self, path: str, content: bytes, mode: int, *, owner: int = -1) -> None:
        parent, _, name = path.strip("/").rpartition("/")
        directory = self._directory(parent)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, mode, dir_fd=directory)
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(fd, view) :]
                os.fchmod(fd, mode)
                if owner >= 0:
                    os.fchown(fd, owner, -1)
            finally:
                os.close(fd)
        except OSError as failure:
            raise KernelError("open", failure.errno or 0, "/" + path.strip("/")) from None
        finally:
            os.close(directory)

    def _place(self, tree: int, path: str, *, directory: bool, close: bool = True) -> None:
        """Put a detached mount on ``path``, which is made first where the root lacks it."""
        if directory:
            target = self._directory(path)
        else:
            parent, _, name = path.strip("/").rpartition("/")
            at = self._directory(parent)
            try:
                os.close(os.open(name, os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o444, dir_fd=at))
            except OSError as failure:
                # Sockets and read-only files that are there already are fine to mount on.
                if failure.errno not in (errno.ENXIO, errno.EROFS, errno.EACCES):
                    raise KernelError("open", failure.errno or 0, path) from None
            target = kernel.open_beneath(at, name, os.O_PATH, resolve=_BENEATH)
            os.close(at)
        kernel.move_mount(tree, target)
        os.close(target)
        if close:
            os.close(tree)

    def _directory(self, path: str) -> int:
        """An O_PATH descriptor of a directory in the new root, its parents made as needed.

        No link is followed on the way: part of the tree may be an agent's own workspace.
        """
        at = os.dup(self.fd)
        for name in path.strip("/").split("/"):
            if not name:
                continue
            try:
                os.mkdir(name, 0o755, dir_fd=at)
            except FileExistsError:
                pass
            except OSError as failure:
                if failure.errno != errno.EROFS:
                    raise KernelError("mkdir", failure.errno or 0, "/" + path.strip("/")) from None
            below = kernel.open_beneath(
                at, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=_BENEATH
            )
            os.close(at)
            at = below
        return at


def _mount_point() -> str:
    """A directory of the host to cover, in this mount namespace alone, while building."""
    for path in ("/tmp", "/run", "/mnt"):  # noqa: S108 - covered, never written
        if os.path.isdir(path):
            return path
    return "/"


def _open_device(name: str) -> int:
    """A detached mount of one of the host's device nodes, usable as a device."""
    path = f"/dev/{name}"
    resolve = kernel.RESOLVE_NO_SYMLINKS
    source = kernel.open_beneath(kernel.AT_FDCWD, path, os.O_PATH, resolve=resolve)
    tree = kernel.clone_tree(source, recursive=False, path=path)
    os.close(source)
    kernel.set_mount_attributes(
        tree, kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NOEXEC, recursive=False, path=path
    )
    return tree


def _open_path(directory: int, name: str) -> int | None:
    try:
        return kernel.open_beneath(directory, name, os.O_PATH, resolve=_BENEATH)
    except KernelError as failure:
        if failure.errno == errno.ENOENT:
            return None
        raise


def _passwd(user: str, number: int) -> bytes:
    return (
        f"{user}:x:{number}:{number}:{user}:/home/{user}:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    ).encode()


def _mapping_namespace(owner: int, group: int, uid: int) -> int:
    """A user namespace mapping ``owner``:``group`` on disk to ``uid``:``uid`` here.

    A child makes the namespace and tells its pid as the host's /proc names it (this process is
    in a pid namespace that the host's /proc doesn't show); the maps are written from outside,
    because only the parent namespace's capabilities allow an arbitrary mapping
    (user_namespaces(7)).
    """
    told, tell = os.pipe2(os.O_CLOEXEC)
    held, hold = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(hold)
            kernel.unshare(kernel.CLONE_NEWUSER)
            os.write(tell, os.readlink("/proc/self").encode())
            os.read(held, 1)
        finally:
            os._exit(0)
    os.close(tell)
    os.close(held)
    try:
        name = os.read(told, 32).decode()
        if not name:
            raise KernelError("unshare", errno.EPERM, "user (for an id-mapped mount)")
        for kind, outside in (("uid", owner), ("gid", group)):
            fd = os.open(f"/proc/{name}/{kind}_map", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"%d %d 1" % (outside, uid))
            finally:
                os.close(fd)
        return os.open(f"/proc/{name}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as failure:
        raise KernelError("idmap", failure.errno or 0, "user namespace") from None
    finally:
        os.close(told)
        os.close(hold)
        os.waitpid(pid, 0)
