"""The examples of the documentation do what they say, as programs of their own and at toy size."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from pages import DOCS, blocks

from secagg_bench.processes import Program, Services, running_services
from secagg_server.task_files import read_task

EXAMPLES = DOCS / "examples"
OWN_LOOP, ANALYTICS = EXAMPLES / "own-loop", EXAMPLES / "analytics"
# The examples are many small processes on few cores.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


def run(script: Path, *arguments: str) -> str:
    """What an example prints, which must end well."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def started(script: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """An example that runs beside others; killed at the end if it has not ended by then."""
    with subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> str:
    """The rest of what it prints, until it ends well."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def accuracies(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"accuracy (0\.\d+)", output)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with running_services(tmp_path_factory.mktemp("federation"), clients=3) as running:
        yield running


# --- a loop of one's own -------------------------------------------------------------------


@pytest.mark.slow
def test_the_encrypted_loop_learns_what_the_plain_one_learns() -> None:
    plain, encrypted = (
        accuracies(run(OWN_LOOP / f"{name}.py")) for name in ("plain", "in_process")
    )
    assert len(plain) == len(encrypted) == 5
    assert plain[-1] > plain[0] + 0.2
    # Rounding moves the mean update by some 0.5 percent of its length.
    assert abs(plain[-1] - encrypted[-1]) < 0.03


@pytest.mark.slow
def test_the_loop_runs_over_http_with_the_real_key_holder(
    federation: Services, tmp_path: Path
) -> None:
    with ExitStack() as running:
        server = running.enter_context(
            started(
                OWN_LOOP / "server.py",
                *("--kit", str(federation.kits / "server"), "--port", "0", "--clients", "3"),
                *("--key-holder", federation.key_holder, "--rounds", "3", "--deadline-s", "300"),
            )
        )
        assert server.stdout is not None
        port = server.stdout.readline().split()[-1]
        clients = [
            running.enter_context(
                started(
                    OWN_LOOP / "client.py",
                    *("--kit", str(federation.client_kit(number)), "--silo", str(number)),
                    *("--server", f"http://127.0.0.1:{port}"),
                    *("--state", str(tmp_path / str(number))),
                )
            )
            for number in range(3)
        ]
        printed, sent = ended(server), [ended(client) for client in clients]
    found = accuracies(printed)
    assert printed.count("3 clients, 0 refused") == len(found) == 3
    assert found[-1] > found[0] + 0.05
    assert all(output.count("sent") == output.count("norm") == 3 for output in sent)


# --- analytics -----------------------------------------------------------------------------


def test_analytics_are_bit_for_bit_those_of_all_data_in_one_place() -> None:
    printed = run(ANALYTICS / "in_process.py")
    assert printed.endswith("bit for bit what all data in one place give: True\n")
    assert re.search(r"euros = -?0\.\d\d \+ 0\.20\d age \+ [34]\.\d+ visits", printed)


@pytest.mark.slow
def test_shops_answer_a_task_of_the_services(
    federation: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--admin", federation.admin, "--kit", str(federation.kits / "operators" / "admin")]
    create = ["task", "create", str(ANALYTICS / "task.toml"), *flags]
    assert _ends_well("secagg_server.cli", create, tmp_path)
    with ExitStack() as running:
        clients = [
            running.enter_context(
                started(
                    ANALYTICS / "client.py",
                    *("--kit", str(federation.client_kit(number)), "--shop", str(number)),
                    *("--server", federation.server),
                )
            )
            for number in range(3)
        ]
        for client in clients:
            assert re.fullmatch(r"round 1: sent \d+ encrypted bytes\n", ended(client))
    file = tmp_path / "sums.npz"
    sums = ["task", "sums", "shops", "1", "--output", str(file), *flags]
    assert _ends_well("secagg_server.cli", sums, tmp_path)
    assert "3 shops" in run(ANALYTICS / "report.py", str(file))

    monkeypatch.syspath_prepend(str(ANALYTICS))
    from shops import answer, shop  # type: ignore[import-not-found]

    central = answer(np.concatenate([shop(number) for number in range(3)]))
    with np.load(file) as found:
        for name, total in central.items():
            np.testing.assert_array_equal(found[name], total)


def _ends_well(module: str, arguments: list[str], folder: Path) -> bool:
    program = Program(module, arguments, folder / "command.log")
    assert program.process.wait(100) == 0, program.tail()
    return True


# --- what the pages say of them ------------------------------------------------------------


def body(script: Path) -> str:
    """A script below its imports."""
    return re.split(r"^(?:import|from) .*\n\n+", script.read_text(encoding="utf-8"), flags=re.M)[-1]


def test_the_loops_of_the_page_are_the_examples() -> None:
    page = DOCS / "how-to" / "own-loop.md"
    training, plain, encrypted = [block.text for block in blocks(page, "python")][:3]
    assert body(OWN_LOOP / "training.py").strip() in training
    loop = body(OWN_LOOP / "plain.py")
    assert plain.replace("initial = current", "current") == loop
    assert encrypted.endswith(body(OWN_LOOP / "in_process.py").partition("\n")[2] + _LAST_LINE)

    (shown,) = blocks(page, "diff")
    other = body(OWN_LOOP / "in_process.py")
    changes = list(difflib.ndiff(loop.splitlines(), other.splitlines()))[1:]
    assert shown.text.splitlines() == [line[0] + line[2:] for line in changes]
    assert len([line for line in changes if line[0] != " "]) <= 8


_LAST_LINE = "assert accuracy() > plain - 0.05\n"


def test_the_task_of_the_page_is_the_example() -> None:
    page = DOCS / "how-to" / "analytics.md"
    (shown,) = blocks(page, "toml")
    file = ANALYTICS / "task.toml"
    assert shown.text == file.read_text(encoding="utf-8")
    assert [segment.size for segment in read_task(file).plan.segments] == [10, 9]


@pytest.mark.parametrize("name", ["own-loop", "analytics"])
def test_a_readme_names_every_file(name: str) -> None:
    readme = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    for file in (EXAMPLES / name).glob("*.*"):
        assert file.name == "README.md" or f"`{file.name}`" in readme, file
