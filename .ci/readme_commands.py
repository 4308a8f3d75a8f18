"""Print the README's two commands, one a line: the first ``sh`` block of each of two headings.

Exits non-zero unless each is exactly one line, so that what a reader copies is what CI runs.
"""

import re
import sys
from pathlib import Path

HEADINGS = ("Try it", "Run the tests")


def main() -> int:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    for heading in HEADINGS:
        block = re.search(
            rf"^## {heading}\n(?:(?!^## ).)*?^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE
        )
        if block is None or len(block[1].strip().splitlines()) != 1:
            print(f"README: no one-line sh block under '## {heading}'", file=sys.stderr)
            return 1
        print(block[1].strip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
