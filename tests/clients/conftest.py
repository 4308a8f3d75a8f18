"""An agent in a real session of a real daemon, with tools that show what a client can see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from real_daemon import RealDaemon, directories

_INPUT = """
argv: ["{word}"]
input:
  type: object
  additionalProperties: false
  properties: {word: {type: string}}
"""
_NO_INPUT = "input: {type: object, additionalProperties: false}\n"


@pytest.fixture
def daemon() -> Iterator[RealDaemon]:
    """A daemon whose agent ``client`` has five tools; the test writes the agent and starts it."""
    with directories() as daemon:
        daemon.tool(
            "use",
            '#!/bin/sh\nprintf "%s used " "$1"\nprintf %s "$TOKEN" | wc -c\necho "it is $TOKEN"\n',
            _INPUT + "secrets: [{variable: TOKEN}]\nannotations: {title: Uses the token}\n",
        )
        daemon.tool("fail", "#!/bin/sh\necho out\necho err >&2\nexit 3\n", _NO_INPUT)
        daemon.tool(
            "talk",
            '#!/bin/sh\necho "one $TOKEN"\nsleep 0.4\necho two\nsleep 0.4\n',
            _NO_INPUT + "secrets: [{variable: TOKEN}]\n",
        )
        daemon.tool("long", "#!/bin/sh\nsleep 88201\n", _NO_INPUT)
        daemon.tool("foreign", "#!/bin/sh\necho not yours\n", _NO_INPUT)
        yield daemon
