"""Counts what the key holder judged and released: what its ledger records, once it is committed.

So counters say what the audit log says, and what is asked for again counts once. A norm counts when
its verdict is given, never before: nobody can fit an upload to what was found of another.
"""

from __future__ import annotations

from collections.abc import Mapping

from secagg.audit import Detail
from secagg.instruments import Meter
from secagg_keyholder.metrics import AUDITS, JUDGED, RELEASES, VERDICTS

__all__ = ["Tally"]


class Tally:
    """Counts entries of the audit log."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def changed(self, event: str, details: Mapping[str, Detail]) -> None:
        """Count one entry that is committed."""
        reason = str(details.get("reason", ""))
        match event:
            case "upload-admitted":
                self._meter.add(JUDGED, verdict="ACCEPTED")
            case "upload-refused":
                self._meter.add(JUDGED, verdict=reason)
            case "norm-judged":
                self._meter.add(VERDICTS, verdict="refused" if reason else "accepted")
            case "upload-audited":
                self._meter.add(AUDITS, finding="off_grid" if reason else "fine")
            case "round-released":
                self._meter.add(RELEASES, outcome="released")
            case "release-refused":
                self._meter.add(RELEASES, outcome="refused")
