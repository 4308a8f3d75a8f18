"""What may be a name, and why not."""

from __future__ import annotations

import os
import subprocess
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import names
from sandboxd.errors import Invalid


@pytest.mark.parametrize("name", ["A", "_", "api_key", "X9", "A" * 128])
def test_a_good_variable_name_is_returned(name: str) -> None:
    assert names.variable_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "9A", "A-B", "A B", "A=B", "A\n", "\nA", "Ä", "A\0", "A" * 129, "A.B"]
)
def test_a_bad_variable_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(Invalid, match="is not a variable name") as caught:
        names.variable_name(name)
    assert "^[A-Za-z_][A-Za-z0-9_]{0,127}$" in caught.value.hint


def test_a_value_in_the_place_of_a_name_is_not_repeated_in_the_refusal() -> None:
    for pasted in ("sk-live-hunter2", "correct horse battery staple", "AbCdEfGhIjKlMnOpQr+9/x="):
        with pytest.raises(Invalid) as caught:
            names.variable_name(pasted)
        assert pasted not in str(caught.value) + caught.value.hint
        assert pasted[13:] not in str(caught.value)


@given(st.text(max_size=140))
def test_a_variable_name_is_accepted_exactly_when_the_rule_says_so(name: str) -> None:
    first = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
    good = (
        0 < len(name) <= 128 and name[0] in first and all(c in first + "0123456789" for c in name)
    )
    try:
        accepted = names.variable_name(name) == name
    except Invalid:
        accepted = False
    assert accepted is good


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("LD_PRELOAD", "dynamic loader"),
        ("ld_preload", "dynamic loader"),
        ("BASH_ENV", "shell"),
        ("BASH_FUNC_x", "shell"),
        ("PYTHONPATH", "Python"),
        ("NODE_OPTIONS", "Node.js"),
        ("npm_config_script_shell", "npm"),
        ("PERL5OPT", "Perl"),
        ("RUBYOPT", "Ruby"),
        ("JAVA_TOOL_OPTIONS", "JVM"),
        ("DOTNET_STARTUP_HOOKS", ".NET"),
        ("GIT_SSH_COMMAND", "git"),
        ("LUA_INIT_5_4", "Lua"),
        ("https_proxy", "traffic"),
        ("ANY_PROXY", "traffic"),
        ("NOTIFY_SOCKET", "daemon"),
        ("LISTEN_FDS", "daemon"),
        ("CREDENTIALS_DIRECTORY", "daemon"),
        ("SANDBOXD_SOCKET", "daemon"),
        ("SSLKEYLOGFILE", "keys of every connection"),
        ("OPENSSL_CONF", "OpenSSL"),
        ("SSL_CERT_FILE", "certificate"),
        ("HOSTALIASES", "host names"),
        ("XDG_CONFIG_HOME", "configuration"),
        ("PATH", "which programs"),
    ],
)
def test_a_variable_that_steers_programs_is_told_with_what_it_does(name: str, part: str) -> None:
    assert part in names.loader_reason(name)


@pytest.mark.parametrize("name", ["API_KEY", "GITHUB_TOKEN", "PROXY", "DATABASE_URL", "LDAP_BIND"])
def test_an_ordinary_variable_steers_nothing(name: str) -> None:
    assert names.loader_reason(name) == ""


@pytest.mark.parametrize("excess", [0, 1])
def test_the_limit_of_a_value_is_the_kernels_own(excess: int) -> None:
    value = b"v" * (names.MAX_ENV_STRING - len("BIG=") - 1 + excess)
    command = ["/bin/sh", "-c", "exit 7"]
    if excess:
        with pytest.raises(OSError, match="Argument list too long"):
            subprocess.run(command, env={b"BIG": value}, check=False)
        with pytest.raises(Invalid, match="BIG is 1 bytes too long"):
            names.variable_value("BIG", value)
    else:
        assert subprocess.run(command, env={b"BIG": value}, check=False).returncode == 7
        assert names.variable_value("BIG", value) == value


@pytest.mark.parametrize("value", [b"hunter2\0", b"hunter2" * 20_000])
def test_a_refused_value_is_in_no_frame_of_the_refusal(value: bytes) -> None:
    def caller() -> None:
        names.variable_value("N", value)

    with pytest.raises(Invalid) as caught:
        caller()
    inner = traceback.TracebackException.from_exception(caught.value, capture_locals=True).stack[-1]
    assert inner.name == "variable_value"
    assert inner.locals is not None
    assert "hunter2" not in repr(inner.locals)
    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_every_byte_but_nul_may_be_in_a_value_and_it_may_be_empty() -> None:
    everything = bytes(range(1, 256))
    assert names.variable_value("N", everything) == everything
    assert names.variable_value("N", b"") == b""


@pytest.mark.parametrize("slug", ["a", "0", "my-agent-2", "a" * 100, "a--b"])
def test_a_good_agent_slug_is_returned(slug: str) -> None:
    assert names.agent_slug(slug) == slug


@pytest.mark.parametrize(
    "slug", ["", "-a", "a-", "A", "a_b", "a/b", "..", "a" * 101, "a\n", "é", "a b"]
)
def test_a_bad_agent_slug_is_refused(slug: str) -> None:
    with pytest.raises(Invalid, match="is not a slug"):
        names.agent_slug(slug)


@pytest.mark.parametrize("name", ["a", "http_request", "sql-query", "t" * 64])
def test_a_good_tool_name_is_returned(name: str) -> None:
    assert names.tool_name(name) == name


@pytest.mark.parametrize("name", ["", "_a", "9a", "A", "a/b", "a.b", "t" * 65, "a\n"])
def test_a_bad_tool_name_is_refused(name: str) -> None:
    with pytest.raises(Invalid, match="is not a tool name"):
        names.tool_name(name)


def test_a_new_session_id_is_a_session_id_and_never_the_same() -> None:
    made = {names.new_session_id() for _ in range(100)}
    assert len(made) == 100
    assert all(names.session_id(each) == each for each in made)


@pytest.mark.parametrize(
    "name", ["", "s-", "s-0123456789abcde", "s-0123456789ABCDEF", "s-" + "0" * 17]
)
def test_a_bad_session_id_is_refused(name: str) -> None:
    with pytest.raises(Invalid, match="is not a session id"):
        names.session_id(name)


def test_untrusted_text_is_shown_escaped_and_cut() -> None:
    assert names.shown("a\x1b[2J\nb") == r"'a\x1b[2J\nb'"
    assert names.shown("ab\u202ecd\u200b") == r"'ab\u202ecd\u200b'"
    assert names.shown(os.fsdecode(b"\xff")) == r"'\udcff'"
    assert names.shown("x" * 100) == "'" + "x" * 79 + "…'"
