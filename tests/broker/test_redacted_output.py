"""What real programs make of a value, and what of it reaches who called or watches."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import trio
import trio.testing
from broker_parts import Broker

from sandboxd.broker.capture import Capture
from sandboxd.redact import Matcher
from sandboxd.secret import Secret

TOKEN = "pl4in/Value+of-the_token=77"
SECRETS: list[dict[str, Any]] = [{"variable": "TOKEN"}]
MARK = b"[redacted:TOKEN]"


def told(data: bytes, value: str = TOKEN) -> int:
    """The most characters of the value in a row that the data show."""
    raw = value.encode()
    return max(
        (
            length
            for start in range(len(raw))
            for length in range(1, len(raw) - start + 1)
            if raw[start : start + length] in data
        ),
        default=0,
    )


@pytest.mark.parametrize(
    ("script", "positive"),
    [
        ('printf %s "$TOKEN" | base64', b"cGw0aW4v"),
        ('echo "$TOKEN" | base64', b"cGw0aW4v"),
        ('printf "x:%s" "$TOKEN" | base64 -w 16', b"eDpwbDRp"),
        ('printf %s "$TOKEN" | base64 -w 0 | tr +/ -_', b"cGw0aW4v"),
        ('printf %s "$TOKEN" | od -An -v -tx1', b"70 6c 34 69 6e"),
        ('printf %s "$TOKEN" | od -An -v -tu1', b"112 108  52 105 110"),
        ('printf %s "$TOKEN" | fold -w 9', b"pl4in/Val\n"),
        ('printf %s "$TOKEN" | sed "s/[^a-zA-Z0-9]/\\\\\\\\&/g"', b"pl4in\\/Value"),
    ],
)
async def test_what_programs_make_of_a_value_is_masked(
    broker: Broker, script: str, positive: bytes
) -> None:
    broker.set(TOKEN=TOKEN)
    shown = await broker.run(script, secrets=[{"variable": "TOKEN", "redact": False}])
    assert positive in shown.stdout, shown  # the control: this is what it prints
    result = await broker.run(script, secrets=SECRETS)
    assert MARK in result.stdout, result
    assert len(result.stdout.replace(MARK, b"").strip()) <= 8  # what base64 shares with neighbours
    assert broker.records("call.ended")[-1]["redacted"] == {"TOKEN": 1}


async def test_a_value_spread_over_both_streams_is_masked_in_both(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN)
    result = await broker.run(
        'printf "out: %.13s" "$TOKEN"; printf %s "${TOKEN#?????????????}" >&2', secrets=SECRETS
    )
    assert result.stdout == b"out: " + MARK
    assert told(result.stdout + result.stderr) < 8


async def test_two_values_are_counted_by_their_names(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN, OTHER="another-value-7")
    result = await broker.run(
        'echo "$TOKEN $OTHER $TOKEN" >&2', secrets=[*SECRETS, {"variable": "OTHER"}]
    )
    assert result.stderr == MARK + b" [redacted:OTHER] " + MARK + b"\n"
    ended = broker.records("call.ended")[-1]
    assert (ended["redactions"], ended["redacted"]) == (3, {"TOKEN": 2, "OTHER": 1})


async def test_bytes_that_are_no_text_stay_as_they_are(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN)
    result = await broker.run(
        'printf "\\377\\000\\376"; printf %s "$TOKEN"; printf "\\200%%\\\\"', secrets=SECRETS
    )
    assert result.stdout == b"\xff\x00\xfe" + MARK + b"\x80%\\"


async def test_the_beginning_of_a_value_that_the_end_cuts_off_is_masked(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN)
    result = await broker.run(
        'printf "%.12s" "$TOKEN"; exec sleep 88010', secrets=SECRETS, timeout="1s"
    )
    assert (result.outcome, result.stdout) == ("timeout", MARK)


async def test_nothing_of_a_call_s_values_is_kept_when_it_is_over(broker: Broker) -> None:
    def matchers() -> int:
        gc.collect()
        return sum(isinstance(each, Matcher) for each in gc.get_objects())

    before = matchers()
    broker.set(TOKEN=TOKEN)
    seen = []

    async def progress(received: float, text: str) -> None:
        seen.append(matchers() - before)

    broker.tool("say", 'echo "$TOKEN"; sleep 0.2; echo "$TOKEN"', secrets=SECRETS)
    await broker.call("say", progress=progress)
    assert max(seen) == 1  # the control: while it runs there is one
    assert matchers() == before


# --- a watcher, on a clock that a test moves ----------------------------------------------------


class Watched:
    """A capture whose streams are pipes, and what its watcher saw."""

    def __init__(self) -> None:
        self.seen = ""
        self.capture = Capture(
            {"TOKEN": Secret(TOKEN)},
            limit=1 << 20,
            kill=False,
            on_overflow=lambda: None,
            progress=self._progress,
        )
        self.ends: dict[str, int] = {}

    async def _progress(self, received: float, text: str) -> None:
        self.seen += text

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            for stream in ("stdout", "stderr"):
                source, self.ends[stream] = os.pipe()
                os.set_blocking(source, False)
                nursery.start_soon(self.capture.read, stream, source)
            nursery.start_soon(self.capture.report)
            task_status.started()

    async def write(self, stream: str, data: str) -> None:
        os.write(self.ends[stream], data.encode())
        await trio.testing.wait_all_tasks_blocked()


async def test_a_short_beginning_is_shown_after_a_silence_and_a_long_one_never(
    mock_clock: trio.testing.MockClock,
) -> None:
    watched = Watched()
    async with trio.open_nursery() as nursery:
        await nursery.start(watched.run)
        await watched.write("stdout", f"one {TOKEN[:5]}")
        assert watched.seen == "one "
        mock_clock.jump(0.3)
        await trio.testing.wait_all_tasks_blocked()
        assert watched.seen == f"one {TOKEN[:5]}"
        await watched.write("stdout", TOKEN[5:12])
        mock_clock.jump(1000)
        await trio.testing.wait_all_tasks_blocked()
        assert watched.seen == f"one {TOKEN[:5]}"
        await watched.write("stdout", TOKEN[12:] + " two\n")
        mock_clock.jump(0.3)
        await trio.testing.wait_all_tasks_blocked()
        assert watched.seen == f"one {TOKEN[:5]}[redacted:TOKEN] two\n"
        nursery.cancel_scope.cancel()


async def test_a_line_is_shown_at_once_to_who_watches(mock_clock: trio.testing.MockClock) -> None:
    watched = Watched()
    async with trio.open_nursery() as nursery:
        await nursery.start(watched.run)
        await watched.write("stdout", "it is a p\n")  # as the value begins
        assert watched.seen == "it is a p\n"
        nursery.cancel_scope.cancel()


async def test_a_value_that_comes_on_both_streams_is_masked_for_who_watches(
    mock_clock: trio.testing.MockClock,
) -> None:
    watched = Watched()
    async with trio.open_nursery() as nursery:
        await nursery.start(watched.run)
        await watched.write("stdout", f"a {TOKEN[:9]}")
        await watched.write("stderr", TOKEN[9:14])
        mock_clock.jump(1000)
        await trio.testing.wait_all_tasks_blocked()
        assert watched.seen == "a "
        await watched.write("stdout", TOKEN[14:] + " b\n")
        mock_clock.jump(1)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    watched.capture.finish()
    assert watched.seen.startswith("a [redacted:TOKEN]")
    assert told((watched.seen + "|").encode() + watched.capture.stdout) < 8
    assert told(watched.capture.stdout + watched.capture.stderr) < 8
    assert watched.capture.stdout == b"a [redacted:TOKEN] b\n"
