"""What a daemon without keys never needs is not loaded."""

from __future__ import annotations

import subprocess
import sys


def test_jwt_is_loaded_with_the_first_token() -> None:
    code = (
        "import sys; import sandboxd.daemon; print('jwt' in sys.modules); "
        "from sandboxd.access import signing, tokens; keys = signing.SigningKeys([], overlap=1.0); "
        "tokens.read('a.b.c', keys, 'x', 0.0); print('jwt' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "True"]
