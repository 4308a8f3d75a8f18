"""How a tool call ended, in terms that a client and a person understand."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sandboxd.broker.capture import Capture
from sandboxd.errors import Invalid
from sandboxd.isolation.client import Exit
from sandboxd.policy.decide import Decision
from sandboxd.policy.model import OutputFormat, Tool
from sandboxd.policy.results import parse_output

__all__ = ["CallResult", "Outcome", "printed", "result_of", "with_structure"]

Outcome = Literal["ok", "denied", "failed", "timeout", "cancelled", "overflow", "busy"]


@dataclass(frozen=True)
class CallResult:
    """How a call ended. ``stdout`` and ``stderr`` are redacted; ``message`` is for people.

    ``structured`` is the JSON object that ``stdout`` holds, where the manifest says that it does.
    """

    outcome: Outcome
    call: str = ""
    exit_code: int | None = None
    signal: int | None = None
    stdout: bytes = field(default=b"", repr=False)
    stderr: bytes = field(default=b"", repr=False)
    truncated: bool = False
    message: str = ""
    hint: str = ""
    rule: str = ""
    output_format: OutputFormat = "auto"
    structured: dict[str, Any] | None = field(default=None, repr=False)
    #: What an MCP server answered, where one did: blocks as the protocol has them.
    content: tuple[dict[str, Any], ...] | None = field(default=None, repr=False)


def printed(content: Iterable[Mapping[str, Any]]) -> bytes:
    """What a server answered, as a terminal shows it: texts as they are, the rest as JSON."""
    lines = [
        block["text"] if block["type"] == "text" else json.dumps(block, ensure_ascii=False)
        for block in content
    ]
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines).encode()


def result_of(
    call: str, tool: str, decision: Decision, capture: Capture, end: Exit, *, timed_out: bool
) -> CallResult:
    """What became of a call whose tree is dead and whose output was read."""
    result = CallResult(
        "ok",
        call,
        exit_code=end.code,
        signal=end.signal,
        stdout=capture.stdout,
        stderr=capture.stderr,
        truncated=capture.truncated,
        rule=decision.rule,
        output_format=decision.tool.output_format if decision.tool is not None else "auto",
    )
    if capture.overflowed:
        return replace(
            result,
            outcome="overflow",
            message=f"{tool} was ended: it printed more than {decision.output_limit:,} bytes",
            hint="ask for less at once",
        )
    if timed_out:
        return replace(
            result,
            outcome="timeout",
            message=f"{tool} was ended after {decision.timeout:g} s",
            hint="ask for less at once; the operator sets timeout in the tool's manifest",
        )
    if end.oom:
        return replace(
            result,
            outcome="failed",
            message=f"{tool} was ended: its processes ran out of memory",
            hint="ask for less at once; the operator sets limits: {memory: ...} in its manifest",
        )
    if end.signal is not None:
        name, hint = _signal(end.signal)
        return replace(result, outcome="failed", message=f"{tool} was killed by {name}", hint=hint)
    if end.code:
        message = f"{tool} ended with status {end.code}"
        return replace(result, outcome="failed", message=message)
    if capture.truncated:
        message = f"only the first {decision.output_limit:,} bytes of output were kept"
        return replace(result, message=message)
    return result


def with_structure(result: CallResult, tool: Tool) -> CallResult:
    """The result of a tool that prints JSON, with it; a failure when it isn't what was promised.

    It is read after redaction: nothing is in it that is not in ``stdout``.
    """
    if result.outcome != "ok" or tool.output_format != "json":
        return result
    hint = f"the program does not keep what {tool.source} says of its output"
    try:
        if result.truncated:
            hint = f"ask for less at once; the operator sets output_limit in {tool.source}"
            raise Invalid("output: cut at the limit, so it is no JSON any more")
        value = parse_output(tool, result.stdout)
    except Invalid as refused:
        message = f"{tool.name} answered with what it must not: {refused.message}"
        return replace(result, outcome="failed", message=message, hint=hint)
    return replace(result, structured=value) if isinstance(value, dict) else result


def _signal(number: int) -> tuple[str, str]:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hints = {
        "SIGKILL": "it may have been over its memory limit",
        "SIGXCPU": "it used up its CPU time limit",
        "SIGXFSZ": "it wrote a file over its size limit",
        "SIGSYS": "it made a system call that the sandbox forbids",
    }
    return name, hints.get(name, "")
