"""What somebody meets who has no checkout: the built wheel, in a fresh environment.

The wheel is built from the source distribution, and installed with the extras that the pages ask
for. Everything runs with that environment's programs, in an empty folder, without this checkout on
any path.
"""

from __future__ import annotations

import ast
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import superlinks
import torch
from pages import DOCS
from ports import free_addresses
from superlinks import EXAMPLE as FLOWER

from secagg.parameters import FloatSegment, TensorSpec
from secagg.planner import make_plan

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = {
    "secagg",
    "secagg_client",
    "secagg_recommender",
    "secagg_server",
    "secagg_keyholder",
    "secagg_bench",
}
PROGRAMS = {"secagg", "secagg-server", "secagg-keyholder", "secagg-client", "secagg-bench"}
NODES, ROUNDS = 5, 3  # of the Flower example
EXAMPLES = (320, 480, 640, 320, 480)  # 4 of 5 of 400, 600, 800, 400, 600
_UV = Path(sys.executable).parent / "uv"  # comes with flwr
_OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(
    command: Sequence[str | Path],
    folder: Path,
    environment: Mapping[str, str] = _OUTSIDE,
    *,
    expected: int = 0,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == expected, done.stdout[-3000:] + done.stderr[-3000:]
    return done


# --- building and installing ---------------------------------------------------------------


def _index() -> tuple[list[str], dict[str, str]]:
    """Where pip is told to find packages, as options and variables for uv, which asks nobody."""
    options, variables = ["--index-strategy", "unsafe-best-match"], {}
    flags = {"index-url": "--index-url", "extra-index-url": "--extra-index-url"}
    flags |= {"find-links": "--find-links", "trusted-host": "--allow-insecure-host"}
    listed = run([sys.executable, "-m", "pip", "config", "list"], ROOT, os.environ).stdout
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        name, values = key.rpartition(".")[2], str(ast.literal_eval(value)).split()
        if name in flags:
            options += [word for each in values for word in (flags[name], each)]
        elif name == "cert":
            variables["SSL_CERT_FILE"] = values[0]
    return options, variables


@dataclass(frozen=True)
class Environment:
    """A fresh environment in a folder of its own."""

    folder: Path

    @property
    def binaries(self) -> Path:
        return self.folder / "bin"

    @property
    def variables(self) -> dict[str, str]:
        """What its programs are started with; few cores are shared by many processes."""
        path = f"{self.binaries}:{os.environ['PATH']}"
        return _OUTSIDE | {"PATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}

    def python(self, code: str, folder: Path) -> str:
        return run([self.binaries / "python", "-c", code], folder, self.variables).stdout


def installed(folder: Path, *requirements: str) -> Environment:
    """An environment with these; by uv, which takes seconds, or by pip where it is missing."""
    made = Environment(folder)
    if _UV.exists():
        options, variables = _index()
        python = [*options, "--python", str(made.binaries / "python")]
        run([_UV, "venv", "-q", "--python", sys.executable, folder], folder.parent)
        command = [_UV, "pip", "install", "-q", *python, *requirements]
        run(command, folder.parent, _OUTSIDE | variables)
    else:
        run([sys.executable, "-m", "venv", folder], folder.parent)
        run([made.binaries / "pip", "install", "-q", *requirements], folder.parent)
    return made


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    if _UV.exists():
        options, variables = _index()
        run([_UV, "build", "-q", "-o", folder, *options, ROOT], folder, _OUTSIDE | variables)
    else:
        run([sys.executable, "-m", "hatchling", "build", "-d", folder], ROOT)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def alone(
    distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """The library without any extra."""
    return installed(tmp_path_factory.mktemp("alone") / "env", str(distributions[1]))


@pytest.fixture(scope="module")
def full(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With what services, training and the Flower example need."""
    folder = tmp_path_factory.mktemp("full") / "env"
    wheel = f"secagg[server,keyholder,client,flower] @ {distributions[1].as_uri()}"
    return installed(folder, wheel, "flwr[simulation]>=1.41")


# --- what is in them -----------------------------------------------------------------------


def test_the_wheel_holds_the_packages_typed_and_licensed_and_nothing_else(
    distributions: tuple[Path, Path],
) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        scripts = wheel.read(entry_points).decode()
    (info,) = {name.split("/")[0] for name in names} - PACKAGES
    assert info.endswith(".dist-info")
    assert f"{info}/licenses/LICENSE" in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {"secagg/wire/v1/round_pb2.pyi", "secagg_server/migrations/env.py"} <= names
    code = [name for name in names if not name.startswith(info)]
    page = {name for name in code if name.startswith("secagg_server/page/")}
    assert {Path(name).name for name in page} == {
        *("page.html", "page.css", "page.js", "icon.svg", "__init__.py")
    }
    suite = {name for name in code if re.fullmatch(r"secagg_bench/.*\.(toml|txt)", name)}
    assert {Path(name).name for name in suite} == {
        *("scenarios.toml", "nvflare_he.txt", "paillier.txt")
    }
    assert {Path(name).suffix for name in {*code} - page - suite} <= {".py", ".pyi", ".typed"}
    assert set(re.findall(r"^(\S+) = secagg\.programs:", scripts, re.MULTILINE)) == PROGRAMS


def test_the_source_distribution_holds_all_that_a_wheel_and_its_tests_need(
    distributions: tuple[Path, Path],
) -> None:
    with tarfile.open(distributions[0]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"} <= names
    assert {"tests/test_newcomer.py", "docs/errors.md", "secagg/py.typed"} <= names
    assert not [
        name for name in names if "/__pycache__/" in name or name.startswith((".venv", "runs"))
    ]


# --- the library alone ---------------------------------------------------------------------


def _block(marker: str) -> str:
    found = re.search(rf"<!-- {marker}.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    assert found
    return found.group(1)


def test_the_quick_start_runs_on_the_library_alone(alone: Environment, tmp_path: Path) -> None:
    printed = alone.python(f"{_block('quick start')}\nprint(secagg.__file__)", tmp_path)
    assert printed.startswith("3 [")
    assert Path(printed.splitlines()[-1]).is_relative_to(alone.folder)
    assert alone.python(_block("norm check"), tmp_path) == "5\n"


def test_exact_analytics_run_on_the_library_alone(alone: Environment, tmp_path: Path) -> None:
    example = shutil.copytree(DOCS / "examples" / "analytics", tmp_path / "analytics")
    printed = run([alone.binaries / "python", "in_process.py"], example, alone.variables).stdout
    assert printed.endswith("bit for bit what all data in one place give: True\n")


@pytest.mark.parametrize(
    ("program", "extra"),
    [
        ("secagg", "cli"),
        ("secagg-server", "server"),
        ("secagg-keyholder", "keyholder"),
        ("secagg-client", "client"),
        ("secagg-bench", "bench"),
    ],
)
def test_a_program_without_its_extra_names_it(
    alone: Environment, tmp_path: Path, program: str, extra: str
) -> None:
    done = run([alone.binaries / program, "--help"], tmp_path, alone.variables, expected=78)
    assert re.fullmatch(
        rf"CONFIGURATION: expected the package \w+; .* pip install 'secagg\[{extra}\]'\n",
        done.stderr,
    )


# --- with extras ---------------------------------------------------------------------------


def test_a_loop_of_ones_own_runs(full: Environment, tmp_path: Path) -> None:
    example = shutil.copytree(DOCS / "examples" / "own-loop", tmp_path / "own-loop")
    printed = run([full.binaries / "python", "in_process.py"], example, full.variables).stdout
    assert float(printed.split()[-1]) > 0.8


def test_the_services_run_by_the_commands_of_the_readme(full: Environment, tmp_path: Path) -> None:
    found = re.search(r"```console\n(\$ secagg provision init.*?)```", README, re.DOTALL)
    assert found, "the README has lost its services"
    commands = re.sub(r"^\$ ", "", found.group(1), flags=re.MULTILINE)
    commands = commands.replace("--rounds 10", "--rounds 2")
    client, admin, key_holder = free_addresses(3)
    variables = full.variables | {
        "SECAGG_KEYHOLDER_LISTEN": key_holder,
        "SECAGG_SERVER_LISTEN": client,
        "SECAGG_SERVER_ADMIN_LISTEN": admin,
        "SECAGG_KEYHOLDER_MONITOR_LISTEN": "off",
        "SECAGG_SERVER_MONITOR_LISTEN": "off",
        "SECAGG_SERVER_KEY_HOLDER": key_holder,
        "SECAGG_OPERATOR_ADMIN": admin,
        "SECAGG_CLIENT_SERVER": client,
    }
    ending = "set -e\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"
    printed = run(["bash", "-c", f"{ending}\n{commands}"], tmp_path, variables).stdout
    assert "contributed to 2 rounds" in printed
    assert "recommender: finished" in printed
    assert "│ 10 │" in printed, "ten recommendations"


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return math.hypot(*((one[name] - other[name]).norm().item() for name in one))


def _rounding_error(model: dict[str, torch.Tensor]) -> float:
    """How far rounding moves the mean of one round, in L2 norm, but for one run in 10**9.

    A rounding error has mean 0 and a variance of at most step^2 / 4, and the sum of V of them for
    each of n clients is a vector of norm sqrt(n V) step / 2. Its square is a sum of V independent
    terms; for V of 1000 and more it exceeds 1.44 times its mean at 7 standard deviations or more.
    """
    shapes = [TensorSpec(name, tuple(value.shape)) for name, value in sorted(model.items())]
    plan = make_plan(
        [FloatSegment("update", tuple(shapes), 1.0, 8, "samples", 1000)], max_clients=NODES
    )
    (segment,) = plan.segments
    assert isinstance(segment, FloatSegment)
    assert segment.values >= 1000
    weight = sum(EXAMPLES) / segment.weight_cap
    return 1.2 * math.sqrt(NODES * segment.values) / 2 * segment.step / weight


def test_both_flower_apps_run_by_the_commands_of_their_readme_and_end_with_one_model(
    full: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, commands = re.findall(
        r"```console\n(.*?)```", (FLOWER / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.setattr(superlinks, "_BINARIES", full.binaries)
    with superlinks.flower(tmp_path, clients=0) as machine:
        for name in machine.environment.keys() - _OUTSIDE:
            if name.startswith("PYTHON"):
                del machine.environment[name]
        # `flwr run` starts a SuperLink by itself, and gives it 15 seconds; here it is there before.
        machine.kits = tmp_path / "here" / "kits"
        machine.simulation()
        log = machine.shell(re.sub(r"^\$ ", "", commands, flags=re.MULTILINE), FLOWER)
        plain, secure = (
            torch.load(tmp_path / "here" / f"{name}.pt") for name in ("plain", "secure")
        )
    said = re.findall(r"secagg: round (\d+): (\d+) contributors, (\d+) refused", log)
    assert said == [(str(number), str(NODES), "0") for number in range(1, ROUNDS + 1)]
    assert "in plaintext" not in log
    assert any(full.folder.rglob("secagg/flower/__pycache__")), "it ran in this environment"
    torch.manual_seed(0)
    moved = _distance(superlinks.example_task().Net().state_dict(), plain)
    # What one round is off by moves the next ones along: training hardly brings two models that
    # are close apart. Three rounds, and as much again for that.
    bound = 2 * ROUNDS * _rounding_error(plain)
    assert _distance(plain, secure) <= bound <= moved / 4
