"""What the launcher tells the broker of its cgroups. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CgroupState"]


@dataclass(frozen=True)
class CgroupState:
    """What cgroups the launcher has: ``v1``, ``v2``, both or "", what they control, what lacks."""

    version: str = ""
    controllers: frozenset[str] = frozenset()
    lacking: str = ""

    @property
    def io(self) -> bool:
        """Whether what a whole sandbox reads from and writes to disks can be limited."""
        return bool({"io", "blkio"} & self.controllers)

    @property
    def complete(self) -> bool:
        """Whether memory, processes and CPU of a whole sandbox are limited."""
        return {"memory", "pids", "cpu"} <= self.controllers

    def pack(self) -> str:
        return "\t".join((self.version, ",".join(sorted(self.controllers)), self.lacking))

    @classmethod
    def unpack(cls, text: str) -> CgroupState:
        version, names, lacking = (text + "\t\t").split("\t", 2)
        return cls(version, frozenset(filter(None, names.split(","))), lacking.strip("\t"))
