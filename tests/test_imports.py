"""What an import loads, and what is said when an extra is missing.

A missing package is one that a subprocess is not let find: what a user without the extra sees.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from secagg.errors import ConfigurationError
from secagg.extras import require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

TRAINING = {"torch", "pandas", "scipy", "opacus"}
FRAMEWORKS = {"flwr", "ray", "nvflare"}
SERVING = {"sqlalchemy", "alembic", "aiohttp"}
CALLS = {"grpc", "structlog", "rich", "prometheus_client"}
COMMANDS = CALLS | {"typer", "pydantic"}
SERVICES = COMMANDS | SERVING | {"dp_accounting"}
CIPHER = {"tenseal"}
EVERYTHING = TRAINING | FRAMEWORKS | SERVICES | CIPHER | {"matplotlib"}


def python(code: str, *, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run code where these packages, with commas between them, are not installed."""
    blocker = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(without.split(","))!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
    return subprocess.run(
        [sys.executable, "-c", blocker + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- what an import loads ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "may_load"),
    [
        ("secagg", set()),
        ("secagg.planner, secagg.quantize, secagg.aggregator, secagg.release", set()),
        ("secagg.encryptor, secagg.keyholder", CIPHER),
        ("secagg.extras, secagg.programs", set()),
        # Asked for health every few seconds, as containers are.
        ("secagg_server.cli", COMMANDS),
        ("secagg_keyholder.cli", COMMANDS | CIPHER),
        ("secagg_client.embedded", CIPHER | {"structlog", "rich"}),
        ("secagg_client.session", CIPHER | CALLS),
        ("secagg_server.embedded", CIPHER | CALLS),
        ("secagg_client.cli", SERVICES | CIPHER),
    ],
)
def test_an_import_is_as_light_as_is_promised(modules: str, may_load: set[str]) -> None:
    done = python(f"import json, {modules}; print(json.dumps(list(sys.modules)))")
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & (EVERYTHING - may_load)


def test_the_core_runs_where_nothing_else_is_installed() -> None:
    code = """
import numpy as np, secagg
plan = secagg.plan_integers(4, max_clients=3, max_abs=9)
holder = secagg.KeyHolder(plan)
server = secagg.Aggregator(holder.context)
for client in range(3):
    server.add(secagg.Encryptor(holder.context).encrypt(np.full(4, client)))
print(holder.release(server.aggregate()).total())
"""
    done = python(code, without=",".join(sorted(EVERYTHING - CIPHER)))
    assert done.stdout == "[3 3 3 3]\n", done.stderr


# --- what a program says -------------------------------------------------------------------


def _line(package: str, extra: str) -> str:
    return f"expected the package {package}; it is not installed; run pip install 'secagg[{extra}]'"


@pytest.mark.parametrize(
    ("program", "without", "arguments", "extra"),
    [
        ("secagg", "typer", "--help", "cli"),
        ("secagg", "rich", "plan --clients 3 --parameters 9", "cli"),
        ("secagg", "matplotlib", "demo --rounds 3", "bench"),
        ("server", "grpc", "run --insecure", "server"),
        ("server", "sqlalchemy", "run --insecure", "server"),
        ("key_holder", "structlog", "run --insecure", "keyholder"),
        ("client", "typer", "join", "client"),
        ("client", "torch", "join --insecure --dataset marketplace", "client"),
    ],
)
def test_a_program_names_its_extra_in_one_line(
    program: str, without: str, arguments: str, extra: str
) -> None:
    start = f"import sys; sys.argv = {['program', *arguments.split()]}\n"
    done = python(f"{start}from secagg import programs; programs.{program}()", without=without)
    assert done.returncode == ConfigurationError.exit_code, done.stderr
    assert done.stderr == f"{ConfigurationError.reason}: {_line(without, extra)}\n"
    assert not done.stdout


def test_what_needs_no_extra_runs_without_it() -> None:
    """Exits with 0 only if the command ran: looking at the ledger takes no training stack."""
    code = "sys.argv = ['secagg-client', 'privacy', '--state-dir', '/nonexistent']\n"
    code += "from secagg import programs; programs.client()"
    done = python(code, without=",".join(TRAINING))
    assert (done.returncode, done.stdout) == (0, "nothing has been contributed\n"), done.stderr


def test_a_module_of_ours_that_is_missing_is_no_missing_extra() -> None:
    done = python("from secagg import programs; programs.server()", without="secagg_server")
    assert done.returncode == 1
    assert "pip install" not in done.stderr
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'secagg_server'\n")


def test_every_installed_command_starts_in_programs() -> None:
    from secagg import programs

    starts = {name: place.partition(":") for name, place in PROJECT["scripts"].items()}
    programs_of_all = ("secagg", "secagg-server", "secagg-keyholder", "secagg-client")
    assert starts.keys() == {*programs_of_all, "secagg-bench"}
    for module, _, function in starts.values():
        assert module == "secagg.programs"
        assert function in programs.__all__


@pytest.mark.parametrize("program", ["secagg", "server", "key_holder", "client", "bench"])
def test_sigterm_ends_a_program_that_does_not_serve_yet(program: str) -> None:
    """By an exit of its own: a signal's default action would not end the first process there is."""
    others = {
        "secagg": "secagg",
        "key_holder": "secagg_keyholder",
        "bench": "secagg_bench.suite",
    }
    package = others.get(program, f"secagg_{program}")
    code = f"""
import os, signal, sys, types
def app():
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("it went on")
sys.modules["{package}.cli"] = types.SimpleNamespace(app=app)
from secagg import programs
programs.{program}()
"""
    done = python(code)
    assert (done.returncode, done.stderr) == (128 + 15, "")


# --- what an import says -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "without", "extra"),
    [
        ("secagg.rpc.channels", "grpc", "rpc"),
        ("secagg_client.session", "grpc", "service"),
        ("secagg_client.embedded", "structlog", "service"),
        ("secagg_server.embedded", "grpc", "service"),
        ("secagg_keyholder.app", "grpc", "keyholder"),
        ("secagg_recommender.factorisation", "torch", "client"),
        ("secagg_bench.check_cost", "matplotlib", "bench"),
        ("secagg.flower", "flwr", "flower"),
        ("secagg.nvflare", "nvflare", "nvflare"),
    ],
)
def test_an_import_names_the_extra(module: str, without: str, extra: str) -> None:
    code = f"""
try:
    import {module}
except ImportError as error:  # as whoever tries an import expects
    print(error.name, error, sep=": ")
"""
    assert python(code, without=without).stdout == f"{without}: {_line(without, extra)}\n"


def test_a_package_that_something_stands_in_for_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch", None)
    with pytest.raises(ModuleNotFoundError, match=r"package usearch.*'secagg\[index\]'"):
        require("index", "json", "usearch")


def test_a_missing_database_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from secagg_server.transactions import Database

    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=r"psycopg.*'secagg\[postgresql\]'"):
        Database("postgresql://somebody:secret@127.0.0.1/nothing")


# --- that extras bring what is imported ----------------------------------------------------


def _names(requirements: list[str]) -> set[str]:
    """Distributions of requirements without a marker for an extra, by their canonical names."""
    plain = [each for each in requirements if "extra ==" not in each]
    return {_canonical(re.split(r"[^A-Za-z0-9._-]", each)[0]) for each in plain}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _brought_by(extra: str) -> set[str]:
    """Distributions that an extra of ours names, and the ones that these need themselves."""
    own = PROJECT["optional-dependencies"]
    wanted, direct = [extra], list(PROJECT["dependencies"])
    for each in wanted:
        for requirement in own[each]:
            inner = re.fullmatch(r"secagg\[(.*)\]", requirement)
            wanted += inner.group(1).split(",") if inner else []
            direct += [] if inner else [requirement]
    found = _names(direct)
    return found.union(*(_names(requires(name) or []) for name in found))


def _imported(package: Path) -> set[str]:
    """Top-level names of everything that a package's modules import, wherever they do."""
    found: set[str] = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize(
    ("package", "extra", "elsewhere"),
    [
        # What another extra brings is imported where it is used, and missed with its own message.
        ("server/secagg_server", "server", set()),
        ("server/secagg_keyholder", "keyholder", set()),
        ("client/secagg_client", "client", set()),
        ("client/secagg_recommender", "client", {"opacus"}),
        ("bench/secagg_bench", "bench", {"flwr", "nvflare", "opendp", "phe", "ray"}),
        ("secagg/rpc", "service", set()),
    ],
)
def test_an_extra_brings_what_its_package_imports(
    package: str, extra: str, elsewhere: set[str]
) -> None:
    homes, brought = packages_distributions(), _brought_by(extra)
    imported = _imported(ROOT / package) - sys.stdlib_module_names
    others = {name for name in imported if not name.startswith("secagg")}
    assert others, "the package imports nothing?"
    # What is in no environment of ours is nobody's: a peer's, which has one of its own.
    found = {name: map(_canonical, homes.get(name, [])) for name in others}
    missing = {name for name, homes_of in found.items() if not brought.intersection(homes_of)}
    assert missing <= elsewhere
