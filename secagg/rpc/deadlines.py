"""How long a call may take: one table, for the caller's deadline and the callee's own limit.

gRPC has no deadline unless one is set. A caller that sets none, or a longer one, is held to the
table all the same.
"""

from __future__ import annotations

__all__ = ["DEADLINES_S", "deadline_s"]

_DEFAULT_S = 30.0

DEADLINES_S: dict[str, float] = {
    "GetRound": 10.0,
    "GetModel": 30.0,
    "OpenUpload": 30.0,
    "PutChunk": 30.0,
    # Hashes the whole upload.
    "CommitUpload": 60.0,
    "GetVerdict": 30.0,
    "WithdrawUpload": 30.0,
    "CreateTask": 60.0,
    "GetSums": 60.0,
    "ExportAudit": 600.0,
    "OpenRound": 30.0,
    "JudgeUploads": 60.0,
    "SubmitSketch": 60.0,
    # One signature an upload.
    "GetVerdicts": 120.0,
    # Four bytes a coefficient go in.
    "CheckSum": 300.0,
    # The whole sum goes in, and out again, and is opened in between.
    "Release": 600.0,
    "AuditNoise": 120.0,
}
"""Seconds by method; every other method has 30."""


def deadline_s(method: str) -> float:
    """Seconds that a call of this method may take; its full name (``/service/Method``) will do."""
    return DEADLINES_S.get(method.rpartition("/")[2], _DEFAULT_S)
