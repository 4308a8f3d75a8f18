"""``sandboxctl tokens``: short-lived tokens that API keys make for an application's users."""

from __future__ import annotations

import argparse

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.keys import say_ended, shown_on_stdin
from sandboxd.cli.parser import Commands, command, group
from sandboxd.errors import Invalid

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(
        commands,
        name,
        help=line,
        description="A token is for an application's user: the application's server makes it with "
        "its API key (POST /v1/tokens) and gives it to the user's browser. It runs sessions and "
        "calls tools of the agents that it names, and nothing else.",
    )
    parser = command(
        nouns,
        "create",
        create,
        help="make a token with a key and print it",
        description="Make a token in the name of an API key, which is named by its id. The token "
        "is printed once, on standard output.",
        examples=[
            (
                "sandboxctl tokens create --key key_0123456789ab --agent reporter --expires 15m",
                "to try an API with",
            )
        ],
    )
    parser.add_argument("--key", metavar="KEY", required=True, help="the key's id or beginning")
    parser.add_argument(
        "--agent",
        metavar="AGENT",
        dest="agents",
        action="append",
        help="only for this agent; may be given again",
    )
    parser.add_argument("--user", metavar="USER", help="the application's user that it is for")
    parser.add_argument(
        "--expires", metavar="TIME", default="1h", help="how long it lives, 24h at most (1h)"
    )
    parser = command(
        nouns,
        "revoke",
        revoke,
        help="refuse a token, or all of a user's, and end their sessions",
        description="Refuse one token, or with --user every token that was made for one of the "
        "application's users until now, and end the sessions that they started. When the command "
        "returns, that is done and on disk.",
        examples=[
            ("sandboxctl tokens revoke tok_0123456789abcdef01234567", "by its id"),
            ("sandboxctl tokens revoke - < found.token", "a token that was found somewhere"),
            ("sandboxctl tokens revoke --user ann@example.org", "all of one user"),
        ],
        usage="sandboxctl tokens revoke [options] TOKEN\n"
        "       sandboxctl tokens revoke [options] --user USER",
    )
    parser.secret_arguments = True
    parser.add_argument(
        "token", metavar="TOKEN", nargs="?", help="its id (tok_...); - reads the token itself"
    )
    parser.add_argument("--user", metavar="USER", help="every token of this user")
    parser.add_argument("--team", metavar="TEAM", help="the team (default)")
    parser = command(
        nouns,
        "rotate-key",
        rotate_key,
        help="sign tokens with a new key",
        description="Make a new key to sign tokens with. Tokens that the old one signed are "
        "accepted until they expire; with --now they are refused at once, and every session that "
        "a token started is ended.",
        examples=[("sandboxctl tokens rotate-key --now", "the old one may be known to somebody")],
    )
    parser.add_argument("--now", action="store_true", help="refuse what the old key signed")
    command(
        nouns,
        "jwks",
        jwks,
        help="print the public keys that tokens are verified with",
        description="Print the JSON Web Key Set (RFC 7517) that is served at "
        "/.well-known/jwks.json.",
        examples=[("sandboxctl tokens jwks | jq -r '.keys[].kid'", "ids of the keys")],
    )


def create(args: argparse.Namespace) -> int:
    params = {"key": args.key, "expires_in": args.expires}
    params |= {"agents": args.agents} if args.agents else {}
    params |= {"subject": args.user} if args.user else {}
    with connect(args) as daemon:
        got = daemon.call("tokens.create", **params)
    if args.json:
        output.print_json(got)
        return 0
    print(got["token"], flush=True)
    output.note(f"made {got['id']}, which expires at {output.when(got['expires_at'])}")
    return 0


def revoke(args: argparse.Namespace) -> int:
    if (args.token is None) == (args.user is None):
        raise Invalid(
            "name a token, or a user with --user",
            hint="ids of tokens are in the audit log: sandboxctl audit tail",
        )
    named = {"subject": args.user} if args.user else {"id": shown_on_stdin(args.token)}
    team = {"team": args.team} if args.team else {}
    with connect(args) as daemon:
        got = daemon.call("tokens.revoke", **named, **team)
    if args.json:
        output.print_json(got)
        return 0
    if args.user:
        print(f"revoked every token made for {output.clean(args.user)} until now")
    else:
        print(f"revoked {got['id']}")
    say_ended(got)
    return 0


def rotate_key(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("tokens.rotate_key", now=args.now)
    if args.json:
        output.print_json(got)
        return 0
    print(f"tokens are signed with {got['keys'][0]['kid']} from now on")
    if args.now:
        say_ended(got)
    return 0


def jwks(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        output.print_json(daemon.call("tokens.jwks"))
    return 0
