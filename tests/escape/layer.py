"""Every layer of a sandbox, where its rule comes from, and how a copy of the package loses it.

A change is a piece of source text, which must occur exactly once, and what stands in its place. A
layer ``behind`` others is seen only once those are gone too: both runs, with it and without it,
are then made without them. ``planted`` is what a careless host or daemon would have left there for
the layer to take away; it too is in both runs.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CALLS", "ISOLATION", "Change", "Layer", "one"]

ISOLATION = "sandboxd/isolation/"
CALLS = ISOLATION + "filters/calls.py"


@dataclass(frozen=True)
class Change:
    """In ``file``, ``old`` becomes ``new``."""

    file: str
    old: str
    new: str = ""


@dataclass(frozen=True)
class Layer:
    """``threats``: words of the selftest's threats whose probes are to notice. ``tests``: pytest
    selections that notice instead. ``filters``: the filter programs are compiled anew."""

    name: str
    source: str
    changes: tuple[Change, ...]
    threats: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    planted: tuple[Change, ...] = ()
    filters: bool = False


def one(file: str, old: str, new: str = "") -> tuple[Change, ...]:
    return (Change(ISOLATION + file, old, new),)
