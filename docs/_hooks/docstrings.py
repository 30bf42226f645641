"""What docstrings here say in ways of their own, said as griffe and Markdown know it."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["OwnWays"]

_ROLE = re.compile(r":(?:meth|class|func|attr|mod|data|exc):`~?([^`]+)`")
_LITERAL = re.compile(r" ?::(?=\n\n)")
_SEVERAL = re.compile(r"^(    )((?:\w+, )+\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]+)`(?!`)")


class OwnWays(griffe.Extension):
    """Roles and literal blocks of reStructuredText; several names before one explanation; names of
    classes and functions between backticks, which become links."""

    def on_package(self, *, pkg: griffe.Module, **_kwargs: Any) -> None:  # noqa: ANN401
        """Change the docstrings of a package once all of its names are known."""
        _change(pkg, pkg)


def _change(this: griffe.Object, package: griffe.Module) -> None:
    if this.docstring:
        text = _ROLE.sub(r"`\1`", this.docstring.value)
        text = _LITERAL.sub(":", text)
        text = _SEVERAL.sub(_each, text)
        this.docstring.value = _NAME.sub(lambda match: _link(match, this, package), text)
    for member in this.members.values():
        if isinstance(member, griffe.Object):
            _change(member, package)


def _each(match: re.Match[str]) -> str:
    """One line for each name: ``a, b: text`` to ``a: text`` and ``b: text``."""
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


def _link(match: re.Match[str], this: griffe.Object, package: griffe.Module) -> str:
    """A link where the name is one of ours that has an entry; else what it was."""
    first, _, rest = match.group(1).partition(".")
    for scope in (this, package):
        try:
            path = scope.resolve(first)
        except griffe.NameResolutionError:
            continue
        target = f"{path}.{rest}".rstrip(".")
        return f'<autoref optional identifier="{target}"><code>{match.group(1)}</code></autoref>'
    return match.group()
