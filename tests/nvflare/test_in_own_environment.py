"""The tests beside this one, where NVFlare is: the environment for development has it not.

The new environment sees what is installed in this one, and gets NVFlare on top by the requirement
of our extra: pip refuses if the two do not go together. So this is also the test that secagg, flwr
and NVFlare fit into one environment.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def requirement() -> str:
    """What the extra installs beside our own packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["nvflare"]
    (found,) = (each for each in extra if each.startswith("nvflare"))
    return str(found)


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment with NVFlare."""
    if find_spec("nvflare"):
        return Path(sys.executable)
    folder = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    made = folder / "bin" / "python"
    asked = run(made, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    below = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    lines = [f"import site; site.addsitedir({path!r})\n" for path in sorted(below)]
    (Path(asked.strip()) / "below.pth").write_text("".join(lines), encoding="utf-8")
    install = ("-m", "pip", "--python", made, "install", "--quiet", "--no-compile")
    run(sys.executable, *install, requirement())
    return made


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_all_tests_pass_where_nvflare_is_installed(python: Path) -> None:
    run(python, "-c", "import flwr, nvflare, secagg.flower, secagg.nvflare")
    here = Path(__file__)
    output = run(python, "-m", "pytest", "-q", "-n2", here.parent, f"--ignore={here}")
    summary = re.search(r"^(\d+) passed in ", output, re.MULTILINE)  # none skipped
    assert summary, output[-4000:]
    assert int(summary[1]) > 30
