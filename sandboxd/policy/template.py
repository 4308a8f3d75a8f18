"""A tool's argument vector as a template: one value is one element, and never an option.

Elements of ``argv`` in a manifest:

``literal``         goes in as it stands; ``{{`` and ``}}`` stand for braces
``{name}``          the argument's value as one whole element
``--flag={name}``   the value after a literal option; the literal ends in ``=``
``[--flag, "{name}"]``  a group: dropped as a whole when an argument in it is absent
``{if: name, argv: [...]}``  only when the boolean argument ``name`` is true
``{operands: [...]}``  comes last: ``--`` and these, or nothing when all of them are absent

An absent argument (or null) drops its element; a list repeats it. A value that starts with ``-``
is refused wherever the program could read it as an option, which is everywhere but after ``=``:
also behind ``--`` (POSIX.1-2024, Utility Syntax Guideline 10), which not every program honours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from sandboxd.names import MAX_ENV_STRING, shown
from sandboxd.policy.values import Wrong, found, text

__all__ = ["MAX_ARGV", "Refused", "Template", "compile_template", "fill", "value_text"]

#: Bytes of all elements together. The kernel's own limit depends on the stack limit (execve(2)).
MAX_ARGV = 1 << 20

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


class Refused(Exception):
    """Arguments that must not become an argument vector. The message holds no value."""


@attrs.frozen
class Element:
    """``before`` and then the value of ``name``; only ``before`` when ``name`` is empty."""

    before: str
    name: str = ""

    def written(self) -> str:
        before = self.before.replace("{", "{{").replace("}", "}}")
        return f"{before}{{{self.name}}}" if self.name else before


@attrs.frozen
class Group:
    """Elements that come and go together; ``condition`` names a boolean argument.

    Before the first ``operand`` that is there the filled vector has a ``--``.
    """

    elements: tuple[Element, ...]
    condition: str = ""
    operand: bool = False


@attrs.frozen
class Template:
    """A compiled ``argv``."""

    groups: tuple[Group, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Every argument that the template uses."""
        used = {element.name for group in self.groups for element in group.elements}
        used |= {group.condition for group in self.groups}
        return frozenset(used - {""})

    def written(self) -> list[Any]:
        """As a manifest would have it."""
        out: list[Any] = []
        for group in self.groups:
            words = [element.written() for element in group.elements]
            if group.condition:
                out.append({"if": group.condition, "argv": words})
            elif group.operand and out and isinstance(out[-1], dict) and "operands" in out[-1]:
                out[-1]["operands"] += words
            elif group.operand:
                out.append({"operands": words})
            else:
                out.append(words if len(words) > 1 else words[0])
        return out


def compile_template(value: Any) -> Template:
    """The template that a manifest's ``argv`` describes. Raises Wrong with the element's path."""
    if not isinstance(value, list):
        raise Wrong(f"expected a list of elements, found {found(value)}")
    groups: list[Group] = []
    for index, item in enumerate(value):
        if groups and groups[-1].operand:
            raise Wrong(
                "an element after the operands would be one of them",
                "move it before {operands: [...]}, which comes last",
                (index,),
            )
        if isinstance(item, list):
            groups.append(Group(_elements(item, (index,))))
        elif isinstance(item, dict) and "operands" in item:
            groups += _operands(item, index, groups)
        elif isinstance(item, dict):
            groups.append(_conditional(item, index))
        else:
            groups.append(Group((_element(item, (index,)),)))
    return Template(tuple(groups))


def fill(template: Template, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The argument vector for ``arguments``. Raises :class:`Refused`."""
    out: list[str] = []
    total = 0
    marked = False
    for group in template.groups:
        if group.condition and arguments.get(group.condition) is not True:
            continue
        words = list(_expand(group, arguments))
        if group.operand and words and not marked:
            words, marked = ["--", *words], True
        for word in words:
            size = len(word.encode("utf-8", "surrogatepass")) + 1
            total += size
            if size > MAX_ENV_STRING:
                raise Refused(
                    f"one argument of the program would have {size:,} bytes; the kernel takes "
                    f"{MAX_ENV_STRING:,} (execve(2), MAX_ARG_STRLEN)"
                )
            if total > MAX_ARGV:
                raise Refused(f"the program's arguments would have more than {MAX_ARGV:,} bytes")
            out.append(word)
    return tuple(out)


def value_text(value: Any) -> str:
    """How one JSON value looks on a command line: text as it stands, the rest as compact JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _expand(group: Group, arguments: Mapping[str, Any]) -> Iterator[str]:
    names = {element.name for element in group.elements if element.name}
    if any(arguments.get(name) is None for name in names):
        return
    lists = [name for name in names if isinstance(arguments[name], list)]
    if not lists:
        for element in group.elements:
            yield _word(element, arguments)
        return
    lengths = {len(arguments[name]) for name in lists}
    if len(lengths) > 1:
        raise Refused(f"the lists {', '.join(map(shown, sorted(lists)))} differ in length")
    for index in range(lengths.pop()):
        row = {**arguments, **{name: arguments[name][index] for name in lists}}
        for element in group.elements:
            yield _word(element, row)


def _word(element: Element, arguments: Mapping[str, Any]) -> str:
    if not element.name:
        return element.before
    word = value_text(arguments[element.name])
    if "\0" in word:
        raise Refused(f"the argument {shown(element.name)} holds a NUL character")
    if not element.before and word.startswith("-"):
        raise Refused(
            f"the argument {shown(element.name)} starts with '-', so the program could take it "
            "for an option"
        )
    return element.before + word


def _elements(items: Any, path: tuple[str | int, ...]) -> tuple[Element, ...]:
    if not isinstance(items, list) or not items:
        raise Wrong(
            f"expected a list of elements, found {found(items) if items else 'none'}", path=path
        )
    return tuple(_element(item, (*path, index)) for index, item in enumerate(items))


def _conditional(item: dict[str, Any], index: int) -> Group:
    if set(item) != {"if", "argv"}:
        raise Wrong("expected the two keys 'if' and 'argv'", path=(index,))
    condition = item["if"]
    if not isinstance(condition, str) or not condition:
        raise Wrong(f"expected an argument's name, found {found(condition)}", path=(index, "if"))
    return Group(_elements(item["argv"], (index, "argv")), condition)


def _operands(item: dict[str, Any], index: int, before: list[Group]) -> list[Group]:
    if set(item) != {"operands"}:
        raise Wrong("expected the one key 'operands'", path=(index,))
    if any(element == Element("--") for group in before for element in group.elements):
        raise Wrong("'--' is put before operands by itself", "drop the literal '--'", (index,))
    path = (index, "operands")
    groups = [Group((e,), operand=True) for e in _elements(item["operands"], path)]
    for position, group in enumerate(groups):
        if group.elements[0].before.startswith("-"):
            raise Wrong(
                "an operand that starts with '-' is an option", "move it up", (*path, position)
            )
    return groups


def _element(item: Any, path: tuple[str | int, ...]) -> Element:
    try:
        words = text(item)
    except Wrong as wrong:
        raise Wrong(wrong.message, wrong.hint, path) from None
    bare = words.replace("{{", "").replace("}}", "")
    placeholder = _PLACEHOLDER.search(bare)
    if placeholder is None:
        if "{" in bare or "}" in bare:
            raise Wrong("a brace without its partner", "write {{ or }} for a brace", path)
        return Element(words.replace("{{", "{").replace("}}", "}"))
    name = placeholder[1]
    before, middle, after = words.partition("{" + name + "}")
    fits = not before or (before.startswith("-") and before.endswith("=") and len(before) > 2)
    if not middle or after or not fits or "{" in before or "}" in before:
        raise Wrong(
            f"{shown(words)}: a placeholder is a whole element or all that follows '--flag='",
            "write '{name}' or '--flag={name}'; for more, take stdin: json",
            path,
        )
    return Element(before, name)
