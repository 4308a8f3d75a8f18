"""Send one HTTP request that carries a credential the caller never sees.

Reads one JSON object on stdin (the arguments that tool.yaml describes) and writes one on stdout.
The environment holds what the operator set for the agent:

``HTTP_REQUEST_TOKEN``
    the credential;
``HTTP_REQUEST_HOSTS``
    the origins it may go to, ``scheme://host[:port]`` separated by spaces or commas;
``HTTP_REQUEST_HEADER``
    optional, how it is sent: ``Name: value with {token} or {token_base64}``.

Exit status: 0 answered (whatever the HTTP status), 1 failed, 2 wrong arguments or settings,
4 refused. A message goes to stderr and never holds the credential.
"""

from __future__ import annotations

import base64
import codecs
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import sys
import time
import urllib.parse
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
TIMEOUT = 30.0  # seconds for the whole exchange, redirects included
MAX_REDIRECTS = 5
MAX_BYTES, DEFAULT_BYTES = 1_048_576, 262_144

#: Headers that frame the message, name its receiver or would let a server undo our redaction.
_HOP = "it belongs to the connection, not to the request (RFC 9110, section 7.6.1)"
FORBIDDEN = {
    "host": "it is made from the url",
    "accept-encoding": "the answer must be readable to be checked for the credential",
    "range": "a part of an answer can't be checked for the credential",
    "connection": _HOP,
    "content-length": _HOP,
    "expect": _HOP,
    "http2-settings": _HOP,
    "keep-alive": _HOP,
    "proxy-authorization": _HOP,
    "proxy-connection": _HOP,
    "te": _HOP,
    "trailer": _HOP,
    "transfer-encoding": _HOP,
    "upgrade": _HOP,
}
#: Headers by which some servers take another method or path than the request line says.
OVERRIDES = (
    *("x-http-method", "x-http-method-override", "x-method-override"),
    *("x-original-url", "x-rewrite-url"),
)

#: What the caller learns of the answer's headers: nothing that sets state or names sessions.
SHOWN = re.compile(
    r"content-(type|length|language|disposition|range)|etag|last-modified|location|link|date|"
    r"retry-after|cache-control|allow|deprecation|sunset|(x-)?ratelimit-[a-z-]+|"
    r"x-(request|correlation)-id|x-(total|page|next-page|per-page|total-pages)(-count)?",
)
REDIRECTS = (301, 302, 303, 307, 308)

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")  # RFC 9110, section 5.6.2
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")
Origin = tuple[str, str, int]


class Stop(Exception):
    """Ends the program with a status, a message and a hint."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.hint = status, message, hint


def main() -> int:
    settings = Settings(os.environ)
    try:
        result = run(read_arguments(), settings)
    except OSError as error:  # ssl.SSLError and timeouts are OSErrors
        raise Stop(1, f"the request failed: {reason(error)}") from None
    except http.client.HTTPException as error:
        raise Stop(1, f"the answer is not HTTP as we know it: {type(error).__name__}") from None
    json.dump(result, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")
    return 0


def run(arguments: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The answer as a JSON object; raises :class:`Stop` for what is refused."""
    method = arguments.get("method", "GET")
    if method not in METHODS:
        raise Stop(2, "unknown method", f"use one of {', '.join(METHODS)}")
    origin, target = parse_url(text(arguments, "url"))
    headers, body = request_parts(arguments, settings.header_name)
    limit = arguments.get("max_bytes", DEFAULT_BYTES)
    if type(limit) is not int or not 1 <= limit <= MAX_BYTES:
        raise Stop(2, f"max_bytes must be a whole number from 1 to {MAX_BYTES}")
    if origin not in settings.origins:
        raise Stop(
            4,
            f"{origin_text(origin)} is not an origin that the credential may go to",
            "the operator lists origins as scheme://host[:port] in HTTP_REQUEST_HOSTS",
        )
    deadline = time.monotonic() + TIMEOUT
    followed = 0
    while True:
        answer = exchange(origin, method, target, headers, body, settings, limit, deadline)
        location = answer.pop("_location")
        answer["url"] = origin_text(origin) + target
        if answer["status"] not in REDIRECTS or not location:
            return answer
        if not arguments.get("follow_redirects", True):
            return answer
        try:
            next_origin, next_target = parse_url(
                urllib.parse.urljoin(origin_text(origin) + target, location)
            )
        except Stop as error:
            answer["redirect"] = f"not followed: {error.message}"
            return answer
        if next_origin != origin:
            answer["redirect"] = "not followed: it leads to another origin"
            return answer
        if followed == MAX_REDIRECTS:
            raise Stop(1, f"more than {MAX_REDIRECTS} redirects")
        followed += 1
        target = next_target
        if answer["status"] == 303 or (answer["status"] in (301, 302) and method == "POST"):
            if method != "HEAD":  # RFC 9110, section 15.4.4
                method = "GET"
            body = None
            headers = {n: v for n, v in headers.items() if n.lower() != "content-type"}


class Settings:
    """What the operator set, checked. Its fields never reach a message."""

    def __init__(self, environ: os._Environ[str] | dict[str, str]) -> None:
        token = environ.get("HTTP_REQUEST_TOKEN", "")
        if not token:
            raise Stop(2, "HTTP_REQUEST_TOKEN is not set for this agent")
        if not re.fullmatch(r"[\x20-\x7e]+", token) or token != token.strip():
            raise Stop(
                2,
                "HTTP_REQUEST_TOKEN holds a character that no header can carry",
                "a trailing newline? set it again without",
            )
        self.origins = parse_origins(environ.get("HTTP_REQUEST_HOSTS", ""))
        template = environ.get("HTTP_REQUEST_HEADER") or "Authorization: Bearer {token}"
        name, colon, value = template.partition(":")
        value = value.strip()
        if (
            not colon
            or not _TOKEN.fullmatch(name)
            or name.lower() in FORBIDDEN
            or not re.fullmatch(r"[\x20-\x7e]+", value)
            or ("{token}" not in value and "{token_base64}" not in value)
        ):
            raise Stop(
                2,
                "HTTP_REQUEST_HEADER is not a header with {token} or {token_base64} in it",
                "for example: X-Api-Key: {token}",
            )
        encoded = base64.b64encode(token.encode()).decode()
        self.header_name = name
        self.header_value = re.sub(
            r"\{token(_base64)?\}", lambda m: encoded if m[1] else token, value
        )
        spellings = {token, encoded, json.dumps(token)[1:-1], urllib.parse.quote(token, safe="")}
        self._hidden = sorted((s.encode() for s in spellings), key=len, reverse=True)
        self.longest = len(self._hidden[0])

    def hide(self, data: bytes, cut: bool = False) -> bytes:
        """``data`` without the credential: a server may well reflect what it was sent.

        ``cut``: more followed, so an end that could begin the credential goes too.
        """
        for value in self._hidden:
            data = data.replace(value, b"[redacted:HTTP_REQUEST_TOKEN]")
        if cut:
            sizes = range(self.longest - 1, 0, -1)
            ends = (n for n in sizes if any(data.endswith(v[:n]) for v in self._hidden))
            data = data[: len(data) - next(ends, 0)]
        return data


def parse_origins(listed: str) -> set[Origin]:
    origins = set()
    for number, entry in enumerate(re.split(r"[\s,]+", listed.strip(" \t\r\n,")), 1):
        if not entry:
            raise Stop(2, "HTTP_REQUEST_HOSTS is not set for this agent")
        try:
            origin, target = parse_url(entry)
        except Stop:
            target = "not an origin"
        if target != "/" or "?" in entry or "#" in entry:
            raise Stop(
                2,
                f"entry {number} of HTTP_REQUEST_HOSTS is not an origin",
                "write scheme://host or scheme://host:port, without path or wildcard",
            )
        origins.add(origin)
    return origins


def parse_url(url: str) -> tuple[Origin, str]:
    """The origin (scheme, host, port) and the request target; anything doubtful is refused.

    Two parsers that disagree about a URL are how an allowlist is passed by (RFC 3986 leaves
    spaces, backslashes and user information to taste), so only the plain form is taken.
    """
    if len(url) > 8192 or not re.fullmatch(r"[\x21-\x7e]+", url) or set(url) & set('\\"<>^`{|}'):
        raise Stop(2, "the url holds characters that must be percent-encoded, or is too long")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        raise Stop(2, "the url is not well formed") from None
    if parts.scheme not in ("http", "https"):
        raise Stop(2, "the url must start with http:// or https://")
    if "@" in parts.netloc:
        raise Stop(2, "the url must not hold a user name or password")
    host = (parts.hostname or "").lower()
    if parts.netloc.startswith("["):
        try:
            host = f"[{ipaddress.IPv6Address(host).compressed}]"
        except ValueError:
            raise Stop(2, "the url's host is not an IPv6 address") from None
    elif not _HOST.fullmatch(host):
        raise Stop(2, "the url's host is not a plain host name", "use the xn-- form for others")
    if parts.netloc.endswith(":") or port == 0:
        raise Stop(2, "the url's port is not a number from 1 to 65535")
    path = parts.path or "/"
    segments = re.split(r"[/\\]", urllib.parse.unquote(path, "latin-1"))
    if "." in segments or ".." in segments:
        raise Stop(2, "the url's path must not hold . or .. segments")
    target = path + (f"?{parts.query}" if parts.query else "")
    return (parts.scheme, host, port or (443 if parts.scheme == "https" else 80)), target


def origin_text(origin: Origin) -> str:
    scheme, host, port = origin
    default = 443 if scheme == "https" else 80
    return f"{scheme}://{host}" + (f":{port}" if port != default else "")


def request_parts(
    arguments: dict[str, Any], credential: str
) -> tuple[dict[str, str], bytes | None]:
    """The caller's headers and body, checked."""
    given = arguments.get("headers", {})
    if not isinstance(given, dict) or len(given) > 64:
        raise Stop(2, "headers must be an object of at most 64 names")
    headers: dict[str, str] = {}
    seen = set()
    for name, value in given.items():
        # Many servers fold "_" into "-" (CGI, WSGI), so X_Api_Key would be X-Api-Key to them.
        plain = name.lower().replace("_", "-")
        if not _TOKEN.fullmatch(name):
            raise Stop(2, "a header's name holds a character that no name may have")
        if not isinstance(value, str) or not re.fullmatch(r"[\t\x20-\x7e]{0,8192}", value):
            raise Stop(
                4,
                f"the value of header {name} holds a line break or another character "
                "that no header may have, or is too long",
            )
        if plain == credential.lower().replace("_", "-"):
            raise Stop(4, f"header {name} carries the credential; the tool sets it itself")
        if plain in FORBIDDEN:
            raise Stop(4, f"header {name} can't be chosen: {FORBIDDEN[plain]}")
        if plain in OVERRIDES:
            raise Stop(4, f"header {name} can't be chosen: it hides the request from the policy")
        if plain in seen:
            raise Stop(2, f"header {name} is given twice")
        seen.add(plain)
        headers[name] = value.strip()
    body: bytes | None = None
    if "json" in arguments:
        if "body" in arguments:
            raise Stop(2, "give body or json, not both")
        body = json.dumps(arguments["json"], ensure_ascii=False, allow_nan=False).encode()
        if "content-type" not in seen:
            headers["Content-Type"] = "application/json"
    elif "body" in arguments:
        body = text(arguments, "body").encode()
    return headers, body


def exchange(
    origin: Origin,
    method: str,
    target: str,
    headers: dict[str, str],
    body: bytes | None,
    settings: Settings,
    limit: int,
    deadline: float,
) -> dict[str, Any]:
    """One request and its answer, read no further than needed."""
    connection = connect(origin, deadline)
    sock: socket.socket = connection.sock  # the connection forgets it when the server closes
    try:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if "user-agent" not in {n.lower() for n in headers}:
            connection.putheader("User-Agent", "sandboxd-http-request/1")
        connection.putheader(settings.header_name, settings.header_value)
        if body is not None or method in ("POST", "PUT", "PATCH"):
            connection.putheader("Content-Length", str(len(body or b"")))
        connection.endheaders(body)
        response = connection.getresponse()
        # Past the limit by the longest spelling: a credential across the cut is seen whole.
        raw, more = read(response, sock, limit + settings.longest, deadline)
    finally:
        connection.close()
    shown = settings.hide(raw, more)
    answer: dict[str, Any] = {
        "status": response.status,
        "reason": hidden_text(response.reason, settings),
        "headers": {
            name.lower(): hidden_text(value, settings)
            for name, value in response.getheaders()
            if SHOWN.fullmatch(name.lower())
        },
        "truncated": more or len(raw) > limit,
        "_location": response.getheader("Location"),
    }
    answer |= body_fields(
        shown[:limit], response.headers.get_content_charset(), bool(answer["truncated"]), settings
    )
    return answer


def connect(origin: Origin, deadline: float) -> http.client.HTTPConnection:
    """A connection to an address that was checked, with the name kept for TLS and Host."""
    scheme, host, port = origin
    bare = host.strip("[]")
    found = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        check_address(bare, str(address[0]))
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(left(deadline))
            sock.connect(address)
            if scheme == "https":
                context = ssl.create_default_context()
                sock = context.wrap_socket(sock, server_hostname=bare)
        except OSError as error:
            sock.close()
            failure = error
            continue
        connection = http.client.HTTPConnection(host, port)
        if scheme == "https":  # so that Host leaves out the port that https implies
            connection.default_port = 443
        connection.sock = sock
        return connection
    raise failure or OSError("the name has no address")


def check_address(host: str, address: str) -> None:
    """Refuse a name that leads to this machine or to a metadata service (DNS rebinding).

    An address that the operator wrote out, or ``localhost``, is what the operator meant.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    written = host == "localhost" or host.replace(":", "").replace(".", "").isdigit() or ":" in host
    local = ip.is_loopback or ip.is_unspecified
    if (local and not written) or (ip.is_link_local and not written) or ip.is_multicast:
        raise Stop(4, "the url's host name leads to a loopback or link-local address")
    if not written and ip == ipaddress.ip_address("fd00:ec2::254"):
        raise Stop(4, "the url's host name leads to a metadata service")


def read(
    response: http.client.HTTPResponse, sock: socket.socket, limit: int, deadline: float
) -> tuple[bytes, bool]:
    """At most ``limit`` decoded bytes, and whether there were more."""
    coding = (response.getheader("Content-Encoding") or "identity").strip().lower()
    feed: Callable[[bytes, int], bytes]
    if coding in ("gzip", "x-gzip", "deflate"):
        decoder = zlib.decompressobj(wbits=47)  # 32 + 15: zlib or gzip, told by its header

        def feed(data: bytes, room: int) -> bytes:
            return decoder.decompress(data, room)
    elif coding == "identity":

        def feed(data: bytes, room: int) -> bytes:
            return data
    else:
        raise Stop(1, "the server chose a content encoding that nobody asked for")
    out = bytearray()
    while len(out) <= limit:
        sock.settimeout(left(deadline))
        chunk = response.read1(65_536)
        if not chunk:
            if response.length:
                raise Stop(1, "the server closed before the end of its answer")
            return bytes(out), False
        try:
            out += feed(chunk, limit + 1 - len(out))
        except zlib.error:
            raise Stop(1, "the answer's content encoding is damaged") from None
    return bytes(out[:limit]), True


def body_fields(data: bytes, charset: str | None, cut: bool, settings: Settings) -> dict[str, str]:
    """``body`` for text, ``body_base64`` for anything else."""
    for encoding in (charset or "utf-8", "utf-8"):
        try:
            decoder = codecs.getincrementaldecoder(encoding)()
            decoded = decoder.decode(
                data, final=not cut
            )  # a character split by the cut is left out
        except (UnicodeDecodeError, LookupError):
            continue
        if "\0" not in decoded:
            # Once more as text: UTF-16 spells the credential in other bytes.
            return {"body": settings.hide(decoded.encode("utf-8", "replace"), cut).decode()}
    return {"body_base64": base64.b64encode(data).decode()}


def hidden_text(value: str, settings: Settings) -> str:
    return settings.hide(value.encode("latin-1", "replace")).decode("latin-1")


def left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError(f"no whole answer within {TIMEOUT:.0f} seconds")
    return seconds


def reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted ({error.verify_message})"
    if isinstance(error, socket.gaierror):
        return "the host name can't be resolved"
    return error.strerror or str(error) or type(error).__name__


def read_arguments() -> dict[str, Any]:
    try:
        arguments = json.load(sys.stdin)
    except (ValueError, RecursionError):
        raise Stop(2, "stdin is not one JSON object") from None
    if not isinstance(arguments, dict):
        raise Stop(2, "stdin is not one JSON object")
    known = ("method", "url", "headers", "body", "json", "follow_redirects", "max_bytes")
    if extra := sorted(set(arguments) - set(known)):
        raise Stop(2, f"unknown argument {extra[0][:40]!a}")
    return arguments


def text(arguments: dict[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise Stop(2, f"{name} must be given as text")
    return value


def end(status: int, message: str, hint: str = "") -> NoReturn:
    sys.stderr.write(f"http_request: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    sys.exit(status)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Stop as stop:
        end(stop.status, stop.message, stop.hint)
    except Exception as error:  # noqa: BLE001  # a traceback could show the credential
        end(1, f"unexpected {type(error).__name__}")
