"""What a tool prints as JSON: read, and held against what its manifest promises.

Pure. :class:`~sandboxd.errors.Invalid` names the place inside the output and what was expected
there, from the schema's side, and never holds a value.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from jsonschema.exceptions import best_match
from referencing.exceptions import Unresolvable

from sandboxd.errors import Invalid
from sandboxd.policy.arguments import explain
from sandboxd.policy.model import Tool

__all__ = ["parse_output"]


def parse_output(tool: Tool, data: bytes) -> Any:
    """The JSON value in ``data``, if it is one and matches the tool's ``output``."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Invalid("output: expected JSON, found what is not UTF-8") from None
    except RecursionError:
        raise Invalid("output: nested too deeply") from None
    except ValueError as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        what = "found nothing" if not data.strip() else f"found what is not JSON{where}"
        raise Invalid(f"output: expected one JSON value, {what}") from None
    if tool.output_validator is None:
        return value
    try:
        wrong = best_match(itertools.islice(tool.output_validator.iter_errors(value), 50))
    except (RecursionError, Unresolvable):
        raise Invalid("output: the schema can't judge it") from None
    if wrong is not None:
        raise Invalid(explain(wrong, root="output"))
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(name)
