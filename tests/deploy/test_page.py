"""The operator's page in a browser: what somebody reads there, and what it never does."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import cohort
import numpy as np
import programs
import pytest
from browser import Page, browser, chromium
from programs import CLIENTS, KEY_HOLDER, SERVER, Clients, Machine, session, task
from serving import LoopThread, loop_thread

from secagg.enrolment import OpenEnrolment
from secagg.errors import StorageError
from secagg.monitor import Monitor
from secagg.parameters import Plan
from secagg_client import session as session_module
from secagg_server.overview import Overview
from secagg_server.page import page_routes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STYLE = Path(page_routes.__code__.co_filename).with_name("page.css").read_text("utf-8")
HOSTILE = '<img src=x onerror="alert(1)">'
# In the page's place of a clock: it looks again when a test says so.
BY_HAND = "window.setTimeout = (look) => { window.again = look; return 0; };"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if chromium() is None:
        pytest.skip("no chromium on this machine")
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


# --- a page of invented documents ----------------------------------------------------------------


def found(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON
    """What a server without anything to show says."""
    minutes = [
        {"minute": f"2026-01-01T{number // 60 + 9:02}:{number % 60:02}Z"} for number in range(60)
    ]
    return {
        "version": "1.2.3",
        "now": "2026-01-01T10:00:00+00:00",
        "started": "2026-01-01T09:00:00+00:00",
        "ready": True,
        "enrolled": 3,
        "certificate_expires": 1798761600.0,
        "waiting": 0,
        "calls": 1,
        "call_limit": 64,
        "disk_free": 5e9,
        "task_counts": {"RUNNING": 1, "FINISHED": 2, "FAILED": 0},
        "tasks": [],
        "rounds": [],
        "verdicts": {},
        "accepted": 0,
        "clients": [],
        "clients_seen": 0,
        "uploads_read": 0,
        "traffic": [minute | {"uploads": 1, "bytes": 1000, "refused": 0} for minute in minutes],
    } | changes


A_TASK = {
    "task": "ratings",
    "state": "RUNNING",
    "reason": "",
    "rounds_done": 3,
    "rounds": 12,
    "created": "2026-01-01T09:30:00+00:00",
    "min_clients": 3,
    "target_clients": 6,
    "upload_bytes": 57344,
    "checked": True,
    "privacy": {
        "mode": "distributed",
        "epsilon": 8.0,
        "delta": 1e-6,
        "spent": 2.0,
        "releases_left": 9,
    },
}
A_ROUND = {
    "task": "ratings",
    "round": 3,
    "attempt": 2,
    "state": "DONE",
    "reason": "",
    "target_clients": 6,
    "contributors": 5,
    "add_ms": 12.0,
    "open_ms": 34.0,
    "created": "2026-01-01T09:58:00+00:00",
    "closes": "2026-01-01T09:59:30+00:00",
    "ended": "2026-01-01T09:59:00+00:00",
    "accepted": 5,
    "receiving": 0,
    "refused": {"NORM_REFUSED": 1},
}
A_CLIENT = {
    "client": "0123456789abcdef0123456789abcdef",
    "task": "ratings",
    "round": 3,
    "accepted": 2,
    "receiving": 0,
    "refused": {},
}
FULL = found(
    tasks=[A_TASK],
    rounds=[A_ROUND],
    clients=[A_CLIENT],
    clients_seen=1,
    uploads_read=2,
    accepted=5,
    verdicts={"NORM_REFUSED": 1},
)


class Told(Overview):
    """Says what a test wants."""

    def __init__(self) -> None:
        self.document_: dict[str, Any] = found()
        self.error: Exception | None = None

    def document(self) -> bytes:
        """See the base."""
        if self.error:
            raise self.error
        return json.dumps(self.document_).encode()


@contextlib.contextmanager
def served(thread: LoopThread, told: Told, address: str = "127.0.0.1:0") -> Iterator[str]:
    """The page over an overview, at an address."""
    routes = {path: route._replace(fresh_s=0.0) for path, route in page_routes(told).items()}

    async def start() -> tuple[Monitor, str]:
        made = Monitor(routes, OpenEnrolment())
        return made, await made.start(address)

    made, bound = thread.run(start())
    try:
        yield bound
    finally:
        thread.run(made.stop())


@contextlib.contextmanager
def looking(
    page: Page, thread: LoopThread, document: dict[str, Any] | None = None
) -> Iterator[tuple[Told, str]]:
    """The browser looks at an invented document, once; `again` lets it look again."""
    told = Told()
    told.document_ = document or found()
    page.begin(BY_HAND)
    page.look_like()
    with served(thread, told) as address:
        page.open(f"http://{address}/")
        page.wait_for("window.again && document.readyState === 'complete'")
        yield told, address
        assert page.complaints == []
        assert {request.split("/")[2] for request in page.requests} <= {address}


def again(page: Page) -> None:
    """The page looks once more, and has shown what it found."""
    page.value("(() => { const look = window.again; window.again = null; look(); })()")
    page.wait_for("window.again !== null")


def rows(page: Page, table: str) -> list[list[str]]:
    """What somebody reads in a table."""
    return page.value(
        f"[...document.querySelectorAll('#{table} tr')].map("
        "row => [...row.children].map(cell => cell.innerText.replace(/\\s+/g, ' ').trim()))"
    )  # type: ignore[no-any-return]


def test_a_server_that_has_done_nothing_says_so(page: Page, thread: LoopThread) -> None:
    with looking(page, thread):
        text = page.text()
        assert page.text("#state") == "ready"
        assert "No task yet: secagg-server task create makes one." in text
        assert "No round yet." in text
        assert "secagg 1.2.3, running for 1 h. Its certificate expires on 1 January 2027." in text
        assert page.value("document.title") == "ready · secagg server"


def test_everything_is_told_in_words(page: Page, thread: LoopThread) -> None:
    with looking(page, thread, FULL):
        assert rows(page, "task-rows") == [
            [
                *("ratings", "running", "3 of 12"),
                *("ε 2 of 8 δ 0.000001; 9 releases left", "3 to 6", "57 kB", "30 min ago"),
            ]
        ]
        assert rows(page, "round-rows") == [
            [
                *("ratings 3 attempt 2", "done", "5", "1 NORM_REFUSED", "5"),
                *("1 min 0 s", "12 ms", "34 ms", "2 min ago"),
            ]
        ]
        assert rows(page, "client-rows") == [["0123456789abcdef", "ratings 3", "2", "–"]]
        assert page.text("#verdict-rows").split("\n") == [
            *("accepted", "5", "NORM_REFUSED", "1"),
            "beyond the norm or direction that the plan allows",
        ]
        assert page.value("document.querySelector('#uploads').getAttribute('aria-label')") == (
            "60 uploads came in whole and 0 were refused in the last hour"
        )
        figures = page.text("#figures")
        for text in ("of 3 on record", "16.7 %" if "16.7" in figures else "17 %", "5 GB free"):
            assert text in figures, (text, figures)


def test_what_changes_is_shown_and_what_does_not_stays(page: Page, thread: LoopThread) -> None:
    with looking(page, thread, FULL) as (told, _):
        page.value("window.kept = document.querySelector('#client-rows tr')")
        told.document_ = FULL | {
            "rounds": [A_ROUND | {"round": 4, "attempt": 1}, A_ROUND],
            "tasks": [A_TASK | {"rounds_done": 4, "state": "FINISHED", "reason": "CONVERGED"}],
        }
        again(page)
        assert [row[0] for row in rows(page, "round-rows")] == ["ratings 4", "ratings 3 attempt 2"]
        assert rows(page, "task-rows")[0][1:3] == ["finished CONVERGED", "4 of 12"]
        assert page.value("window.kept === document.querySelector('#client-rows tr')"), (
            "a hash that somebody is copying stays selected"
        )
        told.document_ = found()
        again(page)
        assert rows(page, "round-rows") == rows(page, "task-rows") == []


def test_a_server_that_is_not_ready_says_where_to_look(page: Page, thread: LoopThread) -> None:
    with looking(page, thread, found(ready=False)):
        assert page.text("#state") == "not ready: its log says why"


def test_a_server_that_is_gone_is_missed_and_found_again(page: Page, thread: LoopThread) -> None:
    told = Told()
    told.document_ = FULL
    page.begin(BY_HAND)
    with served(thread, told) as address:
        page.open(f"http://{address}/")
        page.wait_for("window.again && document.readyState === 'complete'")
        assert not page.value("document.querySelector('#silence').checkVisibility()")
    for _ in range(2):
        again(page)
        assert page.value("document.querySelector('#silence').checkVisibility()")
        silence = page.text("#silence")
        assert re.fullmatch(
            r"The server has not answered since \d\d:\d\d:\d\d: it cannot be reached\. What is "
            r"below is from \d\d:\d\d:\d\d\. This page keeps asking\.",
            silence,
        )
    assert page.text("#state") == "no answer"
    assert page.value("document.title") == "no answer · secagg server"
    assert rows(page, "task-rows"), "what was known is still there"
    with served(thread, told, address):
        again(page)
        assert page.text("#state") == "ready"
        assert not page.value("document.querySelector('#silence').checkVisibility()")


def test_a_store_that_does_not_answer_is_no_answer(page: Page, thread: LoopThread) -> None:
    with looking(page, thread, FULL) as (told, _):
        told.error = StorageError("expected a database; hunter2")
        again(page)
        assert ": it says 503. What is below is from" in page.text("#silence")
        assert "hunter2" not in page.text()
        page.complaints.clear()  # the console names the status


def test_who_pauses_it_is_not_disturbed(page: Page, thread: LoopThread) -> None:
    with looking(page, thread) as (told, _):
        page.value("document.querySelector('#pause').click()")
        asked = len(page.requests)
        told.document_ = found(ready=False)
        for _ in range(3):
            again(page)
        assert page.text("#state") == "ready"
        assert len(page.requests) == asked
        assert page.text("#looked").startswith("paused at")
        page.value("document.querySelector('#pause').click()")
        again(page)
        assert page.text("#state").startswith("not ready")


def hostile(value: object) -> object:
    """A document with a hostile text in the place of every text that it has."""
    if isinstance(value, dict):
        return (
            {HOSTILE if key.isupper() else key: hostile(each) for key, each in value.items()}
            if not {"minute", "now"} & value.keys()
            else value
            | {key: hostile(each) for key, each in value.items() if isinstance(each, list | dict)}
        )
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return HOSTILE if isinstance(value, str) and not value[:2].isdigit() else value


def test_names_are_text_whatever_they_are(page: Page, thread: LoopThread) -> None:
    with looking(page, thread, hostile(FULL) | {"version": HOSTILE}):  # type: ignore[operator]
        for table in ("task-rows", "round-rows", "client-rows"):
            assert HOSTILE in str(rows(page, table)), table
        assert HOSTILE in page.text("#verdict-rows")
        assert HOSTILE in page.text("#about")
        assert page.value("document.querySelectorAll('main img, footer img').length") == 0
        assert page.value("document.querySelectorAll('script').length") == 1
        assert page.dialogs == []
        assert not [request for request in page.requests if request.endswith("/x")]


def test_a_script_that_gets_in_anyway_may_not_run(page: Page, thread: LoopThread) -> None:
    """The second line: what the answer's headers tell the browser."""
    with looking(page, thread):
        page.value("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=alert(1)>`)")
        page.value(
            "document.body.append(Object.assign(document.createElement('script'),"
            " {text: 'window.ran = true'}))"
        )
        assert page.value("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'kept')") == "kept"
        assert page.value("window.ran") is None
        assert page.dialogs == []
        assert "Content Security Policy" in str(page.complaints)
        page.complaints.clear()
        page.requests[:] = [request for request in page.requests if ":9/" not in request]


def test_it_can_be_read_on_every_screen(page: Page, thread: LoopThread) -> None:
    long = A_TASK | {"task": "a" * 64}
    wide = FULL | {"tasks": [long], "rounds": [A_ROUND | {"task": "a" * 64}]}
    with looking(page, thread, wide):
        for width, dark in itertools.product((320, 390, 768, 1024, 1440), (False, True)):
            page.look_like(width=width, dark=dark)
            assert page.value("document.documentElement.scrollWidth") <= width
            background = page.value("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(18, 21, 23)") is dark


def test_it_can_be_used_without_a_mouse_and_without_eyes(page: Page, thread: LoopThread) -> None:
    with looking(page, thread, FULL):
        tree = page.accessible()
        named = {(node["role"], node["name"]) for node in tree}
        for wanted in (
            ("button", "Pause"),
            ("heading", "secagg server"),
            *(("region", name) for name in ("Tasks", "Rounds", "Verdicts", "Clients")),
            ("rowheader", "ratings"),
            ("columnheader", "Privacy spent"),
            ("link", "To the tasks"),
        ):
            assert wanted in named, (wanted, sorted(named))
        assert not [
            node for node in tree if node["role"] in ("image", "button") and not node["name"]
        ]
        assert page.value("document.documentElement.lang") == "en"
        assert page.value("document.querySelector('#state').getAttribute('role')") == "status"
        # Whatever scrolls can be reached by the keyboard.
        assert page.value(
            "[...document.querySelectorAll('.scroll')].every(each => each.tabIndex === 0)"
        )


# --- its colours ---------------------------------------------------------------------------------


def colours() -> Iterator[dict[str, str]]:
    light, dark = re.findall(r":root \{([^}]*--page[^}]*)\}", STYLE)
    first = dict(re.findall(r"--([\w-]+): (#\w{6})", light))
    yield first
    yield first | dict(re.findall(r"--([\w-]+): (#\w{6})", dark))


def luminance(colour: str) -> float:
    """See https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [
        each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize(
    ("text", "ground"),
    [
        *itertools.product(("ink", "quiet", "bad"), ("page", "sheet")),
        *((kind, f"{kind}-sheet") for kind in ("good", "busy", "warn", "bad")),
        ("quiet", "track"),
    ],
)
def test_text_can_be_told_from_its_ground(theme: int, text: str, ground: str) -> None:
    found = list(colours())[theme]
    assert contrast(found[text], found[ground]) >= 4.5


# --- a real server -------------------------------------------------------------------------------


def too_large(machine: Machine, index: int) -> None:
    """Contribute what no honest client would: each number as large as it may be."""
    with session(machine, index) as connected:
        current = next(connected.rounds())

        def largest(plan: Plan, *_: Any, **options: Any) -> Any:  # noqa: ANN401
            honest = cohort.quantized(current.context, index)
            layout = plan.layouts[0]
            signs = np.where(np.arange(layout.values) % 2, 1, -1)
            return [replace(honest[0], values=layout.max_abs * signs), *honest[1:]]

        with mock.patch.object(session_module, "quantize", largest):
            current.contribute(
                cohort.contribution(current.context.plan, index), samples=cohort.samples(index)
            )


def contributes(machine: Machine, index: int) -> None:
    with session(machine, index) as connected:
        current = next(connected.rounds())
        values = cohort.contribution(current.context.plan, index)
        current.contribute(values, samples=cohort.samples(index))


def test_a_real_server_is_shown_as_it_is(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is done, an upload that is refused, and a round that goes on."""
    with Machine(tmp_path) as machine:
        for name in (KEY_HOLDER, SERVER):
            machine.start(name)
        with machine.operator() as operator:
            operator.create_task(task(rounds=1))
            Clients(machine).finish()
            operator.create_task(replace(task(rounds=5), task_id="ratings"))
            monkeypatch.setattr(programs, "TASK_ID", "ratings")
            for index in CLIENTS[:2]:
                contributes(machine, index)
            too_large(machine, CLIENTS[2])
        address = json.loads((tmp_path / "server.ready").read_text("utf-8"))["monitor_listen"]
        page.begin("")
        page.look_like()
        page.open(f"http://{address}/")
        page.wait_for("document.querySelectorAll('#round-rows tr').length === 3")
        page.wait_for("document.querySelector('#round-rows').innerText.includes('closes in')")
        page.wait_for("document.querySelector('#state').innerText === 'ready'")
        assert [row[:3] for row in rows(page, "task-rows")] == [
            ["ratings", "running", "0 of 5"],
            ["task", "finished", "1 of 1"],
        ]
        rounds = rows(page, "round-rows")
        assert [row[0] for row in rounds] == ["ratings 1 attempt 2", "ratings 1", "task 1"]
        assert rounds[0][1].startswith("collecting closes in")
        assert rounds[0][2] == "0 of 3"
        assert rounds[1][1:5] == ["no result QUORUM_NOT_REACHED", "2", "1 NORM_REFUSED", "–"]
        assert rounds[2][1:5] == ["done", "3", "–", "3"]
        clients = rows(page, "client-rows")
        assert clients[0][2:] == ["1", "1 NORM_REFUSED"]
        assert len(clients) == len(CLIENTS)
        assert "client-1" not in page.value("document.documentElement.outerHTML")
        audited = {
            json.loads(entry.details)["client"][:16]
            for entry in machine.entries(SERVER)
            if entry.event == "upload-accepted"
        }
        assert {row[0] for row in clients} == audited, "the hashes of the audit log"
        assert page.complaints == []
        assert {request.split("/")[2] for request in page.requests} == {address}
        assert machine.stop() == [0, 0]
        page.wait_for("document.querySelector('#state').innerText === 'no answer'")
        assert "The server has not answered since" in page.text("#silence")
