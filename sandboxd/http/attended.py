"""Work that is for one client: it ends when the client leaves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio
from fastapi import Request

__all__ = ["ClientLeft", "attended"]

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class _Result(Generic[T]):
    value: T
    there = False


async def attended(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """What ``work`` returns or raises. Cancelled, and ClientLeft raised, when the client leaves.

    The request's body must have been read: what the framework does before it calls a route.
    """
    result: _Result[T] = _Result()
    failure: Exception | None = None
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                scope.cancel()

            nursery.start_soon(watch)
            try:
                result.value = await work()
                result.there = True
            except Exception as error:  # noqa: BLE001  # raised again below, outside of the nursery
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not result.there:
        raise ClientLeft
    return result.value
