"""Work that is done in the event loop where it is brief, for going to a thread takes longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import trio

__all__ = ["brief", "is_brief"]

#: Bytes that are read, hashed or decrypted in less time than a thread is woken in.
_BRIEF = 128 << 10

_T = TypeVar("_T")


def is_brief(size: int) -> bool:
    """Whether so many bytes are few."""
    return size <= _BRIEF


async def brief(size: int, action: Callable[..., _T], *args: Any) -> _T:
    """Do it here for ``size`` bytes if they are few, else in a thread."""
    if is_brief(size):
        return action(*args)
    return await trio.to_thread.run_sync(action, *args)
