"""The README's code and commands do what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _quick_start() -> str:
    match = re.search(r"<!-- quick start.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    assert match, "the README has lost its quick start"
    return match.group(1)


def test_quick_start_runs_and_opens_the_sum_of_three() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _quick_start()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    contributors, numbers = done.stdout.split(" ", 1)
    assert contributors == "3"
    # What the clients put in is in the README too: normals of three seeds, over 50.
    import numpy as np

    expected = np.mean([np.random.default_rng(s).normal(size=1000)[:3] / 50 for s in range(3)], 0)
    found = np.array([float(word) for word in numbers.strip("[] \n").split()])
    # Clip 1, 8 bits, 1000 values: a step is 4 / sqrt(1024) / 127 = 0.001, and the mean of three
    # roundings is off by less than a step.
    assert np.abs(found - expected).max() < 0.001 * 1.5


def _printed(marker: str) -> str:
    """What the README's code under a marker prints."""
    match = re.search(rf"<!-- {marker}:.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    assert match, f"the README has lost its {marker}"
    done = subprocess.run(
        [sys.executable, "-c", match.group(1)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_the_norm_check_lets_five_honest_clients_in() -> None:
    assert _printed("norm check") == "5"


def test_the_privacy_budget_has_room_for_the_releases_it_was_made_for() -> None:
    mean, spent = _printed("privacy").split("\n")
    # 0.01, the noise of 1000 coordinates in the mean of 200: 0.001; clipping and rounding.
    assert abs(float(mean) - 0.01) <= 0.01
    assert re.fullmatch(r"epsilon 1\.\d spent, room for 19 more", spent)


def test_numbers_are_those_of_the_result_files() -> None:
    from secagg_bench.readme import PAGES, rendered

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert rendered(text) == text, "run `python -m secagg_bench.readme`"


def test_quick_start_has_at_most_twelve_lines() -> None:
    lines = [line for line in _quick_start().splitlines() if line.strip()]
    assert len(lines) <= 12


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^\$ make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_of_the_documentation_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
