"""Tool manifests: what a manifest may say, and which programs are trusted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from sandboxd.errors import Denied
from sandboxd.policy import Concurrency, SecretSpec, check_program, decide

ROOT = os.geteuid() == 0


def test_a_full_manifest_is_read(config: Any) -> None:
    config.write(
        "tools/echo/tool.yaml",
        """\
        version: 1
        name: echo
        description: |
          Two lines
          of text.
        program: bin/run
        runtime: python
        argv: [--, "{text}", "--n={n}", [-x, "{x}"], {if: v, argv: [-v]}]
        stdin: json
        input:
          type: object
          properties: {text: {}, n: {}, x: {}, v: {type: boolean}}
          additionalProperties: false
        environment: {LANG: C.UTF-8}
        secrets:
          - TOKEN
          - {variable: CERT, as: cert.pem, delivery: file, required: false}
          - {variable: KEY, as: KEY_FD, delivery: fd}
        workspace: ro
        mounts: [{source: /srv/data, target: /data}]
        network: host
        timeout: 1m
        grace: 2s
        output: {type: object, properties: {n: {type: integer}}}
        output_limit: 64K
        concurrency: {total: 4, per_session: 1}
        on_overflow: kill
        limits:
          {memory: 64M, processes: 8, files: 32, cpu: 500ms, file_size: 1G, tmp_size: 2MiB, cpus: 2}
        annotations: {title: Echo, readOnlyHint: true}
        """,
    )
    config.program("tools/echo/bin/run", "print()\n")
    tool = config.load().tools["echo"]
    assert tool.description == "Two lines\nof text.\n"
    assert tool.program == config.path / "tools/echo/bin/run"
    assert tool.directory == config.path / "tools/echo"
    assert tool.digest == hashlib.sha256(b"print()\n").hexdigest()
    assert tool.secrets == (
        SecretSpec("TOKEN", "TOKEN"),
        SecretSpec("CERT", "cert.pem", "file", False),
        SecretSpec("KEY", "KEY_FD", "fd"),
    )
    assert (tool.timeout, tool.output_limit, tool.limits.cpu) == (60.0, 65_536, 0.5)
    assert (tool.limits.memory, tool.limits.tmp_size) == (64 << 20, 2 << 20)
    assert tool.limits.cpus == 2.0
    assert (tool.grace, tool.concurrency) == (2.0, Concurrency(4, 1))
    assert tool.output_format == "json", "which a schema of the output implies"
    assert tool.annotations.as_dict() == {"title": "Echo", "readOnlyHint": True}


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            "runtime: ruby\n",
            "11:10: runtime: expected none or python or node, found the text 'ruby'",
        ),
        ("stdin: text\n", "11:8: stdin: expected none, json or {text: ARGUMENT}"),
        ("stdin: {text: body}\n", "11:15: stdin uses 'body', which input has no property for"),
        ("stdin: {txt: text}\n", "11:8: stdin: expected none, json or {text: ARGUMENT}"),
        ("network: [a.example]\n", "11:10: network: expected none or host, found a list"),
        ("workspace: rx\n", "11:12: workspace: expected none or ro or rw"),
        ("output: {type: array}\n", "11:16: expected type: object, as structured results (MCP)"),
        ("output: {type: objekt}\n", "11:16: not a valid JSON Schema: output.type"),
        ("output: [x]\n", "11:9: output: expected a mapping, found a list"),
        (
            "output: {type: object}\noutput_format: text\n",
            "12:16: output describes JSON, and output_format is text",
        ),
        ("output_format: xml\n", "11:16: output_format: expected auto or text or json or binary"),
        ("grace: 2m\n", "11:8: expected a grace of at most 60 s"),
        ("concurrency: 0\n", "11:14: concurrency: expected a whole number from 1"),
        ("concurrency: {totl: 1}\n", "11:15: unknown key 'totl' in concurrency"),
        (
            "concurrency: {total: 1, per_session: 2}\n",
            "11:38: per_session: 2 is more than the 1 of all sessions together",
        ),
        ("on_overflow: drop\n", "11:14: on_overflow: expected truncate or kill"),
        ("timeout: -5s\n", "11:10: timeout: expected a duration"),
        ("timeout: true\n", "11:10: timeout: expected a duration, found true"),
        ("output_limit: 1.5M\n", "11:15: output_limit: expected a size"),
        ("annotations: {readOnly: true}\n", "11:15: unknown key 'readOnly' in annotations"),
        ("annotations: {readOnlyHint: 1}\n", "11:29: annotations.readOnlyHint: expected true"),
        ("secrets: TOKEN\n", "11:10: secrets: expected a list, found the text 'TOKEN'"),
        ("secrets: [{as: X}]\n", "11:11: missing key 'variable' in secrets[0]"),
        ("secrets: [{variable: 1X}]\n", "11:22: secrets[0].variable: '1X' is not a variable"),
        ("secrets: [{variable: A, delivery: argv}]\n", "11:35: secrets[0].delivery: expected env"),
        ("secrets: [A, A]\n", "11:14: 'A' is delivered twice"),
        ("secrets: [A, {variable: B, as: A}]\n", "11:14: 'A' is delivered twice"),
        ("secrets: [A, {variable: B, as: A, delivery: fd}]\n", "11:14: 'A' is delivered twice"),
        ("secrets: [A]\nenvironment: {A: x}\n", "11:11: A is a constant in environment already"),
        ("secrets: [{variable: A, as: a-b}]\n", "11:11: 'a…' is not a variable name"),
        ("secrets: [{variable: A, as: ../x, delivery: file}]\n", "11:11: '../x' is not a file na"),
        ("secrets: [{variable: A, as: .x, delivery: file}]\n", "11:11: '.x' is not a file name"),
        ("secrets: [{variable: A, as: NOTIFY_SOCKET}]\n", "11:11: NOTIFY_SOCKET is set by sandb"),
        ("secrets: [{variable: A, as: B, delivery: stdin}]\n", "11:11: 'as' has no meaning"),
        ("stdin: json\nsecrets: [{variable: A, delivery: stdin}]\n", "12:11: delivery: stdin doe"),
        ("environment: {LISTEN_FDS: '1'}\n", "11:15: LISTEN_FDS is set by sandboxd alone"),
        ("replaces: yes\n", "11:11: replaces: expected shipped"),
        ("digest: abc\n", "11:1: unknown key 'digest'"),
        ("shipped: true\n", "11:1: unknown key 'shipped'"),
        ("as_name: x\n", "11:1: unknown key 'as_name'"),
    ],
)
def test_a_mistake_in_a_manifest_is_told_with_its_place(
    config: Any, more: str, problem: str
) -> None:
    config.tool(more)
    assert config.problem().startswith(f"tools/echo/tool.yaml:{problem}")


def test_a_mistake_inside_the_schema_is_told_with_its_place(config: Any) -> None:
    config.tool(input="", argv="", more="")
    text = (config.path / "tools/echo/tool.yaml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(" ") and line]
    schema = "input:\n  type: object\n  properties:\n    n: {type: integr}\n"
    config.write("tools/echo/tool.yaml", "\n".join(kept) + "\n" + schema)
    assert config.problem().startswith(
        "tools/echo/tool.yaml:8:15: not a valid JSON Schema: input.properties.n.type"
    )


def test_a_template_mistake_is_told_at_its_element(config: Any) -> None:
    config.tool(argv='argv: [ok, "x{text}"]')
    assert config.problem().startswith("tools/echo/tool.yaml:10:12: argv[1]: 'x{text}': a place")
    config.tool(argv='argv: ["{txt}"]')
    assert config.problem() == (
        "tools/echo/tool.yaml:10:7: argv uses 'txt', which input has no property for"
    )
    assert config.hint() == "did you mean 'text'?"


def test_two_secrets_can_not_share_one_standard_input(config: Any) -> None:
    config.tool("secrets: [{variable: A, delivery: stdin}, {variable: B, delivery: stdin}]\n")
    assert "two secrets on one standard input" in config.problem()


def test_an_operator_who_sets_a_loader_variable_is_warned_what_it_does(config: Any) -> None:
    config.tool("environment: {LD_LIBRARY_PATH: /opt/lib}\n")
    (warning,) = [w for w in config.load().warnings if "echo" in w]
    assert "tools/echo/tool.yaml:11:15: LD_LIBRARY_PATH is set: the dynamic loader" in warning
    config.tool(
        "environment: {LD_LIBRARY_PATH: /opt/lib}\nallow_environment: {LD_LIBRARY_PATH: why}\n"
    )
    assert not [w for w in config.load().warnings if "echo" in w]
    config.tool("secrets: [{variable: PROXY, as: HTTPS_PROXY}]\n")
    (warning,) = [w for w in config.load().warnings if "echo" in w]
    assert "HTTPS_PROXY is set: it sends the tool's traffic" in warning


def test_a_variable_that_no_store_takes_is_refused(config: Any) -> None:
    config.tool("secrets: [{variable: GIT_TOKEN}]\n")
    assert "11:11: no store takes GIT_TOKEN: git runs programs" in config.problem()
    assert config.hint() == "name the variable otherwise: {variable: OTHER, as: GIT_TOKEN}"


def test_a_schema_that_takes_anything_more_is_a_warning(config: Any) -> None:
    config.tool(input="input: {type: object, properties: {text: {}}}", argv="argv: ['{text}']")
    text = (config.path / "tools/echo/tool.yaml").read_text()
    config.write(
        "tools/echo/tool.yaml",
        "\n".join(line for line in text.splitlines() if not line.startswith(" ")) + "\n",
    )
    assert any("takes arguments that its schema doesn't name" in w for w in config.load().warnings)


# Names


def test_two_tools_of_one_name_are_refused(config: Any) -> None:
    other = (config.path / "tools/echo/tool.yaml").read_text()
    config.write("tools/second/tool.yaml", other)
    config.program("tools/second/run")
    assert config.problem() == (
        "tools/second/tool.yaml:2:7: the tool name 'echo' is taken by tools/echo/tool.yaml"
    )


def test_a_shipped_tool_is_replaced_only_on_purpose(config: Any) -> None:
    config.tool(name="name: shell")
    config.agent(tools="[shell]")
    assert config.problem().endswith("the tool name 'shell' is taken by a shipped tool")
    assert "replaces: shipped" in config.hint()
    config.tool("replaces: shipped\n", name="name: shell")
    tool = config.load().tools["shell"]
    assert not tool.shipped
    assert tool.program == config.path / "tools/echo/run"


def test_replacing_what_is_not_there_is_refused(config: Any) -> None:
    config.tool("replaces: shipped\n")
    assert config.problem().endswith("no shipped tool 'echo' to replace")


# Programs


@pytest.mark.parametrize("program", ["../run", "./run", "a/../run", "~/run", "", "run/"])
def test_a_program_outside_its_folder_is_refused(config: Any, program: str) -> None:
    config.tool(program=f"program: '{program}'")
    assert "expected an absolute path or one inside the tool's folder" in config.problem()


def test_a_missing_program_is_told_with_the_nearest_name(config: Any) -> None:
    config.tool(program="program: runn")
    assert f"no file {config.path}/tools/echo/runn" in config.problem() or "no file" in (
        config.problem()
    )
    assert config.hint() == "did you mean 'run'?"


def test_a_link_out_of_the_folder_is_refused(config: Any) -> None:
    (config.path / "tools/echo/link").symlink_to("/bin/sh")
    config.tool(program="program: link")
    assert "is or is below a symbolic link" in config.problem()
    (config.path / "tools/echo/dir").symlink_to("/bin")
    config.tool(program="program: dir/sh")
    assert "is or is below a symbolic link" in config.problem()


def test_an_absolute_program_is_recorded_by_its_real_path(config: Any) -> None:
    config.tool(program="program: /bin/sh")
    tool = config.load().tools["echo"]
    assert tool.program == Path("/bin/sh").resolve()
    assert tool.digest == hashlib.sha256(Path("/bin/sh").read_bytes()).hexdigest()


def test_a_program_that_can_not_run_is_refused(config: Any) -> None:
    (config.path / "tools/echo/run").chmod(0o644)
    assert config.problem().endswith("tools/echo/run is not executable")
    config.tool("runtime: python\n")
    assert config.load(), "python reads it, so it needs no x bit"
    config.tool(program="program: sub")
    (config.path / "tools/echo/sub").mkdir()
    assert config.problem().endswith("tools/echo/sub is not a regular file")


def test_a_setuid_program_is_refused(config: Any) -> None:
    (config.path / "tools/echo/run").chmod(0o4755)
    assert config.problem().endswith("is setuid or setgid")


@pytest.mark.parametrize("name", ["tools/echo", "tools/echo/run", "tools/echo/helper.py"])
def test_a_tool_that_others_can_write_is_refused(config: Any, name: str) -> None:
    config.write("tools/echo/helper.py", "x = 1\n")
    path = config.path / name
    path.chmod(path.stat().st_mode | 0o002)
    assert config.problem().endswith(f"{name} is writable by everybody")


def test_an_absolute_program_below_a_writable_directory_is_refused(
    config: Any, tmp_path: Path
) -> None:
    place = tmp_path / "open"
    place.mkdir()
    config.tool(program=f"program: {place}/run")
    config.program(str(place / "run"))
    assert config.load()
    place.chmod(0o777)
    assert config.problem().endswith(f"{place} is writable by everybody")
    place.chmod(0o1777)
    assert config.load(), "with the sticky bit nobody else can replace it"


def test_a_program_that_changed_after_loading_is_not_run(config: Any) -> None:
    loaded = config.load()
    tool = loaded.tools["echo"]
    check_program(tool)
    decision = decide(loaded, loaded.agents["coder"], "echo", {"text": "x"})
    assert decision.tool is not None
    check_program(decision.tool)
    config.program("tools/echo/run", "#!/bin/sh\nexfiltrate\n")
    with pytest.raises(Denied, match="changed after the configuration was loaded") as caught:
        check_program(tool)
    assert caught.value.rule == "tools/echo/tool.yaml:4 program"
    (config.path / "tools/echo/run").unlink()
    with pytest.raises(Denied, match="can't be read: No such file"):
        check_program(tool)
