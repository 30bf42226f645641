"""Peers: each reaches the mean of the same updates, and the worker says what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.errors import UnavailableError
from secagg.planner import plan_tensors
from secagg_bench.peers import driving, environments
from secagg_bench.peers.driving import Opened, Peer, Step, Upload
from secagg_bench.peers.systems.paillier import Packing
from secagg_bench.peers.worker import NORM, Clock, Times, Worker, update_of

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "bench" / "secagg_bench" / "peers" / "worker.py"
SHAPES: dict[str, tuple[int, ...]] = {"embedding": (100, 45), "bias": (7,), "scale": ()}
SIZE = 100 * 45 + 7 + 1
CLIENTS = 3
VECTORS = 2  # of 4096 values

CHATTY = """
import os, sys

class System:
    DISTRIBUTIONS = ("numpy",)

    def __init__(self, shapes, clients, clock, *, dies=False):
        self._dies = dies
        print("hello", flush=True)
        os.write(1, b'{"cpu_s": 1}\\n')

    def round(self):
        print("another round")
        if self._dies:
            os.write(2, b"out of luck\\n")
            os._exit(3)
"""

HUNGRY = """
import numpy as np

class System:
    DISTRIBUTIONS = ("numpy",)
    rounds = 0

    def __init__(self, shapes, clients, clock):
        pass

    def round(self):
        self.rounds += 1

    def client(self, number, update):
        np.ones(25_000_000 if self.rounds == 1 else 1)
        return [b""]
"""


def whole_round(peer: Peer, clients: int = CLIENTS) -> tuple[Upload, Step, Opened]:
    """A round of everybody; the figures of the last client."""
    peer.round()
    for number in range(clients):
        made = peer.client(number)
        added = peer.add(number)
    return made, added, peer.open()


def talk(system: str, *commands: object) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and answers of a worker that was told these lines."""
    done = subprocess.run(
        [sys.executable, str(WORKER), system],
        input="".join(json.dumps(each) + "\n" for each in commands),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


SET_UP = {"do": "set up", "shapes": SHAPES, "clients": CLIENTS, "seed": 1, "options": {}}


# --- updates --------------------------------------------------------------------------------


def test_updates_have_the_shapes_the_norm_and_nothing_in_common() -> None:
    first, second = update_of(1, 0, SHAPES), update_of(1, 1, SHAPES)
    assert {name: each.shape for name, each in first.items()} == SHAPES
    assert all(each.dtype == np.float32 for each in first.values())
    flat = [np.concatenate([x.ravel() for x in each.values()]) for each in (first, second)]
    for each in flat:
        assert float(np.linalg.norm(each)) == pytest.approx(NORM, rel=1e-6)
    assert abs(float(flat[0] @ flat[1])) < 0.1
    again, other = update_of(1, 0, SHAPES), update_of(2, 0, SHAPES)
    assert (again["embedding"] == first["embedding"]).all()
    assert (other["embedding"] != first["embedding"]).any()


# --- systems --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "options", "largest_error"),
    [
        ("plaintext", {}, 1e-8),
        # 2**40 and 2**52 are the scales; noise is some hundreds of units, of one client's value.
        ("tenseal_vector", {}, 1e-7),
        ("tenseal_vector", {"use": "fedml_he"}, 1e-10),
        ("secaggplus", {}, 2 * 2.0 / (1 << 22)),
        # Values are of standard deviation 0.013; eight bits leave some percent of that.
        ("ours", {}, 2e-3),
        ("ours", {"norm_check": True, "max_clients": 10}, 2e-3),
    ],
)
def test_every_system_reaches_the_mean_round_after_round(
    system: str, options: dict[str, Any], largest_error: float
) -> None:
    with Peer(system) as peer:
        started = peer.set_up(SHAPES, clients=CLIENTS, options=options)
        assert started.cpu_s > 0
        assert started.versions["system"].partition(" ")[2][0].isdigit()
        for clients in (CLIENTS, CLIENTS):
            made, added, opened = whole_round(peer, clients)
            assert 0 <= peer.error() < largest_error
            assert made.bytes >= SIZE
            for step in (made, added, opened, opened.hand_over):
                assert step.wall_s >= 0
                assert step.cpu_s >= 0
                # Earlier work counts as well; clocks are read at slightly different times.
                assert sum(step.parts.values()) <= step.cpu_s + 1e-3
        assert peer.peak_bytes() > 10_000_000


def test_bytes_are_those_that_travel() -> None:
    plan = plan_tensors(SHAPES, max_clients=CLIENTS, clip=1.0, bits=8)
    # Two polynomials over the moduli of data; the last one of TenSEAL's is for keys.
    common, fedml = 2 * 8192 * (60 + 40) // 8, 2 * 8192 * (60 + 40 + 40) // 8
    bounds: list[tuple[str, dict[str, Any], float, float]] = [
        ("plaintext", {}, 4 * SIZE, 4 * SIZE),
        ("tenseal_vector", {}, VECTORS * common, VECTORS * common * 1.25),
        # The embedding takes two ciphertexts, the others one each.
        ("tenseal_vector", {"use": "fedml_he"}, 4 * fedml, 4 * fedml * 1.25),
        # 32 of the 64 bits that it sends for a value are zeros.
        ("secaggplus", {}, 8 * SIZE, 8 * SIZE + 4000),
        ("ours", {}, plan.payload_bytes + 1000, plan.payload_bytes + 2000),
    ]
    for system, options, least, most in bounds:
        with Peer(system) as peer:
            peer.set_up(SHAPES, clients=CLIENTS, options=options)
            made, _, opened = whole_round(peer)
        assert least <= made.bytes <= most, system
        if system == "ours":
            admissions = CLIENTS * (made.bytes - plan.payload_bytes)
            assert plan.payload_bytes < opened.bytes < plan.payload_bytes + admissions
        elif system == "secaggplus":
            assert opened.bytes == 0
        else:
            assert least <= opened.bytes <= most, system


def test_our_sum_is_exact_but_for_the_bits_of_its_values() -> None:
    errors = []
    for bits in (8, 16):
        with Peer("ours") as peer:
            peer.set_up(SHAPES, clients=CLIENTS, options={"bits": bits})
            whole_round(peer)
            errors.append(peer.error())
    assert errors[1] < errors[0] / 100  # 256 times finer


def test_noise_is_added_where_it_is_asked_for() -> None:
    """With a multiplier of 1, the mean of three has noise of 1/3 on each value, or more."""
    uploads = {}
    for privacy in ("", "release", "distributed"):
        with Peer("ours") as peer:
            peer.set_up(SHAPES, clients=CLIENTS, options={"privacy": privacy, "max_clients": 1000})
            made, _, _ = whole_round(peer)
            error, uploads[privacy] = peer.error(), made.bytes
        # The largest of some thousand: three standard deviations at the least, and never ten.
        assert (1.0 < error < 3.4) if privacy else (error < 2e-3)
    assert uploads["release"] == uploads[""]
    assert uploads["distributed"] > 1.9 * uploads[""], "noise has ciphertexts of its own"


def test_what_is_left_out_and_what_is_counted_is_said() -> None:
    with Peer("ours") as peer:
        peer.set_up(SHAPES, clients=CLIENTS, options={"norm_check": True})
        _, added, opened = whole_round(peer)
    assert set(added.parts) == {"parse", "sketch"}
    assert set(added.beside) == {"unauthenticated"}
    assert 0 < added.beside["unauthenticated"] < added.cpu_s
    assert set(opened.parts) == {"admit", "judge", "release"}
    with Peer("secaggplus") as peer:
        peer.set_up(SHAPES, clients=CLIENTS)
        made, _, opened = whole_round(peer)
    assert 0 < made.parts["keys_and_shares"] < made.cpu_s
    assert opened.beside["clients"] > 0


def test_a_client_of_secaggplus_that_is_not_added_has_dropped_out() -> None:
    with Peer("secaggplus") as peer:
        peer.set_up(SHAPES, clients=5)
        whole_round(peer, clients=4)
        assert peer.error() < 2 * 2.0 / (1 << 22)


def test_fewer_shares_are_less_to_send_and_fewer_clients_that_may_leave() -> None:
    uploads = []
    for shares, enough in ((3, 5), (5, 4)):
        with Peer("secaggplus") as peer:
            peer.set_up(SHAPES, clients=6, options={"shares": shares})
            made, _, _ = whole_round(peer, clients=enough)
            assert peer.error() < 2 * 2.0 / (1 << 22)
            # Of a client and its neighbours, most have to be left.
            with pytest.raises(UnavailableError, match=r"smaller than threshold|too few"):
                whole_round(peer, clients=2)
        uploads.append(made.bytes)
    assert uploads[0] < uploads[1]


# --- the clock ------------------------------------------------------------------------------


def spin(seconds: float) -> None:
    ends = Times.now().cpu_s + seconds
    while Times.now().cpu_s < ends:
        pass


def test_the_clock_counts_what_is_to_count() -> None:
    clock = Clock()

    def work() -> str:
        with clock.part("first"):
            spin(0.02)
        with clock.beside("aside"):
            spin(0.05)
        clock.earlier("before", Times(1.0, 2.0))
        return "done"

    done, times = clock.step(work)
    assert done == "done"
    assert 1.02 <= times["cpu_s"] < 1.05
    assert times["wall_s"] >= 2.02
    assert 0.02 <= times["parts"]["first"] < 0.04
    assert times["parts"]["before"] == 1.0
    assert times["beside"]["aside"] >= 0.05
    _, again = clock.step(lambda: None)
    assert (again["parts"], again["beside"]) == ({}, {})
    assert again["cpu_s"] < 0.01


# --- the worker -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("commands", "kind", "says"),
    [
        ([{"do": "dance"}], "ValueError", "expected a command of set up, round"),
        ([{}], "ValueError", "expected a command"),
        ([{"do": "round"}], "ValueError", "expected to be set up first"),
        ([SET_UP, {"do": "client", "number": CLIENTS}], "ValueError", "below 3; got 3"),
        ([SET_UP, {"do": "client", "number": -1}], "ValueError", "below 3; got -1"),
        ([SET_UP, {"do": "client"}], "TypeError", "number"),
        ([SET_UP, {"do": "round"}, {"do": "add", "number": 0}], "ValueError", "client 0 made"),
        ([SET_UP, {"do": "round"}, {"do": "open"}], "ValueError", "nothing was added"),
        ([SET_UP, {"do": "round"}, {"do": "error"}], "ValueError", "that was opened"),
        ([SET_UP | {"options": {"bits": 8}}], "TypeError", "bits"),
        (["round"], "ValueError", ""),
    ],
)
def test_a_bad_command_is_answered_and_ends_the_worker(
    commands: list[object], kind: str, says: str
) -> None:
    status, answers = talk("plaintext", *commands, {"do": "memory"})
    assert status == 1
    assert len(answers) == len(commands)  # nothing after it
    assert answers[-1]["error_kind"] == kind
    assert says in answers[-1]["message"]
    assert all("error_kind" not in each for each in answers[:-1])


def test_a_round_may_bring_other_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    # The worker's own way to its systems, for this process.
    monkeypatch.syspath_prepend(str(Path(driving.__file__).parent))
    worker, seen = Worker("plaintext"), []
    common = {"do": "set up", "shapes": SHAPES, "clients": CLIENTS, "options": {}}
    worker.answer(common | {"seed": 1})
    for seed in (None, 2, None):
        worker.answer({"do": "round", "seed": seed})
        worker.answer({"do": "client", "number": 0})
        seen.append(b"".join(worker._made[0]))
    wanted = [
        b"".join(each.tobytes() for each in update_of(seed, 0, SHAPES).values())
        for seed in (1, 2, 2)
    ]
    assert seen == wanted


def test_an_upload_counts_once_a_round() -> None:
    client, add = {"do": "client", "number": 0}, {"do": "add", "number": 0}
    status, answers = talk("plaintext", SET_UP, {"do": "round"}, client, add, client, add)
    assert (status, answers[-1]["error_kind"]) == (1, "ValueError")
    status, answers = talk("plaintext", SET_UP, {"do": "round"}, client, {"do": "round"}, add)
    assert (status, answers[-1]["error_kind"]) == (1, "ValueError")


def test_the_end_of_the_input_ends_the_worker() -> None:
    assert talk("plaintext") == (0, [])
    status, answers = talk("plaintext", SET_UP)
    assert status == 0
    assert {"cpu_s", "wall_s", "parts", "beside", "versions"} == set(answers[0])


# --- driving --------------------------------------------------------------------------------


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that prints, and may die; and one that takes memory in its first round."""
    (tmp_path / "systems").mkdir()
    for name, code in (("chatty", CHATTY), ("hungry", HUNGRY)):
        (tmp_path / "systems" / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(driving, "_WORKER", Path(shutil.copy(WORKER, tmp_path)))


@pytest.mark.usefixtures("toys")
def test_a_library_that_prints_does_not_disturb() -> None:
    with Peer("chatty") as peer:
        assert "numpy" in peer.set_up(SHAPES, clients=CLIENTS).versions
        assert peer.round().cpu_s < 1
        assert peer.round().parts == {}


@pytest.mark.usefixtures("toys")
def test_a_worker_that_dies_is_an_error_with_its_last_words() -> None:
    with Peer("chatty") as peer:
        peer.set_up(SHAPES, clients=CLIENTS, options={"dies": True})
        with pytest.raises(UnavailableError, match=r"(?s)'round'.*has ended.*out of luck$"):
            peer.round()
        with pytest.raises(UnavailableError, match="has ended"):  # and is not asked twice
            peer.peak_bytes()


@pytest.mark.usefixtures("toys")
def test_memory_is_that_of_the_steps_of_a_round() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("a process cannot begin to count anew here")
    peaks = []
    with Peer("hungry") as peer:
        peer.set_up({"w": (10_000_000,)}, clients=1)
        for _ in range(2):
            peer.round()
            peer.client(0)
            peaks.append(peer.peak_bytes())
    megabytes = [each / 1e6 for each in peaks]
    assert megabytes[0] > 240, "200 MB that were not kept, and an update"
    # Drawing an update takes 120 MB for a while, of which 40 are left.
    assert 40 < megabytes[1] < 110


def test_what_the_worker_says_went_wrong_is_passed_on() -> None:
    with (
        Peer("nothing_like_it") as peer,
        pytest.raises(UnavailableError, match=r"ValueError: expected one of the systems .*, ours"),
    ):
        peer.set_up(SHAPES, clients=CLIENTS)
    with Peer("_flat") as peer, pytest.raises(UnavailableError, match="one of the systems"):
        peer.set_up(SHAPES, clients=CLIENTS)
    with Peer("ours") as peer, pytest.raises(UnavailableError, match="PlanError: expected max_cl"):
        peer.set_up(SHAPES, clients=2)
    with pytest.raises(UnavailableError, match="with block"):
        Peer("plaintext").round()


def test_a_worker_stays_on_its_core() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("cores cannot be chosen here")
    core = min(os.sched_getaffinity(0))
    with Peer("plaintext", core=core) as peer:
        peer.set_up(SHAPES, clients=CLIENTS)
        process = peer._process
        assert process is not None
        assert os.sched_getaffinity(process.pid) == {core}
    assert process.returncode == 0


# --- environments ---------------------------------------------------------------------------


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "requirements"
    folder.mkdir()
    monkeypatch.setattr(environments, "_REQUIREMENTS", folder)
    return folder


def test_an_environment_is_made_when_what_goes_into_it_changes(
    requirements: Path, tmp_path: Path
) -> None:
    (requirements / "some.txt").write_text("# nothing\n", encoding="utf-8")
    python = environments.interpreter("some", tmp_path)
    assert python == tmp_path.resolve() / "some" / "bin" / "python"
    found = subprocess.run(
        [python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == tmp_path.resolve() / "some"
    mark = python.with_name("mark")
    mark.touch()
    assert environments.interpreter("some", tmp_path) == python
    assert mark.exists()
    (requirements / "some.txt").write_text("# nothing else\n", encoding="utf-8")
    environments.interpreter("some", tmp_path)
    assert not mark.exists()


def test_an_environment_that_cannot_be_made_says_so_each_time(
    requirements: Path, tmp_path: Path
) -> None:
    (requirements / "some.txt").write_text(str(tmp_path / "missing.whl"), encoding="utf-8")
    with pytest.raises(UnavailableError, match=r"what some needs.*pip did not succeed"):
        environments.interpreter("some", tmp_path)
    with (
        pytest.raises(UnavailableError, match="pip did not succeed"),
        Peer("some", folder=tmp_path),
    ):
        pass


def test_systems_without_requirements_run_here(tmp_path: Path) -> None:
    for system in ("ours", "plaintext", "secaggplus", "tenseal_vector"):
        assert environments.interpreter(system, tmp_path) == Path(sys.executable)
    assert list(tmp_path.iterdir()) == []


def test_requirements_are_pinned() -> None:
    files = sorted((WORKER.parent / "requirements").glob("*.txt"))
    assert [each.stem for each in files] == ["nvflare_he", "paillier"]
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        assert lines
        assert all(line.count("==") == 1 and " " not in line for line in lines)


# --- packing --------------------------------------------------------------------------------


@given(
    bits=st.integers(2, 16),
    clients=st.integers(1, 300),
    size=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    extreme=st.booleans(),
)
def test_sums_of_plaintexts_are_sums_of_values(
    bits: int, clients: int, size: int, seed: int, extreme: bool
) -> None:
    packing, most = Packing(bits, clients, 256), (1 << (bits - 1)) - 1
    random = np.random.default_rng(seed)
    values = random.integers(-most, most, (min(clients, 40), size), endpoint=True)
    if extreme:  # the largest sums that there can be, of both signs, side by side
        values = np.tile(np.where(np.arange(size) % 2, most, -most), (clients, 1))
    packed = [packing.pack(each) for each in values]
    sums = [sum(column) for column in zip(*packed, strict=True)]
    assert all(each < 1 << 256 for each in sums)
    assert (packing.unpack(sums, size) == values.sum(axis=0)).all()


def test_a_sum_that_leaves_its_field_is_noticed() -> None:
    packing = Packing(8, 4, 64)
    with pytest.raises(ValueError, match="overflowed"):
        packing.unpack([5 * each for each in packing.pack(np.array([127, 0]))], 2)
    with pytest.raises(ValueError, match="expected lanes"):
        Packing(16, 1000, 32)


# --- environments of their own --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("system", "options", "largest_error"),
    [
        ("nvflare_he", [{"ship_context": True}, {"ship_context": False}], 1e-6),
        ("paillier", [{}, {"key_bits": 3072, "max_clients": 1000}], 2e-3),
    ],
)
def test_systems_that_do_not_go_with_ours(
    system: str, options: list[Mapping[str, Any]], largest_error: float
) -> None:
    folder = ROOT / environments.FOLDER
    try:
        environments.interpreter(system, folder)
    except UnavailableError as error:
        pytest.skip(str(error))
    uploads = []
    for each in options:
        with Peer(system, folder=folder) as peer:
            started = peer.set_up(SHAPES, clients=CLIENTS, options=each)
            whole_round(peer)
            made, _, _ = whole_round(peer)
            assert peer.error() < largest_error
        uploads.append(made.bytes)
    assert started.versions["system"] in ("nvflare 2.9.0", "phe 1.5.0")
    if system == "nvflare_he":
        assert started.versions["tenseal"] == "0.3.15"
        assert uploads[0] > uploads[1] + len(SHAPES) * 600_000  # a context each
    else:
        # A lane has 8 bits, 2 or 10 for the sum and as many for carries, and another sign;
        # a ciphertext has twice the bits of the key.
        assert uploads == [-(-SIZE // (2046 // 13)) * 512, -(-SIZE // (3070 // 29)) * 768]
