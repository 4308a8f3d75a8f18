"""What a trace says about a manifest, as a pure function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandboxd.authoring.findings import Finding, findings
from sandboxd.policy import Mount, Tool
from sandboxd.policy.values import AbsolutePath, Line, ProgramPath, ToolName

TOOL = Tool(
    name=ToolName("t"),
    description=Line("a tool"),
    program=ProgramPath("/opt/t/program"),
    input_schema={},
    directory=Path("/opt/t"),
    mounts=(Mount(AbsolutePath("/data"), AbsolutePath("/in")),),
)
HOST = {"/srv/model", "/etc/hosts.extra", "/run/docker.sock", "/usr/share/locale/de"}


def of(**record: Any) -> Finding | None:
    """The finding for one record, if there is one."""
    found = findings([record], TOOL, HOST.__contains__)
    assert len(found) <= 1
    return found[0] if found else None


WAY_OUT = "egress, if a host is enough, or network: host"


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            {"call": "openat", "path": "/srv/model", "error": "ENOENT"},
            "mounts: [{source: /srv/model, target: /srv/model}]",
        ),
        (
            {"call": "openat", "path": "/srv/model", "writes": True, "error": "ENOENT"},
            "mounts: [{source: /srv, target: /srv, mode: rw}]",
        ),
        (
            {"call": "openat", "path": "/in/x", "writes": True, "error": "EROFS"},
            "mounts: [{source: /data, target: /in, mode: rw}]",
        ),
        ({"call": "stat", "path": "/workspace/a", "error": "ENOENT"}, "workspace: ro"),
        (
            {"call": "openat", "path": "/workspace/a", "writes": True, "error": "ENOENT"},
            "workspace: rw",
        ),
        ({"call": "connect", "address": "192.0.2.1:443", "error": "EACCES"}, WAY_OUT),
        ({"call": "sendto", "address": "[::1]:53", "error": "ENETUNREACH"}, WAY_OUT),
        ({"call": "write", "file": "/tmp/big", "error": "ENOSPC"}, "limits: {tmp_size: ...}"),
        ({"call": "write", "file": "/tmp/big", "error": "EFBIG"}, "limits: {file_size: ...}"),
        ({"call": "openat", "path": "/in/x", "error": "EMFILE"}, "limits: {files: ...}"),
        ({"call": "clone3", "error": "EAGAIN"}, "limits: {processes: ...}"),
        ({"call": "mmap", "error": "ENOMEM"}, "limits: {memory: ...}"),
    ],
)
def test_a_refusal_names_the_line_that_would_allow_it(record: dict[str, Any], line: str) -> None:
    found = of(**record)
    assert found is not None
    assert found.refused
    assert found.line == line


@pytest.mark.parametrize(
    "record",
    [
        {"call": "unshare", "error": "EPERM"},
        {"call": "socket", "family": 40, "error": "EPERM"},
        {"call": "openat", "path": "/usr/bin/x", "writes": True, "error": "EROFS"},
        {"call": "connect", "address": "unix:/run/docker.sock", "error": "ENOENT"},
    ],
)
def test_what_no_manifest_may_allow_is_told_without_a_line(record: dict[str, Any]) -> None:
    found = of(**record)
    assert found is not None
    assert found.refused
    assert not found.line


@pytest.mark.parametrize(
    "record",
    [
        {"call": "openat", "path": "/srv/nowhere", "error": "ENOENT"},  # not on the host either
        {"call": "openat", "path": "/usr/lib/libc.so.6", "error": ""},  # what every program reads
        {"call": "openat", "path": "/opt/t/program.py", "error": ""},
        {"call": "openat", "path": "/usr/share/locale/de", "error": "ENOENT"},
        {"call": "openat", "path": "/memfd:spec (deleted)", "error": ""},
        {"call": "connect", "address": "unix:/nowhere", "error": "ENOENT"},
    ],
)
def test_what_every_program_does_is_not_worth_telling(record: dict[str, Any]) -> None:
    assert of(**record) is None


def test_each_thing_is_told_once_as_the_most_that_was_done() -> None:
    records = [
        {"call": "stat", "path": "/in", "error": ""},
        {"call": "stat", "path": "/in/out.txt", "error": ""},
        {"call": "openat", "path": "/in/out.txt", "writes": True, "error": ""},
        {"call": "openat", "path": "/in/out.txt", "writes": True, "error": ""},
        {"call": "connect", "address": "192.0.2.1:443", "error": "EINPROGRESS"},
    ]
    assert findings(records, TOOL, HOST.__contains__) == [
        Finding("wrote", "/in/out.txt"),
        Finding("connected", "192.0.2.1:443"),
    ]
