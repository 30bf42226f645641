"""The page of command lines, made from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reference_text import code, plain, table
from typer.main import get_command

import secagg.cli
import secagg_bench.suite.cli
import secagg_client.cli
import secagg_keyholder.cli
import secagg_server.cli

__all__ = ["commands", "commands_page"]

_APPS = {
    "secagg": secagg.cli.app,
    "secagg-server": secagg_server.cli.app,
    "secagg-keyholder": secagg_keyholder.cli.app,
    "secagg-client": secagg_client.cli.app,
    "secagg-bench": secagg_bench.suite.cli.app,
}
_SHELL = {"--install-completion", "--show-completion", "--help"}


def commands() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every command and group by the words that call it, as click describes it."""
    for name, app in _APPS.items():
        command = get_command(app)
        with command.make_context(name, [], resilient_parsing=True) as context:
            yield from _below(name, command.to_info_dict(context))


def _below(name: str, info: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield name, info
    for word, inner in info.get("commands", {}).items():
        if not inner["hidden"]:
            yield from _below(f"{name} {word}", inner)


def options(info: dict[str, Any]) -> list[dict[str, Any]]:
    """A command's own options; those of every command are left out."""
    return [
        each
        for each in info["params"]
        if each["param_type_name"] == "option"
        and not each["hidden"]
        and not _SHELL.intersection(each["opts"])
    ]


def commands_page() -> str:
    """Every command and every option of all programs."""
    parts = []
    for name, info in commands():
        parts.append(f"{'###' if ' ' in name else '##'} `{name}` {{ #{name.replace(' ', '-')} }}\n")
        parts.append(f"{plain(info['help'] or '')}\n")
        arguments = [each for each in info["params"] if each["param_type_name"] == "argument"]
        if "commands" not in info:
            words = [name, *(_metavar(each) for each in arguments)]
            parts.append(f"```text\n{' '.join(words)} [OPTIONS]\n```\n")
        given = [(code(_metavar(each)), plain(each.get("help") or "")) for each in arguments]
        parts.append(table(("argument", "meaning"), given))
        rows = [(_flags(each), _kind(each), plain(_help(each))) for each in options(info)]
        parts.append(table(("option", "value", "meaning"), rows))
    return "\n".join(parts)


def _metavar(argument: dict[str, Any]) -> str:
    name = str(argument["name"]).upper()
    several = "..." if argument["nargs"] == -1 else ""
    return f"{name}{several}" if argument["required"] else f"[{name}]{several}"


def _flags(option: dict[str, Any]) -> str:
    return "<br>".join(code(flag) for flag in [*option["opts"], *option["secondary_opts"]])


def _kind(option: dict[str, Any]) -> str:
    kind = option["type"]
    if option["is_flag"]:
        return ""
    if "choices" in kind:
        return ", ".join(code(choice) for choice in kind["choices"])
    bounds = " to ".join(str(kind[end]) for end in ("min", "max") if kind.get(end) is not None)
    limits = f", {bounds}{'' if ' to ' in bounds else ' or more'}" if bounds else ""
    return str(kind["name"]).removesuffix(" range") + limits


def _help(option: dict[str, Any]) -> str:
    text = str(option.get("help") or option["name"].strip("_").replace("_", " "))
    default = option["default"]
    if option["required"]:
        return f"{text}; required"
    if isinstance(default, (int, float, str)) and not isinstance(default, bool) and default != "":
        return f"{text}; default {default}"
    return text
