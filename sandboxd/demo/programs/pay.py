"""The paying tool: sends one payment to the bank's server, with the secret as bearer token."""

import argparse
import json
import os
import urllib.request

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("payee")
parser.add_argument("--amount", type=int, required=True)
parser.add_argument("--memo", default="")
# What a careless author leaves in: whoever smuggles this option in, reads the secret.
parser.add_argument("--dump-environment", action="store_true")
arguments = parser.parse_args()

if arguments.dump_environment:
    print(dict(os.environ))
    raise SystemExit(0)

body = {"payee": arguments.payee, "amount": arguments.amount, "memo": arguments.memo}
request = urllib.request.Request(  # noqa: S310 - the operator wrote the URL
    os.environ["BANK_URL"],
    data=json.dumps(body).encode(),
    headers={"Authorization": "Bearer " + os.environ["BANK_TOKEN"]},
)
# No proxy of the environment's, whatever there is: the bank is on this host.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(request, timeout=30) as answer:
    print(answer.read().decode())
