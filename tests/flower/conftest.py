"""A key holder behind mutual TLS in this process, and Flower runs beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from federations import Site, shared, site
from flower_runs import Run
from serving import loop_thread


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The services of the shared federation, of which Flower needs the key holder alone."""
    with loop_thread() as thread, site(thread, tmp_path_factory.mktemp("site"), shared()) as made:
        yield made


@pytest.fixture
def run(running: Site) -> Run:
    """A Flower run with the shared federation's kits: alice, bob, carol and dave."""
    return Run({"secagg-key-holder": running.key_holder, "secagg-kits": str(shared().folder)})
