"""What both services show of themselves whenever somebody looks."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from cryptography.x509 import load_pem_x509_certificate

from secagg.certificates import Kit
from secagg.enrolment import OpenEnrolment, Roster
from secagg.instruments import Meter
from secagg.rpc.metrics import BUILD, CERTIFICATE_EXPIRY, ENROLLED

__all__ = ["watch"]


def watch(meter: Meter, roster: Roster, kit: Kit | None) -> None:
    """Show version, certificate and clients; without a kit, or without a list, the first alone."""
    meter.set(BUILD, 1.0, version=version("secagg"))
    if kit is not None:
        # The file, not what was read of it: it may be replaced while the service runs.
        certificate = kit.file("certificate.pem")
        meter.watch(CERTIFICATE_EXPIRY, lambda: _expiry(certificate))
    if not isinstance(roster, OpenEnrolment):
        meter.watch(ENROLLED, lambda: len(roster.active()))


def _expiry(certificate: Path) -> float:
    return load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()
