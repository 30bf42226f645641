"""The site of the documentation: generated pages are complete, and it needs no other host."""

from __future__ import annotations

import html
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from google.protobuf.descriptor import FileDescriptor
from pydantic import BaseModel
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

import secagg
import secagg.cli
import secagg_bench.suite.cli
import secagg_client.cli
import secagg_keyholder.cli
import secagg_server.cli
from secagg.settings import Settings
from secagg.wire.v1 import (
    aggregation_service_pb2,
    key_holder_service_pb2,
    operator_service_pb2,
    plan_pb2,
    round_pb2,
)
from secagg_client.config import ClientSettings
from secagg_keyholder.config import KeyHolderSettings
from secagg_server import task_files
from secagg_server.config import OperatorSettings, ServerSettings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


Hooks = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def hooks() -> Iterator[Hooks]:
    """What the site's generated pages are made by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "_hooks"))
        yield importlib.import_module


def words(page: str) -> str:
    """What a reader sees of a page's markup."""
    return html.unescape(re.sub(r"<[^>]+>", "\n", page)).replace("\\", "")


def entry(page: str, heading: str) -> str:
    """What is below one heading of a page."""
    return re.split(r"^#{1,4} ", page.partition(heading)[2], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("Server", ServerSettings),
        ("Key holder", KeyHolderSettings),
        ("Client", ClientSettings),
        ("Operator", OperatorSettings),
    ],
)
def test_every_setting_is_in_the_configuration_reference(
    hooks: Hooks, title: str, kind: type[Settings]
) -> None:
    page = hooks("reference_configuration").configuration_page()
    rows = [row for row in entry(page, f"## {title}\n").splitlines() if "<span" in row]
    assert len(rows) == len(kind.model_fields)
    for row, (name, field) in zip(rows, kind.model_fields.items(), strict=True):
        cells = [words(cell).strip() for cell in row.split(" | ")]
        assert name.removeprefix("release_") in cells[0]
        assert f"{kind.env_prefix}{name.upper()}\n" in words(row)
        secret = "SecretStr" in str(field.annotation)
        assert (f"--{name.replace('_', '-')}\n" in words(row)) is not secret
        if isinstance(field.default, (str, int, Path)) and field.default is not False:
            assert cells[2] == str(field.default).lower()
        assert len(cells[3]) > 5
    assert "[release] min_clients" in words(page)


def test_every_key_is_in_the_task_file_reference(hooks: Hooks) -> None:
    page = hooks("reference_configuration").task_file_page()

    def check(kind: type[BaseModel], section: str) -> None:
        heading = f"`{section}`" if section else "## The task"
        part = entry(page, heading).splitlines()
        for name, field in kind.model_fields.items():
            inner = re.search(r"task_files\.(_\w+)", str(field.annotation))
            if inner:
                path = ".".join(filter(None, [section.strip("[]"), name]))
                many = "list[" in str(field.annotation)
                check(getattr(task_files, inner.group(1)), f"[[{path}]]" if many else f"[{path}]")
                continue
            row = next(row for row in part if f"<code>{name}</code>" in row)
            default, meaning = (words(cell).strip() for cell in row.strip("| ").split(" | ")[-2:])
            assert len(meaning) > 5, f"{section} {name}"
            # The sample's comments repeat defaults, and say more than the model where it has none.
            if isinstance(field.default, (bool, int, float, str)):
                said = re.split(r", or ", default)[0]
                assert said == str(field.default).lower() or float(said) == field.default

    check(task_files._TaskFile, "")


def test_every_command_and_option_is_in_the_reference(hooks: Hooks) -> None:
    page = hooks("reference_commands").commands_page()

    def check(name: str, command: TyperCommand | TyperGroup) -> int:
        part = words(entry(page, f" `{name}` {{"))
        for parameter in command.params:
            if isinstance(parameter, TyperOption) and "completion" not in parameter.opts[0]:
                for flag in parameter.opts:
                    assert f"\n{flag}\n" in part, f"{name} {flag}"
        if not isinstance(command, TyperGroup):
            assert f"\n{name}" in part, "how it is called"
            return 1
        context = command.make_context("", [], resilient_parsing=True)
        inner = [
            (each, command.get_command(context, each)) for each in command.list_commands(context)
        ]
        return sum(check(f"{name} {each}", found) for each, found in inner)

    counts = [
        check("secagg", get_command(secagg.cli.app)),
        check("secagg-server", get_command(secagg_server.cli.app)),
        check("secagg-keyholder", get_command(secagg_keyholder.cli.app)),
        check("secagg-client", get_command(secagg_client.cli.app)),
        check("secagg-bench", get_command(secagg_bench.suite.cli.app)),
    ]
    assert sum(counts) > 30


def test_every_reason_has_an_entry_with_its_exit_code_and_a_remedy(hooks: Hooks) -> None:
    errors = hooks("reference_errors")
    table = (DOCS / "errors.md").read_text(encoding="utf-8")
    page = errors.errors_page(table)
    rows = list(errors.rows(table))
    # That these are all, and right, is what tests/test_docs.py compares.
    assert len(rows) == len(re.findall(r"^\| \w+Error \|", table, re.MULTILINE)) > 40
    for row in rows:
        part = entry(page, f"### `{row.reason}` {{ #{row.reason} }}\n")
        assert f"exit code {row.exit_code} " in part
        assert "**Meaning.** " in part
        assert "**What to do.** " in part


def test_every_message_field_and_method_is_in_the_wire_reference(hooks: Hooks) -> None:
    page = hooks("reference_wire").wire_page()
    modules: list[ModuleType] = [
        aggregation_service_pb2,
        key_holder_service_pb2,
        operator_service_pb2,
        plan_pb2,
        round_pb2,
    ]
    for module in modules:
        file: FileDescriptor = module.DESCRIPTOR
        for message in file.message_types_by_name.values():
            part = words(entry(page, f"### {message.name} {{"))
            for field in message.fields:
                assert f"\n{field.name} = {field.number}\n" in part, message.name
        for service in file.services_by_name.values():
            for method in service.methods:
                assert f"#### {method.name} {{ #{service.name}.{method.name} }}" in page
    assert not re.search(r"\| *\|$", page, re.MULTILINE), "a field without a comment"


def test_every_public_name_of_the_library_has_an_entry() -> None:
    entries = "\n".join(
        path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md")
    )
    named = set(re.findall(r"^::: (\S+)$", entries, re.MULTILINE))
    missing = {
        name
        for name in secagg.__all__
        if not {f"secagg.{name}", getattr(secagg, name).__module__} & named
    }
    assert not missing
    for module in ("secagg_client.embedded", "secagg_server.embedded", "secagg_client.session"):
        assert module in named


class _Resources(HTMLParser):
    """What a page loads by itself, what it links to, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors.update(found[name] for name in ("id", "name") if name in found)
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link":
            self.loaded.append(found.get("href", ""))
        elif "src" in found:
            self.loaded.append(found["src"])


@pytest.mark.slow
def test_the_site_builds_without_warnings_asks_no_other_host_and_has_no_dead_link(
    tmp_path: Path,
) -> None:
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    pages = {
        path: _Resources(path.read_text(encoding="utf-8"))
        for path in site.glob("**/*.html")
        if path.name != "404.html"  # is served for any address, so that its links begin at the root
    }
    assert len(pages) > 50
    for path, page in pages.items():
        for address in page.loaded:
            assert not urlsplit(address).netloc, f"{path.name} loads {address}"
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name} links to {address}"
            if parts.fragment and target in pages:
                anchors = pages[target].anchors | {"__tabbed", "__codelineno"}
                assert unquote(parts.fragment) in anchors, f"{path.name} links to {address}"
    for sheet in site.glob("**/*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", text), sheet.name
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    for found in (
        "plan_tensors",
        "SECAGG_SERVER_LISTEN",
        "secagg-client withdraw",
        "FORGED_SKETCH",
    ):
        assert found in index
