"""From plain YAML values to the frozen classes, with every mistake reported at its place.

cattrs does the building. Its converter here is strict (no coercion, unknown keys refused) and
gathers all errors of a document; this module turns them into messages with positions.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import attrs
from cattrs import Converter
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, override

from sandboxd.names import shown
from sandboxd.policy import destinations, values
from sandboxd.policy.model import Concurrency, Condition, SecretSpec, Stdin
from sandboxd.policy.policyfile import Globs
from sandboxd.policy.problems import Problems
from sandboxd.policy.template import Template, compile_template
from sandboxd.policy.values import Wrong, found
from sandboxd.policy.yamlpos import Document, Path

__all__ = ["VERSION", "keys_of", "structure"]

#: The version that every file states; a later format gets a later number.
VERSION = 1

#: Keys below which null is a value, for what stands there is JSON.
_KEEP_NULL = frozenset({"input", "output", "when"})

T = TypeVar("T")


def structure(document: Document, cls: type[T], problems: Problems) -> T | None:
    """``document`` as ``cls``, or None after noting every mistake in ``problems``."""
    value = document.value
    if not isinstance(value, dict):
        what = "an empty file" if value is None else found(value)
        problems.add(
            document.file,
            document.at(()),
            f"expected a mapping, found {what}",
            f"start with: version: {VERSION}",
        )
        return None
    before = len(problems.errors)
    value = dict(value)
    if not _check_version(value, document, problems):
        return None  # another version has other keys: reading on would report them all
    _check_empty(value, (), document, problems)
    try:
        result = _converter.structure(value, cls)
    except (BaseValidationError, Wrong) as error:
        for path, problem in _leaves(error, ()):
            # Of what has no value it was told already, but where JSON may have null.
            if not _is_empty(value, path) or _KEEP_NULL.intersection(path[:-1]):
                _report(path, problem, document, problems)
        return None
    return result if len(problems.errors) == before else None


def keys_of(cls: Any) -> dict[str, str]:
    """The keys that a file may hold for ``cls``, each with its attribute's name."""
    return {
        field.metadata.get("key", field.name): field.name
        for field in attrs.fields(cls)
        if not field.metadata.get("loaded")
    }


def _check_version(value: dict[str, Any], document: Document, problems: Problems) -> bool:
    """Take the version out of ``value``; whether the rest can be read by what this one means."""
    if "version" not in value:
        problems.add(
            document.file,
            document.at(()),
            "missing key 'version'",
            f"start the file with: version: {VERSION}",
        )
        return True
    version = value.pop("version")
    if version == VERSION and isinstance(version, int) and not isinstance(version, bool):
        return True
    newer = isinstance(version, int) and version > VERSION
    problems.add(
        document.file,
        document.at(("version",)),
        f"version {version} is newer than this sandboxd, which reads version {VERSION}"
        if newer
        else f"expected version {VERSION}, found {found(version)}",
        "upgrade sandboxd, or write the file for an older one" if newer else "",
    )
    return not newer


def _check_empty(value: Any, path: Path, document: Document, problems: Problems) -> None:
    """A key without a value is a value forgotten; only JSON (schemas, conditions) has null."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        place = (*path, key)
        if inner is None:
            problems.add(
                document.file,
                document.key_at(place),
                f"{_spell(place)} has no value",
                "leave the key out to have its default" if isinstance(key, str) else "",
            )
        elif isinstance(inner, dict | list) and key not in _KEEP_NULL:
            _check_empty(inner, place, document, problems)


def _is_empty(value: Any, path: Path) -> bool:
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return False
    return value is None


def _leaves(error: BaseException, path: Path) -> Iterator[tuple[Path, BaseException]]:
    """Every single error below cattrs' exception groups, with the path that leads to it."""
    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            note = next(
                (
                    n
                    for n in getattr(inner, "__notes__", ())
                    if isinstance(n, AttributeValidationNote | IterableValidationNote)
                ),
                None,
            )
            step: Path = ()
            if isinstance(note, AttributeValidationNote):
                step = (_key_name(error.cl, note.name),)
            elif note is not None:
                step = (note.index,)
            yield from _leaves(inner, path + step)
    elif isinstance(error, Wrong):
        yield path + error.path, error
    else:
        yield path, error


def _key_name(cls: Any, attribute: str) -> str:
    if not attrs.has(cls):
        return attribute
    return next((key for key, name in keys_of(cls).items() if name == attribute), attribute)


def _report(path: Path, error: BaseException, document: Document, problems: Problems) -> None:
    where = f"{_spell(path)}: " if path else ""
    if isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields, key=str):
            problems.add(
                document.file,
                document.key_at((*path, key)),
                f"unknown key {shown(str(key))}" + (f" in {_spell(path)}" if path else ""),
                values.nearest(str(key), keys_of(error.cl)),
            )
    elif isinstance(error, KeyError):  # cattrs reads a required attribute: o['name']
        place = _spell(path[:-1])
        problems.add(
            document.file,
            document.at(path[:-1]),
            f"missing key '{path[-1]}'" + (f" in {place}" if place else ""),
        )
    elif isinstance(error, Wrong):
        problems.add(document.file, document.at(path), where + error.message, error.hint)
    else:  # a hook of ours raises Wrong; anything else still has to name its place
        problems.add(document.file, document.at(path), f"{where}not valid here")


def _spell(path: Path) -> str:
    out = ""
    for step in path:
        out += f"[{step}]" if isinstance(step, int) else (f".{step}" if out else str(step))
    return out


def _class_hook(cls: type[Any], converter: Converter) -> Callable[[Any, Any], Any]:
    overrides = {
        field.name: override(omit=True)
        if field.metadata.get("loaded")
        else override(rename=field.metadata.get("key"))
        for field in attrs.fields(cls)
    }
    build: Any = make_dict_structure_fn(
        cls,
        converter,
        _cattrs_forbid_extra_keys=True,
        _cattrs_detailed_validation=True,
        **overrides,  # type: ignore[arg-type]
    )

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise Wrong(f"expected a mapping, found {found(value)}", _hint_keys(cls))
        return build(value, cls)

    return hook


def _hint_keys(cls: type[Any]) -> str:
    return f"its keys: {', '.join(keys_of(cls))}"


def _tuple_hook(kind: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    item = typing.get_args(kind)[0]

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            raise Wrong(f"expected a list, found {found(value)}", "write it as [a, b] or - lines")
        return tuple(_each(enumerate(value), lambda v: converter.structure(v, item), kind, item))

    return hook


def _mapping_hook(kind: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    key_type, item = typing.get_args(kind)

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise Wrong(f"expected a mapping, found {found(value)}")
        if item is Any:
            return MappingProxyType(dict(value))
        built = _each(value.items(), lambda v: converter.structure(v, item), kind, item)
        names = _each(((k, k) for k in value), lambda k: converter.structure(k, key_type), kind, "")
        return MappingProxyType(dict(zip(names, built, strict=True)))

    return hook


def _each(pairs: Any, build: Callable[[Any], Any], kind: Any, item: Any) -> list[Any]:
    """``build`` of every value; the errors of all together, each noted with its index."""
    out: list[Any] = []
    errors: list[Exception] = []
    for index, value in pairs:
        try:
            out.append(build(value))
        except (BaseValidationError, Wrong) as error:
            error.add_note(IterableValidationNote("", index, item))
            errors.append(error)
    if errors:
        raise IterableValidationError("", errors, kind)
    return out


def _secret(value: Any, build: Callable[[Any, Any], Any]) -> SecretSpec:
    if isinstance(value, str):  # the short form: just the variable
        value = {"variable": value}
    spec = typing.cast(SecretSpec, build(value, SecretSpec))
    return spec if spec.as_name else attrs.evolve(spec, as_name=spec.variable)


def _concurrency(value: Any, build: Callable[[Any, Any], Any]) -> Concurrency:
    if not isinstance(value, dict):  # the short form: over all sessions
        return Concurrency(total=values.count(value))
    return typing.cast(Concurrency, build(value, Concurrency))


def _stdin(value: Any) -> Stdin:
    if isinstance(value, dict):
        if set(value) != {"text"} or not isinstance(value["text"], str) or not value["text"]:
            raise Wrong("expected none, json or {text: ARGUMENT}")
        return Stdin("text", value["text"])
    if value in ("none", "json"):
        return Stdin(value)
    raise Wrong(
        f"expected none, json or {{text: ARGUMENT}}, found {found(value)}",
        "name the argument to send: {text: ARGUMENT}" if value == "text" else "",
    )


def _condition(value: Any) -> Condition:
    """``name: value`` is equals, ``name: [..]`` any of, ``name: {glob: ..}`` in full."""
    if isinstance(value, list):
        value = {"any_of": value}
    elif not isinstance(value, dict):
        value = {"equals": value}
    if len(value) != 1 or next(iter(value)) not in ("equals", "any_of", "glob"):
        raise Wrong("expected one of the keys equals, any_of, glob")
    ((kind, wanted),) = value.items()
    if kind == "any_of":
        if not isinstance(wanted, list) or not wanted:
            raise Wrong(f"expected a list of values, found {found(wanted)}", path=("any_of",))
        return Condition(any_of=tuple(wanted))
    if kind == "glob":
        if not isinstance(wanted, str) or not wanted or len(wanted) > 1000:
            raise Wrong(f"expected a pattern with *, found {found(wanted)}", path=("glob",))
        return Condition(glob=wanted)
    return Condition(any_of=(wanted,))


def _globs(value: Any) -> Globs:
    if not isinstance(value, list):
        return Globs((values.glob(value),))
    if not value:
        raise Wrong("expected at least one name or pattern, found an empty list")
    return Globs(tuple(_each(enumerate(value), values.glob, Globs, Globs)))


def _hook(check: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda value, _: check(value)


def _origin(kind: Any) -> Any:
    return typing.get_origin(kind)


def _make_converter() -> Converter:
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook_factory(attrs.has, lambda c: _class_hook(c, converter))
    converter.register_structure_hook_factory(
        lambda t: _origin(t) is tuple, lambda t: _tuple_hook(t, converter)
    )
    converter.register_structure_hook_factory(
        lambda t: _origin(t) is Mapping, lambda t: _mapping_hook(t, converter)
    )
    converter.register_structure_hook_factory(
        lambda t: _origin(t) is typing.Literal,
        lambda t: lambda value, _: values.choice(value, typing.get_args(t)),
    )
    for kind, check in (*values.checks.items(), *destinations.checks.items()):
        # Both of classes and of NewTypes; for str, int and bool it takes the place of coercion.
        converter.register_structure_hook(kind, _hook(check))
    secret = _class_hook(SecretSpec, converter)
    converter.register_structure_hook(SecretSpec, lambda value, _: _secret(value, secret))
    concurrency = _class_hook(Concurrency, converter)
    converter.register_structure_hook(
        Concurrency, lambda value, _: _concurrency(value, concurrency)
    )
    converter.register_structure_hook(Stdin, lambda value, _: _stdin(value))
    converter.register_structure_hook(Globs, lambda value, _: _globs(value))
    converter.register_structure_hook(Condition, lambda value, _: _condition(value))
    converter.register_structure_hook(Template, lambda value, _: compile_template(value))
    return converter


_converter = _make_converter()
