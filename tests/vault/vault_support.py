"""What the vault's tests share beside fixtures."""

from __future__ import annotations

import traceback
from pathlib import Path

TESTS = str(Path(__file__).resolve().parents[1])

#: The plaintext that tests set and look for.
PLAINTEXT = b"hunter2-plaintext"


def everything(error: BaseException) -> str:
    """All that the most talkative log could print of an error: chain, locals, attributes.

    The frames of the tests are left out: a test knows its own plaintext.
    """
    seen: list[str] = []
    pending: list[BaseException | None] = [error]
    done: set[int] = set()
    while pending:
        each = pending.pop()
        if each is None or id(each) in done:
            continue
        done.add(id(each))
        # Also what "from None" only hides: the objects are still there.
        pending += [each.__cause__, each.__context__]
        shown = traceback.TracebackException.from_exception(each, capture_locals=True)
        for frame in shown.stack:
            if not frame.filename.startswith(TESTS):
                seen.append(f"{frame.filename}:{frame.lineno} {frame.locals}")
        seen += shown.format_exception_only()
        seen += [repr(each.args), repr(vars(each))]
    return "\n".join(seen)
