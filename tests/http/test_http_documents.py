"""docs/http-api.md and docs/clients.md say what is: routes, and programs that run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
from http_daemon import new_key, served

DOCS = Path(__file__).parents[2] / "docs"


def test_the_python_client_of_the_manual_runs() -> None:
    match = re.search(
        r"^<!-- run: python -->\n```python\n(.*?)^```",
        (DOCS / "clients.md").read_text(),
        re.M | re.S,
    )
    assert match
    with served() as daemon:
        environment = {**os.environ, "SANDBOXD_URL": daemon.url}
        environment["SANDBOXD_API_KEY"] = new_key(daemon, "operator")
        done = subprocess.run(
            [sys.executable, "-I", "-c", match[1]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[:2] == ["0 Grace", "Ada"]
        assert "file /workspace/names.txt" in lines
        assert daemon.call("session.list")["sessions"] == []
        _assert_every_route_is_described(httpx2.get(f"{daemon.url}/openapi.json").json())


def _assert_every_route_is_described(document: dict[str, dict[str, object]]) -> None:
    """Of both base paths; what other parts serve beside them has manuals of its own."""
    text = (DOCS / "http-api.md").read_text()
    described = text + text.replace(".../files", "/v1/sandboxes/ID/files")
    paths = [path for path in document["paths"] if path.startswith(("/v1/", "/api/v1/"))]
    assert len(paths) > 15
    names = {"{id}": "ID", "{slug}": "SLUG", "{method}": "METHOD"}
    for path in paths:
        for parameter, word in names.items():
            path = path.replace(parameter, word)
        assert path in described, path
