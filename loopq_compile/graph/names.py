"""Names of the model's parameters, and the safe targets under which a graph module holds them.

PyTorch takes any text without dots as the name of a module or parameter: Python keywords (`in`, `lambda`), attributes
of `GraphModule` (`graph`, `meta`), quotes, and letters that Python normalizes to others. A graph module is Python code
and takes none of these. Such a part of a name is therefore spelled as an ordinary identifier inside the graph,
`loopq_in`. People and files see the name of the model, `in`. Everything else stays as it is.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from functools import cache

from torch import fx, nn

_MARK = "loopq_"
_ESCAPED = re.compile(r"_x([0-9a-f]+)_")
_TO_ESCAPE = re.compile(r"[^A-Za-z0-9_]|_(?=x[0-9a-f]+(?:[^A-Za-z0-9]|$))")
_ARGUMENTS = ("self", "torch", "device", "inf", "nan", "operator", "math", "fx_pytree", "pytree", "NoneType")
"""Names with a meaning of their own in generated code."""


def safe_name(name: str) -> str:
    """The target of `name` (dotted) in a graph module; for most names, the name itself.

    Two names never share a target, and `shown_name` gives the name back.
    """
    first, *rest = name.split(".")
    return ".".join([_safe(first, _taken(root=True)), *(_safe(part, _taken(root=False)) for part in rest)])


def safe_argument(name: str) -> str:
    """The name of an input in generated code."""
    made = _safe(name.replace(".", "_"), frozenset(_ARGUMENTS))
    return made if made.isidentifier() else _MARK + made


def shown_name(target: str) -> str:
    """Inverse of `safe_name`: the name for people, or several joined by `+`."""
    return "+".join(".".join(map(_shown, name.split("."))) for name in target.split("+"))


def _safe(part: str, taken: frozenset[str]) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9_]+", part) or (
        part.isidentifier() and unicodedata.normalize("NFKC", part) == part
    )
    if plain and not keyword.iskeyword(part) and part not in taken and not part.startswith(_MARK):
        return part
    return _MARK + _TO_ESCAPE.sub(lambda found: f"_x{ord(found[0]):x}_", part)


def _shown(part: str) -> str:
    if not part.startswith(_MARK):
        return part
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), part.removeprefix(_MARK))


@cache
def _taken(root: bool) -> frozenset[str]:
    """Attributes that a graph module, or a module inside it, has of its own."""
    return frozenset(dir(fx.GraphModule({}, fx.Graph()) if root else nn.Module()))
