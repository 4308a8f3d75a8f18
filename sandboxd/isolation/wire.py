"""What the broker and the launcher say to each other.

Frames have one fixed size and travel over a SOCK_SEQPACKET pair (unix(7)), so that a frame is
whole or absent. A LAUNCH frame carries descriptors by SCM_RIGHTS: first a sealed memfd that holds
the encoded :class:`LaunchSpec`, then the program's standard input, output and error, then any
extra ones. The launcher itself never reads the memfd; the forked child does. So the launcher's
memory never holds a secret that a later sandbox could inherit.

A template is told its launches over a socket of its own. There the spec follows the frame in the
same packet, which is wiped once the program runs; a memfd carries what is too large for that.

Standard library only.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from sandboxd.errors import Invalid, KernelError, SandboxdError
from sandboxd.isolation.cgroup_state import CgroupState
from sandboxd.isolation.listeners import Listener, check_listeners
from sandboxd.isolation.packing import Reader, Writer

__all__ = [
    "FRAME",
    "UNPINNED",
    "CgroupState",
    "FileSpec",
    "Frame",
    "Kind",
    "LaunchSpec",
    "Limits",
    "Listener",
    "Located",
    "MountSpec",
    "Outline",
    "OverlaySpec",
    "Pin",
    "check_spec",
    "decode_lasting",
    "decode_spec",
    "encode_spec",
    "failed",
    "lasting_part",
    "locate",
    "outline",
    "sealed_memfd",
]

#: magic, kind, sandbox number, four signed operands, a short text (system call and path).
FRAME = struct.Struct("!4sBxxxQqqqq192s")
MAGIC = b"SBX1"
MAX_FDS = 16
MAX_SPEC = 16 << 20
#: A launch spec up to this size goes to a template within the frame's packet.
MAX_INLINE = 64 << 10
#: Descriptors wait at this number and above while they are put in their places.
FIRST_HIGH_FD = 256

Span = tuple[int, int]
#: A file as it is now: device, inode number, nanoseconds of its last change (stat(2), st_ctim).
Pin = tuple[int, int, int]
#: Whatever file is there.
UNPINNED: Pin = (0, 0, 0)

#: Of an encoded spec: its size, that of its lasting part and of its id; how many arguments,
#: variables and files follow.
_HEAD = struct.Struct("!6Q")
#: What the lasting part begins with: the uid, and the flags of the outline.
_OUTLINE = struct.Struct("!2Q")
_GROUP = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}")


class Kind(enum.IntEnum):
    """Frame kinds. Requests are below 16, reports from 16 on."""

    #: Operands: number of descriptors; of the cgroup: bytes, processes, millicpus. To a template:
    #: 1 where the first descriptor is a memfd, 0 where the spec follows. Text: bytes a second.
    LAUNCH = 1
    SIGNAL = 2  # operands: signal number, for the program
    KILL = 3  # the whole tree, at once
    TEMPLATE = 4  # make a template; operands: 0; of the cgroup: as of LAUNCH
    #: Operands: 1 when privileged, else 0; Landlock's ABI; 1 when seccomp filters are installed; 1
    #: when there are time namespaces. Text: CgroupState.
    READY = 16
    #: Descriptor: pidfd of the sandbox's init. Of a template itself: a socket to it, and the pidfd;
    #: of its call: CPU microseconds that it used before, no descriptor.
    STARTED = 17
    #: Operands: errno; 1 when a template ends with it. Text: system call and path.
    FAILED = 18
    #: Operands: wait status, cpu microseconds, peak KiB of the largest process, of the whole tree
    #: (0 where no cgroup tells); text: "oom" when the kernel killed in it for want of memory.
    EXITED = 19


@dataclass(frozen=True)
class Frame:
    kind: Kind
    number: int
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    text: str = ""

    def pack(self) -> bytes:
        raw = self.text.encode("utf-8", "surrogateescape")[:191]
        operands = (self.a, self.b, self.c, self.d)
        return FRAME.pack(MAGIC, self.kind, self.number, *operands, raw)

    @classmethod
    def unpack(cls, data: bytes) -> Frame:
        """The frame in ``data``; ValueError unless it is exactly one well-formed frame."""
        if len(data) != FRAME.size:
            raise ValueError(f"a frame has {FRAME.size} bytes, got {len(data)}")
        magic, kind, number, a, b, c, d, raw = FRAME.unpack(data)
        if magic != MAGIC:
            raise ValueError("not a launcher frame")
        text = raw.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return cls(Kind(kind), number, a, b, c, d, text)


@dataclass(frozen=True)
class MountSpec:
    """One bind mount: host ``source`` appears at ``target``, always nosuid and nodev.

    ``idmap`` makes the source's owner appear as the sandbox's user, so that files keep their
    owner on disk (mount_setattr(2), MOUNT_ATTR_IDMAP; privileged launcher only: without
    privileges both are the same user anyway).

    ``shared``: ``source`` is a path of the mount namespace that the launch brings along as its
    last descriptor, made by a launch with an :class:`OverlaySpec`. ``pin``: what it must be.
    """

    source: str
    target: str
    readonly: bool = True
    noexec: bool = False
    idmap: bool = False
    optional: bool = False
    shared: bool = False
    pin: Pin = UNPINNED


@dataclass(frozen=True)
class OverlaySpec:
    """A copy-on-write view of ``lower`` (overlayfs), made instead of running a program.

    What is written goes to ``layers``/upper with ``layers``/work beside it, or, where ``layers``
    is empty, to memory of ``size`` bytes. A descriptor of the new mount namespace, in which the
    view is at /merged and the layers are at /layers, comes back through standard input, which
    must be a Unix socket.
    """

    lower: str
    layers: str = ""
    size: int = 0


@dataclass(frozen=True)
class FileSpec:
    """A file made in the sandbox's private memory, owned by its user."""

    path: str
    content: bytes = field(repr=False)
    mode: int = 0o400


@dataclass(frozen=True)
class Limits:
    """Resource limits; 0 leaves the inherited one. Bytes, seconds, thousandths of one CPU.

    ``memory``, ``processes`` and ``millicpus`` bound the whole tree by its cgroup, where this host
    has one. All but the last also bound each process (setrlimit(2)). There ``memory`` is
    RLIMIT_DATA, private writable memory: unlike RLIMIT_AS it spares runtimes that reserve address
    space without using it (V8, Go, Bun).
    """

    memory: int = 0
    processes: int = 0
    open_files: int = 1024
    file_size: int = 0
    cpu_seconds: int = 0
    tmp_size: int = 64 << 20
    millicpus: int = 0
    io: int = 0


@dataclass(frozen=True)
class LaunchSpec:
    """Everything that one sandbox is. Strings are host or sandbox paths, bytes are opaque.

    ``template`` names a group (a session) whose prepared sandboxes this launch may use one of;
    empty asks for a sandbox made for this launch alone.
    ``program``: the file to execute, where not argv's first; ``pin``: what that must be.
    ``further``: more programs can be started in it later, over the last descriptor, a socket.
    """

    id: str
    argv: tuple[bytes, ...] = field(repr=False)
    env: tuple[tuple[bytes, bytes], ...] = field(repr=False)
    uid: int
    program: str = ""
    pin: Pin = UNPINNED
    cwd: str = "/"
    network: str = "none"  # or "host"
    hostname: str = "sandbox"
    user: str = "agent"
    tty: bool = False
    mounts: tuple[MountSpec, ...] = ()
    files: tuple[FileSpec, ...] = field(default=(), repr=False)
    extra_fds: tuple[int, ...] = ()
    limits: Limits = Limits()
    template: str = ""
    overlay: OverlaySpec | None = None
    #: A launch with listeners brings a Unix socket after these, for them to be passed out by.
    listeners: tuple[Listener, ...] = ()
    #: A launch that waits brings a socket after these, on which its program is told later.
    waits: bool = False
    further: bool = False

    @property
    def brings_namespace(self) -> bool:
        """Whether a mount namespace comes after the descriptors that the program gets."""
        return any(mount.shared for mount in self.mounts)


def check_spec(spec: LaunchSpec, *, search: bool = False) -> None:
    """Invalid when ``spec`` can't be what somebody meant. Quotes no argument and no value.

    One that waits needs no program yet.

    ``search``: the program may be a name, or a relative path, for the sandbox to find.
    """
    program = os.fsencode(spec.program) or b"".join(spec.argv[:1])
    known = program if search else program.startswith(b"/")
    if (spec.argv or not spec.waits) and (not known or b"\0" in program):
        raise Invalid("a sandbox needs a program, by its absolute path")
    if any(b"\0" in argument for argument in spec.argv):
        raise Invalid("an argument holds a NUL byte, which no command line can carry")
    names = [name for name, _ in spec.env]
    if any(not name or b"=" in name or b"\0" in name for name in names):
        raise Invalid("a variable of the environment has no name that execve(2) could carry")
    if any(b"\0" in value for _, value in spec.env) or len(set(names)) < len(names):
        raise Invalid("a variable of the environment is set twice, or holds a NUL byte")
    if spec.template and not _GROUP.fullmatch(spec.template):
        raise Invalid("a group of templates has letters, digits, '.', '_' and '-', at most 64")
    if spec.network not in ("none", "host"):
        raise Invalid(f"there is no network {spec.network!r}", hint="one of: none, host")
    if not _NAME.fullmatch(spec.hostname) or not _NAME.fullmatch(spec.user):
        raise Invalid("a sandbox's host and user name are letters, digits and '-', at most 32")
    targets = [mount.target for mount in spec.mounts] + [file.path for file in spec.files]
    view = spec.overlay
    layers = (view.lower, view.layers or "/") if view is not None else ()
    for path in (spec.cwd, *targets, *(mount.source for mount in spec.mounts), *layers):
        if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise Invalid(f"a sandbox takes absolute paths without '..', not {path!r}")
    for path in targets:
        first = next(filter(None, path.split("/")), "")
        if first in ("", "proc"):
            raise Invalid(f"nothing can be placed on {path} of a sandbox")
    extra = spec.extra_fds
    if len(set(extra)) < len(extra) or any(not 3 <= fd < FIRST_HIGH_FD for fd in extra):
        raise Invalid(f"extra descriptors are different numbers from 3 to {FIRST_HIGH_FD - 1}")
    more = spec.brings_namespace + bool(spec.listeners) + spec.waits + spec.further
    if len(extra) + more > MAX_FDS - 4:
        raise Invalid(f"a sandbox takes at most {MAX_FDS - 4} extra descriptors")
    if spec.listeners and spec.network != "none":
        raise Invalid("a sandbox has either the host's network or listeners of its own")
    check_listeners(spec.listeners)
    if not 0 <= spec.uid < 0xFFFFFFFF:
        raise Invalid(f"{spec.uid} is no user id")
    if any(not 0 <= getattr(spec.limits, name) < 1 << 63 for name in _LIMIT_FIELDS):
        raise Invalid("a limit is a number from 0 up")


def failed(number: int, failure: SandboxdError) -> Frame:
    """The FAILED frame that tells ``failure``: its errno, system call and path."""
    if isinstance(failure, KernelError):
        text = f"{failure.syscall}\t{failure.path}"
        return Frame(Kind.FAILED, number, failure.errno, text=text)
    return Frame(Kind.FAILED, number, errno.EINVAL, text=f"setup\t{failure.message}")


def encode_spec(spec: LaunchSpec, lasting: bytes | None = None) -> bytes:
    """The bytes of ``spec``: its lasting part, then what is this launch's own.

    The lasting part is all that a template is built from, and holds no secret; who has it already
    passes it on. In the other, arguments and environment stand as execve(2) wants them, so that a
    template can point to them where they lie instead of copying them.
    """
    if lasting is None:
        lasting = lasting_part(spec)
    name, counts = os.fsencode(spec.id), (len(spec.argv), len(spec.env), len(spec.files))
    at = _HEAD.size + len(lasting) + len(name) + 8 * (2 * counts[0] + 3 * counts[1] + 2 * counts[2])
    places: list[int] = []  # where each part stands
    parts: list[bytes] = []
    for argument in spec.argv:
        end = at + len(argument)
        places += (at, end)
        parts += (argument, b"\0")
        at = end + 1
    for key, value in spec.env:
        start = at + len(key) + 1
        end = start + len(value)
        places += (at, start, end)
        parts += (key, b"=", value, b"\0")
        at = end + 1
    for file in spec.files:
        end = at + len(file.content)
        places += (at, end)
        parts += (file.content, b"\0")
        at = end + 1
    head = _HEAD.pack(at, len(lasting), len(name), *counts)
    return b"".join((head, lasting, name, struct.pack(f"!{len(places)}Q", *places), *parts))


def lasting_part(spec: LaunchSpec) -> bytes:
    """The encoded fields that two launches from one template have in common."""
    out = Writer()
    out.number(spec.uid)
    out.number(sum(1 << bit for bit, on in enumerate(_outline(spec)) if on))
    for number in spec.pin:
        out.number(number)
    for text in (spec.program, spec.cwd, spec.network, spec.hostname, spec.user, spec.template):
        out.text(text)
    out.number(spec.tty)
    out.number(len(spec.mounts))
    for mount in spec.mounts:
        _put_mount(out, mount)
    out.number(len(spec.files))
    for file in spec.files:
        out.text(file.path)
        out.number(file.mode)
    out.number(len(spec.extra_fds))
    for fd in spec.extra_fds:
        out.number(fd)
    for limit in _LIMIT_FIELDS:
        out.number(getattr(spec.limits, limit))
    out.number(spec.overlay is not None)
    if spec.overlay is not None:
        out.text(spec.overlay.lower)
        out.text(spec.overlay.layers)
        out.number(spec.overlay.size)
    out.number(len(spec.listeners))
    for one in spec.listeners:
        out.text(one.address)
        out.number(one.port)
        out.text(one.name)
    out.number(spec.waits)
    out.number(spec.further)
    return bytes(out.data)


def decode_spec(data: bytes) -> LaunchSpec:
    """The spec in ``data``; ValueError unless it is exactly one."""
    own = locate(data)
    lasting = decode_lasting(data[slice(*own.lasting)])
    if len(own.files) != len(lasting.files):
        raise ValueError("a launch spec has one content for each of its files")
    return replace(
        lasting,
        id=os.fsdecode(data[slice(*own.id)]),
        argv=tuple(data[start:end] for start, end in own.argv),
        env=tuple((data[start : value - 1], data[value:end]) for start, value, end in own.env),
        files=tuple(
            FileSpec(file.path, data[start:end], file.mode)
            for file, (start, end) in zip(lasting.files, own.files, strict=True)
        ),
    )


def decode_lasting(data: bytes) -> LaunchSpec:
    """A spec of the lasting fields alone; its files are empty, the rest is blank."""
    read = Reader(data)
    uid, _ = read.number(), read.number()  # the second is the outline
    spec = LaunchSpec(
        id="",
        argv=(),
        env=(),
        uid=uid,
        pin=(read.number(), read.number(), read.number()),
        program=read.text(),
        cwd=read.text(),
        network=read.text(),
        hostname=read.text(),
        user=read.text(),
        template=read.text(),
        tty=bool(read.number()),
        mounts=tuple(_get_mount(read) for _ in range(read.number())),
        files=tuple(FileSpec(read.text(), b"", read.number()) for _ in range(read.number())),
        extra_fds=tuple(read.number() for _ in range(read.number())),
        limits=Limits(**{name: read.number() for name in _LIMIT_FIELDS}),
        overlay=OverlaySpec(read.text(), read.text(), read.number()) if read.number() else None,
        listeners=tuple(
            Listener(read.text(), read.number(), read.text()) for _ in range(read.number())
        ),
        waits=bool(read.number()),
        further=bool(read.number()),
    )
    read.end()
    return spec


class Outline(NamedTuple):
    """What the init of a sandbox knows of its spec; all else it leaves to who builds or runs."""

    uid: int
    host_network: bool
    overlay: bool
    # What the launch brings after the program's descriptors, in this order.
    namespace: bool
    listeners: bool
    waits: bool
    further: bool


def outline(memfd: int) -> Outline:
    """The outline of the spec in ``memfd``, without reading the rest. ValueError if damaged."""
    data = os.pread(memfd, _HEAD.size + _OUTLINE.size, 0)
    if len(data) < _HEAD.size + _OUTLINE.size:
        raise ValueError("the launch spec is cut short")
    uid, flags = _OUTLINE.unpack_from(data, _HEAD.size)
    if _HEAD.unpack_from(data)[0] != os.fstat(memfd).st_size or flags >> len(Outline._fields) - 1:
        raise ValueError("not a launch spec")
    return Outline(uid, *(bool(flags & 1 << bit) for bit in range(len(Outline._fields) - 1)))


def _outline(spec: LaunchSpec) -> tuple[bool, ...]:
    more = (spec.brings_namespace, bool(spec.listeners), spec.waits, spec.further)
    return (spec.network == "host", spec.overlay is not None, *more)


class Located(NamedTuple):
    """Where the parts of an encoded spec lie: (start, end), and a NUL at the end.

    Of a variable: where its name starts, where its value starts and ends.
    """

    lasting: Span
    id: Span
    argv: Sequence[Span]
    env: Sequence[tuple[int, int, int]]
    files: Sequence[Span]


def locate(data: bytes | memoryview) -> Located:
    """Find the parts of an encoded spec, copying nothing. ValueError if damaged."""
    size = len(data)
    if size < _HEAD.size:
        raise ValueError("the launch spec is cut short")
    total, lasting, name, argc, envc, filec = _HEAD.unpack_from(data)
    count = 2 * argc + 3 * envc + 2 * filec
    begin = _HEAD.size + lasting + name
    if size < total or begin + 8 * count > size:
        raise ValueError("the launch spec is cut short")
    if size > total:
        raise ValueError("bytes are left over after the launch spec")
    table = struct.unpack_from(f"!{count}Q", data, begin)
    argv = list(zip(table[0 : 2 * argc : 2], table[1 : 2 * argc : 2], strict=True))
    rest = table[2 * argc :]
    env = list(zip(*(iter(rest[: 3 * envc]),) * 3, strict=True))
    files = list(zip(*(iter(rest[3 * envc :]),) * 2, strict=True))
    if table and (min(table) < begin + 8 * count or max(table) >= size):
        raise ValueError("a part of the launch spec lies elsewhere")
    if any(data[end] for _, end in argv) or any(data[end] for _, _, end in env):
        raise ValueError("a string of the launch spec has no end")
    middle = _HEAD.size + lasting
    return Located((_HEAD.size, middle), (middle, begin), argv, env, files)


def sealed_memfd(data: bytes) -> int:
    """An anonymous file holding ``data`` that nobody can change any more (memfd_create(2))."""
    fd = os.memfd_create("sandboxd-spec", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


_LIMIT_FIELDS = tuple(limit.name for limit in fields(Limits))  # in declaration order


def _put_mount(out: Writer, mount: MountSpec) -> None:
    out.text(mount.source)
    out.text(mount.target)
    flags = (mount.readonly, mount.noexec, mount.idmap, mount.optional, mount.shared)
    out.number(sum(1 << bit for bit, on in enumerate(flags) if on))
    for number in mount.pin:
        out.number(number)


def _get_mount(read: Reader) -> MountSpec:
    source, target, flags = read.text(), read.text(), read.number()
    readonly, noexec, idmap, optional, shared = (bool(flags & 1 << bit) for bit in range(5))
    pin = read.number(), read.number(), read.number()
    return MountSpec(source, target, readonly, noexec, idmap, optional, shared, pin)
