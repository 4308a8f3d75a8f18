"""A probe: one thing that a sandbox must refuse, what refuses it, and how its control works."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AGENT",
    "BOTH",
    "CATALOGUE",
    "HOST",
    "OWN_UID",
    "SCRATCH",
    "TOOL",
    "Attack",
    "Plan",
    "Probe",
    "add",
]

AGENT, TOOL = "agent", "tool"
#: Not among the layers that the daemon tells: a sandbox has a uid of its own where root runs it.
OWN_UID = "host uid"
BOTH = (AGENT, TOOL)
#: Where a control runs outside a sandbox: as an ordinary process of the host, or as root of fresh
#: namespaces (really root, or the root of a new user namespace), where nothing can be harmed.
HOST, SCRATCH = "host", "scratch"


@dataclass(frozen=True)
class Plan:
    """What the runner tells every prober, to be generous: where everything really is."""

    place: str = HOST
    #: Files and sockets of the host that exist, by what they are.
    paths: Mapping[str, str] = field(default_factory=dict)
    #: Processes of the host, by what they are. ``bystander`` is an ordinary one.
    pids: Mapping[str, int] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()
    port: int = 0
    udp_port: int = 0
    abstract: str = ""
    #: A System V segment, a POSIX queue and a file in /dev/shm that the runner made.
    ipc_key: int = 0
    segment: int = -1
    queue: str = ""
    shared_file: str = ""
    key: int = 0
    netns: int = 0
    tmp_size: int = 0
    processes: int = 0
    since: float = 0.0
    hostname: str = ""
    #: When the host was started, in seconds since 1970.
    booted: float = 0.0
    #: By kind, those of the host and of another session, as links of /proc name them.
    namespaces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Of a whole sandbox: bytes, processors, and bytes a second.
    memory: int = 0
    processors: int = 0
    io: int = 0
    #: The process that is looked at, for what only the host can see; and, where that is the init
    #: of a sandbox, its program.
    target: int = 0
    program: int = 0
    marker: str = ""
    #: Only probes for threats that contain one of these words; all when empty.
    threats: tuple[str, ...] = ()

    @property
    def inside(self) -> bool:
        return self.place in BOTH

    def wants(self, probe: Probe) -> bool:
        return not self.threats or any(
            word.lower() in probe.threat.lower() for word in self.threats
        )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Plan:
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class Layers:
    """The layers of a sandbox, and of them what changes how it refuses: a filter, and Landlock's
    ABI or 0."""

    seccomp: bool = False
    landlock: int = 0
    #: By name, all that are on.
    on: frozenset[str] = frozenset()


#: Tries it. Returns nothing when it worked, or a word for what came of it; OSError is a denial.
#: (Any arguments: in the tables some take the row's values by default.)
Attack = Callable[..., Any]


@dataclass(frozen=True)
class Probe:
    """One row of the catalogue.

    ``denials``: what may come of it without seccomp and Landlock. Empty: only these stand in its
    way. ``filtered``: the one denial where the filter is on. ``landlocked``: the one from an
    ABI of Landlock on. ``needs``: the layer without which nothing denies it. ``inside`` is a
    control in the sandbox: the same code where it is allowed. ``outside`` names the place outside
    where the attack itself must come to one of ``allowed``; where the host refuses even that,
    ``fallback`` has to work in the sandbox. ``observed``: it is the runner that looks, from the
    host.
    """

    name: str
    threat: str
    attack: Attack
    denials: tuple[str, ...]
    filtered: str = ""
    landlocked: tuple[int, str] | None = None
    needs: str = ""
    inside: Attack | None = None
    outside: str = ""
    allowed: tuple[str, ...] = ("ok",)
    fallback: Attack | None = None
    says: str = ""
    places: tuple[str, ...] = BOTH
    observed: bool = False

    def applies(self, layers: Layers) -> bool:
        """Whether there is the layer that refuses it."""
        return not self.needs or self.needs in layers.on

    def expected(self, layers: Layers) -> tuple[str, ...]:
        """The denials that are right where these layers are on."""
        if not self.applies(layers):
            return ()
        if layers.seccomp and self.filtered:
            return (self.filtered,)
        if self.landlocked is not None and self.landlocked[0] <= layers.landlock:
            return (self.landlocked[1],)
        return self.denials


CATALOGUE: dict[str, Probe] = {}


def add(name: str, threat: str, attack: Attack, *denials: str, **options: Any) -> None:
    """Put one row into the catalogue."""
    if name in CATALOGUE:
        raise ValueError(f"two probes are called {name!r}")
    CATALOGUE[name] = Probe(name, threat, attack, denials, **options)


def word_for(failure: BaseException) -> str:
    """``ENOENT``, ``timeout``; anything else by its class."""
    if isinstance(failure, TimeoutError) and failure.errno is None:
        return "timeout"
    if isinstance(failure, OSError) and failure.errno:
        return errno.errorcode.get(failure.errno, str(failure.errno))
    return type(failure).__name__


def open_(path: str, flags: int = os.O_RDONLY) -> None:
    """open(2), without waiting for a FIFO or taking a terminal."""
    os.close(os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
