"""Files, and standard input in their place, that operators give to commands."""

from __future__ import annotations

import sys
from pathlib import Path

from sandboxd.errors import Invalid, NotFound

__all__ = ["MOST", "read_input"]

#: More than any value or sensible file of them: what is longer is a mistake, not read to its end.
MOST = 8 << 20


def read_input(path: str, shown: str, *, most: int = MOST) -> bytes:
    """The content of a file, or of standard input for ``-``; errors call it ``shown``.

    Raises NotFound when there is none, Invalid when it can't be read or has over ``most`` bytes.
    """
    try:
        if path == "-":
            data = sys.stdin.buffer.read(most + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(most + 1)
    except FileNotFoundError:
        raise NotFound(f"{shown} does not exist") from None
    except OSError as error:
        raise Invalid(f"can't read {shown}: {error.strerror}") from None
    if len(data) > most:
        raise Invalid(f"{shown} is longer than {most:,} bytes")
    return data
