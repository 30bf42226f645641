"""Pages that repeat what the code says must say the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
from ports import free_addresses
from typer.core import TyperGroup
from typer.main import get_command

import secagg.cli
import secagg_bench.suite.cli
import secagg_client.cli
import secagg_keyholder.cli
import secagg_recommender.interactions  # noqa: F401 - adds its error to the tree
import secagg_server.cli
from secagg import errors
from secagg.settings import Settings, load
from secagg_bench.privacy.report import markdown
from secagg_client.config import ClientSettings
from secagg_keyholder.config import KeyHolderSettings
from secagg_server import states
from secagg_server.config import ServerSettings
from secagg_server.task_files import read_task

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "docs" / "samples"
# Their console blocks are executed as a whole.
WALKED = {"tutorial.md", "operations.md"}
# Their Python takes longer than a few seconds.
SLOW = {"how-to/analytics.md", "how-to/flower.md", "how-to/own-loop.md"}
PROGRAMS = {
    "secagg": secagg.cli.app,
    "secagg-server": secagg_server.cli.app,
    "secagg-keyholder": secagg_keyholder.cli.app,
    "secagg-client": secagg_client.cli.app,
    "secagg-bench": secagg_bench.suite.cli.app,
}


def _classes(root: type[errors.SecaggError]) -> list[type[errors.SecaggError]]:
    return [root, *(c for child in root.__subclasses__() for c in _classes(child))]


def test_error_page_lists_the_whole_tree_and_nothing_else() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \| (\d+) \|", page, re.MULTILINE)
    documented = {name: (reason, status, int(code)) for name, reason, status, code in rows}
    defined = {c.__name__: (c.reason, c.status, c.exit_code) for c in _classes(errors.SecaggError)}
    assert documented == defined


def test_sample_task_is_a_valid_task() -> None:
    spec = read_task(SAMPLES / "task.toml")
    assert spec.plan.max_clients == 100
    assert [segment.name for segment in spec.plan.segments] == ["update", "clicks-per-category"]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (ServerSettings, "server.toml"),
        (KeyHolderSettings, "keyholder.toml"),
        (ClientSettings, "client.toml"),
    ],
)
def test_samples_load_and_name_every_setting(kind: type[Settings], file: str) -> None:
    load(kind, SAMPLES / file, {})
    text = (SAMPLES / file).read_text(encoding="utf-8")
    unmentioned = {"ready_file", "repeatable_seed"}  # for programs that start programs
    for name in kind.model_fields.keys() - unmentioned:
        name = name.removeprefix("release_")  # in a table of that name
        assert re.search(rf"^(# )?{name} = ", text, re.MULTILINE), f"{file} does not show {name}"


def test_architecture_page_draws_the_states_of_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = re.search(r"```\n(CREATED.*?)```", page, re.DOTALL)
    assert drawing
    drawn = sorted(re.findall(r"[A-Z]{4,}", drawing.group(1)))
    assert drawn == sorted(state.value for state in states.RoundState)
    for state in states.RoundState:
        assert f"**{state}.**" in page or state is states.RoundState.ABORTED


def test_no_page_names_a_machine_path() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.toml")]:
        assert str(ROOT) not in page.read_text(encoding="utf-8")


def test_the_figures_of_the_privacy_page_are_those_of_the_results() -> None:
    """All tables are made from the results file; what the page quotes stands in them."""
    results = json.loads((ROOT / "bench" / "results" / "privacy.json").read_text(encoding="utf-8"))
    tables = (ROOT / "docs" / "privacy-results.md").read_text(encoding="utf-8")
    assert tables.endswith(markdown(results))
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    start = page.index("## What it costs")
    quoted = [
        figure
        for line in page[start : page.index("### Membership inference")].splitlines()
        if line.startswith("| ")
        for figure in re.findall(r"\b0\.\d{3}\b", line)
    ]
    assert len(quoted) > 40
    assert not [figure for figure in quoted if figure not in tables]


def _name(page: Path) -> str:
    return page.relative_to(pages.DOCS).as_posix()


def _pages_with_python() -> list[Any]:
    return [
        pytest.param(page, id=_name(page), marks=[pytest.mark.slow] * (_name(page) in SLOW))
        for page in pages.pages()
        if pages.script(page)
    ]


def _run(
    command: list[str], folder: Path, environment: dict[str, str], timeout_s: float = 100
) -> tuple[int, str]:
    """Exit status and output of a program, with which everything ends that it has started."""
    program = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = program.communicate(timeout=timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return program.returncode, output


def _environment() -> dict[str, str]:
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SECAGG_KEYHOLDER_MONITOR_LISTEN": "off",
        "SECAGG_SERVER_MONITOR_LISTEN": "off",
    }


@pytest.mark.parametrize("page", _pages_with_python())
def test_the_python_of_a_page_runs_from_its_first_line_to_its_last(
    page: Path, tmp_path: Path
) -> None:
    pages.write_files(page, tmp_path)
    script = tmp_path / page.name.replace(".md", "-md.py")
    script.write_text(pages.script(page), encoding="utf-8")
    status, output = _run([sys.executable, script.name], tmp_path, _environment())
    assert status == 0, f"{page}, lines as on the page:\n{output[-3000:]}"
    lines = iter(output.splitlines())
    for line in pages.printed(page):
        assert line in lines, f"{page} says that it prints {line!r}"


def test_a_file_that_a_page_shows_is_run_by_the_page_or_is_one_of_the_examples() -> None:
    examples = [path for path in pages.DOCS.glob("examples/**/*") if path.is_file()]
    assert not [
        f"{_name(page)}:{block.line} {block.title}"
        for page in pages.pages()
        for block in pages.blocks(page)
        if block.title and not block.skipped
        if not _is_run(block, page)
        if not any(
            path.name == Path(block.title).name
            and path.read_text(encoding="utf-8").strip() == block.text.strip()
            for path in examples
        )
    ]


def _is_run(block: pages.Block, page: Path) -> bool:
    """Whether what is executed of the page, or a file that it shows beside, names this one."""
    walked = pages.commands(page) if _name(page) in WALKED else []
    beside = [each.text for each in pages.blocks(page) if each.title not in ("", block.title)]
    return any(Path(block.title).stem in text for text in [pages.script(page), *walked, *beside])


CARRIERS = {"docker", "kubectl", "podman"}


def _calls(line: str) -> list[list[str]]:
    """The calls of our programs in a line of shell: their words, up to what ends a call."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.wordchars += "…$"
    calls: list[list[str]] = [[]]
    carried = False
    for word in lexer:
        if set(word) <= set("();<>|&"):
            calls.append([])
            carried = False
        elif calls[-1] or (word in PROGRAMS and not carried):
            calls[-1].append(word)
        else:
            # What an engine is told are its own words, until it is told what to run.
            carried = word in CARRIERS or (carried and word != "--")
    return [call for call in calls if call]


def _wrong(call: list[str]) -> str:
    """The first word of a call that its program does not know, or nothing."""
    command = get_command(PROGRAMS[call[0]])
    for word in call[1:]:
        if word.startswith("--"):
            known = {flag for each in command.params for flag in [*each.opts, *each.secondary_opts]}
            if word.split("=")[0] not in known | {"--help"}:
                return word
        elif isinstance(command, TyperGroup) and word.islower():
            found = command.get_command(command.make_context("", [], resilient_parsing=True), word)
            if found is None:
                return word
            command = found
    return ""


def test_the_commands_of_all_pages_exist_with_their_options() -> None:
    found, wrong = 0, []
    for page in [*pages.pages(), *ROOT.glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        inline = re.findall(r"`((?:secagg|secagg-[a-z]+) [^`]*)`", text)
        for line in [*pages.commands(page), *inline]:
            for call in _calls(" ".join(line.split())):
                found += bool(call)
                if word := _wrong(call):
                    wrong.append(f"{page.name}: {word!r} in {line!r}")
    assert found > 100
    assert not wrong


def test_a_command_or_option_that_does_not_exist_is_noticed() -> None:
    assert not _wrong(["secagg", "plan", "--clients", "3", "--bits=8"])
    assert _wrong(["secagg", "plam", "--clients", "3"]) == "plam"
    assert _wrong(["secagg", "plan", "--client", "3"]) == "--client"
    assert _wrong(["secagg-server", "task", "make"]) == "make"
    assert _calls("A=1 until secagg plan; do secagg-client join 2>> x & done") == [
        ["secagg", "plan"],
        ["secagg-client", "join", "2"],
    ]


@pytest.mark.slow
def test_the_tutorial_runs_from_an_empty_folder_to_the_end(tmp_path: Path) -> None:
    page = pages.DOCS / "tutorial.md"
    pages.write_files(page, tmp_path)
    client, admin, key_holder = free_addresses(3)
    program = tmp_path / "client.py"
    as_written = program.read_text(encoding="utf-8")
    program.write_text(as_written.replace("127.0.0.1:7400", client), encoding="utf-8")
    environment = _environment() | {
        "SECAGG_KEYHOLDER_LISTEN": key_holder,
        "SECAGG_SERVER_LISTEN": client,
        "SECAGG_SERVER_ADMIN_LISTEN": admin,
        "SECAGG_SERVER_KEY_HOLDER": key_holder,
        "SECAGG_OPERATOR_ADMIN": admin,
    }
    ending = "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"
    shell = "\n".join(["set -e", ending, *pages.commands(page)])
    status, output = _run(["bash", "-c", shell], tmp_path, environment, timeout_s=280)
    logs = "".join(file.read_text(encoding="utf-8") for file in sorted(tmp_path.glob("*.log")))
    assert status == 0, output[-3000:] + logs[-3000:]
    errors_of_clinics = re.findall(r"clinic \d: off by (\d\.\d) days", output)
    assert len(errors_of_clinics) == 3
    assert len(set(errors_of_clinics)) == 1, "all have the same model"
    # As in the loop above on the page; off by 2.0 days at the start.
    assert float(errors_of_clinics[0]) < 0.3
    assert "stays: finished" in output
    assert "all as they were written" in output
