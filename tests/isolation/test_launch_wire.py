"""What both halves say to each other: round trips, refusals, and what is never shown."""

from __future__ import annotations

import dataclasses
import errno
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.errors import Invalid, KernelError, Unavailable
from sandboxd.isolation.wire import (
    FRAME,
    FileSpec,
    Frame,
    Kind,
    LaunchSpec,
    Limits,
    MountSpec,
    OverlaySpec,
    check_spec,
    decode_spec,
    encode_spec,
    failed,
    sealed_memfd,
)

# Paths as os.fsdecode makes them from any bytes: surrogates stand for what is not UTF-8.
paths = st.binary(max_size=40).map(os.fsdecode)
numbers = st.integers(0, 2**64 - 1)
blobs = st.binary(max_size=200)
specs = st.builds(
    LaunchSpec,
    id=paths,
    argv=st.lists(blobs, max_size=5).map(tuple),
    env=st.lists(st.tuples(blobs, blobs), max_size=5).map(tuple),
    uid=numbers,
    cwd=paths,
    network=st.sampled_from(["none", "host"]),
    hostname=paths,
    user=paths,
    tty=st.booleans(),
    mounts=st.lists(
        st.builds(
            MountSpec,
            paths,
            paths,
            readonly=st.booleans(),
            noexec=st.booleans(),
            idmap=st.booleans(),
            optional=st.booleans(),
            shared=st.booleans(),
        ),
        max_size=4,
    ).map(tuple),
    files=st.lists(st.builds(FileSpec, paths, blobs, numbers), max_size=4).map(tuple),
    extra_fds=st.lists(numbers, max_size=4).map(tuple),
    limits=st.builds(Limits, **{field.name: numbers for field in dataclasses.fields(Limits)}),
    overlay=st.none() | st.builds(OverlaySpec, paths, paths, numbers),
)

PLAIN = LaunchSpec(id="x", argv=(b"/bin/true",), env=((b"A", b"b"),), uid=1000)


@given(specs)
@settings(max_examples=60)
def test_a_spec_survives_the_wire(spec: LaunchSpec) -> None:
    assert decode_spec(encode_spec(spec)) == spec


@given(specs, st.data())
@settings(max_examples=60)
def test_a_spec_that_is_cut_or_padded_is_refused(spec: LaunchSpec, data: st.DataObject) -> None:
    whole = encode_spec(spec)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (whole[:cut], whole + b"\0"):
        with pytest.raises(ValueError, match=r"cut short|left over"):
            decode_spec(damaged)


@given(st.binary(max_size=400))
@settings(max_examples=100)
def test_noise_is_refused_and_nothing_else(noise: bytes) -> None:
    with pytest.raises(ValueError):
        decode_spec(noise)


def test_a_count_that_promises_too_much_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="cut short"):
        decode_spec(b"\0" * 8 + b"\xff" * 8)


@settings(max_examples=60)
@given(
    st.sampled_from(Kind),
    numbers,
    st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 3),
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=40),
)
def test_a_frame_survives_the_wire(
    kind: Kind, number: int, operands: tuple[int, int, int], text: str
) -> None:
    frame = Frame(kind, number, *operands, text=text)
    packed = frame.pack()
    assert len(packed) == FRAME.size
    assert Frame.unpack(packed) == frame


def test_what_is_not_a_frame_is_refused() -> None:
    good = Frame(Kind.KILL, 1).pack()
    unknown_kind = good[:4] + b"\x63" + good[5:]
    for bad in (b"", good[:-1], good + b"\0", b"XXXX" + good[4:], unknown_kind):
        with pytest.raises(ValueError):
            Frame.unpack(bad)


def test_a_long_text_is_cut_to_the_frame() -> None:
    assert Frame.unpack(Frame(Kind.FAILED, 1, text="é" * 300).pack()).text.startswith("é" * 95)


def test_a_failure_keeps_its_call_errno_and_path() -> None:
    frame = failed(7, KernelError("mount", errno.EPERM, "/x"))
    assert (frame.kind, frame.number, frame.a, frame.text) == (Kind.FAILED, 7, 1, "mount\t/x")
    assert failed(7, Unavailable("no")).text == "setup\tno"


def test_a_printed_spec_shows_no_argument_value_or_content() -> None:
    spec = dataclasses.replace(
        PLAIN,
        argv=(b"/bin/true", b"canary-argv"),
        env=((b"NAME", b"canary-env"),),
        files=(FileSpec("/run/secrets/x", b"canary-file"),),
    )
    for shown in (repr(spec), str(spec), f"{spec}", repr(spec.files), repr([spec])):
        assert "canary" not in shown
    assert "uid=1000" in repr(spec)


def test_a_memfd_can_not_be_changed_any_more() -> None:
    fd = sealed_memfd(b"content")
    try:
        assert os.pread(fd, 100, 0) == b"content"
        assert not os.get_inheritable(fd)
        for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0)):
            with pytest.raises(PermissionError):
                change()
    finally:
        os.close(fd)


def test_a_plain_spec_passes_the_check() -> None:
    check_spec(PLAIN)
    check_spec(dataclasses.replace(PLAIN, uid=0, extra_fds=(3, 4, 255), tty=True, network="host"))


@pytest.mark.parametrize(
    "change",
    [
        {"argv": ()},
        {"argv": (b"true",)},
        {"argv": (b"/bin/true", b"canary\0")},
        {"env": ((b"", b"canary"),)},
        {"env": ((b"A=B", b"canary"),)},
        {"env": ((b"A", b"canary\0"),)},
        {"env": ((b"A", b"canary"), (b"A", b"2"))},
        {"network": "bridge"},
        {"hostname": "a\nb"},
        {"hostname": ""},
        {"user": "root:0:0"},
        {"user": "../x"},
        {"cwd": "relative"},
        {"cwd": "/a/../b"},
        {"mounts": (MountSpec("relative", "/x"),)},
        {"mounts": (MountSpec("/x", "/"),)},
        {"mounts": (MountSpec("/x", "//"),)},
        {"mounts": (MountSpec("/x", "/proc/sys"),)},
        {"mounts": (MountSpec("/x", "/a/../proc"),)},
        {"mounts": (MountSpec("/x\0y", "/a"),)},
        {"overlay": OverlaySpec("relative")},
        {"overlay": OverlaySpec("/x", "/a/../b")},
        {"files": (FileSpec("/proc/x", b"canary"),)},
        {"files": (FileSpec("x", b"canary"),)},
        {"extra_fds": (2,)},
        {"extra_fds": (256,)},
        {"extra_fds": (5, 5)},
        {"extra_fds": tuple(range(3, 20))},
        {"uid": -1},
        {"uid": 0xFFFFFFFF},
        {"limits": Limits(cpu_seconds=-1)},
        {"limits": Limits(memory=1 << 63)},
    ],
    ids=str,
)
def test_a_spec_that_nobody_can_mean_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as refusal:
        check_spec(dataclasses.replace(PLAIN, **change))
    assert "canary" not in str(refusal.value) + refusal.value.hint
