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
        # Whoever read us has had enough: end as SIGPIPE would have, without a traceback at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return status
