"""The recorder of detached sessions: bounded, readable while it grows, never in the agent's way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from sandboxd.errors import NotFound
from sandboxd.sessions import output
from sandboxd.sessions.output import Recorder, read_log


async def recorded(directory: Path, *chunks: bytes) -> Recorder:
    recorder = Recorder(directory)
    read, write = os.pipe()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.record, read)
        async with trio.lowlevel.FdStream(write) as pipe:
            for chunk in chunks:
                await pipe.send_all(chunk)
                await trio.testing.wait_all_tasks_blocked()  # one read for each
    return recorder


async def text(directory: Path, recorder: Recorder | None = None, *, follow: bool = False) -> bytes:
    return b"".join([chunk async for chunk in read_log(directory, recorder, follow=follow)])


async def test_what_was_printed_can_be_read(tmp_path: Path) -> None:
    await recorded(tmp_path / "s", b"one\n", b"two\n")
    assert await text(tmp_path / "s") == b"one\ntwo\n"
    assert (tmp_path / "s" / "output.log").stat().st_mode & 0o777 == 0o600


async def test_a_log_keeps_its_newest_part_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "MAX_LOG", 10)
    await recorded(tmp_path / "s", *(b"%08d\n" % i for i in range(5)))
    kept = await text(tmp_path / "s")
    assert kept.endswith(b"00000004\n")
    assert len(kept) <= 20


async def test_following_ends_with_the_session(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s")
    read, write = os.pipe()
    seen: list[bytes] = []

    async def follow() -> None:
        async for chunk in read_log(tmp_path / "s", recorder, follow=True):
            seen.append(chunk)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.record, read)
        async with trio.lowlevel.FdStream(write) as pipe:
            await pipe.send_all(b"early ")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(follow)
            await pipe.send_all(b"late")
    assert b"".join(seen) == b"early late"


async def test_a_log_that_cannot_be_written_does_not_stop_the_agent(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a file where the directory should be")
    # More than a pipe holds: it would block if nobody read it any more.
    recorder = await recorded(tmp_path / "s", b"x" * (1 << 20))
    assert recorder.done


async def test_nothing_recorded_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no recorded output"):
        await text(tmp_path / "missing")
