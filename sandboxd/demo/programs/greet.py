"""A tool without secrets: it prints its environment, and what its parent's looks like."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH123, PTH208

import os

print("hello;", dict(os.environ))
for pid in filter(str.isdecimal, os.listdir("/proc")):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            print(pid, file.read())
    except OSError as failure:
        print(pid, failure.strerror)
