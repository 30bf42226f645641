"""`secagg privacy`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from secagg.accounting import (
    Budget,
    example_level,
    example_level_noise,
    gaussian_rho,
    noise_multiplier_for,
)
from secagg.privacy_commands import privacy

app = typer.Typer()
app.command("privacy")(privacy)
app.command("other")(lambda: None)  # a second one, so that the first keeps its name


def run(line: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["privacy", *line.split()])


def answer(line: str) -> dict[str, object]:
    result = run(line + " --format json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_noise_for_a_budget() -> None:
    found = answer("--epsilon 2 --delta 1e-6 --rounds 25")
    noise = noise_multiplier_for(2, 1e-6, 25)
    assert found["noise_multiplier"] == noise
    assert found["rounds"] == 25
    assert found["budget_epsilon"] == 2
    assert found["rho"] == pytest.approx(25 * gaussian_rho(noise))
    assert found["epsilon"] == Budget(2, 1e-6).spent(25 * gaussian_rho(noise))
    assert found["epsilon"] <= 2


def test_epsilon_of_a_noise() -> None:
    found = answer("--noise-multiplier 10 --delta 1e-6 --rounds 60")
    assert found["budget_epsilon"] is None
    assert found["epsilon"] == Budget(1, 1e-6).spent(60 * gaussian_rho(10))
    rounds = [row["rounds"] for row in found["by_rounds"]]
    levels = [row["epsilon"] for row in found["by_rounds"]]
    assert rounds == [1, 2, 5, 10, 20, 50, 60]
    assert levels == sorted(levels)
    assert levels[-1] == found["epsilon"]


@pytest.mark.parametrize(
    ("rounds", "marks"), [(1, [1]), (2, [1, 2]), (10, [1, 2, 5, 10]), (11, [1, 2, 5, 10, 11])]
)
def test_rounds_of_the_table(rounds: int, marks: list[int]) -> None:
    found = answer(f"--noise-multiplier 10 --delta 1e-6 --rounds {rounds}")
    assert [row["rounds"] for row in found["by_rounds"]] == marks


def test_rounds_that_fit() -> None:
    found = answer("--noise-multiplier 10 --delta 1e-6 --epsilon 1")
    assert found["rounds"] == Budget(1, 1e-6).left(0.0, gaussian_rho(10))
    assert found["epsilon"] <= 1
    answer(f"--noise-multiplier 10 --delta 1e-6 --epsilon 1 --rounds {found['rounds']}")
    more = run(f"--noise-multiplier 10 --delta 1e-6 --epsilon 1 --rounds {found['rounds'] + 1}")
    assert more.exit_code == 78
    assert "use a noise_multiplier of at least" in more.stderr


def test_error_of_a_mean() -> None:
    found = answer("--noise-multiplier 10 --delta 1e-6 --rounds 1 --clients 40 --clip 0.5")
    assert found["mean_noise_std"] == pytest.approx(10 * 0.5 / 40)
    assert found["mean_noise_relative"] == pytest.approx(10 / 40)
    assert found["warnings"] == []
    table = run("--noise-multiplier 10 --delta 1e-6 --rounds 1 --clients 40 --clip 0.5").stdout
    assert "0.125" in table
    assert f"{0.125 * math.sqrt(40):.4g}" in table


def test_a_delta_that_protects_nobody_is_pointed_out() -> None:
    found = answer("--noise-multiplier 10 --delta 0.01 --rounds 1 --clients 200")
    assert len(found["warnings"]) == 1
    assert "one client in 100" in found["warnings"][0]
    assert "warning" in run("--noise-multiplier 10 --delta 0.01 --rounds 1 --clients 200").stdout


def test_examples_of_a_silo_both_ways() -> None:
    found = answer("--noise-multiplier 1 --delta 1e-5 --sampling-rate 0.1 --steps 20")
    assert found["epsilon"] == example_level(1, 0.1, 20, 1e-5)
    back = answer("--epsilon 2 --delta 1e-5 --sampling-rate 0.1 --steps 20")
    assert back["noise_multiplier"] == example_level_noise(2, 1e-5, 0.1, 20)
    assert back["epsilon"] <= 2
    for one in (found, back):
        assert one["level"] == "example"
        assert "example" in one["adjacency"]
        assert "Poisson" in one["amplification"]
    every = answer("--noise-multiplier 9 --delta 1e-5 --sampling-rate 1 --steps 20")
    assert every["amplification"] == "no amplification by sampling is claimed"


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        (
            "--epsilon 2 --delta 1e-6 --rounds 25",
            ["zero-out", "no amplification by sampling is claimed", "Canonne", "Kairouz", "Bun"],
        ),
        (
            "--noise-multiplier 9 --delta 1e-5 --sampling-rate 0.5 --steps 2",
            ["one example", "Poisson", "Mironov", "Koskela"],
        ),
    ],
)
def test_the_table_says_what_is_promised_and_why(line: str, texts: list[str]) -> None:
    result = run(line)
    assert result.exit_code == 0, result.stderr
    for text in texts:
        assert text in result.stdout


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--delta 1e-6", "expected two of"),
        ("--delta 1e-6 --epsilon 1", "expected two of"),
        ("--delta 1e-6 --rounds 1", "expected two of"),
        ("--delta 1e-6 --noise-multiplier 1", "expected two of"),
        ("--delta 1 --epsilon 1 --rounds 1", "expected delta in (0, 1)"),
        ("--delta 0 --noise-multiplier 1 --rounds 1", "expected delta in (0, 1)"),
        ("--delta 1e-6 --epsilon -1 --rounds 1", "positive, finite epsilon"),
        ("--delta 1e-6 --epsilon 1 --rounds 0", "at least 1 release"),
        ("--delta 1e-6 --noise-multiplier 1 --rounds 0", "at least 1 round"),
        ("--delta 1e-6 --noise-multiplier 0 --rounds 1", "positive, finite noise_multiplier"),
        ("--delta 1e-6 --noise-multiplier nan --rounds 1", "positive, finite noise_multiplier"),
        ("--delta 1e-6 --noise-multiplier 1 --epsilon 0.1", "noise_multiplier of at least"),
        ("--delta 1e-6 --epsilon 1 --rounds 1 --clients 0", "at least 1 client"),
        ("--delta 1e-6 --epsilon 1 --rounds 1 --clients 9 --clip 0", "positive clip"),
        ("--delta 1e-6 --epsilon 1 --steps 9", "--sampling-rate, --steps and one of"),
        ("--delta 1e-6 --epsilon 1 --sampling-rate 0.1", "--sampling-rate, --steps and one of"),
        ("--delta 1e-6 --sampling-rate 0.1 --steps 9", "--sampling-rate, --steps and one of"),
        (
            "--delta 1e-6 --epsilon 1 --noise-multiplier 1 --sampling-rate 0.1 --steps 9",
            "--sampling-rate, --steps and one of",
        ),
        ("--delta 1e-6 --epsilon 0 --sampling-rate 0.1 --steps 9", "positive, finite epsilon"),
        ("--delta 1e-6 --epsilon 1 --sampling-rate 2 --steps 9", "sampling rate in (0, 1]"),
        ("--delta 1e-6 --epsilon 1 --sampling-rate 0.1 --steps 9 --rounds 3", "without --rounds"),
    ],
)
def test_refusals(line: str, text: str) -> None:
    result = run(line)
    assert result.exit_code == 78, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert text in result.stderr
