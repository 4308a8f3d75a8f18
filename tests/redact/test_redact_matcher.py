"""What the search finds does not depend on how it searches, and it keeps nothing for long."""

from __future__ import annotations

import pytest

from sandboxd.redact import Mask, Matcher, Redactor, Streams, matcher
from sandboxd.redact.encodings import forms
from sandboxd.secret import Secret

VALUE = b"9vZ4/Qm7x_T2kLw8.Rb3+Yc6="
PEM = (
    b"-----BEGIN PRIVATE KEY-----\n"
    b"MIGHAgEAMBMGByqGSM49\nAgEGCCqGSM49AwEHBG0w\n"
    b"-----END PRIVATE KEY-----\n"
)


def masked(secrets: dict[str, bytes], data: bytes) -> bytes:
    redactor = Redactor({name: Secret(value) for name, value in secrets.items()})
    return redactor.feed(data) + redactor.flush()


def test_with_and_without_the_automaton_the_same_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if not matcher.HAS_AUTOMATON:
        pytest.skip("there is no build of it here")
    secrets = {"A": VALUE, "B": b"9vZ4/Qm7", "KEY": PEM, "C": b"9vZ4/Qm7x_T2 something else"}
    text = b" ".join(form.text for name in secrets for form in forms(name, secrets[name])) * 2
    monkeypatch.setattr(matcher, "_PATIENCE", 0)
    at_once = masked(secrets, text)
    monkeypatch.setattr(matcher, "_PATIENCE", 1 << 30)
    assert at_once == masked(secrets, text)
    assert at_once.count(b"[redacted:A]") > 20


def test_a_value_that_begins_another_is_masked_alone_and_within_it_in_every_form() -> None:
    secrets = {"SHORT": b"9vZ4/Qm7x_T2", "LONG": b"9vZ4/Qm7x_T2kLw8.Rb3"}
    for encode in (
        bytes,
        lambda value: value.hex().encode(),
        lambda value: value.hex(" ").encode(),
    ):
        short, long = encode(secrets["SHORT"]), encode(secrets["LONG"])
        assert masked(secrets, b"<" + long + b">") == b"<[redacted:LONG]>"
        assert masked(secrets, b"<" + short + b">") == b"<[redacted:SHORT]>"


def test_lines_that_any_key_file_has_are_shown_and_the_others_are_not() -> None:
    for line in PEM.splitlines():
        expected = line if line.startswith(b"-----") else b"[redacted:KEY]"
        assert masked({"KEY": PEM}, b"| " + line + b" |") == b"| " + expected + b" |"


def test_the_password_of_a_url_is_masked_alone_too() -> None:
    secrets = {"URL": b"postgresql://app:p%40ss-w0rd-77@db.example.com/shop"}
    data = b"postgresql://app:***@db.example.com/shop p@ss-w0rd-77 p%40ss-w0rd-77"
    assert masked(secrets, data) == (
        b"postgresql://app:***@db.example.com/shop [redacted:URL] [redacted:URL]"
    )


def test_a_key_in_json_is_masked_also_once_it_is_decoded() -> None:
    value = b'{"type": "service_account", "private_key": "' + PEM.replace(b"\n", b"\\n") + b'"}'
    out = masked({"JSON": value}, b"it says\n" + PEM)
    assert b"MIGHAgEAMBMGByqGSM49" not in out
    assert b"AgEGCCqGSM49AwEHBG0w" not in out


@pytest.mark.parametrize("blank", [b" ", b"\n", b"\\n", b"\\", b"%", b"&#x"])
def test_endless_text_behind_a_beginning_is_not_kept(blank: bytes) -> None:
    redactor = Redactor({"A": Secret(VALUE)})
    given = len(redactor.feed(b"x " + VALUE[:12]))
    for _ in range(40):
        given += len(redactor.feed(blank * 1000))
        assert len(redactor._lane.rest) < 8000
    assert given > 30_000


def test_nothing_that_holds_a_value_shows_it() -> None:
    found = Matcher({"A": Secret(VALUE)})
    streams = Streams(found, ("stdout", "stderr"))
    streams.feed("stdout", VALUE[:10])
    redactor = Redactor(found)
    redactor.feed(VALUE[:10])
    shown = [found, streams, redactor, Mask(found), *forms("A", VALUE)]
    shown += [*found._lenses, redactor._lane, streams._joint]
    for each in shown:
        for text in (repr(each), str(each), f"{each}"):
            assert VALUE[:4].decode() not in text
            assert VALUE.hex()[:8] not in text
