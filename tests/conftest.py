"""Shared by all tests: where real data is, and the rule that it must not be skipped silently."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says more of what else the machine does than of the code.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

# Tables are as wide as the first module to print found the terminal: the same for all tests.
os.environ["COLUMNS"] = "200"


def pytest_collection_finish() -> None:
    """Leave what was imported and collected, a million objects, out of every later collection."""
    gc.collect()
    gc.freeze()


DATA_DIR = os.environ.get("SECAGG_DATA_DIR")
REQUIRE_DATA = os.environ.get("SECAGG_REQUIRE_DATA") == "1"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data; tests that use it are skipped, or fail where it is required."""
    if DATA_DIR and Path(DATA_DIR).is_dir():
        return Path(DATA_DIR)
    reason = "real data not found: set SECAGG_DATA_DIR to the folder that holds ml-100k/"
    if REQUIRE_DATA:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Where real data is required, a skipped test that needs it is a failure."""
    outcome = yield
    report = outcome.get_result()
    if REQUIRE_DATA and report.skipped and item.get_closest_marker("realdata"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped although real data is required"
