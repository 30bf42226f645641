"""Reads Dockerfiles and .dockerignore files as container engines do, as far as ours go."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

__all__ = ["Dockerfile", "Instruction", "Stage", "in_context"]


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name in capitals, and all that follows, on one line."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """What follows, without options such as ``--from=build``."""
        return [word for word in self.text.split() if not word.startswith("--")]

    def option(self, name: str) -> str | None:
        """The value of an option, or None."""
        found = re.search(rf"(?:^|\s)--{name}=(\S+)", self.text)
        return found[1] if found else None

    @property
    def listed(self) -> list[str]:
        """The words of a JSON list, which ends the instruction."""
        found: list[str] = json.loads(self.text[self.text.index("[") :])
        return found


@dataclass
class Stage:
    """A stage: its name, what it is made from, and its instructions."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Dockerfile:
    """A Dockerfile: arguments before the first stage, and the stages by name."""

    arguments: dict[str, str]
    stages: dict[str, Stage]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        found = cls({}, {})
        stage: Stage | None = None
        for each in _instructions(path.read_text(encoding="utf-8")):
            if each.name == "FROM":
                base, _, name = each.words
                stage = found.stages[name] = Stage(name, base)
            elif stage is None:
                name, _, value = each.text.partition("=")
                found.arguments[name] = value
            else:
                stage.instructions.append(each)
        return found

    def effective(self, target: str) -> list[Instruction]:
        """What makes up an image: the instructions of its stage after those it is made from."""
        stage = self.stages[target]
        below = self.effective(stage.base) if stage.base in self.stages else []
        return below + stage.instructions

    def last(self, target: str, name: str) -> Instruction | None:
        """The instruction of this name that counts in an image."""
        found = [each for each in self.effective(target) if each.name == name]
        return found[-1] if found else None

    def values(self, target: str, name: str) -> dict[str, str]:
        """All that ENV, or LABEL, sets in an image."""
        found: dict[str, str] = {}
        for each in self.effective(target):
            if each.name == name:
                pairs = re.findall(r'([\w.]+)=("[^"]*"|\S+)', each.text)
                found |= {key: value.strip('"') for key, value in pairs}
        return found


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not re.match(r"\s*(#|$)", line)]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in joined.splitlines():
        name, _, rest = line.strip().partition(" ")
        found.append(Instruction(name.upper(), rest.strip()))
    return found


def in_context(ignore: str, path: str) -> bool:
    """Whether a file of the context reaches the builder, by the text of a .dockerignore.

    The last pattern that matches it, or a folder above it, decides.
    """
    names = [path, *(str(above) for above in PurePosixPath(path).parents)][:-1]
    stays = True
    for line in ignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        kept = pattern.startswith("!")
        wanted = _pattern(pattern.removeprefix("!").strip("/"))
        if any(wanted.fullmatch(name) for name in names):
            stays = kept
    return stays


def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", text)
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(signs.get(part, re.escape(part)) for part in parts))
