"""Dashboards and alerts: current, true to what is measured, valid, and able to raise an alarm."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from promql_faults import Known, catalogue, faults, names

from deploy.monitoring import FOLDER, KEY_HOLDER, SERVER
from deploy.monitoring.alerts import ALERTS, Alert
from deploy.monitoring.asking import PrometheusError, filled, panels, read
from deploy.monitoring.generate import files, main, outdated
from secagg.instruments import Instrument
from secagg.rpc.metrics import REASONS
from secagg_keyholder.metrics import METRICS as KEY_HOLDER_METRICS
from secagg_server.metrics import METRICS as SERVER_METRICS

ROOT = Path(__file__).parents[2]
BOARDS = FOLDER / "grafana" / "dashboards"
RULES = FOLDER / "prometheus" / "rules.yaml"
SCHEMAS = Path(__file__).parent / "schemas" / "grafana-11.6"
KNOWN = catalogue(SERVER_METRICS, KEY_HOLDER_METRICS)
GRAFANA = {"__rate_interval": "1m", "__range": "3h"}
UNITS = {
    "short", "s", "bytes", "Bps", "percentunit", "ops", "reqps", "suffix: bit",
}  # fmt: skip
Board = dict[str, Any]

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus"
)


@pytest.fixture(params=["overview", "server", "keyholder"])
def board(request: pytest.FixtureRequest) -> Board:
    return read(BOARDS / f"{request.param}.json")


def test_what_is_committed_is_what_would_be_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out
    for path, text in files().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert not outdated(tmp_path)
    (tmp_path / "prometheus/rules.yaml").write_text("groups: []\n", encoding="utf-8")
    (tmp_path / "grafana/dashboards/server.json").unlink()
    (tmp_path / "grafana/dashboards/old.json").write_text("{}", encoding="utf-8")
    assert {path.name for path in outdated(tmp_path)} == {"rules.yaml", "server.json", "old.json"}


# What they ask for


def _variables(board: Board) -> dict[str, str]:
    return {each["name"]: "x" for each in board["templating"]["list"]} | GRAFANA


def _queries(board: Board) -> Iterator[tuple[str, str, str]]:
    for panel in panels(board):
        for expr, legend in panel.queries:
            yield panel.title, filled(expr, _variables(board)), legend


def _faults(board: Board) -> list[str]:
    return [
        f"{title}: {fault}"
        for title, query, legend in _queries(board)
        for fault in faults(query, KNOWN, legend)
    ]


def test_every_query_asks_for_metrics_labels_and_values_that_there_are(board: Board) -> None:
    assert not _faults(board)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_every_alert_asks_for_metrics_labels_and_values_that_there_are(alert: Alert) -> None:
    assert not faults(alert.expr, KNOWN)


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("increase(secagg_round_total[1m])", "no metric secagg_round_total"),
        ("rate(secagg_rounds_total{result='DONE'}[1m])", "has no label result"),
        ("rate(secagg_rounds_total{outcome='FINE'}[1m])", "outcome of .* is never FINE"),
        ("rate(secagg_rounds_total{outcome=~'DONE|FINE'}[1m])", "is never FINE"),
        ("rate(secagg_rounds_total{outcome!='FINE'}[1m])", "is never FINE"),
        ("sum by (client) (rate(secagg_rounds_total[1m]))", "no label client to group by"),
        ("sum by (state) (rate(secagg_rounds_total[1m]))", "no label state to group by"),
        ("secagg_rounds_total", "counts"),
        ("delta(secagg_rounds_total[1m])", "counts"),
        ("max_over_time(secagg_rounds_total[1m])", "counts"),
        ("sum(process_cpu_seconds_total)", "counts"),
        ("rate(secagg_ready[1m])", "is a gauge"),
        ("rate(secagg_round_duration_seconds[1m])", "is a histogram"),
        ("secagg_round_duration_seconds_sum", "counts"),
        ("rate(secagg_round_duration_seconds_total[1m])", "no metric"),
        ("histogram_quantile(0.5, rate(secagg_ready_bucket[1m]))", "no metric"),
        ("secagg_ready / on (job) secagg_calls_limits", "no metric secagg_calls_limits"),
        ("(1 - -secagg_reddy)", "no metric secagg_reddy"),
    ],
)
def test_a_query_that_asks_for_what_there_is_not_is_noticed(query: str, fault: str) -> None:
    assert any(re.search(fault, each) for each in faults(query, KNOWN)), faults(query, KNOWN)


def test_a_legend_that_names_no_label_of_the_answer_is_noticed() -> None:
    query = "sum by (outcome) (rate(secagg_rounds_total[1m]))"
    assert not faults(query, KNOWN, "{{outcome}}")
    assert faults(query, KNOWN, "{{job}} {{outcome}}") == ["no label job for the legend"]


@pytest.mark.parametrize(
    ("own", "metrics"), [("server", SERVER_METRICS), ("keyholder", KEY_HOLDER_METRICS)]
)
def test_everything_that_a_service_measures_is_on_its_dashboard(
    own: str, metrics: tuple[Instrument, ...]
) -> None:
    board = read(BOARDS / f"{own}.json")
    assert not _unseen(board, metrics)
    forgotten = [each for each in board["panels"] if "Calls" not in each["title"]]
    assert "secagg.calls.limit" in _unseen({**board, "panels": forgotten}, metrics)


def _unseen(board: Board, metrics: tuple[Instrument, ...]) -> list[str]:
    shown = {name for _, query, _ in _queries(board) for name in names(query)}
    return [
        each.name
        for each in metrics
        if shown.isdisjoint(
            f"{each.prometheus}{part}" for part in ("", "_sum", "_count", "_bucket")
        )
    ]


def test_no_query_and_no_label_tells_clients_tasks_or_rounds_apart(board: Board) -> None:
    assert not [
        label
        for known in KNOWN.values()
        for label in known.labels
        if label in ("client", "task", "round", "upload", "name", "id", "address")
    ]
    for _, query, legend in _queries(board):
        assert not re.search(r"\b(client|task|round)_?(id|name|hash)\b", query + legend)


def test_rates_are_taken_over_what_grafana_thinks_right(board: Board) -> None:
    for panel in panels(board):
        for expr, _ in panel.queries:
            windows = set(re.findall(r"\[(.+?)\]", expr))
            assert windows <= ({"$__range"} if panel.instant else set()) | {"$__rate_interval"}


def test_a_variable_that_a_dashboard_does_not_have_is_noticed(board: Board) -> None:
    with pytest.raises(PrometheusError, match="expected variables of the dashboard; got jobs"):
        filled('up{job=~"$jobs"}', {"jo": "x", **GRAFANA})
    for each in board["templating"]["list"]:
        if each["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), \w+\)", each["query"])
            assert match
            assert names(filled(match.group(1), _variables(board))) <= set(KNOWN)


# What they look like


def _schema(name: str) -> dict[str, Any]:
    """A schema, put right where it is narrower than what it says in words.

    The lowest threshold is minus infinity, which JSON has as null; and what a matcher is given may
    be anything, a name for instance.
    """
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.jsonschema.json").read_text("utf-8"))
    if name == "dashboard":
        found["definitions"]["Threshold"]["properties"]["value"]["type"] = ["number", "null"]
        del found["definitions"]["MatcherConfig"]["properties"]["options"]["type"]
    return found


def _valid(value: object, schema: Mapping[str, Any], definition: str) -> None:
    whole = {**schema, "$ref": f"#/definitions/{definition}"}
    jsonschema.Draft7Validator(whole).validate(value)


def _check_form(board: Board) -> None:
    """By the schema of all, which leaves open what is in each kind of panel, and those of each."""
    _valid(board, _schema("dashboard"), "Dashboard")
    for panel in panels(board):
        kind = _schema(panel.kind)
        _valid(panel.model["options"], kind, "Options")
        defaults = panel.model.get("fieldConfig", {}).get("defaults", {})
        if "custom" in defaults:
            _valid(defaults["custom"], kind, "FieldConfig")
        for target in panel.model["targets"]:
            _valid(target, _schema("prometheus"), "dataquery")


def test_dashboards_are_what_grafana_s_schemas_take(board: Board) -> None:
    _check_form(board)


def test_dashboards_survive_being_read_and_written_by_grafana_s_own_models(board: Board) -> None:
    register_default_plugins()
    again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    assert again == board


def _first(board: Board, kind: str) -> Board:
    found: Board = next(each for each in board["panels"] if each["type"] == kind)
    return found


def _set(value: object, *path: str | int) -> Callable[[Any], None]:
    def change(inside: Any) -> None:  # noqa: ANN401
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("timeseries", _set(1, "titel")),
        ("timeseries", _set("8", "gridPos", "w")),
        ("timeseries", _set("wiggly", "fieldConfig", "defaults", "custom", "drawStyle")),
        ("timeseries", _set("left", "options", "legend", "placement")),
        ("timeseries", _set([1], "targets", 0, "expr")),
        ("timeseries", _set("up", "targets", 0, "query")),
        ("timeseries", _set({"value": 1}, "fieldConfig", "defaults", "thresholds")),
        ("stat", _set("loud", "options", "colorMode")),
        ("stat", _set("sum", "options", "reduceOptions", "calcs")),
        ("row", _set("no", "collapsed")),
    ],
)
def test_a_dashboard_that_grafana_would_not_understand_is_noticed(
    board: Board, kind: str, change: Callable[[Any], None]
) -> None:
    change(_first(board, kind))
    with pytest.raises(jsonschema.ValidationError):
        _check_form(board)


def _overlaps(board: Board) -> list[tuple[str, str]]:
    def cells(panel: Board) -> set[tuple[int, int]]:
        place = panel["gridPos"]
        return set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )

    return [
        (one["title"], other["title"])
        for one, other in itertools.combinations(board["panels"], 2)
        if cells(one) & cells(other)
    ]


def test_panels_lie_beside_one_another_and_fill_their_lines(board: Board) -> None:
    assert not _overlaps(board)
    widths: dict[int, int] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        widths[place["y"]] = widths.get(place["y"], 0) + place["w"]
    assert set(widths.values()) == {24}
    _first(board, "timeseries")["gridPos"]["y"] -= 1
    assert _overlaps(board)


def _incomplete(board: Board) -> list[str]:
    found = []
    for panel in panels(board):
        defaults = panel.model.get("fieldConfig", {}).get("defaults", {})
        unit = defaults.get("unit") or panel.model["options"].get("yAxis", {}).get("unit")
        said = panel.model.get("description", "")
        legends = [legend for _, legend in panel.queries]
        checks = {
            "unit": unit in UNITS,
            "description": len(said) > 10 and said.endswith("."),
            "legend": all(legends) and len(set(legends)) == len(legends),
            "datasource": panel.model["datasource"]
            == {"type": "prometheus", "uid": "${datasource}"},
        }
        found += [f"{panel.title}: {name}" for name, fine in checks.items() if not fine]
    return found


def test_every_panel_has_a_unit_a_description_and_a_legend(board: Board) -> None:
    assert not _incomplete(board)
    panel = _first(board, "timeseries")
    panel["fieldConfig"]["defaults"]["unit"] = "parsecs"
    panel["targets"][0]["legendFormat"] = ""
    del panel["description"], panel["datasource"]["uid"]
    assert {each.rpartition(": ")[2] for each in _incomplete(board)} == {
        "unit", "description", "legend", "datasource",
    }  # fmt: skip


def _numbers(boards: list[Board]) -> list[object]:
    """What must not come twice: uids and titles of dashboards, and numbers of panels in each."""
    uids = [(each["uid"],) for each in boards] + [(each["title"],) for each in boards]
    return [*uids, *((each["uid"], panel["id"]) for each in boards for panel in each["panels"])]


def test_dashboards_and_panels_can_be_told_apart_and_are_not_by_one_prometheus() -> None:
    boards = [read(path) for path in sorted(BOARDS.glob("*.json"))]
    found = _numbers(boards)
    assert len(found) > 80
    assert len(set(found)) == len(found)
    for each in boards:
        assert len(each["uid"]) <= 40
        assert each["templating"]["list"][0]["type"] == "datasource"
    boards[0]["panels"][1]["id"] = boards[0]["panels"][0]["id"]
    assert len(set(_numbers(boards))) == len(found) - 1


# What raises an alarm


def _anchors(page: str) -> set[str]:
    return {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+?)(?: \{.*\})?$", page, re.MULTILINE)
    }


def test_every_alert_says_what_has_happened_what_to_do_and_where_more_is_said() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    anchors = _anchors(page)
    for alert in ALERTS:
        file, _, anchor = alert.runbook.partition("#")
        assert (ROOT / file).is_file()
        assert anchor in anchors, alert.name
        assert alert.severity in ("critical", "warning", "info")
        assert alert.summary.endswith(".")
        assert len(alert.action) > 20
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    assert {each for each in anchors if each.startswith("secagg")} == {
        alert.name.lower() for alert in ALERTS
    }
    assert "secaggdown" not in _anchors(page.replace("# SecaggDown", "# SecaggIsDown"))


def test_the_jobs_of_both_scrape_files_are_those_that_alerts_look_for() -> None:
    for name in ("prometheus.yml", "prometheus-mtls.yml"):
        text = (FOLDER / "prometheus" / name).read_text(encoding="utf-8")
        jobs = {each["job_name"] for each in yaml.safe_load(text)["scrape_configs"]}
        assert {SERVER, KEY_HOLDER} <= jobs
    asked = {job for alert in ALERTS for job in re.findall(r'job=~"([^"]+)"', alert.expr)}
    assert asked == {f"{SERVER}|{KEY_HOLDER}"}


def test_grafana_is_pointed_at_the_dashboards_and_at_prometheus() -> None:
    provisioning = FOLDER / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources/secagg.yaml").read_text("utf-8"))
    (source,) = sources["datasources"]
    assert (source["uid"], source["type"]) == ("secagg-prometheus", "prometheus")
    scrape = yaml.safe_load((FOLDER / "prometheus/prometheus.yml").read_text("utf-8"))
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    providers = yaml.safe_load((provisioning / "dashboards/secagg.yaml").read_text("utf-8"))
    assert [each["type"] for each in providers["providers"]] == ["file"]


def _promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


@promtool
def test_prometheus_takes_the_rules_and_both_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "prometheus"
    shutil.copytree(FOLDER / "prometheus", folder)
    assert "SUCCESS" in _promtool("check", "rules", folder / "rules.yaml").stdout
    for name in ("prometheus.yml", "prometheus-mtls.yml"):
        done = _promtool("check", "config", "--syntax-only", folder / name)
        assert done.returncode == 0, done.stderr
    (folder / "rules.yaml").write_text(RULES.read_text("utf-8").replace("== 0", "=== 0"), "utf-8")
    assert _promtool("check", "rules", folder / "rules.yaml").returncode != 0
    (folder / "rules.yaml").unlink()
    assert _promtool("check", "config", folder / "prometheus.yml").returncode != 0


Values = Mapping[str, str]
_AT_S, _AT_K = f'job="{SERVER}",instance="s"', f'job="{KEY_HOLDER}",instance="k"'
_DAYS = "{:.0f}x3000".format


def _s(name: str, labels: str = "") -> str:
    return f"{name}{{{', '.join(filter(None, (_AT_S, labels)))}}}"


def _k(name: str, labels: str = "") -> str:
    return f"{name}{{{', '.join(filter(None, (_AT_K, labels)))}}}"


def _buckets(name: str, labels: str, low: str, high: str) -> Values:
    """A histogram whose observations are below half a second, and below a minute."""
    return {
        _s(f"{name}_bucket", ", ".join(filter(None, (labels, f'le="{le}"')))): values
        for le, values in {"0.5": low, "60.0": high, "+Inf": high}.items()
    }


_NORMS = "secagg_keyholder_norms_judged_total"
_JUDGED = "secagg_keyholder_uploads_judged_total"
_REFUSED = "secagg_calls_refused_total"
_ROUNDS = "secagg_rounds_total"
_EXPIRY = "secagg_certificate_expiry_timestamp_seconds"
_WAIT = "secagg_workers_queue_wait_seconds"
_TRANSACTIONS = "secagg_store_transaction_duration_seconds"
_STEADY, _GROWS, _STILL = "1x3000", "0+1x3000", "0x3000"


class Case(NamedTuple):
    """When to look at an alert, in minutes; with which series it is raised then, with which not.

    Attributes:
        step: minutes from value to value.
        alone: whether the alert is about no instance.
    """

    minutes: int
    raised: list[Values]
    quiet: list[Values]
    step: int = 1
    alone: bool = False


CASES: Mapping[str, Case] = {
    "SecaggDown": Case(
        5,
        [{_s("up"): _STILL}, {_k("up"): "1 1 0x3000"}],
        [
            {_s("up"): _STEADY},
            {_s("up"): "1x3 0x1 1x3000"},
            {'up{job="node",instance="n"}': _STILL},
        ],
    ),
    "SecaggNotReady": Case(
        8,
        [{_s("secagg_ready"): _STILL}, {_k("secagg_ready"): "1 0x3000"}],
        [{_s("secagg_ready"): _STEADY}, {_s("secagg_ready"): "1x4 0x3000"}],
    ),
    "SecaggRestarts": Case(
        30,
        [{_s("process_start_time_seconds"): "1x9 2x5 3x5 4x3000"}],
        [
            {_s("process_start_time_seconds"): "1x9 2x3000"},
            {'process_start_time_seconds{job="node",instance="n"}': "0+1x3000"},
        ],
    ),
    "SecaggCertificateExpiresSoon": Case(
        61,
        [{_s(_EXPIRY): _DAYS(20 * 86400)}],
        [{_s(_EXPIRY): _DAYS(22 * 86400)}, {_s(_EXPIRY): _DAYS(2 * 86400)}],
    ),
    "SecaggCertificateExpires": Case(
        1,
        [{_k(_EXPIRY): _DAYS(2.9 * 86400)}, {_k(_EXPIRY): _DAYS(0)}],
        [{_k(_EXPIRY): _DAYS(3.1 * 86400)}],
    ),
    "SecaggVersionsDiffer": Case(
        61,
        [
            {
                _s("secagg_build_info", 'version="1"'): _STEADY,
                _k("secagg_build_info", 'version="2"'): _STEADY,
            }
        ],
        [
            {
                _s("secagg_build_info", 'version="1"'): _STEADY,
                _k("secagg_build_info", 'version="1"'): _STEADY,
            }
        ],
        alone=True,
    ),
    "SecaggTaskFailed": Case(
        20,
        [{_s("secagg_tasks", 'state="FAILED"'): "2x15 3x3000"}],
        [
            {_s("secagg_tasks", 'state="FAILED"'): "2x3000"},
            {_s("secagg_tasks", 'state="FAILED"'): "2x15 0x3000"},
            {_s("secagg_tasks", 'state="FINISHED"'): _GROWS},
        ],
    ),
    "SecaggRoundsFail": Case(
        60,
        [
            {
                _s(_ROUNDS, 'outcome="ABORTED"'): "0+0.1x60",
                _s(_ROUNDS, 'outcome="DONE"'): "0+0.05x60",
            },
            {_s(_ROUNDS, 'outcome="VOID"'): "0x30 3x3000", _s(_ROUNDS, 'outcome="DONE"'): _STILL},
        ],
        [
            {
                _s(_ROUNDS, 'outcome="ABORTED"'): "0+0.1x60",
                _s(_ROUNDS, 'outcome="DONE"'): "0+0.2x60",
            },
            {
                _s(_ROUNDS, 'outcome="ABORTED"'): "0x30 2x3000",
                _s(_ROUNDS, 'outcome="DONE"'): _STILL,
            },
        ],
    ),
    "SecaggRoundStuck": Case(
        50,
        [
            {
                _s("secagg_rounds_open", 'state="SUMMING"'): _STEADY,
                _s(_ROUNDS, 'outcome="DONE"'): _STILL,
            }
        ],
        [
            {
                _s("secagg_rounds_open", 'state="COLLECTING"'): _STEADY,
                _s(_ROUNDS, 'outcome="DONE"'): _STILL,
            },
            {
                _s("secagg_rounds_open", 'state="SUMMING"'): _STEADY,
                _s(_ROUNDS, 'outcome="DONE"'): "0+0.2x3000",
            },
            {
                _s("secagg_rounds_open", 'state="SUMMING"'): "0x30 1x3000",
                _s(_ROUNDS, 'outcome="DONE"'): _STILL,
            },
        ],
    ),
    "SecaggNoRounds": Case(
        25 * 60,
        [
            {
                _s("secagg_tasks", 'state="RUNNING"'): _STEADY,
                _s(_ROUNDS, 'outcome="DONE"'): _STILL,
                _s(_ROUNDS, 'outcome="ABORTED"'): _GROWS,
            }
        ],
        [
            {
                _s("secagg_tasks", 'state="RUNNING"'): _STILL,
                _s(_ROUNDS, 'outcome="DONE"'): _STILL,
            },
            {
                _s("secagg_tasks", 'state="RUNNING"'): _STEADY,
                _s(_ROUNDS, 'outcome="DONE"'): "0x60 1x300",
            },
        ],
        step=10,
    ),
    "SecaggSumLost": Case(
        20,
        [{_s(_ROUNDS, 'outcome="VOID"'): "0x15 1x3000"}],
        [
            {_s(_ROUNDS, 'outcome="VOID"'): "1x3000"},
            {_s(_ROUNDS, 'outcome="VOID"'): "0 1x3000"},
            {_s(_ROUNDS, 'outcome="ABORTED"'): _GROWS},
        ],
    ),
    "SecaggInternalErrors": Case(
        20,
        [
            {_k(_REFUSED, 'reason="INTERNAL"'): "0x15 1x3000"},
            {_s("secagg_rounds_failed_total", 'reason="INTERNAL"'): "0x15 1x3000"},
        ],
        [
            {_s(_REFUSED, 'reason="NOT_READY"'): _GROWS},
            {_s(_REFUSED, 'reason="INTERNAL"'): "1x3000"},
        ],
    ),
    "SecaggUpdatesRefused": Case(
        60,
        [{_k(_NORMS, 'verdict="refused"'): "0+0.1x60", _k(_NORMS, 'verdict="accepted"'): "0+1x60"}],
        [
            {
                _k(_NORMS, 'verdict="refused"'): "0+0.1x60",
                _k(_NORMS, 'verdict="accepted"'): "0+3x60",
            },
            {
                _k(_NORMS, 'verdict="refused"'): "0x30 2x30",
                _k(_NORMS, 'verdict="accepted"'): _STILL,
            },
        ],
    ),
    "SecaggOffGrid": Case(
        20,
        [{_k("secagg_keyholder_noise_audited_total", 'finding="off_grid"'): "0x15 1x3000"}],
        [{_k("secagg_keyholder_noise_audited_total", 'finding="fine"'): _GROWS}],
    ),
    "SecaggUploadsForged": Case(
        20,
        [
            {_k(_JUDGED, 'verdict="INVALID_RECEIPT"'): "0x15 1x3000"},
            {_k(_JUDGED, 'verdict="INVALID_SEAL"'): "0x15 1x3000"},
        ],
        [{_k(_JUDGED, 'verdict="ACCEPTED"'): _GROWS}, {_k(_JUDGED, 'verdict="REVOKED"'): _GROWS}],
    ),
    "SecaggReleaseRefused": Case(
        20,
        [{_k("secagg_keyholder_releases_total", 'outcome="refused"'): "0x15 1x3000"}],
        [{_k("secagg_keyholder_releases_total", 'outcome="released"'): _GROWS}],
    ),
    "SecaggStrangers": Case(
        20,
        [
            {_s(_REFUSED, 'reason="NOT_ENROLLED"'): "0+2x3000"},
            {_k(_REFUSED, 'reason="WRONG_ROLE"'): "0+2x3000"},
        ],
        [
            {_s(_REFUSED, 'reason="NOT_ENROLLED"'): "0+1x3000"},
            {_s(_REFUSED, 'reason="NOT_READY"'): "0+100x3000"},
        ],
    ),
    "SecaggPrivacyBudgetLow": Case(
        1,
        [
            {_s("secagg_privacy_budget_remaining_ratio"): "0.09x3000"},
            {_k("secagg_keyholder_privacy_budget_remaining_ratio"): "0x3000"},
        ],
        [
            {_s("secagg_privacy_budget_remaining_ratio"): "0.1x3000"},
            {_k("secagg_keyholder_privacy_budget_remaining_ratio"): "1x3000"},
        ],
    ),
    "SecaggAttemptsLow": Case(
        10,
        [
            {
                _k("secagg_keyholder_attempts_remaining"): "2x3000",
                _k("secagg_keyholder_rounds_open"): _STEADY,
            }
        ],
        [
            {
                _k("secagg_keyholder_attempts_remaining"): "3x3000",
                _k("secagg_keyholder_rounds_open"): _STEADY,
            },
            {
                _k("secagg_keyholder_attempts_remaining"): "2x3000",
                _k("secagg_keyholder_rounds_open"): _STILL,
            },
        ],
    ),
    "SecaggOverloaded": Case(
        20,
        [{_s(_REFUSED, 'reason="OVERLOADED"'): _GROWS}],
        [
            {_s(_REFUSED, 'reason="OVERLOADED"'): "0x12 1x3000"},
            {_s(_REFUSED, 'reason="NOT_READY"'): _GROWS},
        ],
    ),
    "SecaggWorkersBehind": Case(
        40,
        [_buckets(_WAIT, "", "0x3000", "0+10x3000")],
        [_buckets(_WAIT, "", "0+10x3000", "0+10x3000"), _buckets(_WAIT, "", _STILL, _STILL)],
    ),
    "SecaggDiskFills": Case(
        90,
        [{_s("secagg_disk_free_bytes"): "20000000000-20000000x3000"}],
        [
            {_s("secagg_disk_free_bytes"): "20000000000x3000"},
            {_s("secagg_disk_free_bytes"): "2000000000000-20000000x3000"},
        ],
    ),
    "SecaggDiskLow": Case(
        8,
        [{_s("secagg_disk_free_bytes"): "1000000000x3000"}],
        [{_s("secagg_disk_free_bytes"): "1100000000x3000"}],
    ),
    "SecaggStoreFailing": Case(
        20,
        [{_s("secagg_store_failures_total"): "0x15 1x3000"}],
        [{_s("secagg_store_failures_total"): "7x3000"}],
    ),
    "SecaggStoreSlow": Case(
        40,
        [_buckets(_TRANSACTIONS, 'access="write"', "0x3000", "0+10x3000")],
        [_buckets(_TRANSACTIONS, 'access="write"', "0+10x3000", "0+10x3000")],
    ),
}


def _alarms(folder: Path, rules: str) -> str:
    """What promtool says of all cases, by the rules given; nothing if it is as it should be.

    Each case is about instances of its own, so that most can share one run, which is quicker.
    """
    (folder / "rules.yaml").write_text(rules, encoding="utf-8")
    said = ""
    for step in (1, 10):
        cases = {
            "rule_files": ["rules.yaml"],
            "evaluation_interval": f"{step}m",
            "tests": list(_runs(step)),
        }
        (folder / "cases.yaml").write_text(yaml.safe_dump(cases), encoding="utf-8")
        done = _promtool("test", "rules", folder / "cases.yaml")
        said += "" if done.returncode == 0 else done.stdout + done.stderr
    return said.replace("\\", "")


def _runs(step: int) -> Iterator[dict[str, Any]]:
    shared: dict[str, Any] = {"interval": f"{step}m", "input_series": [], "promql_expr_test": []}
    for name, case in CASES.items():
        for number, series in enumerate([*case.raised, *case.quiet] if case.step == step else []):
            apart = {**shared, "input_series": [], "promql_expr_test": []}
            run = apart if case.alone else shared
            own = f'instance="{name}{number}"'
            run["input_series"] += [
                {"series": re.sub(r'instance="\w+"', own, key), "values": values}
                for key, values in series.items()
            ]
            which = f'alertname="{name}", alertstate="firing"'
            run["promql_expr_test"].append(
                {
                    "expr": f"max(ALERTS{{{which if case.alone else f'{which}, {own}'}}})",
                    "eval_time": f"{case.minutes}m",
                    "exp_samples": [{"labels": "{}", "value": 1}] * (number < len(case.raised)),
                }
            )
            if case.alone:
                yield run
    yield shared


def test_every_alert_has_cases_of_both_kinds() -> None:
    assert CASES.keys() == {alert.name for alert in ALERTS}
    for case in CASES.values():
        assert case.raised
        assert case.quiet
        series = {key.partition("{")[0] for each in [*case.raised, *case.quiet] for key in each}
        assert series <= set(KNOWN)


@promtool
def test_every_alert_is_raised_when_it_should_be_and_not_when_it_should_not(tmp_path: Path) -> None:
    assert not _alarms(tmp_path, RULES.read_text(encoding="utf-8"))


@promtool
def test_whoever_is_told_reads_how_much_and_where(tmp_path: Path) -> None:
    (alert,) = (each for each in ALERTS if each.name == "SecaggUpdatesRefused")
    case = CASES[alert.name]
    told = "6 updates were refused for their norm on secagg-keyholder at k within an hour"
    for said, right in ((told, True), (told.replace("6", "7"), False)):
        run = {
            "interval": "1m",
            "input_series": [
                {"series": key, "values": values} for key, values in case.raised[0].items()
            ],
            "alert_rule_test": [
                {
                    "alertname": alert.name,
                    "eval_time": f"{case.minutes}m",
                    "exp_alerts": [
                        {
                            "exp_labels": {
                                "job": KEY_HOLDER,
                                "instance": "k",
                                "severity": "warning",
                            },
                            "exp_annotations": {
                                "summary": f"{said}, more than one in twenty.",
                                "description": alert.action,
                                "runbook": alert.runbook,
                            },
                        }
                    ],
                }
            ],
        }
        cases = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [run]}
        (tmp_path / "told.yaml").write_text(yaml.safe_dump(cases), encoding="utf-8")
        done = _promtool("test", "rules", tmp_path / "told.yaml")
        assert (done.returncode == 0) is right, done.stdout + done.stderr


@promtool
@pytest.mark.parametrize("deaf", [True, False], ids=["deaf", "hysterical"])
def test_an_alert_that_is_never_or_always_raised_is_noticed(tmp_path: Path, deaf: bool) -> None:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    changed = copy.deepcopy(rules)
    for rule in itertools.chain.from_iterable(group["rules"] for group in changed["groups"]):
        always = f'count by (job, instance) ({{instance=~"{rule["alert"]}.", alertname=""}})'
        rule["expr"] = "vector(1) < 0" if deaf else always
        rule.pop("for", None)
    said = _alarms(tmp_path, yaml.safe_dump(changed))
    for name, case in CASES.items():
        wrong = len(case.raised if deaf else case.quiet)
        assert said.count(f'alertname="{name}"') == wrong, name


def test_the_catalogue_is_no_longer_than_what_is_measured() -> None:
    assert "secagg_rounds_total" in KNOWN
    assert KNOWN["secagg_crypto_operation_duration_seconds_bucket"] == Known(
        KNOWN["secagg_crypto_operation_duration_seconds_sum"].kind,
        {
            **KNOWN["secagg_crypto_operation_duration_seconds_sum"].labels,
            "le": (),
        },
    )


# What is written down


def test_every_metric_is_on_the_reference_page_with_its_kind_labels_and_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_hooks"))
    page = importlib.import_module("reference_metrics").metrics_page()
    server, holder, process = re.split(r"^## .+\n", page, flags=re.MULTILINE)[1:]
    for part, metrics in ((server, SERVER_METRICS), (holder, KEY_HOLDER_METRICS)):
        rows = [line for line in part.splitlines() if "<span" in line]
        assert len(rows) == len(metrics)
        for row, metric in zip(rows, metrics, strict=True):
            assert f">{metric.prometheus}<" in row
            assert f"| {metric.kind}" in row
            for name, label_values in zip(metric.label_names, metric.labels.values(), strict=True):
                assert f"<code>{name}</code>" in row
                missing = [value for value in label_values if f"<code>{value}</code>" not in row]
                assert not missing or (set(missing) < set(REASONS) and "../errors.md" in row)
    assert process.count("| <code>process_") >= 6
    assert not re.search(r"\| *\|$", page, re.MULTILINE), "a metric that nothing is said of"
