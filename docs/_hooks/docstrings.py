"""What docstrings here say in ways of their own, said as griffe and Markdown know it."""

from __future__ import annotations

import re
from typing import Any

import griffe

from secagg import errors

__all__ = ["OwnWays"]

_ROLE = re.compile(r":(?:meth|class|func|attr|mod|data|exc):`~?([^`]+)`")
_LITERAL = re.compile(r"(?:^:|(?<=\S) ?(:)):(?=\n\n)", re.MULTILINE)
_SEVERAL = re.compile(r"^(    )((?:\w+, )+\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
_RAISES = re.compile(r"(?<=^    )(\w+Error)(?=: )", re.MULTILINE)
_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]+)`(?!`)")


class OwnWays(griffe.Extension):
    """Makes links of names between backticks and of errors, spells out several names before one
    explanation, knows roles and literal blocks, and leaves private fields out."""

    def on_package(self, *, pkg: griffe.Module, **_kwargs: Any) -> None:  # noqa: ANN401
        """Change a package once all of its names are known."""
        _change(pkg, pkg)


def _change(this: griffe.Object, package: griffe.Module) -> None:
    if this.docstring:
        text = _ROLE.sub(r"`\1`", this.docstring.value)
        text = _LITERAL.sub(r"\1", text)
        text = _SEVERAL.sub(_each, text)
        for name in _RAISES.findall(text):
            _know(name, this)
        this.docstring.value = _NAME.sub(lambda match: _link(match, this, package), text)
    if isinstance(this, griffe.Function) and this.name == "__init__":
        for parameter in [each.name for each in this.parameters if each.name.startswith("_")]:
            del this.parameters[parameter]
    for member in list(this.members.values()):
        if isinstance(member, griffe.Object):
            _change(member, package)


def _each(match: re.Match[str]) -> str:
    """One line for each name: ``a, b: text`` to ``a: text`` and ``b: text``."""
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


def _know(name: str, this: griffe.Object) -> None:
    """Make an error that is raised further below known where it is mentioned."""
    try:
        this.resolve(name)
    except griffe.NameResolutionError:
        if name in errors.__all__:
            this.module.set_member(name, griffe.Alias(name, _error(name)))


def _error(name: str) -> str:
    return f"secagg.errors.{name}" if name in errors.__all__ else name


def _link(match: re.Match[str], this: griffe.Object, package: griffe.Module) -> str:
    """A link where the name is one of ours that has an entry; else what it was."""
    first, _, rest = match.group(1).partition(".")
    for scope in (this, package):
        try:
            path = scope.resolve(first)
            break
        except griffe.NameResolutionError:
            path = _error(first)
    target = f"{path}.{rest}".rstrip(".")
    return f'<autoref optional identifier="{target}"><code>{match.group(1)}</code></autoref>'
