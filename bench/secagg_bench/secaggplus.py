"""What a round costs here, and with the SecAgg+ that comes with Flower: same updates, same cohort.

Theirs runs as it is: `SecAggPlusWorkflow` sends its four stages to `secaggplus_mod`, with what lies
between them, sending and waiting, left out of the clock. Ours is what an embedded round does:
quantise, encrypt, serialise; parse, validate, add; admit, open. Each upload is measured as the
message that carries it. All of it on one core, in interleaved rounds, once with everybody and once
with a tenth of the clients gone when vectors are due; medians, and medians of the rounds' ratios.

Both clip at 1 and round at random. SecAgg+ takes its own defaults, 22 bits in 32; how many bits do
not change its bytes or times. Its strategy does nothing here, and no model is sent on either side.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from secagg.aggregator import Aggregator
from secagg.challenger import Challenger
from secagg.context import RoundContext
from secagg.parameters import NormCheck, Plan
from secagg.planner import plan_tensors
from secagg.receipts import NO_COMMITMENT, SigningKey
from secagg.residues import widen
from secagg.sampling import Stream
from secagg.sketches import Sketch
from secagg.upload import Upload
from secagg.wire.codec import upload_from_bytes, upload_to_bytes
from secagg_bench.one_core import in_child, machine, pin

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.common import FitRes

__all__ = ["app", "lost_rounds", "shares_for"]

_SIZES = [10_000, 100_000, 1_000_000]
_COHORTS = [20, 100]
_DROPPED = 0.1
_NORM = 0.9  # of the measured update; the clip norm is 1
_LARGEST_ERROR = 0.02  # of a mean; more is a mistake in this benchmark
_DRAWS = 20_000
# Weights are equal, and the largest there are, which SecAgg+ rounds by nothing. Ranges are its own
# defaults but for what it clips at: no value of an update of norm 1 is beyond 1.
_SECAGGPLUS: dict[str, Any] = {
    "max_weight": 1.0,
    "clipping_range": 1.0,
    "quantization_range": 1 << 22,
    "modulus_range": 1 << 32,
}

app = typer.Typer(help=__doc__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class System:
    """One way to sum the same updates.

    Attributes:
        name: what is particular about it.
        shares, threshold: of a secret of SecAgg+, and how many open it; 0 for ours.
        plan_digest: of our plan; empty for SecAgg+.
        client_ms: of one client, all stages of a round.
        upload_bytes: by one client in all stages.
        round_trips: of a client that takes part in a round.
        server_ms: all that the server computes in a round.
        key_holder_ms: all that the key holder computes in a round; SecAgg+ has none.
        server_dropped_ms, key_holder_dropped_ms: the same where a tenth of the clients is gone.
        lost: share of rounds that end without a sum when a random tenth of the clients is gone.
        error: root mean square error of the mean, of its root mean square: what rounding and, with
            ours, saturation leave.
        client_ratio, upload_ratio, server_ratio, server_dropped_ratio: over our first system;
            the key holder counts as server.
    """

    name: str
    shares: int
    threshold: int
    plan_digest: str
    client_ms: float
    upload_bytes: float
    round_trips: int
    server_ms: float
    key_holder_ms: float
    server_dropped_ms: float
    key_holder_dropped_ms: float
    lost: float
    error: float
    client_ratio: float
    upload_ratio: float
    server_ratio: float
    server_dropped_ratio: float


class _Clock:
    """Adds up the processor time of one party's calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, work: Callable[..., _T], *arguments: object) -> _T:
        started = time.process_time()
        try:
            return work(*arguments)
        finally:
            self.seconds += time.process_time() - started


@dataclass(frozen=True, slots=True)
class _Round:
    """What one round took, in seconds and bytes, and how far off its mean was."""

    clients: Sequence[float]
    uploads: Sequence[int]
    server: float
    key_holder: float
    round_trips: int
    error: float

    @property
    def client(self) -> float:
        return median(self.clients)

    @property
    def upload(self) -> float:
        return median(self.uploads)

    @property
    def servers(self) -> float:
        return self.server + self.key_holder


def shares_for(clients: int) -> int:
    """An odd number of shares that grows with the logarithm of the cohort, as SecAgg+ proposes.

    Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", let a
    client have O(log n) neighbours; here it is ceil(log2 n) on each side, and the client itself.
    """
    return 2 * math.ceil(math.log2(clients)) + 1


def lost_rounds(clients: int, dropped: int, shares: int, threshold: int) -> float:
    """Share of rounds without a sum when this many clients, drawn at random, are gone.

    Clients stand in a ring. A round ends where a client and its neighbours, ``shares`` in a row,
    have fewer than ``threshold`` left (`SecAggPlusWorkflow._check_threshold`).
    """
    draws = np.random.default_rng(1).permuted(
        np.tile(np.arange(clients) >= dropped, (_DRAWS, 1)), axis=1
    )
    half = shares // 2
    left = sum(
        (np.roll(draws, offset, axis=1).astype(np.int64) for offset in range(-half, half + 1)),
        start=np.zeros(draws.shape, dtype=np.int64),
    )
    return float((left.min(axis=1) < threshold).mean())


def _update(parameters: int) -> NDArray[np.float32]:
    drawn = Stream.derive("secaggplus benchmark", parameters).uint32(parameters) * 2.0**-31 - 1.0
    update: NDArray[np.float32] = (drawn * _NORM / np.linalg.norm(drawn)).astype(np.float32)
    return update


def _error(mean: NDArray[Any], update: NDArray[np.float32]) -> float:
    """How far off a mean of equal updates is.

    Raises:
        RuntimeError: so far that it is no mean of them.
    """
    error = float(np.linalg.norm(mean - update) / np.linalg.norm(update))
    if not error < _LARGEST_ERROR:
        raise RuntimeError(f"expected the mean of the updates; got one that is off by {error:.1%}")
    return error


class _Ours:
    """Rounds of this library, all parties in one process."""

    shares = threshold = 0

    def __init__(
        self, update: NDArray[np.float32], clients: int, bits: int, check: NormCheck | None
    ) -> None:
        self.name = f"{bits} bits" + (", norm check" if check else "")
        self.plan: Plan = plan_tensors(
            update.size, max_clients=clients, clip=1.0, bits=bits, norm_check=check
        )
        self.plan_digest = self.plan.digest.hex()
        self._update, self._number = update, 0
        # Clients enrol once and keep their keys; a round has none but the key holder's.
        self._identities = [SigningKey.generate() for _ in range(clients)]

    def round(self, dropped: int) -> _Round:
        from secagg.keyholder import KeyHolder

        server_clock, holder_clock, seconds, sizes = _Clock(), _Clock(), [], []
        # Another round has another rotation: no median rests on how the first one comes out.
        self._number += 1
        holder = holder_clock(partial(KeyHolder, self.plan, round_number=self._number))
        context, checked = holder.context, self.plan.norm_check is not None
        challenger, server = Challenger(context), Aggregator(context)
        stored: list[Upload] = []
        for identity in self._identities[dropped:]:
            commitment = challenger.commitment(identity.public) if checked else NO_COMMITMENT
            client_clock = _Clock()
            sent = client_clock(self._encrypted, context, identity, commitment)
            seconds.append(client_clock.seconds)
            sizes.append(_message_bytes(_carrying(sent)))
            upload = server_clock(upload_from_bytes, sent, self.plan)
            holder_clock(holder.admit, upload.admission)
            # What is checked is stored, shown, and added once it is accepted.
            if checked:
                stored.append(upload)
                sketch = server_clock(self._sketched, challenger, upload)
                holder_clock(holder.submit_sketch, sketch)
            else:
                server_clock(server.add, upload)
        if checked and not all(each.accepted for each in holder_clock(holder.verdicts)):
            raise RuntimeError("expected honest updates to pass; one was refused")
        for upload in stored:
            server_clock(server.add, upload)
        total = server_clock(server.aggregate)
        names = [each.receipt.upload_digest for each in total.manifest]
        release = holder_clock(holder.release_admitted, names, total.residues)
        mean = server_clock(release.mean)["vector"]
        return _Round(
            seconds,
            sizes,
            server_clock.seconds,
            holder_clock.seconds,
            round_trips=1,
            error=_error(mean, self._update),
        )

    def lost(self, dropped: int) -> float:
        """None, as long as the plan's minimum is left."""
        return float(len(self._identities) - dropped < self.plan.min_clients)

    def _encrypted(self, context: RoundContext, identity: SigningKey, commitment: bytes) -> bytes:
        from secagg.encryptor import Encryptor

        upload = Encryptor(context, identity, commitment=commitment).encrypt(self._update)
        return upload_to_bytes(upload)

    def _sketched(self, challenger: Challenger, upload: Upload) -> Sketch:
        residues = widen(upload.payload, self.plan.blocks)  # as stored: adding it validates it
        return challenger.sketch_validated(upload.admission.receipt, [residues])


def _carrying(upload: bytes) -> RecordDict:
    """What carries an upload of ours through Flower."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({"secagg": ConfigRecord({"upload": upload})})


def _message_bytes(content: RecordDict) -> int:
    from flwr.common.serde import recorddict_to_proto

    return int(recorddict_to_proto(content).ByteSize())


class _Client:
    """A node of SecAgg+, and what it has cost so far."""

    def __init__(self, name: int, trained: FitRes) -> None:
        from flwr.app import Context, RecordDict

        self._context = Context(1, name, {}, RecordDict(), {})
        self._trained = trained
        self._clock, self._training = _Clock(), _Clock()
        self.bytes = 0

    @property
    def seconds(self) -> float:
        """All that the protocol computed here, without what stands for training."""
        return self._clock.seconds - self._training.seconds

    def answer(self, message: Message) -> Message:
        from flwr.client.mod import secaggplus_mod

        def train(message: Message, _: object) -> Message:
            return self._training(self._trains, message)

        reply = self._clock(secaggplus_mod, message, self._context, train)
        self.bytes += _message_bytes(reply.content)
        return reply

    def _trains(self, message: Message) -> Message:
        from flwr.app import Message
        from flwr.compat.common.recorddict_compat import fitres_to_recorddict

        return Message(fitres_to_recorddict(self._trained, keep_input=True), reply_to=message)


class _Network:
    """Stands in for Flower's: hands every message to its client, at once, and takes no time."""

    def __init__(self, clients: dict[int, _Client], dropped: int, threshold: int) -> None:
        self._clients, self._dropped, self._threshold = clients, dropped, threshold
        self._neighbours: dict[int, set[int]] = {}
        self.round_trips, self.clock = 0, _Clock()
        self.gone: set[int] = set()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Their `Grid.send_and_receive`."""
        self.round_trips += 1
        return self.clock(self._answers, list(messages))

    def _answers(self, messages: list[Message]) -> list[Message]:
        self._note(messages)
        return [self._delivered(message) for message in messages]

    def _note(self, messages: list[Message]) -> None:
        """Learn who has which neighbours; let clients go when they are due to send vectors."""
        from flwr.common.secure_aggregation.secaggplus_constants import (
            RECORD_KEY_CONFIGS,
            Key,
            Stage,
        )

        for message in messages:
            config = message.content.config_records[RECORD_KEY_CONFIGS]
            if config[Key.STAGE] == Stage.SHARE_KEYS:
                near = {int(name) for name in config if name != Key.STAGE}
                self._neighbours[message.metadata.dst_node_id] = near
            elif config[Key.STAGE] == Stage.COLLECT_MASKED_VECTORS:
                self._let_go()
                return

    def _let_go(self) -> None:
        """Clients whose absence the round survives, so that there is a round to measure."""
        for name in self._neighbours:
            if len(self.gone) == self._dropped:
                return
            gone = self.gone | {name}
            if all(len(near - gone) >= self._threshold for near in self._neighbours.values()):
                self.gone = gone
        if len(self.gone) < self._dropped:
            raise RuntimeError(f"expected {self._dropped} clients that can be missed; too many")

    def _delivered(self, message: Message) -> Message:
        from flwr.app import Error, Message
        from flwr.common.serde import message_from_proto, message_to_proto

        name = message.metadata.dst_node_id
        if name in self.gone:
            return Message(Error(0, "gone"), reply_to=message)
        # A copy, as it would come from the network: their workflow shares contents among clients.
        return self._clients[name].answer(message_from_proto(message_to_proto(message)))


class _Theirs:
    """Rounds of Flower's SecAgg+, all parties in one process."""

    plan_digest = ""

    def __init__(self, update: NDArray[np.float32], clients: int, shares: int) -> None:
        from flwr.common import Code, FitRes, Status, ndarrays_to_parameters

        self.name = f"SecAgg+, {shares} shares"
        self.shares, self.threshold = shares, shares // 2 + 1
        self._update, self._clients = update, clients
        parameters = ndarrays_to_parameters([update])
        self._trained = FitRes(Status(Code.OK, ""), parameters, num_examples=1, metrics={})

    def round(self, dropped: int) -> _Round:
        from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
        from flwr.server.compat.legacy_context import LegacyContext
        from flwr.server.workflow import SecAggPlusWorkflow
        from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        clients = {name: _Client(name, self._trained) for name in range(1, self._clients + 1)}
        network = _Network(clients, dropped, self.threshold)
        strategy = _Strategy(clients)
        state = RecordDict(
            {
                MAIN_CONFIGS_RECORD: ConfigRecord({Key.CURRENT_ROUND: 1}),
                MAIN_PARAMS_RECORD: ArrayRecord(),
            }
        )
        context = LegacyContext(Context(1, 0, {}, state, {}), strategy=strategy)  # type: ignore[arg-type]
        workflow = SecAggPlusWorkflow(self.shares, self.threshold, **_SECAGGPLUS)
        clock = _Clock()
        clock(workflow, network, context)
        stayed = [each for name, each in clients.items() if name not in network.gone]
        return _Round(
            [each.seconds for each in stayed],
            [each.bytes for each in stayed],
            clock.seconds - network.clock.seconds,
            key_holder=0.0,
            round_trips=network.round_trips,
            error=_error(strategy.mean(), self._update),
        )

    def lost(self, dropped: int) -> float:
        return lost_rounds(self._clients, dropped, self.shares, self.threshold)


class _Strategy:
    """Asks all clients, sends no model, and takes the mean as it comes."""

    def __init__(self, names: Iterable[int]) -> None:
        self._names = list(names)
        self._results: list[tuple[Any, Any]] = []

    def configure_fit(self, *_: object) -> list[tuple[Any, Any]]:
        from flwr.common import FitIns, Parameters

        nothing = FitIns(Parameters([], ""), {})
        return [(SimpleNamespace(node_id=name), nothing) for name in self._names]

    def aggregate_fit(
        self, _: int, results: list[tuple[Any, Any]], failures: list[Any]
    ) -> tuple[None, dict[str, Any]]:
        self._results = results
        return None, {}

    def mean(self) -> NDArray[np.float64]:
        from flwr.common import parameters_to_ndarrays

        if not self._results:
            raise RuntimeError("expected SecAgg+ to end with a sum; it halted")
        (mean,) = parameters_to_ndarrays(self._results[0][1].parameters)
        return np.asarray(mean, dtype=np.float64)


def _measured(parameters: int, clients: int, rounds: int) -> dict[str, Any]:
    """All figures of one model and cohort, as they go into the results."""
    update, dropped = _update(parameters), round(clients * _DROPPED)
    systems: list[_Ours | _Theirs] = [
        _Ours(update, clients, 8, None),
        _Ours(update, clients, 16, None),
        _Ours(update, clients, 8, NormCheck()),
        _Theirs(update, clients, 3),
        _Theirs(update, clients, shares_for(clients)),
    ]
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # saying what happens is not its work
    _warm()
    taken = [[(each.round(0), each.round(dropped)) for each in systems] for _ in range(rounds)]
    pairs = list(zip(*taken, strict=True))
    return {
        "parameters": parameters,
        "clients": clients,
        "dropped": dropped,
        "systems": [
            asdict(_system(each, found, pairs[0], dropped))
            for each, found in zip(systems, pairs, strict=True)
        ],
    }


def _warm() -> None:
    """Load what is loaded late, and fill caches, with a small round of each kind."""
    small = _update(4096)
    for each in (_Ours(small, 5, 8, None), _Ours(small, 5, 8, NormCheck()), _Theirs(small, 5, 3)):
        each.round(0)


_Pairs = Sequence[tuple[_Round, _Round]]


def _system(system: _Ours | _Theirs, found: _Pairs, first: _Pairs, dropped: int) -> System:
    whole, fewer = zip(*found, strict=True)

    def ms(rounds: Sequence[_Round], part: Callable[[_Round], float]) -> float:
        return 1000 * median(part(each) for each in rounds)

    def ratio(which: int, part: Callable[[_Round], float]) -> float:
        return median(
            part(mine[which]) / part(ours[which]) for mine, ours in zip(found, first, strict=True)
        )

    return System(
        system.name,
        system.shares,
        system.threshold,
        system.plan_digest,
        client_ms=ms(whole, lambda each: each.client),
        upload_bytes=median(size for each in whole for size in each.uploads),
        round_trips=whole[0].round_trips,
        server_ms=ms(whole, lambda each: each.server),
        key_holder_ms=ms(whole, lambda each: each.key_holder),
        server_dropped_ms=ms(fewer, lambda each: each.server),
        key_holder_dropped_ms=ms(fewer, lambda each: each.key_holder),
        lost=system.lost(dropped),
        error=median(each.error for each in whole),
        client_ratio=ratio(0, lambda each: each.client),
        upload_ratio=ratio(0, lambda each: each.upload),
        server_ratio=ratio(0, lambda each: each.servers),
        server_dropped_ratio=ratio(1, lambda each: each.servers),
    )


@app.command("measure", hidden=True)
def _measure_command(parameters: int, clients: int, rounds: int) -> None:
    pin()
    sys.stdout.write(json.dumps(_measured(parameters, clients, rounds)))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    parameters: Annotated[list[int], typer.Option(min=1, help="model parameters")] = _SIZES,
    clients: Annotated[list[int], typer.Option(min=10, help="clients of a round")] = _COHORTS,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved repetitions")] = 3,
    output: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Measure a round against Flower's SecAgg+."""
    if context.invoked_subcommand is not None:
        return
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    wanted = list(product(parameters, clients))
    settings = [
        in_child("secagg_bench.secaggplus", "measure", *each, rounds)
        for each in track(wanted, "Measuring", console=Console(stderr=True))
    ]
    if output is not None:
        results = {
            "rounds": rounds,
            "machine": machine() | {"flwr": version("flwr")},
            "secaggplus": _SECAGGPLUS,
            "settings": settings,
        }
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for setting in settings:
        _show(setting, rounds)


def _show(setting: dict[str, Any], rounds: int) -> None:
    title = (
        f"{setting['parameters']:,} parameters, {setting['clients']} clients, one core, "
        f"median of {rounds} rounds"
    )
    head = ("", "client", "upload", "round trips", "server", "key holder", "a tenth gone", "lost")
    table = Table(*head, "error", title=title)
    for each in (System(**row) for row in setting["systems"]):
        table.add_row(
            each.name,
            f"{each.client_ms:.3g} ms ({each.client_ratio:.2g}x)",
            f"{each.upload_bytes / setting['parameters']:.3g} B ({each.upload_ratio:.2g}x)",
            str(each.round_trips),
            f"{each.server_ms:.3g} ms ({each.server_ratio:.2g}x)",
            f"{each.key_holder_ms:.3g} ms",
            f"{each.server_dropped_ms + each.key_holder_dropped_ms:.3g} ms "
            f"({each.server_dropped_ratio:.2g}x)",
            f"{each.lost:.0%}",
            f"{each.error:.2g}",
        )
    Console().print(table)


if __name__ == "__main__":
    app()
