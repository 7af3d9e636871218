"""From a request's fields to an op's schema, and between a request and the flat arguments of an op.

A request is a NamedTuple whose fields are tensors, numbers or further NamedTuples; an op takes the leaves in order. A
nested request that is None travels as its leaves' empty values, and is None again where its first leaf is.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

Request = TypeVar("Request", bound=tuple[Any, ...])

_SCALARS = {int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


class Field(NamedTuple):
    """name; kind: the schema's type, or the class of a nested request; optional; written: changed in place."""

    name: str
    kind: str | type
    optional: bool
    written: bool


def fields(request: type) -> list[Field]:
    """The fields of a request class, as its annotations say."""
    found = []
    for name, hint in get_type_hints(request, include_extras=True).items():
        optional = get_origin(hint) in (Union, types.UnionType)
        if optional:
            (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
        written = get_origin(hint) is Annotated
        kind = get_args(hint)[0] if written else hint
        if kind is torch.Tensor:
            found.append(Field(name, "Tensor", optional, written))
        elif kind in _SCALARS:
            found.append(Field(name, _SCALARS[kind], optional, written))
        else:
            found.append(Field(name, kind, optional, written))
    return found


def leaves(request: type, optional: bool = False) -> list[Field]:
    """The leaves of a request class in the order of an op's arguments; a taken name gets its parent's before it."""
    found: list[Field] = []
    for field in fields(request):
        if isinstance(field.kind, str):
            # Numbers of an absent request have an empty value; only its tensors are None.
            found.append(field._replace(optional=field.optional or (optional and field.kind == "Tensor")))
        else:
            taken = {leaf.name for leaf in found}
            for leaf in leaves(field.kind, optional or field.optional):
                found.append(leaf._replace(name=f"{field.name}_{leaf.name}") if leaf.name in taken else leaf)
    return found


def arguments(request: type, symbolic: bool = False) -> str:
    """The arguments of an op's schema: ``"Tensor(a!) k, Tensor? advancing, int new_frames, ..."``.

    symbolic: integers may be symbols of a trace with dynamic shapes.
    """
    listed, alias = [], iter("abcdefghijklmnopqrstuvwxyz")
    for leaf in leaves(request):
        kind = "SymInt" if symbolic and leaf.kind == "int" else leaf.kind
        kind = f"{kind}({next(alias)}!)" if leaf.written else kind
        listed.append(f"{kind}{'?' if leaf.optional else ''} {leaf.name}")
    return ", ".join(listed)


def _empty(request: type) -> tuple[Any, ...]:
    """The leaves of a request that is None."""
    values = {"Tensor": None, "bool": False, "int": 0, "float": 0.0, "str": "", "ScalarType": None}
    return tuple(values[str(leaf.kind)] for leaf in leaves(request, optional=True))


def _flat_expression(request: type, value: str, names: dict[str, Any]) -> str:
    parts = []
    for field in fields(request):
        at = f"{value}.{field.name}"
        if isinstance(field.kind, str):
            parts.append(at)
        elif field.optional:  # its own fields are leaves: a NamedTuple is its own flat form
            names[f"empty_{field.kind.__name__}"] = _empty(field.kind)
            parts.append(f"*({at} or empty_{field.kind.__name__})")
        elif all(isinstance(inner.kind, str) for inner in fields(field.kind)):
            parts.append(f"*{at}")
        else:
            parts.append(_flat_expression(field.kind, at, names))
    return ", ".join(parts)


def _nested_expression(request: type, position: int, names: dict[str, Any]) -> tuple[str, int]:
    names[request.__name__] = request
    parts = []
    for field in fields(request):
        if isinstance(field.kind, str):
            parts.append(f"a[{position}]")
            position += 1
            continue
        first = position
        inner, position = _nested_expression(field.kind, position, names)
        parts.append(f"None if a[{first}] is None else {inner}" if field.optional else inner)
    return f"{request.__name__}({', '.join(parts)})", position


def flattener(request: type[Request]) -> Callable[[Request], tuple[Any, ...]]:
    """A function from a request to the flat arguments of its op.

    Written out as one expression and compiled, as NamedTuple itself does: a walk over the fields would cost several
    microseconds in every pass.
    """
    names: dict[str, Any] = {}
    expression = _flat_expression(request, "request", names)
    return eval(f"lambda request: ({expression},)", names)


def unflattener(request: type[Request]) -> Callable[[Sequence[Any]], Request]:
    """The inverse of `flattener`. What follows a request's own leaves is left alone."""
    names: dict[str, Any] = {}
    expression, _ = _nested_expression(request, 0, names)
    return eval(f"lambda a: {expression}", names)
