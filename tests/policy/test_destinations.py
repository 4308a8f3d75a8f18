"""Which hosts and addresses a rule reaches, in every spelling that has been tried elsewhere."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.errors import Invalid
from sandboxd.policy.destinations import (
    AddressRange,
    DestinationRule,
    HostPattern,
    Port,
    Verdict,
    decide,
    destination,
    host_pattern,
    kind_of,
    network,
    read_address,
)


def rule(host: str, ports: tuple[int, ...] = (443,), **more: Any) -> DestinationRule:
    return DestinationRule(HostPattern(host), tuple(map(Port, ports)), **more)


API = rule("api.example.com", source="tools/x/tool.yaml:7")
WIDE = rule("*.example.com", ports=(80, 443), methods=("GET", "HEAD"))


def asked(host: str, port: int = 443, *lists: tuple[DestinationRule, ...]) -> Verdict:
    return decide(lists or ((API, WIDE),), destination(host, port))


@pytest.mark.parametrize("host", ["api.example.com", "API.Example.COM", "api.example.com."])
def test_a_named_host_is_allowed_in_any_case_and_with_a_root_dot(host: str) -> None:
    verdict = asked(host)
    assert verdict.admission is not None
    assert verdict.rule == "tools/x/tool.yaml:7 allow api.example.com:443"


@pytest.mark.parametrize(
    "host",
    ["example.com", "api.example.com.evil.net", "evilexample.com", "xapi.example.org"],
)
def test_a_host_beside_the_named_ones_is_not(host: str) -> None:
    verdict = asked(host)
    assert verdict.admission is None
    assert verdict.rule == "default deny"
    assert verdict.reason == f"no rule names the host {host}"


def test_a_suffix_reaches_every_depth_below_it_and_not_itself() -> None:
    assert asked("a.b.example.com", 80).admission is not None
    assert asked("example.com", 80).admission is None


def test_a_port_and_a_method_have_to_be_named() -> None:
    assert asked("api.example.com", 22).reason == "no rule allows port 22 of api.example.com"
    lists = ((WIDE,),)
    wanted = destination("www.example.com", 80)
    assert decide(lists, wanted, "GET").admission is not None
    assert decide(lists, wanted, "POST").reason == "no rule allows POST to www.example.com:80"
    assert decide(lists, wanted).admission is not None  # nothing to be read: TLS


def test_every_list_has_to_allow() -> None:
    both = ((WIDE,), (API,))
    assert asked("api.example.com", 443, *both).admission is not None
    assert asked("www.example.com", 443, *both).admission is None
    assert asked("api.example.com", 443, (API,), ()).admission is None
    assert decide((), destination("api.example.com", 443)).admission is None


@pytest.mark.parametrize(
    "host",
    [
        "2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "127.0.0.01", "1.2.3.4.5",
        "0x", "1.2.3", "256.1.1.1", "127.0.0.1.", "fe80::1%eth0", "[fe80::1%1]", "::1::",
        "example.com\0.evil.net", "exa mple.com", "ex\u00e4mple.com", "a..b", "-a.com", "a-.com",
        "", ".", "*", "user@example.com", "example.com/", "[example.com", "a" * 64 + ".com",
        "x." * 127 + "com", "example.123", "example.0x1f", "\uff11.2.3.4", "127\u3002example.com",
    ],
)  # fmt: skip
def test_what_has_more_than_one_reading_is_no_destination(host: str) -> None:
    with pytest.raises(Invalid):
        destination(host, 443)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_there_are_ports_up_to_65535(port: int) -> None:
    with pytest.raises(Invalid, match="there is no port"):
        destination("example.com", port)


NOT_PUBLIC = {
    "127.0.0.1": "of this host itself", "127.255.1.2": "of this host itself",
    "0.0.0.0": "of this network", "10.1.2.3": "of a private network",
    "172.16.0.1": "of a private network", "192.168.1.1": "of a private network",
    "169.254.1.1": "of the local link", "169.254.169.254": "of a cloud's metadata service",
    "100.100.100.200": "of a cloud's metadata service", "100.64.0.1": "of shared address space",
    "224.0.0.1": "for many receivers", "255.255.255.255": "reserved", "240.0.0.1": "reserved",
    "198.18.0.1": "for benchmarks", "192.0.2.1": "for documentation",
    "::1": "of this host itself", "::": "of this host itself", "fe80::1": "of the local link",
    "fd00:ec2::254": "of a cloud's metadata service", "fc00::1": "of a private network",
    "ff02::1": "for many receivers", "2001:db8::1": "for documentation",
    "fec0::1": "outside of what is public",
}  # fmt: skip


@pytest.mark.parametrize("text", sorted(NOT_PUBLIC))
def test_an_address_that_is_not_public_is_refused_also_after_resolving(text: str) -> None:
    address = ipaddress.ip_address(text)
    assert kind_of(address) == NOT_PUBLIC[text]
    admission = asked("api.example.com").admission
    assert admission is not None
    assert admission.refuses(address) == f"{text} is an address {NOT_PUBLIC[text]}"
    assert admission.refuses(ipaddress.ip_address("93.184.216.34")) == ""


@pytest.mark.parametrize(
    "text",
    [
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "2002:7f00:1::",
        "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "::7f00:1", "::ffff:0:7f00:1",
    ],
)  # fmt: skip
def test_an_address_within_an_address_is_refused(text: str) -> None:
    admission = asked("api.example.com").admission
    assert admission is not None
    assert admission.refuses(ipaddress.ip_address(text))


def test_a_mapped_public_address_is_the_public_address() -> None:
    admission = asked("api.example.com").admission
    assert admission is not None
    assert admission.refuses(ipaddress.ip_address("::ffff:93.184.216.34")) == ""


def test_an_address_that_every_list_names_is_allowed_and_its_neighbour_is_not() -> None:
    named = rule("10.1.2.3", ports=(5432,))
    ranged = rule("db.internal", ports=(5432,), addresses=(AddressRange("10.1.0.0/16"),))
    assert asked("10.1.2.3", 5432, (named,)).admission is not None
    assert asked("10.1.2.4", 5432, (named,)).admission is None
    admission = asked("db.internal", 5432, (ranged,)).admission
    assert admission is not None
    assert admission.refuses(read_address("10.1.2.3")) == ""
    assert admission.refuses(read_address("10.2.0.1"))
    assert admission.refuses(read_address("127.0.0.1"))
    ceiling = rule("*.internal.example", ports=(5432,))
    db = rule("db.internal.example", ports=(5432,), addresses=ranged.addresses)
    bounded = asked("db.internal.example", 5432, (db,), (ceiling,)).admission
    assert bounded is not None
    assert bounded.refuses(read_address("10.1.2.3"))  # the ceiling doesn't name it


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("API.example.com", "api.example.com"),
        ("*.Example.com", "*.example.com"),
        ("10.1.2.3", "10.1.2.3"),
        ("[FD00:0::1]", "fd00::1"),
    ],
)
def test_a_rule_is_kept_in_its_normal_form(text: str, normal: str) -> None:
    assert host_pattern(text) == normal


@pytest.mark.parametrize("text", ["**", "*.com", "a.*.com", "*example.com", "127.1", "", "*."])
def test_a_pattern_that_is_too_wide_or_unclear_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        host_pattern(text)


def test_every_public_host_is_every_public_host_and_no_other() -> None:
    anything = (rule("*"),)
    admission = asked("whatever.example", 443, anything).admission
    assert admission is not None
    assert admission.refuses(read_address("93.184.216.34")) == ""
    assert admission.refuses(read_address("10.0.0.1"))
    assert asked("10.0.0.1", 443, anything).admission is None
    assert asked("93.184.216.34", 443, anything).admission is not None


@pytest.mark.parametrize("text", ["10.1.2.3/16", "10.1", "x", "10.0.0.0/33"])
def test_a_network_is_written_exactly(text: str) -> None:
    with pytest.raises(Invalid):
        network(text)


@given(st.text(alphabet="0123456789abcdefx.:[]%", max_size=40))
def test_what_a_library_takes_for_an_address_is_decided_as_that_address(text: str) -> None:
    """inet_aton(3) reads a name as an address: then we read the same one, or refuse it."""
    try:
        packed = socket.inet_aton(text)
    except (OSError, ValueError):
        return
    try:
        found = destination(text, 443)
    except Invalid:
        return
    assert found.address == ipaddress.IPv4Address(packed)
