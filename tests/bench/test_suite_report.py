"""What tables and figures make of rows: pairs by seed, medians, powers, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg_bench import readme
from secagg_bench.suite import figures
from secagg_bench.suite.medians import exponents, ratio
from secagg_bench.suite.report import (
    LIMIT,
    NOT_MEASURED,
    OURS,
    growth_table,
    limit_table,
    power_text,
    summary_table,
    table,
    targets_table,
    time,
)
from secagg_bench.suite.rows import UNITS, Metric, Row, write
from secagg_bench.suite.scenarios import scenarios


def row(system: str, metric: Metric, value: float, seed: int = 1, **changes: Any) -> Row:  # noqa: ANN401
    values = {
        "scenario": "sizes",
        "system": system,
        "version": f"{system} 1",
        "parameters": 10,
        "clients": 3,
        "metric": metric,
        "value": value,
        "unit": UNITS[metric],
        "seed": seed,
        "machine": "here",
    }
    return Row.model_validate(values | changes)


def test_ratios_are_of_pairs_and_not_of_medians() -> None:
    """The machine was ten times as slow in one repetition: both were."""
    ours = [
        row("secagg", Metric.CLIENT, value, seed) for seed, value in enumerate((1.0, 10.0, 2.0))
    ]
    theirs = [
        row("other", Metric.CLIENT, value, seed) for seed, value in enumerate((3.0, 30.0, 5.0))
    ]
    assert ratio([*ours, *theirs], Metric.CLIENT, "other", "secagg") == 3.0
    assert ratio([*ours, *theirs[:1]], Metric.CLIENT, "other", "secagg") == 3.0


@pytest.mark.parametrize("seed", [2, None])
def test_systems_without_a_repetition_in_common_have_no_ratio(seed: int | None) -> None:
    rows = [row("secagg", Metric.CLIENT, 1.0, 1)]
    rows += [] if seed is None else [row("other", Metric.CLIENT, 1.0, seed)]
    with pytest.raises(ValueError, match="none"):
        ratio(rows, Metric.CLIENT, "other", "secagg")


@given(st.floats(-1, 3), st.floats(1e-6, 1e3))
def test_the_power_of_a_power_is_found(power: float, factor: float) -> None:
    rows = [
        row("secagg", Metric.CLIENT, factor * size**power, parameters=size)
        for size in (10, 100, 1000)
    ]
    assert exponents(rows, Metric.CLIENT)["secagg"] == pytest.approx(power, abs=1e-6)
    assert exponents(rows[:1], Metric.CLIENT) == {}, "one size says nothing"


STEPS = [
    Metric.CLIENT,
    *(Metric.ADD, Metric.HAND_OVER, Metric.OPEN, Metric.UPLOAD, Metric.ERROR),
]
MILLION = 1_000_000


def everything(
    system: str,
    factor: float,
    size: int,
    seed: int,
    metrics: list[Metric] = STEPS,
    **changes: Any,  # noqa: ANN401
) -> list[Row]:
    return [
        row(system, metric, factor * size, seed, parameters=size, **changes) for metric in metrics
    ]


def cells(text: str) -> list[list[str]]:
    """Of the lines below a table's head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[1:]]


def test_a_table_has_a_line_for_each_system_of_each_size_in_order() -> None:
    rows = [
        each
        for size in (200, 100)
        for seed in (1, 2)
        for system, factor in (("secagg", 1.0), ("other", 4.0))
        for each in everything(system, factor, size, seed)
    ]
    text = table(rows)
    assert [line[:3] for line in cells(text)] == [
        ["100", "3", "secagg"],
        ["100", "3", "other"],
        ["200", "3", "secagg"],
        ["200", "3", "other"],
    ]
    assert sum(cell.count("(× 4)") for cell in cells(text)[1]) == 5, "bytes and four times"
    assert "(×" not in " ".join(cells(text)[0])
    assert "medians of 2 interleaved repetitions" in text
    assert "secagg 1; other 1" in text
    assert growth_table(rows).count("| 1.00 |") >= 2


def test_what_is_nothing_for_one_has_no_ratio() -> None:
    rows = everything("secagg", 1.0, 10, 1) + everything("other", 0.0, 10, 1)
    assert "(×" not in table(rows)
    more = everything("secagg", 1.0, 20, 1) + everything("other", 0.0, 20, 1)
    assert "| other | – |" in growth_table(rows + more)


def test_a_system_that_was_to_be_measured_and_was_not_has_a_line_that_says_so() -> None:
    rows = everything("secagg", 1.0, 10, 1) + everything("other", 2.0, 20, 1)
    rows += everything("secagg", 1.0, 20, 1)
    found = {
        (line[0], line[2]): line[3] for line in cells(table(rows, systems=["secagg", "third"]))
    }
    assert {key for key, cell in found.items() if cell == NOT_MEASURED} == {
        ("10", "other"),
        ("10", "third"),
        ("20", "third"),
    }
    assert all(len(line) == len(cells(table(rows))[0]) for line in cells(table(rows)))


def test_memory_has_a_column_where_it_was_measured() -> None:
    rows = everything("secagg", 1.0, 10, 1)
    assert "memory" not in table(rows)
    held = row("secagg", Metric.MEMORY, 123.4e6, parameters=10)
    line = cells(table([*rows, held, *everything("other", 1.0, 10, 1)]))
    assert line[0][-2:] == ["123 MB", "1e+01"]
    assert line[1][-2] == "–"
    head = table([*rows, held]).splitlines()[0]
    assert head.endswith("| key holder, once | memory | error |")


def test_the_limit_is_no_competitor_and_ours_is_so_many_times_it() -> None:
    metrics = [*STEPS, Metric.ADD_UNAUTHENTICATED]
    rows = [
        each
        for seed, busy in ((1, 1.0), (2, 10.0))
        for each in (
            *everything("secagg", 3.0 * busy, 10, seed, metrics),
            *everything(LIMIT, 2.0 * busy, 10, seed),
        )
    ]
    assert LIMIT not in table(rows, systems=["secagg", LIMIT])
    assert f"| {LIMIT} |" not in growth_table([*rows, *everything(LIMIT, 1.0, 20, 1)])
    (line,) = cells(limit_table(rows))
    assert [cell.split()[:2] for cell in line[2:]] == [["**×", "1.5**"]] * 5
    other = everything("secagg", 1.0, 500, 1, scenario="large")
    assert cells(limit_table([*rows, *other])) == [line], "another scenario has no limit"
    (line,) = cells(limit_table(other))
    assert line[2:] == [NOT_MEASURED] * 5


def test_powers_are_fitted_over_several_files_and_by_clients() -> None:
    rows = [
        row("secagg", Metric.CLIENT, float(size) ** 2, parameters=size, scenario=name)
        for name, sizes in (("sizes", (10, 100)), ("large", (1000,)))
        for size in sizes
    ]
    text = growth_table(rows)
    assert cells(text) == [["3", "secagg", "2.00"]]
    assert "10, 100, 1,000 parameters" in text
    rows = [row("secagg", Metric.OPEN, 7.0 * clients, clients=clients) for clients in (3, 30, 300)]
    assert cells(growth_table(rows, "clients")) == [["10", "secagg", "1.00"]]
    assert power_text(-0.001) == "0.00"
    assert power_text(-0.01) == "-0.01"


def test_the_figures_asked_for_first_are_pairs_with_their_range_and_none_is_left_out() -> None:
    sizes = []
    for seed, times in ((1, 2.0), (2, 9.0), (3, 4.0)):
        sizes += everything("secagg", 1e-9, MILLION, seed, [Metric.CLIENT, Metric.ADD])
        sizes += everything("secagg", 3.5, MILLION, seed, [Metric.UPLOAD])
        sizes += everything("NVFlare HE", times * 1e-9, MILLION, seed, [Metric.CLIENT, Metric.ADD])
    lines = {(line[0], line[2]): line[1:] for line in cells(targets_table({"sizes": sizes}))}
    assert len(lines) == 12
    assert lines["client", "NVFlare HE"][2:] == ["4 ms", "**× 4**", "2 to 9"]
    assert lines["client", "TenSEAL CKKSVector"][1:] == [
        "TenSEAL CKKSVector",
        NOT_MEASURED,
        "–",
        "–",
    ]
    assert lines["upload", "NVFlare HE"][0] == "3.5 B a parameter"
    # 3.5 MB in a thousandth of a second.
    assert lines["ciphertext that the server takes", "–"][0] == "3.5 GB/s"
    for what in ("upload: NCF of seven layers", "upload: 4 bits, planned for 100 clients"):
        (line,) = (line for (name, _), line in lines.items() if name == what)
        assert (line[0], line[2]) == (NOT_MEASURED, NOT_MEASURED), "that file is missing"
    assert all(line[0] == NOT_MEASURED for line in [each[1:] for each in cells(targets_table({}))])


def test_the_summary_compares_within_a_run_alone() -> None:
    """The machine of the second run is ten times as slow, and its cohort is another."""
    sizes = [*everything("secagg", 1.0, MILLION, 1), *everything("plaintext", 0.5, MILLION, 1)]
    masks = [
        each
        for clients, factor in ((20, 10.0), (100, 10.0))
        for system, times in (("secagg", 1.0), ("Flower SecAgg+", 0.2 * clients))
        for each in everything(system, factor * times, MILLION, 1, clients=clients)
    ]
    text = summary_table(sizes, masks)
    found = {line[0]: line[1:] for line in cells(text)}
    assert found["plaintext"][0] == "0.5 (× 0.5)"
    assert all(cell.endswith("(× 20)") for cell in found["Flower SecAgg+"]), "the largest cohort"
    assert found["NVFlare HE"] == [NOT_MEASURED] * 4
    assert "100 in a run of its own" in text


def test_a_block_whose_results_are_missing_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    blocks = [f"suite {name}" for name in (*scenarios(), "targets", "limit", "growth", "scale")]
    page = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in blocks)
    text = readme.rendered(page)
    assert "old" not in text
    assert text.count("Not measured yet: `secagg-bench run ") == len(blocks)
    write(tmp_path / "suite" / "sizes.csv", everything("secagg", 1.0, MILLION, 1))
    text = readme.rendered(page)
    assert text.count("Not measured yet") == len(blocks) - 5, "sizes, and what begins with them"
    assert "| FedML-HE | not measured |" in text, "a system of the scenario"
    assert readme.rendered(text) == text


def test_every_block_of_a_page_is_rendered_by_somebody() -> None:
    known = {f"suite {name}" for name in (*readme.SUITE_BLOCKS, *scenarios())}
    known |= {f"figure {name}" for name in figures.FIGURES}
    for page in readme.PAGES:
        for name in readme.blocks(page.read_text(encoding="utf-8")):
            assert name in known or not name.startswith(("suite ", "figure ")), (page.name, name)


def whole_rounds() -> list[Row]:
    metrics = (
        *(Metric.FETCHING, Metric.ENCRYPTING, Metric.UPLOADING, Metric.CONCLUDING),
        *(Metric.CLIENTS_CPU, Metric.SERVER_CPU, Metric.KEY_HOLDER_CPU),
    )
    return [
        row(OURS, metric, 1.0 + clients, scenario="rounds", clients=clients)
        for metric in metrics
        for clients in (10, 100)
    ]


def test_figures_are_drawn_of_what_there_is_and_are_the_same_bytes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    systems = ("secagg", "NVFlare HE", "plaintext", LIMIT, *(f"other {n}" for n in range(5)))
    sizes = [
        each
        for size in (1000, 2000)
        for factor, system in enumerate(systems, 1)
        for each in everything(system, float(factor), size, 1)
    ]
    write(tmp_path / "sizes.csv", sizes)
    write(tmp_path / "rounds.csv", whole_rounds())
    drawn = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        figures.draw(tmp_path, folder)
        drawn.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert drawn[0] == drawn[1]
    assert drawn[0].keys() == {
        "benchmarks-growth.svg",
        "benchmarks-bytes.svg",
        "benchmarks-rounds.svg",
    }
    assert b"<svg" in drawn[0]["benchmarks-growth.svg"]
    assert "benchmarks-clients: not drawn; `secagg-bench run clients`" in capsys.readouterr().out


def test_a_figure_names_every_system_and_its_power() -> None:
    sizes = [
        row(system, metric, factor * size**power, parameters=size)
        for size in (1000, 10, 100)
        for metric in (Metric.CLIENT, Metric.ADD, Metric.OPEN)
        for system, factor, power in (("secagg", 1e-6, 1.0), ("other", 1e-5, 0.5))
    ]
    figure = figures.growth_figure(sizes)
    assert len(figure.axes) == 3
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is not None
        named = [text.get_text() for text in legend.get_texts()]
        assert named == ["secagg: power 1.00", "other: power 0.50"]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [list(line.get_xdata()) for line in axes.lines] == [[10, 100, 1000]] * 2  # type: ignore[arg-type]


def test_bars_are_bytes_a_parameter_and_none_of_ours_is_drawn_twice() -> None:
    def uploads(scenario: str, size: int, **by_system: float) -> list[Row]:
        return [
            row(name, Metric.UPLOAD, each * size, parameters=size, scenario=scenario)
            for name, each in by_system.items()
        ]

    figure = figures.bytes_figure(
        {
            "sizes": uploads("sizes", MILLION, secagg=3.5, plaintext=4.0),
            "bits": uploads("bits", MILLION, **{"secagg, 4 bits": 1.8, "secagg, 12 bits": 3.5}),
            "paillier": uploads("paillier", 100, secagg=9.0, Paillier=7.0),
        }
    )
    (axes,) = figure.axes
    bars = dict(
        zip(
            (label.get_text() for label in axes.get_yticklabels()),
            (bar.get_width() for bar in axes.patches),  # type: ignore[attr-defined]
            strict=True,
        )
    )
    assert bars == {
        "Paillier, 100 parameters": 7.0,
        "plaintext": 4.0,
        "secagg, 8 bits": 3.5,
        "secagg, 4 bits": 1.8,
    }


def test_parts_of_whole_rounds_are_shown_by_client() -> None:
    figure = figures.rounds_figure(whole_rounds())
    for axes, parts in zip(figure.axes, (4, 3), strict=True):
        heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
        assert heights == pytest.approx([1.1, 1.01] * parts)
        assert axes.patches[-2].get_y() == pytest.approx(1.1 * (parts - 1))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0996, "100 ms"),
        (0.0994, "99 ms"),
        (0.9996, "1,000 ms"),
        (1.0, "1 s"),
        (0.00063, "0.63 ms"),
        (142.3, "142 s"),
        (float("nan"), "–"),
    ],
)
def test_times_are_written_out(seconds: float, text: str) -> None:
    assert time(seconds) == text
