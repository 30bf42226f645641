"""The contract and what was generated from it: up to date, implemented, and within its limits."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import cohort
import grpc_tools
import pytest
from google.protobuf.message import Message
from grpc_tools import protoc

from secagg.parameters import CHUNK_BYTES, FloatSegment, TensorSpec
from secagg.planner import make_plan
from secagg.wire import codec
from secagg.wire.codec import MAX_MESSAGE_BYTES, PIECE_BYTES
from secagg.wire.v1 import aggregation_service_pb2 as aggregation
from secagg.wire.v1 import key_holder_service_pb2 as key_holder
from secagg.wire.v1 import operator_service_pb2 as operator
from secagg.wire.v1 import round_pb2
from secagg_keyholder.service import MAX_JUDGED, KeyHolderService
from secagg_server.key_holder import JUDGE_BATCH, MANIFEST_BATCH
from secagg_server.services import AggregationService, OperatorService

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))
COMMITTED = ROOT / "secagg" / "wire" / "v1"
SERVICERS = {
    "AggregationService": AggregationService,
    "KeyHolderService": KeyHolderService,
    "OperatorService": OperatorService,
}
MODULES = (aggregation, key_holder, operator)


def run_protoc(outputs: Sequence[str], files: Sequence[Path]) -> None:
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    names = [str(file.relative_to(ROOT / "proto")) for file in files]
    includes = [f"-I{ROOT / 'proto'}", f"-I{well_known}"]
    assert protoc.main(["protoc", *includes, *outputs, *names]) == 0


def test_the_committed_code_is_what_the_contract_generates(tmp_path: Path) -> None:
    run_protoc([f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"], PROTOS)
    services = [file for file in PROTOS if file.stem.endswith("_service")]
    run_protoc([f"--grpc_python_out={tmp_path}"], services)
    fresh = {file.name: file.read_text() for file in tmp_path.rglob("*_pb2*.py*")}
    committed = {file.name: file.read_text() for file in COMMITTED.glob("*_pb2*.py*")}
    assert len(PROTOS) == 5
    assert len(services) == 3
    assert committed.keys() == fresh.keys()
    assert [name for name in fresh if committed[name] != fresh[name]] == []


def test_the_contract_passes_buf_lint() -> None:
    buf = Path(sys.executable).with_name("buf")
    done = subprocess.run([buf, "lint", "proto"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_field_message_and_method_of_the_contract_has_a_comment() -> None:
    for file in PROTOS:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        for before, line in itertools.pairwise(lines):
            declares = line.startswith(("message ", "enum ", "service ", "rpc "))
            numbered = " = " in line and line.endswith(";") and not line.startswith("//")
            if (declares or numbered) and not line.startswith("syntax"):
                assert before.startswith("//"), f"{file.name}: {line}"


def test_every_service_has_a_servicer_with_every_method() -> None:
    found = {s.name: s for m in MODULES for s in m.DESCRIPTOR.services_by_name.values()}
    assert found.keys() == SERVICERS.keys()
    for name, service in found.items():
        base = import_module(f"{service.file.name[:-6].replace('/', '.')}_pb2_grpc")
        abstract = getattr(base, f"{name}Servicer")
        assert issubclass(SERVICERS[name], abstract)
        for method in service.methods:
            own = inspect.getattr_static(SERVICERS[name], method.name)
            assert own is not inspect.getattr_static(abstract, method.name), method.full_name


def test_every_method_translates_its_errors() -> None:
    for servicer in SERVICERS.values():
        for name, method in vars(servicer).items():
            if name[0].isupper():
                assert method.__wrapped__.__module__ == servicer.__module__, name


@pytest.mark.parametrize(
    "module",
    [
        "plan_pb2",
        "round_pb2",
        "aggregation_service_pb2",
        "operator_service_pb2",
        "key_holder_service_pb2",
    ],
)
def test_messages_import_without_grpc(module: str) -> None:
    code = (
        f"import sys, secagg.wire.v1.{module}, secagg.wire.codec; assert 'grpc' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- sizes: the largest message of each kind ----------------------------------------------------


LONGEST_ID = "x" * 64
HIGHEST = (1 << 32) - 1


def largest_context() -> round_pb2.ContextId:
    context = cohort.round_context(cohort.counts_plan()).id
    message = codec.context_id_to_wire(context)
    message.task_id, message.round_number, message.attempt = LONGEST_ID, HIGHEST, HIGHEST
    return message


def largest_admission() -> round_pb2.Admission:
    context = cohort.round_context(cohort.counts_plan())
    message = codec.admission_to_wire(cohort.noise_upload(context, 0).admission)
    message.receipt.context.CopyFrom(largest_context())
    return message


def many_tensors(count: int, name_length: int) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(f"{i:0{name_length}}", (64, 64)) for i in range(count))


def fits(message: Message) -> bool:
    return 0 < message.ByteSize() <= MAX_MESSAGE_BYTES


def test_a_full_chunk_fits() -> None:
    full = aggregation.PutChunkRequest(
        context=largest_context(),
        client_key=bytes(32),
        upload_digest=bytes(32),
        chunk_index=HIGHEST,
        data=bytes(CHUNK_BYTES),
    )
    assert fits(full)
    assert fits(key_holder.ReleaseRequest(residues=bytes(CHUNK_BYTES)))


def test_as_many_admissions_as_are_judged_at_once_fit() -> None:
    assert JUDGE_BATCH <= MAX_JUDGED == 256
    judged = key_holder.JudgeUploadsRequest(
        context=largest_context(), admissions=[largest_admission()] * MAX_JUDGED
    )
    assert fits(judged)
    verdict = round_pb2.Verdict(upload_digest=bytes(32), state=2, reason="Z" * 64)
    assert fits(key_holder.JudgeUploadsResponse(verdicts=[verdict] * MAX_JUDGED))


def test_a_full_part_of_a_manifest_fits() -> None:
    """Larger cohorts take several parts; see the tests of the key holder's service."""
    part = key_holder.Manifest(
        context=largest_context(), upload_digests=[bytes(32)] * MANIFEST_BATCH
    )
    assert fits(key_holder.ReleaseRequest(manifest=part))


def test_a_piece_of_sums_fits() -> None:
    piece = bytes(PIECE_BYTES)
    assert fits(key_holder.ReleaseResponse(data=piece, contributors=HIGHEST))
    assert fits(operator.GetSumsResponse(data=piece, contributors=HIGHEST))


def test_a_piece_of_an_initial_model_fits() -> None:
    assert fits(operator.CreateTaskRequest(model_data=bytes(PIECE_BYTES)))


@pytest.mark.parametrize(
    ("tensors", "name_length"), [(3, 20), (200, 40), (4096, 20)], ids=["small", "usual", "most"]
)
def test_a_full_piece_of_a_model_fits_with_its_tensors(tensors: int, name_length: int) -> None:
    """A model of 200 layers is nothing special; 4096 tensors is what the codec allows."""
    answer = aggregation.GetModelResponse(
        version=HIGHEST,
        model_digest=bytes(32),
        total_bytes=1 << 34,
        chunk_count=1 << 14,
        data=bytes(PIECE_BYTES),
        tensors=codec.tensors_to_wire(many_tensors(tensors, name_length)),
    )
    assert fits(answer)


@pytest.mark.parametrize("name_length", [20, 128])
def test_the_plan_with_the_most_tensors_fits_into_every_message_that_carries_one(
    name_length: int,
) -> None:
    segment = FloatSegment("update", many_tensors(4096, name_length), 1.0)
    plan = codec.plan_to_wire(make_plan([segment], max_clients=10))
    spec = operator.TaskSpec(task_id=LONGEST_ID, plan=plan)
    round_key = bytes(1216)
    assert fits(operator.CreateTaskRequest(spec=spec))
    assert fits(key_holder.OpenRoundRequest(task_id=LONGEST_ID, plan=plan))
    answer = aggregation.GetRoundResponse(context=largest_context(), plan=plan, round_key=round_key)
    assert fits(answer)


def test_the_record_of_a_thousand_rounds_fits() -> None:
    record = operator.RoundRecord(
        round_number=HIGHEST,
        attempt=HIGHEST,
        state="ROUND_STATE_DONE",
        uploads=1_000_000,
        contributors=1_000_000,
        sums_sha256=bytes(32),
        model_version=HIGHEST,
        upload_bytes=1 << 50,
        aggregate_ms=1.5,
        release_ms=1.5,
    )
    record.created_at.GetCurrentTime()
    record.ended_at.GetCurrentTime()
    assert fits(operator.GetTaskResponse(rounds=[record] * 1000))


def test_an_announcement_fits_and_the_answer_names_all_chunks_of_the_largest_plan() -> None:
    assert fits(aggregation.OpenUploadRequest(admission=largest_admission()))
    largest_chunk_count = -(-(1 << 28) // (4096 * 32))
    missing = aggregation.OpenUploadResponse(missing_chunks=range(largest_chunk_count))
    assert fits(missing)
