"""A careless tool: its report holds all it knows, the secret included, on both streams."""

import os
import sys

print("report:", sys.argv[1:])
for name, value in os.environ.items():
    print(f"{name}={value}")
print("token, in pieces:", end=" ")
sys.stdout.flush()
for character in os.environ["BANK_TOKEN"]:  # one write per character
    sys.stdout.write(character)
    sys.stdout.flush()
print()
print("and on stderr:", os.environ["BANK_TOKEN"], file=sys.stderr)
