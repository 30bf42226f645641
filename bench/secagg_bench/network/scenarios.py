"""What goes wrong, and when: one task each, which must come out as if nothing had.

A line that is bad is bad all the time; a cut happens amid something, and is healed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from secagg.parameters import CHUNK_BYTES
from secagg.wire.v1 import round_pb2
from secagg_bench.network.federation import (
    CLIENT_HOSTS,
    KEY_HOLDER,
    SERVER,
    Federation,
    NotAsExpectedError,
)
from secagg_bench.network.participant import CLIENTS, plan
from secagg_bench.network.wire import Cut, Line

__all__ = ["SCENARIOS", "Outcome", "Scenario", "play"]

_DEADLINE_S = 600.0
_LIMIT_S = 420.0
_EVERYBODY = list(range(CLIENTS))
_SLOW = Line(bytes_per_s=500_000)
"""So slow that an upload takes five seconds, and a release ten."""
_AT_WORK_BYTES = 20_000  # more than a handshake and a look at the other's health


@dataclass
class Outcome:
    """What came of a scenario.

    Attributes:
        violations: what was not as it must be; empty in the end.
        round_s: seconds from a round's creation to its end: of the last one.
        on_again_s: seconds from healing until what was stuck went on; None where nothing was cut.
        recovered_s: seconds from healing until everything was done.
        figures: what else was measured.
    """

    violations: list[str] = field(default_factory=list)
    round_s: float = 0.0
    on_again_s: float | None = None
    recovered_s: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Scene:
    """A running scenario: what it sees, and what it does.

    Attributes:
        contributors: who must be in each round's sum.
    """

    federation: Federation
    task: str
    outcome: Outcome
    contributors: list[list[int]]
    healed_at: float | None = None

    def state(self) -> int:
        """State of the newest round; 0 before there is one."""
        rounds = self.federation.task(self.task).rounds
        return rounds[-1].state if rounds else 0

    def reaches(self, state: int) -> None:
        """Wait until the newest round is in a state, or past it."""
        self.federation.wait(f"the round is in state {state}", lambda: self.state() >= state)

    def carried(self, source: str, destination: str) -> int:
        """Bytes that have arrived."""
        return self.federation.hosts.wire.carried(source, destination)

    def arrive(
        self,
        count: float,
        *lines: tuple[str, str],
        then: Callable[[str], None] = lambda _source: None,
    ) -> None:
        """Wait until so many more bytes have arrived over each of these lines.

        Args:
            then: called with each source once they have.

        Raises:
            NotAsExpectedError: the round was over before.
        """
        start = {line: self.carried(*line) for line in lines}

        def enough() -> bool:
            for line in [each for each in start if self.carried(*each) - start[each] >= count]:
                del start[line]
                then(line[0])
            if start and self.state() >= round_pb2.ROUND_STATE_DONE:
                raise NotAsExpectedError("expected to cut amid something; the round was over")
            return not start

        self.federation.wait(f"{count:g} bytes arrive", enough)

    def slow(self, one: str, other: str) -> None:
        """So that there is time to cut amid something."""
        self.federation.hosts.degrade(one, other, _SLOW)

    def heal(self, *lines: tuple[str, str]) -> None:
        """From now on nothing is in the way; wait until work goes on over these lines."""
        self.healed_at = time.monotonic()
        self.federation.hosts.clear()
        self.arrive(_AT_WORK_BYTES, *lines)
        self.outcome.on_again_s = round(time.monotonic() - self.healed_at, 1)


Act = Callable[[Scene], None]


@dataclass(frozen=True)
class Scenario:
    """One thing that goes wrong.

    Attributes:
        name: one word or two.
        fault: what happens, in words.
        act: makes it happen; called once the task is there and the clients begin.
        before: called before there is a task.
        rounds: of the task.
        deadline_s: of each round.
        contributors: who must be in each round's sum.
    """

    name: str
    fault: str
    act: Act = lambda _scene: None
    before: Act = lambda _scene: None
    rounds: int = 1
    deadline_s: float = _DEADLINE_S
    contributors: tuple[list[int], ...] | None = None


def play(federation: Federation, scenario: Scenario) -> Outcome:
    """Run a scenario to its end, over lines that are clear before and after."""
    task, outcome = scenario.name.replace(" ", "-"), Outcome()
    wanted = scenario.contributors or (_EVERYBODY,) * scenario.rounds
    scene = Scene(federation, task, outcome, list(wanted))
    federation.hosts.clear()
    try:
        scenario.before(scene)
        federation.create(task, rounds=scenario.rounds, deadline_s=scenario.deadline_s)
        federation.join(task)
        scenario.act(scene)
        federation.wait("the task ends", lambda: federation.finished(task), _LIMIT_S)
        if scene.healed_at is not None:
            outcome.recovered_s = round(time.monotonic() - scene.healed_at, 1)
        outcome.violations += federation.violations(task, scene.contributors)
    except NotAsExpectedError as error:
        outcome.violations.append(str(error))
    finally:
        federation.hosts.clear()
    rows = federation.task(task).rounds
    if rows and rows[-1].HasField("ended_at"):
        took = rows[-1].ended_at.ToDatetime() - rows[-1].created_at.ToDatetime()
        outcome.round_s = round(took.total_seconds(), 1)
    outcome.figures |= {"rounds": scenario.rounds, "attempts": len(rows)}
    outcome.figures["gave_up"] = federation.said("gave up", task)
    if outcome.violations:
        federation.stop_clients()
        federation.start_clients()
    return outcome


# Lines that are bad from the first packet to the last


def _bad(line: Line) -> Act:
    """Every line between clients, server and key holder."""

    def act(scene: Scene) -> None:
        for name in (*CLIENT_HOSTS, KEY_HOLDER):
            scene.federation.hosts.degrade(name, SERVER, line)

    return act


def _tampering(scene: Scene) -> None:
    """Each damaged packet costs a connection, and what was on its way."""
    for name in CLIENT_HOSTS:
        scene.federation.hosts.degrade(name, SERVER, Line(0.01, tamper=0.001))
    scene.federation.hosts.degrade(KEY_HOLDER, SERVER, Line(0.01, tamper=0.0002))


# A client's line that is cut amid its upload

_VICTIM, _SECOND, _THIRD, _FOURTH = CLIENT_HOSTS


def _amid_upload(scene: Scene, faults: dict[str, Callable[[], None]], chunks: float = 1.5) -> None:
    """Do this to each of these clients once so many of its chunks have arrived."""
    for client in faults:
        scene.slow(client, SERVER)
    lines = [(client, SERVER) for client in faults]
    scene.arrive(chunks * CHUNK_BYTES, *lines, then=lambda client: faults[client]())


def _resume(scene: Scene, *clients: str, stored: int = 1) -> None:
    """Heal; the chunks of these clients that are stored are not sent again."""
    before = {client: scene.carried(client, SERVER) for client in clients}
    scene.heal(*((client, SERVER) for client in clients))
    federation = scene.federation
    federation.wait("the task ends", lambda: federation.finished(scene.task), _LIMIT_S)
    missing = plan().payload_bytes - stored * CHUNK_BYTES
    for client in clients:
        sent = scene.carried(client, SERVER) - before[client]
        scene.outcome.figures |= {"sent_after_bytes": sent, "missing_bytes": missing}
        if sent > missing + CHUNK_BYTES / 2:
            scene.outcome.violations.append(
                f"{client} sent {sent} bytes after it was back; {missing} were missing"
            )


def _client_cut(seconds: float, how: Cut = Cut.SILENT, *, answers_only: bool = False) -> Act:
    def act(scene: Scene) -> None:
        _amid_upload(scene, {_VICTIM: _cutting(scene, _VICTIM, how, answers_only=answers_only)})
        time.sleep(seconds)
        _resume(scene, _VICTIM)

    return act


def _cutting(
    scene: Scene, client: str, how: Cut = Cut.SILENT, *, answers_only: bool = False
) -> Callable[[], None]:
    return lambda: scene.federation.hosts.cut(client, SERVER, how, answers_only=answers_only)


def _roaming(scene: Scene) -> None:
    _amid_upload(scene, {_VICTIM: scene.federation.hosts[_VICTIM].move})
    _resume(scene, _VICTIM)


def _each_in_its_way(scene: Scene) -> None:
    """One roams, one is refused, one gets no answers, and one a proxy without a server."""
    _amid_upload(
        scene,
        {
            _VICTIM: scene.federation.hosts[_VICTIM].move,
            _SECOND: _cutting(scene, _SECOND, Cut.REFUSED),
            _THIRD: _cutting(scene, _THIRD, answers_only=True),
            _FOURTH: _cutting(scene, _FOURTH, Cut.HUNG_UP),
        },
    )
    time.sleep(5.0)
    _resume(scene, *CLIENT_HOSTS)


def _flapping(scene: Scene) -> None:
    _amid_upload(scene, {_VICTIM: lambda: _flap(scene, _VICTIM)}, chunks=0.5)
    _resume(scene, _VICTIM, stored=0)


def _flap(scene: Scene, name: str) -> None:
    for _ in range(4):
        scene.federation.hosts.cut(name, SERVER, Cut.REFUSED)
        time.sleep(1.5)
        scene.federation.hosts.heal(name, SERVER)
        time.sleep(1.5)


def _lost_client(scene: Scene) -> None:
    """Away until the round is over, and back for the next."""
    _amid_upload(scene, {_VICTIM: _cutting(scene, _VICTIM)}, chunks=0.5)
    scene.federation.wait(
        "the round ends without it", lambda: len(scene.federation.task(scene.task).rounds) > 1
    )
    scene.heal((_VICTIM, SERVER))


# The key holder, cut off from the server amid what it does


_TO_KEY_HOLDER = (SERVER, KEY_HOLDER)


def _opening(seconds: float, how: Cut) -> tuple[Act, Act]:
    def before(scene: Scene) -> None:
        scene.federation.hosts.cut(SERVER, KEY_HOLDER, how)

    def act(scene: Scene) -> None:
        time.sleep(seconds)
        # What opens a round is small; what follows on it is not.
        scene.heal((_SECOND, SERVER))

    return before, act


def _slow_key_holder(scene: Scene) -> None:
    scene.slow(SERVER, KEY_HOLDER)


def _judging(seconds: float, how: Cut) -> Act:
    def act(scene: Scene) -> None:
        scene.reaches(round_pb2.ROUND_STATE_CHECKING)
        scene.arrive(300_000, _TO_KEY_HOLDER)
        _cut_for(scene, seconds, how)

    return act


def _releasing(seconds: float, how: Cut) -> Act:
    """Amid the sum itself, which follows on the low bits of it."""

    def act(scene: Scene) -> None:
        scene.reaches(round_pb2.ROUND_STATE_RELEASING)
        scene.arrive(4 * 4096 * plan().sum_blocks + 150_000, _TO_KEY_HOLDER)
        _cut_for(scene, seconds, how)

    return act


def _answering(seconds: float) -> Act:
    """While the released sums are on their way back; what the server says still arrives."""

    def act(scene: Scene) -> None:
        scene.reaches(round_pb2.ROUND_STATE_RELEASING)
        scene.arrive(1_000_000, (KEY_HOLDER, SERVER))
        _cut_for(scene, seconds, Cut.SILENT, answers_only=True)

    return act


def _twice(scene: Scene) -> None:
    _judging(3.0, Cut.REFUSED)(scene)
    _slow_key_holder(scene)
    _answering(3.0)(scene)


def _cut_for(scene: Scene, seconds: float, how: Cut, *, answers_only: bool = False) -> None:
    scene.federation.hosts.cut(SERVER, KEY_HOLDER, how, answers_only=answers_only)
    time.sleep(seconds)
    scene.heal((KEY_HOLDER, SERVER) if answers_only else _TO_KEY_HOLDER)


def _flapping_key_holder(scene: Scene) -> None:
    scene.reaches(round_pb2.ROUND_STATE_RELEASING)
    scene.arrive(4 * 4096 * plan().sum_blocks + 150_000, _TO_KEY_HOLDER)
    _flap(scene, KEY_HOLDER)
    # The round may be done by now: no line was slow any more between two cuts.
    scene.healed_at = time.monotonic()
    scene.federation.hosts.clear()


def _key_holder(name: str, fault: str, act: Act) -> Scenario:
    return Scenario(name, fault, act, before=_slow_key_holder)


def _unopened(name: str, fault: str, seconds: float, how: Cut) -> Scenario:
    before, act = _opening(seconds, how)
    return Scenario(name, fault, act, before=before)


_ROUGH = Line(delay_s=0.05, jitter_s=0.02, loss=0.01, duplicate=0.05, reorder=0.02)

SCENARIOS = (
    Scenario("clear", "nothing", rounds=2),
    Scenario("late", "200 ± 100 ms each way", before=_bad(Line(0.2, 0.1)), rounds=2),
    Scenario("loss 5", "5 % of packets lost", before=_bad(Line(0.02, loss=0.05)), rounds=2),
    Scenario("loss 20", "20 % of packets lost", before=_bad(Line(0.02, loss=0.2)), rounds=2),
    Scenario(
        "disorder",
        "10 % of packets come twice, 25 % overtake others",
        before=_bad(Line(0.03, duplicate=0.1, reorder=0.25)),
        rounds=2,
    ),
    Scenario(
        "rough", "50 ± 20 ms each way, 1 % lost, 5 % twice, 2 % overtake", before=_bad(_ROUGH)
    ),
    Scenario("damage", "5 % of packets damaged; TCP sees it", before=_bad(Line(0.01, damage=0.05))),
    Scenario(
        "tampering",
        "one packet in 1000 (key holder: 5000) damaged so that TCP does not see it",
        before=_tampering,
    ),
    Scenario("narrow", "1 Mbit/s each way", before=_bad(Line(0.02, bytes_per_s=125_000))),
    Scenario("short packets", "at most 576 bytes a packet", before=_bad(Line(mtu=576)), rounds=2),
    Scenario("client silent 10", "client: amid its upload, 10 s of silence", _client_cut(10)),
    Scenario("client silent 40", "client: amid its upload, 40 s of silence", _client_cut(40)),
    Scenario("client silent 90", "client: amid its upload, 90 s of silence", _client_cut(90)),
    Scenario(
        "client refused", "client: amid its upload, refused for 10 s", _client_cut(10, Cut.REFUSED)
    ),
    Scenario(
        "client hung up",
        "client: amid its upload, connections end at the first word for 10 s",
        _client_cut(10, Cut.HUNG_UP),
    ),
    Scenario(
        "client unanswered",
        "client: amid its upload, answers lost for 10 s",
        _client_cut(10, answers_only=True),
    ),
    Scenario("client roams", "client: another address amid its upload", _roaming),
    Scenario(
        "four clients",
        "amid their uploads, for 5 s: one roams, one is refused, one unanswered, one hung up on",
        _each_in_its_way,
    ),
    Scenario("client flaps", "client: amid its upload, refused 4 times for 1.5 s", _flapping),
    Scenario(
        "client lost",
        "client: silent until its round is over",
        _lost_client,
        rounds=2,
        deadline_s=30.0,
        contributors=(_EVERYBODY[1:], _EVERYBODY),
    ),
    _unopened("opening silent", "key holder: opening a round, 30 s of silence", 30, Cut.SILENT),
    _unopened("opening refused", "key holder: opening a round, refused for 10 s", 10, Cut.REFUSED),
    _key_holder(
        "judging silent", "key holder: amid judging, 30 s of silence", _judging(30, Cut.SILENT)
    ),
    _key_holder(
        "judging refused", "key holder: amid judging, refused for 10 s", _judging(10, Cut.REFUSED)
    ),
    _key_holder(
        "judging silent 240",
        "key holder: amid judging, 240 s of silence",
        _judging(240, Cut.SILENT),
    ),
    _key_holder(
        "releasing silent", "key holder: amid the sum, 30 s of silence", _releasing(30, Cut.SILENT)
    ),
    _key_holder(
        "releasing refused",
        "key holder: amid the sum, refused for 5 s",
        _releasing(5, Cut.REFUSED),
    ),
    _key_holder("answer lost", "key holder: amid its answer, answers lost for 8 s", _answering(8)),
    _key_holder(
        "answer lost 30", "key holder: amid its answer, answers lost for 30 s", _answering(30)
    ),
    _key_holder(
        "judging and answer",
        "key holder: amid judging refused, amid its answer unanswered, for 3 s each",
        _twice,
    ),
    _key_holder(
        "releasing flaps",
        "key holder: amid the sum, refused 4 times for 1.5 s",
        _flapping_key_holder,
    ),
)
"""In the order of the table."""
