"""tools/http_request against real servers: where the credential goes, and where it never does."""

from __future__ import annotations

import base64
import gzip
import json
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

TOKEN = "tok-9f8e7d6c5b4a3210"


@pytest.fixture
def call(run_tool: Any, site: Any) -> Callable[..., Any]:
    """Call the tool for an agent that may use ``site``."""

    def run(arguments: Mapping[str, Any], **environment: str) -> Any:
        base = {"HTTP_REQUEST_TOKEN": TOKEN, "HTTP_REQUEST_HOSTS": site.origin}
        ran = run_tool("http_request", arguments, base | environment)
        assert TOKEN not in ran.everything
        return ran

    return run


def test_the_credential_arrives_in_the_header_and_nowhere_in_the_answer(
    call: Any, site: Any
) -> None:
    site.answer = lambda seen: (
        201,
        {"Content-Type": "application/json", "ETag": '"7"', "Set-Cookie": "sid=1"},
        b'{"made": true}',
    )
    answer = call({"url": site.origin + "/things?q=1"}).answer
    assert site.seen[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert site.seen[0].path == "/things?q=1"
    assert answer == {
        "status": 201,
        "reason": "Created",
        "url": site.origin + "/things?q=1",
        "headers": answer["headers"],
        "truncated": False,
        "body": '{"made": true}',
    }
    assert answer["headers"]["content-type"] == "application/json"
    assert answer["headers"]["etag"] == '"7"'
    assert "set-cookie" not in answer["headers"]


@pytest.mark.parametrize(
    ("template", "name", "value"),
    [
        ("X-Api-Key: {token}", "X-Api-Key", TOKEN),
        (
            "Authorization: Basic {token_base64}",
            "Authorization",
            "Basic " + base64.b64encode(TOKEN.encode()).decode(),
        ),
        ("Authorization: token {token}", "Authorization", f"token {TOKEN}"),
    ],
)
def test_the_operator_chooses_the_header(
    call: Any, site: Any, template: str, name: str, value: str
) -> None:
    assert call({"url": site.origin}, HTTP_REQUEST_HEADER=template).status == 0
    assert site.seen[0].headers[name] == value


@pytest.mark.parametrize(
    "template",
    ["X-Api-Key", "X-Api-Key: fixed", "X Key: {token}", "Host: {token}", "A: {token}\r\nB: c", ":"],
)
def test_a_header_template_that_cannot_work_is_told(call: Any, site: Any, template: str) -> None:
    ran = call({"url": site.origin}, HTTP_REQUEST_HEADER=template)
    assert ran.status == 2
    assert "HTTP_REQUEST_HEADER" in ran.stderr
    assert not site.seen


def test_methods_bodies_and_json_reach_the_server(call: Any, site: Any) -> None:
    assert call({"method": "POST", "url": site.origin, "json": {"a": "é"}}).status == 0
    assert (
        call({"method": "PUT", "url": site.origin, "body": "plain", "headers": {"X-A": "b"}}).status
        == 0
    )
    assert call({"method": "DELETE", "url": site.origin}).status == 0
    post, put, delete = site.seen
    assert (post.method, json.loads(post.body)) == ("POST", {"a": "é"})
    assert post.headers["Content-Type"] == "application/json"
    assert (put.method, put.body, put.headers["X-A"]) == ("PUT", b"plain", "b")
    assert delete.method == "DELETE"


def test_an_error_status_is_an_answer_not_a_failure(call: Any, site: Any) -> None:
    site.answer = lambda seen: (404, {}, b"nothing here")
    answer = call({"url": site.origin}).answer
    assert (answer["status"], answer["body"]) == (404, "nothing here")


def test_another_origin_is_refused_before_anything_is_sent(
    call: Any, site: Any, open_site: Any
) -> None:
    other = open_site()
    ran = call({"url": other.origin})
    assert ran.status == 4
    assert f"{other.origin} is not an origin that the credential may go to" in ran.stderr
    assert "HTTP_REQUEST_HOSTS" in ran.stderr
    assert not other.seen
    # The control: the same server once the operator lists it.
    both = f"{site.origin}, {other.origin}/"
    assert call({"url": other.origin}, HTTP_REQUEST_HOSTS=both).answer["status"] == 200
    assert other.seen[0].headers["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    "spelling",
    [
        "http://localhost:{port}/",  # another name for the same address is another origin
        "http://2130706433:{port}/",
        "http://0177.0.0.1:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "https://127.0.0.1:{port}/",
        "http://127.0.0.1:{port}@evil.example/",
        "http://evil.example\\@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}.evil.example/",
        "http://evil.example/#@127.0.0.1:{port}/",
        "http://127.0.0.1/",
        "ftp://127.0.0.1:{port}/",
        "file:///etc/passwd",
        "//127.0.0.1:{port}/",
        "http://127.0.0.1:{port}/ HTTP/1.1\r\nX: y",
        "http://127.0.0.1:{port}/\u2028",
        "http://127.0.0.1:/",
        "http://127.0.0.1:99999/",
        "http://user:pass@127.0.0.1:{port}/",
    ],
)
def test_no_spelling_of_a_url_passes_the_list(call: Any, site: Any, spelling: str) -> None:
    ran = call({"url": spelling.replace("{port}", str(site.port))})
    assert ran.status in (2, 4)
    assert not site.seen
    assert call({"url": f"HTTP://127.0.0.1:{site.port}/"}).answer["status"] == 200


@pytest.mark.parametrize("path", ["/safe/../admin", "/safe/%2e%2E/admin", "/safe/..%2fadmin", "/."])
def test_a_path_cannot_climb(call: Any, site: Any, path: str) -> None:
    assert call({"url": site.origin + path}).status == 2
    assert not site.seen
    assert call({"url": site.origin + "/safe/a..b/%2ewell"}).answer["status"] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer mine"},
        {"authorization": "x"},
        {"Host": "evil.example"},
        {"Content-Length": "0"},
        {"Transfer-Encoding": "chunked"},
        {"Connection": "Authorization"},
        {"Accept-Encoding": "gzip"},
        {"Range": "bytes=0-9"},
        {"X-HTTP-Method-Override": "DELETE"},
        {"X-Original-URL": "/admin"},
        {"X-A": "b\r\nAuthorization: x"},
        {"X-A": "b\nc"},
        {"X-A": "b\0c"},
        {"X-A\r\nX-B": "c"},
        {"X-A:": "c"},
        {"": "c"},
        {"X-A": "1", "x-a": "2"},
    ],
)
def test_headers_that_the_agent_may_not_send(call: Any, site: Any, headers: Any) -> None:
    ran = call({"url": site.origin, "headers": headers})
    assert ran.status in (2, 4)
    assert "header" in ran.stderr
    assert not site.seen
    assert call({"url": site.origin, "headers": {"X-A": "b"}}).answer["status"] == 200


def test_an_underscore_does_not_hide_the_credential_header(call: Any, site: Any) -> None:
    template = {"HTTP_REQUEST_HEADER": "X-Api-Key: {token}"}
    assert call({"url": site.origin, "headers": {"X_Api_Key": "x"}}, **template).status == 4
    assert not site.seen
    assert call({"url": site.origin, "headers": {"X_Other": "x"}}, **template).status == 0


def test_a_redirect_inside_the_origin_is_followed_with_the_credential(call: Any, site: Any) -> None:
    site.answer = lambda seen: (
        (302, {"Location": "/end"}, b"") if seen.path == "/" else (200, {}, b"end")
    )
    answer = call({"method": "POST", "url": site.origin + "/", "body": "x"}).answer
    assert (answer["body"], answer["url"]) == ("end", site.origin + "/end")
    assert [(s.method, s.path, s.body) for s in site.seen] == [
        ("POST", "/", b"x"),
        ("GET", "/end", b""),
    ]
    assert site.seen[1].headers["Authorization"] == f"Bearer {TOKEN}"


def test_a_permanent_redirect_keeps_method_and_body(call: Any, site: Any) -> None:
    site.answer = lambda seen: (
        (308, {"Location": "/end"}, b"") if seen.path == "/" else (200, {}, b"end")
    )
    assert call({"method": "PUT", "url": site.origin + "/", "body": "x"}).status == 0
    assert [(s.method, s.body) for s in site.seen] == [("PUT", b"x"), ("PUT", b"x")]


def test_a_redirect_to_another_origin_is_not_followed_even_to_a_listed_one(
    call: Any, site: Any, open_site: Any
) -> None:
    other = open_site()
    site.answer = lambda seen: (302, {"Location": other.origin + "/take"}, b"")
    answer = call({"url": site.origin}, HTTP_REQUEST_HOSTS=f"{site.origin} {other.origin}").answer
    assert answer["status"] == 302
    assert answer["headers"]["location"] == other.origin + "/take"
    assert answer["redirect"] == "not followed: it leads to another origin"
    assert len(site.seen) == 1
    assert not other.seen


def test_redirects_end(call: Any, site: Any) -> None:
    site.answer = lambda seen: (302, {"Location": "/again"}, b"")
    ran = call({"url": site.origin})
    assert ran.status == 1
    assert "more than 5 redirects" in ran.stderr
    assert call({"url": site.origin, "follow_redirects": False}).answer["status"] == 302


def test_a_server_that_reflects_the_credential_reveals_nothing(call: Any, site: Any) -> None:
    basic = base64.b64encode(TOKEN.encode()).decode()
    site.answer = lambda seen: (
        200,
        {"Content-Type": "text/plain", "X-Request-Id": TOKEN},
        f"{seen.headers['Authorization']} {basic}".encode(),
    )
    ran = call({"url": site.origin})
    assert basic not in ran.everything
    marker = "[redacted:HTTP_REQUEST_TOKEN]"
    assert ran.answer["body"] == f"Bearer {marker} {marker}"
    assert ran.answer["headers"]["x-request-id"] == marker


@pytest.mark.parametrize("cut", [1, 3, 4, 13, 22, 23])
def test_a_cut_through_the_reflected_credential_shows_no_part_of_it(
    call: Any, site: Any, cut: int
) -> None:
    site.answer = lambda seen: (200, {"Content-Type": "text/plain"}, f"abc{TOKEN}xyz".encode())
    answer = call({"url": site.origin, "max_bytes": cut}).answer
    assert answer["truncated"] is True
    assert answer["body"] == "abc[redacted:HTTP_REQUEST_TOKEN]xyz"[:cut]


@pytest.mark.parametrize("charset", ["utf-8", "utf-16-le"])
@pytest.mark.parametrize("cut", [100, 150, 401])
def test_no_part_is_shown_where_hiding_makes_room_for_what_follows(
    call: Any, site: Any, cut: int, charset: str
) -> None:
    long = "".join(f"{n:04x}" for n in range(30, 60))  # longer than its marker, without a repeat
    kind = {"Content-Type": f"text/plain; charset={charset}"}
    site.answer = lambda seen: (200, kind, ("_" + long * 50).encode(charset))
    answer = call({"url": site.origin, "max_bytes": cut}, HTTP_REQUEST_TOKEN=long).answer
    assert answer["truncated"] is True
    shown = answer["body"]
    assert shown[0] == "_"
    assert long[:3] not in shown.replace("[redacted:HTTP_REQUEST_TOKEN]", "")
    site.answer = lambda seen: (200, kind, ("_" + "x" * 6000).encode(charset))  # the control
    shown = call({"url": site.origin, "max_bytes": cut}, HTTP_REQUEST_TOKEN=long).answer["body"]
    assert len(shown) == cut // len("x".encode(charset))


@pytest.mark.parametrize(
    ("charset", "encode"),
    [("utf-16", lambda s: s.encode("utf-16")), ("utf-8", lambda s: s.encode())],
)
def test_a_reflected_credential_is_hidden_in_other_encodings_too(
    call: Any, site: Any, charset: str, encode: Any
) -> None:
    site.answer = lambda seen: (
        200,
        {"Content-Type": f"text/plain; charset={charset}"},
        encode(f"é {TOKEN}"),
    )
    assert call({"url": site.origin}).answer["body"] == "é [redacted:HTTP_REQUEST_TOKEN]"


def test_a_compressed_answer_is_read_and_searched(call: Any, site: Any) -> None:
    packed = gzip.compress(f"hello {TOKEN}".encode())
    site.answer = lambda seen: (200, {"Content-Encoding": "gzip"}, packed)
    assert call({"url": site.origin}).answer["body"] == "hello [redacted:HTTP_REQUEST_TOKEN]"
    assert site.seen[0].headers.get("Accept-Encoding") is None
    site.answer = lambda seen: (200, {"Content-Encoding": "br"}, b"?")
    assert call({"url": site.origin}).status == 1


def test_a_compressed_bomb_stays_within_the_limit(call: Any, site: Any) -> None:
    packed = gzip.compress(b"\0" * 0 + b"a" * 50_000_000, 1)
    site.answer = lambda seen: (200, {"Content-Encoding": "gzip"}, packed)
    answer = call({"url": site.origin, "max_bytes": 1000}).answer
    assert (answer["truncated"], len(answer["body"])) == (True, 1000)


def test_the_answer_is_cut_at_the_limit_between_characters(call: Any, site: Any) -> None:
    site.answer = lambda seen: (200, {}, "ééé".encode())
    answer = call({"url": site.origin, "max_bytes": 3}).answer
    assert (answer["body"], answer["truncated"]) == ("é", True)
    answer = call({"url": site.origin, "max_bytes": 6}).answer
    assert (answer["body"], answer["truncated"]) == ("ééé", False)


def test_bytes_that_are_no_text_come_as_base64(call: Any, site: Any) -> None:
    site.answer = lambda seen: (200, {}, b"\x89PNG\0\xff")
    answer = call({"url": site.origin}).answer
    assert base64.b64decode(answer["body_base64"]) == b"\x89PNG\0\xff"
    assert "body" not in answer


def test_an_answer_that_ends_early_is_a_failure(call: Any, site: Any) -> None:
    site.answer = lambda seen: (200, {"Content-Length": "100"}, b"short")
    ran = call({"url": site.origin})
    assert ran.status == 1
    assert "before the end" in ran.stderr


def test_a_server_that_is_not_there_is_told(run_tool: Any, open_site: Any) -> None:
    ran = run_tool(
        "http_request",
        {"url": "http://127.0.0.1:1/"},
        {"HTTP_REQUEST_TOKEN": TOKEN, "HTTP_REQUEST_HOSTS": "http://127.0.0.1:1"},
    )
    assert ran.status == 1
    assert "Connection refused" in ran.stderr


def test_proxy_variables_are_not_obeyed(call: Any, site: Any, open_site: Any) -> None:
    proxy = open_site()
    assert call({"url": site.origin}, http_proxy=proxy.origin, HTTP_PROXY=proxy.origin).status == 0
    assert not proxy.seen
    assert site.seen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"HTTP_REQUEST_TOKEN": ""}, "HTTP_REQUEST_TOKEN is not set"),
        ({"HTTP_REQUEST_TOKEN": TOKEN + "\n"}, "trailing newline"),
        ({"HTTP_REQUEST_TOKEN": TOKEN + "\r\nX: y"}, "no header can carry"),
        ({"HTTP_REQUEST_HOSTS": ""}, "HTTP_REQUEST_HOSTS is not set"),
        ({"HTTP_REQUEST_HOSTS": "https://*.example.com"}, "entry 1"),
        ({"HTTP_REQUEST_HOSTS": "https://a.example, b.example"}, "entry 2"),
        ({"HTTP_REQUEST_HOSTS": "https://a.example/path"}, "entry 1"),
    ],
)
def test_settings_that_cannot_work_are_told(
    call: Any, site: Any, change: dict[str, str], words: str
) -> None:
    ran = call({"url": site.origin}, **change)
    assert ran.status == 2
    assert words in ran.stderr
    assert not site.seen


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"url": 7},
        {"url": "{origin}", "method": "CONNECT"},
        {"url": "{origin}", "method": "get"},
        {"url": "{origin}", "body": "a", "json": 1},
        {"url": "{origin}", "max_bytes": 0},
        {"url": "{origin}", "max_bytes": True},
        {"url": "{origin}", "headers": []},
        {"url": "{origin}", "verify": False},
        [],
        None,
    ],
)
def test_wrong_arguments_are_told(call: Any, site: Any, arguments: Any) -> None:
    if isinstance(arguments, dict) and arguments.get("url") == "{origin}":
        arguments["url"] = site.origin
    ran = call(arguments)
    assert ran.status == 2
    assert ran.stderr.startswith("http_request: ")
    assert not site.seen


def test_tls_is_checked_against_the_trusted_authorities(
    call: Any, open_site: Any, certificate: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    secure = open_site(context)
    arguments = {"url": f"https://localhost:{secure.port}/"}
    hosts = f"https://localhost:{secure.port}"
    ran = call(arguments, HTTP_REQUEST_HOSTS=hosts)
    assert ran.status == 1
    assert "certificate is not trusted" in ran.stderr
    assert not secure.seen
    answer = call(arguments, HTTP_REQUEST_HOSTS=hosts, SSL_CERT_FILE=str(certificate)).answer
    assert answer["status"] == 200
    assert secure.seen[0].headers["Authorization"] == f"Bearer {TOKEN}"
