"""``sandboxctl dashboard``: a link that signs a browser in once, and the end of open pages."""

from __future__ import annotations

import argparse
from urllib.parse import urlsplit

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command
from sandboxd.errors import Invalid

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    parser = command(
        commands,
        name,
        run,
        help=line,
        description="Print a link to the daemon's dashboard that signs a browser in: once, and "
        "within two minutes. Its code stands behind the #, which browsers send to nobody and the "
        "page removes at once. On the host the page is of one team, with the role of an owner "
        "unless another is named. See docs/dashboard.md.",
        examples=[
            ("sandboxctl dashboard", "a link for this host's browser"),
            ("sandboxctl dashboard --role viewer", "to look, and change nothing"),
            ("sandboxctl dashboard --url https://sandboxes.example.com", "behind a proxy"),
            ("sandboxctl dashboard --end", "sign every browser out"),
        ],
    )
    parser.add_argument("--team", metavar="TEAM", help="the team (default: default)")
    parser.add_argument("--role", choices=("owner", "operator", "viewer"), help="what it may do")
    parser.add_argument(
        "--url", metavar="URL", help="where the browser finds the daemon, if not where it listens"
    )
    parser.add_argument("--end", action="store_true", help="end the pages that are signed in")


def run(args: argparse.Namespace) -> int:
    base = _base(args.url) if args.url is not None else None
    team = {"team": args.team} if args.team is not None else {}
    with connect(args) as daemon:
        if args.end:
            got = daemon.call("dashboard.end", **team)
        else:
            role = {"role": args.role} if args.role is not None else {}
            got = daemon.call("dashboard.link", **team, **role)
    if not args.end:
        base = base or got["url"]
        if base is None:
            raise Invalid(
                "the daemon listens on a Unix socket, which no browser opens",
                hint="name where a proxy serves it: sandboxctl dashboard --url https://HOST",
            )
        got["url"] = base + got.pop("path")
    if args.json:
        output.print_json(got)
    elif args.end:
        print(f"{output.amount(got['ended'], 'page')} ended")
    else:
        print(got["url"])
        output.note(
            f"signs in once, within {got['valid_for']:g} s: {got['role']} of team {got['team']}"
        )
    return 0


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise Invalid("--url is http://HOST or https://HOST, with a port where there is one")
    return f"{parts.scheme}://{parts.netloc}"
