"""Dashboards and alerts for both services, made from the lists of what they measure.

``python -m deploy.monitoring.generate`` writes them, ``python -m deploy.monitoring.check`` asks a
running Prometheus all of their queries. It runs in the development environment and is part of no
package.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDER", "KEY_HOLDER", "SERVER"]

FOLDER = Path(__file__).parent

# The names of the jobs that scrape; what an alert looks for where a metric does not tell.
SERVER, KEY_HOLDER = "secagg-server", "secagg-keyholder"
