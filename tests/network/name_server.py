"""An authoritative name server for tests: NAME=ADDRESS,... and a file for what it was asked."""

from __future__ import annotations

import socket
import struct
import sys


def main() -> None:
    table = dict(entry.split("=") for entry in sys.argv[1].split(","))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, open(sys.argv[2], "a") as log:
        sock.bind(("127.0.0.1", 53))
        print("ready", flush=True)
        while True:
            query, client = sock.recvfrom(512)
            name, end = _name(query)
            (kind,) = struct.unpack_from("!H", query, end)
            print(name, file=log, flush=True)
            address = table.get(name)
            found = address is not None and kind == 1  # A; of AAAA there are none
            # RFC 1035, 4.1.1: an authoritative answer, NXDOMAIN where there is no such name.
            flags = 0x8400 | (0 if address is not None else 3)
            head = query[:2] + struct.pack("!HHHHH", flags, 1, int(found), 0, 0)
            answer = b""
            if found:
                assert address is not None
                answer = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 1, 4) + socket.inet_aton(address)
            sock.sendto(head + query[12 : end + 4] + answer, client)


def _name(query: bytes) -> tuple[str, int]:
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode("ascii").lower())
        at += 1 + length
    return ".".join(labels), at + 1


main()
