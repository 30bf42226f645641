"""Builds of the site: what of its pages is made from the code, and links that lead out of docs/.

Pages link to files beside docs/ as they lie in the repository. Such a file comes along into the
site at the same place, `CHANGELOG.md` and the like as pages; a link to a folder becomes a link to
its page if it has one, and plain text if not.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from reference_commands import commands_page
from reference_configuration import configuration_page, task_file_page
from reference_errors import errors_page
from reference_metrics import metrics_page
from reference_wire import wire_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
GENERATED = {
    "reference/configuration.md": configuration_page,
    "reference/task-files.md": task_file_page,
    "reference/commands.md": commands_page,
    "reference/metrics.md": metrics_page,
    "reference/wire.md": wire_page,
}
MARK = "<!-- made when the site is built -->"
# What stands for a file or folder of the repository in the site.
_INSTEAD = {"README.md": "index.md", "proto/secagg/wire/v1": "reference/wire.md"}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/."""
    for name in PROJECT:
        files.append(_taken(ROOT / name, config))
    for page in files.documentation_pages():
        for match in _LINK.finditer(page.content_string):
            target = _target(page, match.group(2))
            if target.is_file() and not target.is_relative_to(DOCS):
                path = _in_site(target)
                if path not in files.src_uris:
                    files.append(_taken(target, config))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site, and fill in what is made."""
    if page.file.src_uri == "errors.md":
        markdown = errors_page(markdown)

    def relinked(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        target = _target(page.file, link)
        if not target.exists():
            return match.group()  # code, or a mistake that mkdocs names
        path = _in_site(target)
        for found in (path, f"{path}/index.md", f"{path}/README.md"):
            if found in files.src_uris:
                here = os.path.relpath(found, Path(page.file.src_uri).parent)
                return f"[{text}]({here}{anchor or ''})"
        return text

    return _LINK.sub(relinked, markdown).replace(MARK, GENERATED.get(page.file.src_uri, str)())


def _taken(file: Path, config: MkDocsConfig) -> File:
    return File.generated(config, _in_site(file), abs_src_path=str(file))


def _target(page: File, link: str) -> Path:
    return Path(os.path.normpath(Path(page.abs_src_path or "").parent / link))


def _in_site(target: Path) -> str:
    """Where a file or folder of the repository is in the site."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    path = os.path.relpath(target, ROOT)
    return _INSTEAD.get(path, path)
