"""sandboxctl: what an operator types. Thin: arguments in, one request to the daemon, a table out.

One module per noun; a command imports what it needs and no more, so that a shell prompt or a
completion can afford to call it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (listed in ``sandboxctl --help``)."""
    from sandboxd.cli import output
    from sandboxd.cli.parser import parse
    from sandboxd.errors import SandboxdError

    output.set_up()
    args = None
    try:
        args = parse(list(sys.argv[1:] if argv is None else argv))
        status = int(args.run(args))
        sys.stdout.flush()
    except SandboxdError as error:
        output.show_error(error, as_json=args is not None and args.json)
        return int(getattr(args, "failed_status", None) or error.exit_code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _give_up_output()
        return 141  # whoever read us has had enough: end as SIGPIPE would have
    except OSError as error:
        _give_up_output()
        where = error.filename or "input or output failed"
        output.show_error(SandboxdError(f"{where}: {error.strerror}"))
        return 1
    return status


def _give_up_output() -> None:
    """Let what is still buffered go nowhere, so that the interpreter's exit does not trip on it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
