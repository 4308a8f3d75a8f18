"""What may be a name: variables, agents, tools, sessions. Pure checks with reasons.

A check returns the name or raises :class:`~sandboxd.errors.Invalid` with the rule that it breaks.
"""

from __future__ import annotations

import re
import secrets

from sandboxd.errors import Invalid

__all__ = [
    "agent_slug",
    "loader_reason",
    "mcp_tool_name",
    "new_session_id",
    "server_name",
    "session_id",
    "tool_name",
    "variable_name",
    "variable_value",
]

#: Longest single ``NAME=VALUE`` string that execve(2) takes, with its final NUL
#: (MAX_ARG_STRLEN = 32 pages, include/uapi/linux/binfmts.h).
MAX_ENV_STRING = 131_072

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_TOOL = re.compile(r"[a-z][a-z0-9_-]{0,63}|(?=.{1,64}\Z)[a-z][a-z0-9_-]*?__[A-Za-z0-9_-]+")
_SERVER = re.compile(r"(?=.{1,32}\Z)[a-z][a-z0-9]*(?:[_-][a-z0-9]+)*")
_MCP_TOOL = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_SESSION = re.compile(r"s-[0-9a-f]{16}")

_LOADER = "the dynamic loader obeys it, so it can run code inside the tool before its first line"
_SHELL = "a shell runs what it names or holds before the script that the tool meant to run"
_PYTHON = "the Python interpreter loads or changes code because of it"
_GIT = "git runs programs, hooks or transports because of it"
_DAEMON = "it belongs to the daemon and its service manager, never to a tool"
_CONFIG = "programs read configuration that runs commands from where it points"
_TRUST = "it changes which certificate authorities the tool trusts"
_NODE = "Node.js and npm load modules, flags or programs because of it"
_RESOLVER = "it changes how the C library resolves host names"
_PROXY = "it sends the tool's traffic, credentials included, to a host of somebody's choice"

_LOADER_PREFIXES: tuple[tuple[str, str], ...] = (
    ("LD_", _LOADER),
    ("DYLD_", _LOADER),
    ("GLIBC_", _LOADER),
    ("MALLOC_", _LOADER),
    ("BASH_FUNC_", _SHELL),
    ("PYTHON", _PYTHON),
    ("PERL5", "the Perl interpreter loads code because of it"),
    ("RUBY", "the Ruby interpreter loads code because of it"),
    ("DOTNET_", "the .NET runtime loads startup hooks because of it"),
    ("COR_", "the .NET runtime loads a profiler because of it"),
    ("CORECLR_", "the .NET runtime loads a profiler because of it"),
    ("GIT_", _GIT),
    ("LUA_INIT", "the Lua interpreter runs it"),
    ("LUA_PATH", "the Lua interpreter loads code because of it"),
    ("LUA_CPATH", "the Lua interpreter loads code because of it"),
    ("NPM_CONFIG_", _NODE),
    ("LISTEN_", _DAEMON),
    ("SANDBOXD_", _DAEMON),
)

_LOADER_NAMES: dict[str, str] = {
    "BASH_ENV": _SHELL,
    "ENV": _SHELL,
    "SHELLOPTS": _SHELL,
    "BASHOPTS": _SHELL,
    "PS4": _SHELL,
    "PROMPT_COMMAND": _SHELL,
    "IFS": "it changes how a shell splits words, so an argument can become several",
    "PATH": "it decides which programs the tool runs",
    "HOME": "dotfiles below it are read as configuration by most programs",
    "GCONV_PATH": _LOADER,
    "NLSPATH": _LOADER,
    "LOCPATH": _LOADER,
    "GETCONF_DIR": _LOADER,
    "HOSTALIASES": _RESOLVER,
    "LOCALDOMAIN": _RESOLVER,
    "RES_OPTIONS": _RESOLVER,
    "RESOLV_HOST_CONF": _RESOLVER,
    "TZDIR": "the C library reads time zone files from it",
    "NODE_OPTIONS": _NODE,
    "NODE_PATH": _NODE,
    "NODE_EXTRA_CA_CERTS": _TRUST,
    "NODE_TLS_REJECT_UNAUTHORIZED": "it turns off the check of certificates",
    "SSL_CERT_FILE": _TRUST,
    "SSL_CERT_DIR": _TRUST,
    "CURL_CA_BUNDLE": _TRUST,
    "REQUESTS_CA_BUNDLE": _TRUST,
    "SSLKEYLOGFILE": "TLS libraries write the keys of every connection to it",
    "OPENSSL_CONF": "OpenSSL loads engines and providers from it",
    "OPENSSL_ENGINES": "OpenSSL loads engines from it",
    "OPENSSL_MODULES": "OpenSSL loads providers from it",
    "PERLLIB": "the Perl interpreter loads code because of it",
    "GEM_PATH": "the Ruby interpreter loads code because of it",
    "GEM_HOME": "the Ruby interpreter loads code because of it",
    "JAVA_TOOL_OPTIONS": "the JVM loads agents and flags from it",
    "_JAVA_OPTIONS": "the JVM loads agents and flags from it",
    "JDK_JAVA_OPTIONS": "the JVM loads agents and flags from it",
    "CLASSPATH": "the JVM loads code because of it",
    "PHPRC": "PHP loads its configuration from it",
    "PHP_INI_SCAN_DIR": "PHP loads its configuration from it",
    "XDG_CONFIG_HOME": _CONFIG,
    "XDG_CONFIG_DIRS": _CONFIG,
    "ZDOTDIR": _SHELL,
    "HGRCPATH": _CONFIG,
    "LESSOPEN": "less runs the program it names",
    "LESSCLOSE": "less runs the program it names",
    "MANPAGER": "programs run what it names",
    "RSYNC_RSH": "rsync runs the program it names",
    "SSH_ASKPASS": "ssh runs the program it names",
    "SSH_AUTH_SOCK": "it hands the tool an authentication agent",
    "EDITOR": "programs run what it names",
    "VISUAL": "programs run what it names",
    "PAGER": "programs run what it names",
    "BROWSER": "programs run what it names",
    "NOTIFY_SOCKET": _DAEMON,
    "WATCHDOG_USEC": _DAEMON,
    "WATCHDOG_PID": _DAEMON,
    "CREDENTIALS_DIRECTORY": _DAEMON,
    "HTTP_PROXY": _PROXY,
    "HTTPS_PROXY": _PROXY,
    "ALL_PROXY": _PROXY,
    "FTP_PROXY": _PROXY,
    "NO_PROXY": _PROXY,
}


def variable_name(name: str) -> str:
    """An environment variable's name: a letter or ``_``, then letters, digits, ``_``; 128 at most.

    The refusal shows no more than the first characters: what stands where a name should be is
    often a value (a mistyped command, the second line of a multi-line value in a file).
    """
    if not _VARIABLE.fullmatch(name):
        start = re.match(r"[A-Za-z0-9_]{0,12}", name)
        begin = start[0] if start else ""
        raise Invalid(
            f"{shown(begin + ('…' if len(name) > len(begin) else ''))} is not a variable name",
            hint="use a letter or _, then letters, digits or _, 128 at most: "
            "^[A-Za-z_][A-Za-z0-9_]{0,127}$",
        )
    return name


def loader_reason(name: str) -> str:
    """Why a variable of this name steers the loader, an interpreter or the daemon; "" if not.

    The comparison ignores case: ``http_proxy`` and ``HTTP_PROXY`` do the same.
    """
    upper = name.upper()
    if upper in _LOADER_NAMES:
        return _LOADER_NAMES[upper]
    if upper.endswith("_PROXY"):
        return _PROXY
    for prefix, reason in _LOADER_PREFIXES:
        if upper.startswith(prefix):
            return reason
    return ""


def variable_value(name: str, value: bytes) -> bytes:
    """A value that execve(2) can carry: no NUL byte, and ``NAME=VALUE`` within 128 KiB."""
    has_nul = b"\0" in value
    size = len(name) + 1 + len(value) + 1
    if not has_nul and size <= MAX_ENV_STRING:
        return value
    del value  # a traceback that shows locals must not show it
    if has_nul:
        raise Invalid(
            f"the value of {name} holds a NUL byte, which no environment can carry",
            hint="encode binary data, for example as base64, and let the tool decode it",
        )
    raise Invalid(
        f"{name} is {size - MAX_ENV_STRING:,} bytes too long for the kernel",
        hint=f"NAME=VALUE and its final NUL may be {MAX_ENV_STRING:,} bytes (execve(2), "
        "MAX_ARG_STRLEN); keep the large part in a file that a tool mounts",
    )


def agent_slug(name: str) -> str:
    """An agent's slug: lower-case letters, digits and inner hyphens, at most 100."""
    if len(name) > 100 or not _SLUG.fullmatch(name):
        raise Invalid(
            f"{shown(name)} is not a slug",
            hint="use lower-case letters, digits and inner hyphens, 100 at most: "
            "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        )
    return name


def tool_name(name: str) -> str:
    """A tool's name: a lower-case letter, then lower-case letters, digits, ``_``, ``-``; to 64.

    Behind a server's name and ``__`` an MCP server's own name for it, which has capitals too.
    """
    if not _TOOL.fullmatch(name):
        raise Invalid(
            f"{shown(name)} is not a tool name",
            hint="use a lower-case letter, then lower-case letters, digits, _ or -, 64 at most",
        )
    return name


def server_name(name: str) -> str:
    """An MCP server's name: as a tool's, but 32 at most and no two ``_`` or ``-`` in a row."""
    if not _SERVER.fullmatch(name):
        raise Invalid(
            f"{shown(name)} is not a server name",
            hint="use lower-case letters and digits, with single _ or - between them, 32 at most",
        )
    return name


def mcp_tool_name(name: str) -> str:
    """A tool's name as an MCP server says it (MCP 2025-11-25, "Tool Names")."""
    if not _MCP_TOOL.fullmatch(name):
        raise Invalid(
            f"{shown(name)} is not the name of an MCP tool",
            hint="write it as the server does: letters, digits, _, - and .; without a prefix",
        )
    return name


def new_session_id() -> str:
    """A fresh session id, ``s-`` and 16 hex digits from the OS generator."""
    return "s-" + secrets.token_hex(8)


def session_id(name: str) -> str:
    """A whole session id as :func:`new_session_id` makes them."""
    if not _SESSION.fullmatch(name):
        raise Invalid(f"{shown(name)} is not a session id", hint="see: sandboxctl session list")
    return name


def shown(text: str, limit: int = 80) -> str:
    """Untrusted text made safe for a terminal: escaped, quoted and cut to ``limit`` characters."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return (
        "'"
        + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        + "'"
    )
