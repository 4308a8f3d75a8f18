"""The file system that a sandboxed program sees: built in memory, then pivoted into.

Everything comes from one list that can be read from top to bottom: a read-only view of the
system's programs and libraries, a handful of files in /etc, a /dev of six devices, a /proc of the
sandbox's own processes with the kernel's knobs masked, private memory for /tmp and HOME, and what
the launch spec mounts. The host's other files aren't hidden: they aren't there.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat

from sandboxd.errors import KernelError
from sandboxd.isolation import kernel
from sandboxd.isolation.wire import UNPINNED, LaunchSpec, MountSpec, Pin

__all__ = [
    "READONLY",
    "Root",
    "check_pin",
    "mount_point",
    "private_places",
    "system_layout",
    "system_paths",
]

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

_PROC_COVERED = {*_PROC_READONLY, *_PROC_MASKED_FILES, *_PROC_MASKED_DIRECTORIES}
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)

_LOCKED = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
READONLY = _LOCKED | kernel.MOUNT_ATTR_RDONLY
_BENEATH = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS


class Root:
    """One sandbox's root directory. Call :meth:`build`, then :meth:`pivot`."""

    def __init__(
        self, spec: LaunchSpec, uid: int, *, inside_id: int, privileged: bool, namespace: int = -1
    ) -> None:
        """``namespace``: the mount namespace that the spec's shared mounts come from."""
        self.spec, self.uid, self.inside_id = spec, uid, inside_id
        self.namespace = namespace
        self.gid = uid if privileged else os.getegid()
        self.privileged = privileged
        self.fd = -1
        self._made: set[str] = set()
        self.memory: set[int] = set()  # device numbers of the file systems made here

    def build(self) -> int:
        """Build the tree. Returns /proc/sys as a writable descriptor, which the caller closes."""
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        # Every host path is opened before the new root covers anything of the host's tree.
        etc = _ETC + (_ETC_NETWORK if self.spec.network == "host" else ())
        directories, links = system_layout()
        paths = (*directories, *etc)
        system = [(path, tree) for path in paths if (tree := _clone_system(path)) is not None]
        mounts = self.spec.mounts
        own = [None if mount.shared else self._clone(mount) for mount in mounts]
        devices = [(name, _clone_device(name)) for name in _DEVICES]
        masks = [_clone_device("null") for _ in _PROC_MASKED_FILES]
        # Last, for it moves the root directory (to the same one, outside of a chroot).
        copies = [
            self._clone_shared(m) if m.shared else t for m, t in zip(mounts, own, strict=True)
        ]
        self.fd = kernel.mount_filesystem(
            "tmpfs", _LOCKED, mode="0755", size=str(32 << 20), nr_inodes="4096"
        )
        self.memory.add(os.fstat(self.fd).st_dev)
        kernel.move_mount(self.fd, kernel.AT_FDCWD, mount_point())

        # So far the tree is ours alone, and plain paths in it lead nowhere else.
        for path, tree in system:
            self.place_own(path, tree)
        for path, target in links:
            os.symlink(target, path.lstrip("/"), dir_fd=self.fd)
        for place, mode in private_places(self.spec):
            if not place.startswith("/dev/"):
                self._private(place, mode)
        self._devices(devices)
        sysctl = self._proc(masks)
        self._etc()

        # From here on parts of it can be an agent's own files.
        for mount, tree in zip(mounts, copies, strict=True):
            if tree is not None:
                self._place(tree, mount.target)
        self.deliver()
        kernel.set_mount_attributes(self.fd, kernel.MOUNT_ATTR_RDONLY, recursive=False)
        return sysctl

    def pivot(self) -> None:
        """Make the built tree the root and forget the host's (pivot_root(2), NOTES)."""
        os.fchdir(self.fd)
        kernel.pivot_root(".", ".")
        kernel.umount_detached(".")
        os.chdir("/")
        os.close(self.fd)

    def deliver(self) -> None:
        """Make the spec's files."""
        for file in self.spec.files:
            self._file(file.path, file.content, file.mode)

    def _clone(self, mount: MountSpec) -> int | None:
        """A detached, locked-down copy of a host path; None for an absent optional one."""
        # What an operator names may pass through links; what belongs to an agent may not, for
        # the agent could turn it while we look.
        resolve = kernel.RESOLVE_NO_MAGICLINKS
        if not mount.readonly or mount.idmap:
            resolve |= kernel.RESOLVE_NO_SYMLINKS
        try:
            source = kernel.open_beneath(kernel.AT_FDCWD, mount.source, os.O_PATH, resolve=resolve)
        except KernelError as failure:
            if mount.optional and failure.errno in _ABSENT:
                return None
            raise
        check_pin(source, mount.pin, mount.source)
        userns = self._idmap(source, mount) if mount.idmap and self.privileged else -1
        # A user namespace may not leave out mounts below the source (they could be what hides a
        # directory), an id-mapped copy must: their file systems need not support the mapping.
        recursive = userns < 0
        tree = kernel.clone_tree(source, recursive=recursive, shown=mount.source)
        os.close(source)
        attributes = READONLY if mount.readonly else _LOCKED
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

    def _clone_shared(self, mount: MountSpec) -> int:
        """A detached copy of a mount in the namespace that the broker passed along."""
        tree = _clone_from(self.namespace, mount.source)
        attributes = READONLY if mount.readonly else _LOCKED
        attributes |= kernel.MOUNT_ATTR_NOEXEC if mount.noexec else 0
        kernel.set_mount_attributes(tree, attributes, recursive=False, path=mount.source)
        return tree

    def _idmap(self, source: int, mount: MountSpec) -> int:
        """A user namespace that maps the source's owner to this sandbox's user, or -1 if equal."""
        status = os.fstat(source)
        if status.st_uid == 0:
            raise KernelError("idmap", errno.EPERM, f"{mount.source} (it belongs to root)")
        if status.st_uid == self.uid:
            return -1
        return _mapping_namespace(status.st_uid, status.st_gid, self.uid)

    def _private(self, path: str, mode: int) -> None:
        """Memory of the sandbox's own at ``path``, bounded in bytes and inodes (tmpfs(5))."""
        size = self.spec.limits.tmp_size
        tree = kernel.mount_filesystem(
            "tmpfs",
            _LOCKED,
            mode=f"{mode:04o}",
            size=str(size),
            nr_inodes=str(max(1024, size >> 12)),
            uid=str(self.uid),
            gid=str(self.gid),
        )
        self.memory.add(os.fstat(tree).st_dev)
        self.place_own(path, tree)

    def _devices(self, devices: list[tuple[str, int]]) -> None:
        dev = kernel.mount_filesystem("tmpfs", _LOCKED, mode="0755", size="65536", nr_inodes="64")
        self.place_own("dev", dev, close=False)
        for name, device in devices:
            self.place_own(f"dev/{name}", device)
        for name, target in _DEVICE_LINKS.items():
            os.symlink(target, name, dir_fd=dev)
        for place, mode in private_places(self.spec):
            if place.startswith("/dev/"):
                self._private(place, mode)
        pts = kernel.mount_filesystem(
            "devpts", kernel.MOUNT_ATTR_NOSUID, newinstance=None, ptmxmode="0666", mode="0620"
        )
        self.place_own("dev/pts", pts)
        kernel.set_mount_attributes(dev, kernel.MOUNT_ATTR_RDONLY, recursive=False)
        os.close(dev)

    def _proc(self, masks: list[int]) -> int:
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
        self.place_own("proc", proc, close=False)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        listing = os.open(".", flags, dir_fd=proc)
        present = _PROC_COVERED.intersection(os.listdir(listing))
        os.close(listing)
        sysctl = os.open("sys", flags, dir_fd=proc)
        for name in present.intersection(_PROC_READONLY):
            tree = kernel.clone_tree(proc, name, recursive=True, shown=f"/proc/{name}")
            kernel.set_mount_attributes(tree, READONLY, recursive=True)
            _move(tree, proc, name)
        for name, null in zip(_PROC_MASKED_FILES, masks, strict=True):
            if name in present:
                kernel.set_mount_attributes(null, kernel.MOUNT_ATTR_RDONLY, recursive=False)
                _move(null, proc, name)
            else:
                os.close(null)
        for name in present.intersection(_PROC_MASKED_DIRECTORIES):
            empty = kernel.mount_filesystem("tmpfs", READONLY, mode="0555", size="4096")
            _move(empty, proc, name)
        os.close(proc)
        return sysctl

    def _etc(self) -> None:
        user, number = self.spec.user, self.inside_id
        self._file("etc/passwd", _passwd(user, number), 0o444, own=False)
        self._file(
            "etc/group", f"{user}:x:{number}:\nnogroup:x:65534:\n".encode(), 0o444, own=False
        )
        databases = "files dns" if self.spec.network == "host" else "files"
        nsswitch = f"passwd: files\ngroup: files\nhosts: {databases}\n"
        self._file("etc/nsswitch.conf", nsswitch.encode(), 0o444, own=False)
        self._file("etc/hostname", f"{self.spec.hostname}\n".encode(), 0o444, own=False)
        if self.spec.network != "host":
            hosts = f"127.0.0.1 localhost {self.spec.hostname}\n::1 localhost\n"
            hosts += "".join(f"{o.address} {o.name}\n" for o in self.spec.listeners if o.name)
            self._file("etc/hosts", hosts.encode(), 0o444, own=False)

    def place_own(self, path: str, tree: int, *, close: bool = True) -> None:
        """Put a detached mount on ``path`` while nothing in the tree is anybody else's."""
        path = path.strip("/")
        if stat.S_ISDIR(os.fstat(tree).st_mode):
            self._make_directories(path)
        else:
            self._make_directories(path.rpartition("/")[0])
            os.mknod(path, stat.S_IFREG | 0o444, dir_fd=self.fd)
        kernel.move_mount(tree, self.fd, path)
        if close:
            os.close(tree)

    def _make_directories(self, path: str) -> None:
        if path and path not in self._made:
            self._make_directories(path.rpartition("/")[0])
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o755, dir_fd=self.fd)
            self._made.add(path)

    def _file(self, path: str, content: bytes, mode: int, *, own: bool = True) -> None:
        """A file in the sandbox's memory; it belongs to its user if ``own``, else to nobody."""
        parent, _, name = path.strip("/").rpartition("/")
        directory = self._directory(parent)
        try:
            if os.fstat(directory).st_dev not in self.memory:
                raise OSError(errno.EXDEV, "not the sandbox's own memory")  # but a host directory
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, mode, dir_fd=directory)
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(fd, view) :]
                os.fchmod(fd, mode)
                if own:
                    os.fchown(fd, self.uid, self.gid)
            finally:
                os.close(fd)
        except OSError as failure:
            raise KernelError("open", failure.errno or 0, "/" + path.strip("/")) from None
        finally:
            os.close(directory)

    def _place(self, tree: int, path: str) -> None:
        """Put a detached mount on ``path``, which is made first where the root lacks it."""
        if stat.S_ISDIR(os.fstat(tree).st_mode):
            target = self._directory(path)
        else:
            parent, _, name = path.strip("/").rpartition("/")
            at = self._directory(parent)
            try:
                # Never opened: what is there already could be an agent's fifo.
                with contextlib.suppress(FileExistsError):
                    os.mknod(name, stat.S_IFREG | 0o444, dir_fd=at)
            except OSError as failure:
                raise KernelError("mknod", failure.errno or 0, "/" + path.strip("/")) from None
            target = kernel.open_beneath(at, name, os.O_PATH, resolve=_BENEATH)
            os.close(at)
        kernel.move_mount(tree, target)
        os.close(target)
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
            else:
                self._inherit_owner(name, at)
            below = kernel.open_beneath(
                at, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=_BENEATH
            )
            os.close(at)
            at = below
        return at

    def _inherit_owner(self, name: str, at: int) -> None:
        """A directory made in the user's private memory is the user's, as its parent is."""
        parent = os.fstat(at)
        if parent.st_uid == self.uid and parent.st_dev in self.memory:
            os.chown(name, self.uid, self.gid, dir_fd=at, follow_symlinks=False)


def check_pin(fd: int, pin: Pin, path: str) -> None:
    """KernelError (ESTALE) when ``fd`` is not the pinned file, or it was written since.

    Whoever made the pin holds the file open, so nothing else can have its numbers meanwhile.
    """
    there = os.fstat(fd)
    if pin not in (UNPINNED, (there.st_dev, there.st_ino, there.st_ctime_ns)):
        raise KernelError("open", errno.ESTALE, path)


def private_places(spec: LaunchSpec) -> tuple[tuple[str, int], ...]:
    """Where a sandbox has memory of its own to write to, and with which mode."""
    return (("/tmp", 0o1777), (f"/home/{spec.user}", 0o700), ("/dev/shm", 0o1777))  # noqa: S108


@functools.cache
def system_layout() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The host's directories of programs and libraries, and its links to them, as at the start."""
    links = tuple((path, os.readlink(path)) for path in _SYSTEM if os.path.islink(path))
    directories = (path for path in _SYSTEM if os.path.isdir(path) and not os.path.islink(path))
    return tuple(directories), links


def system_paths() -> tuple[str, ...]:
    """What of the host every sandbox shows."""
    return _SYSTEM + _ETC


@functools.cache
def mount_point() -> str:
    """A directory of the host to cover, in this mount namespace alone, while building."""
    for path in ("/tmp", "/run", "/mnt"):  # noqa: S108 - covered, never written
        if os.path.isdir(path) and not os.path.islink(path):
            return path
    return "/"


def _clone_system(path: str) -> int | None:
    """A detached read-only copy of one of the system's paths; None if the host lacks it."""
    try:
        tree = kernel.clone_tree(kernel.AT_FDCWD, path, recursive=True)
    except KernelError as failure:
        if failure.errno in _ABSENT:
            return None
        raise
    kernel.set_mount_attributes(tree, READONLY, recursive=True, path=path)
    return tree


def _clone_from(namespace: int, path: str) -> int:
    """A detached copy of the mount at ``path`` of another mount namespace.

    Only a namespace's own mounts can be copied (open_tree(2)), so it is entered and left again.
    """
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    kernel.setns(namespace, kernel.CLONE_NEWNS)
    try:
        return kernel.clone_tree(kernel.AT_FDCWD, path, recursive=False, shown=path)
    finally:
        kernel.setns(own, kernel.CLONE_NEWNS)
        os.close(own)


def _clone_device(name: str) -> int:
    """A detached mount of one of the host's device nodes, usable as a device."""
    path = f"/dev/{name}"
    tree = kernel.clone_tree(kernel.AT_FDCWD, path, recursive=False)
    attributes = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NOEXEC
    kernel.set_mount_attributes(tree, attributes, recursive=False, path=path)
    return tree


def _move(tree: int, directory: int, name: str) -> None:
    kernel.move_mount(tree, directory, name)
    os.close(tree)


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
