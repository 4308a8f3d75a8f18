"""A secret can be used and never shown."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback

import pytest

from sandboxd.errors import Invalid
from sandboxd.secret import Secret

VALUE = b"hunter2-\xff-plaintext"


def test_reveal_gives_the_bytes_and_text_becomes_utf8() -> None:
    assert Secret(VALUE).reveal() == VALUE
    assert Secret("pä\udcff").reveal() == b"p\xc3\xa4\xff"
    assert Secret(bytearray(b"ab")).reveal() == b"ab"
    assert len(Secret(VALUE)) == len(VALUE)


def test_bytes_are_held_without_another_copy() -> None:
    assert Secret(VALUE).reveal() is VALUE


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        format,
        ascii,
        lambda s: f"{s!r:>3} {s:x}",
        lambda s: "%s" % s,  # noqa: UP031
        lambda s: repr([s, {"k": s}, (s,)]),
        lambda s: logging.LogRecord("n", 20, "p", 1, "%s %r", (s, s), None).getMessage(),
    ],
)
def test_every_way_to_show_it_says_secret(show) -> None:
    assert "<secret>" in show(Secret(VALUE))
    assert "hunter2" not in show(Secret(VALUE))


@pytest.mark.parametrize(
    "take",
    [
        bytes,
        list,
        pickle.dumps,
        copy.copy,
        copy.deepcopy,
        json.dumps,
        hash,
        vars,
        lambda s: s.__getstate__(),
        lambda s: b"%b" % s,
        lambda s: s[0],
        lambda s: "".join([s]),
        lambda s: b"" + s,
    ],
)
def test_every_other_way_to_the_bytes_is_a_type_error_without_them(take) -> None:
    with pytest.raises(TypeError) as caught:
        take(Secret(VALUE))
    assert "hunter2" not in str(caught.value)


def test_equality_is_by_value_and_only_among_secrets() -> None:
    assert Secret(b"a") == Secret("a")
    assert Secret(b"a") != Secret(b"b")
    assert Secret(b"a") != b"a"


def test_an_empty_secret_is_a_value_like_any_other() -> None:
    assert bool(Secret(b"")) is True


@pytest.mark.parametrize("wrong", ["hunter2\ud800", 7, None, [104, 105]])
def test_what_is_not_bytes_or_text_is_refused_and_not_shown(wrong) -> None:
    with pytest.raises(Invalid) as caught:
        Secret(wrong)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert shown.stack[-1].name == "__init__"
    assert set(shown.stack[-1].locals or {}) == {"self"}
    assert caught.value.__context__ is None
