"""The .env dialect, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.dotenv import parse


def values(text: str | bytes) -> dict[str, bytes]:
    entries, problems = parse(text.encode() if isinstance(text, str) else text)
    assert problems == []
    return {entry.name: entry.value for entry in entries}


def problems(text: str) -> list[tuple[int, str]]:
    _, found = parse(text.encode())
    return [(problem.line, problem.message) for problem in found]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=plain", b"plain"),
        ("A=", b""),
        ("A=''", b""),
        ('A=""', b""),
        ("  A = spaced out  ", b"spaced out"),
        ("export A=exported", b"exported"),
        ("export\tA=tab", b"tab"),
        ("A=x=y==", b"x=y=="),
        ("A=value # comment", b"value"),
        ("A=value#no-comment", b"value#no-comment"),
        ("A=#all comment", b""),
        ("A= # all comment", b""),
        ("A=$HOME/${B}", b"$HOME/${B}"),
        (r"A=back\nslash", rb"back\nslash"),
        ("A=it's", b"it's"),
        ("A='single # $x \\n'", b"single # $x \\n"),
        ("A='single'  # comment", b"single"),
        ("A='it is \"quoted\"'", b'it is "quoted"'),
        ("A=`back 'and' \"double\"`", b"back 'and' \"double\""),
        (r'A="tab\tnew\nquote\"dollar\$slash\\"', b'tab\tnew\nquote"dollar$slash\\'),
        (r'A="unknown \q stays"', rb"unknown \q stays"),
        ('A="one\ntwo\n\nthree"', b"one\ntwo\n\nthree"),
        ("A='one\n# two\nB=3'", b"one\n# two\nB=3"),
        ("A=ünï", "ünï".encode()),
    ],
)
def test_a_value_is_read_as_other_tools_read_it(line: str, value: bytes) -> None:
    assert values(line) == {"A": value}
    assert values(f"# before\n\n{line}\nZ=after\n") == {"A": value, "Z": b"after"}
    assert values(f"{line}\nZ=after\n".replace("\n", "\r\n"))["A"] == value


def test_bytes_that_are_not_utf8_and_a_byte_order_mark_survive() -> None:
    assert values(b"\xef\xbb\xbfA=\xff\xfe\n") == {"A": b"\xff\xfe"}


def test_an_empty_file_sets_nothing() -> None:
    assert values("") == {}
    assert values("\n  \n# only a comment") == {}


def test_every_mistake_is_reported_at_its_line() -> None:
    text = (
        "GOOD=1\n"
        "no assignment\n"
        'MULTI="a\nb"\n'
        "1BAD=x\n"
        "GOOD=2\n"
        "LD_PRELOAD=/x.so\n"
        "AFTER='x' y\n"
        "=nameless\n"
        "NUL=\0\n"
        "OPEN='never closed\n"
        "HIDDEN=behind it\n"
    )
    assert [line for line, _ in problems(text)] == [2, 5, 6, 7, 8, 9, 10, 11]
    said = dict(problems(text))
    assert "expected NAME=value" in said[2]
    assert "not a variable name" in said[5]
    assert said[6] == "GOOD was already given on line 1"
    assert "LD_PRELOAD is refused: the dynamic loader obeys it" in said[7]
    assert "after the closing quote" in said[8]
    assert "NUL byte" in said[10]
    assert "never closed" in said[11]


def test_a_value_too_long_for_the_kernel_is_a_mistake() -> None:
    ((line, message),) = problems("A=" + "x" * 131_072)
    assert (line, "too long for the kernel" in message) == (1, True)


@pytest.mark.parametrize(
    "text",
    [
        "KEY=-----BEGIN KEY-----\nc2VjcmV0c2VjcmV0\nc2VjcmV0cw==\n",
        "A='hunter2' hunter2\n",
        'A="hunter2',
        "hunter2 hunter2=1\n",
        "A=hunter2\0",
        "A=1\nA=hunter2\n",
    ],
)
def test_no_mistake_quotes_what_may_be_a_secret(text: str) -> None:
    entries, found = parse(text.encode())
    assert found
    assert "hunter2" not in repr(found) + repr(entries)
    assert "c2VjcmV0" not in repr(found)


@settings(deadline=None)  # the machine may be busy
@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_what_is_quoted_for_double_quotes_comes_back(value: str) -> None:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "\\r")
    assert values(f'A="{quoted}"') == {"A": value.encode()}


@settings(deadline=None)  # the machine may be busy
@given(st.binary())
def test_any_bytes_are_read_or_refused_without_an_exception(data: bytes) -> None:
    entries, _ = parse(data)
    assert all(b"\0" not in entry.value for entry in entries)
