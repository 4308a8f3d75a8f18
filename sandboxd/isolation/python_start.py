"""Starts an MCP server whose command line holds secrets: they come in the environment, and are put
into sys.argv here, where no other process can read them (proc(5), /proc/pid/cmdline)."""

import json
import os
import runpy
import sys

program, *words = json.loads(sys.argv[1])
sys.argv = [program, *(before + os.environ[name] if name else before for before, name in words)]
runpy.run_path(program, run_name="__main__")
