"""Who else could read a file of secrets."""

from __future__ import annotations

import os

import pytest

from secagg.private_files import open_to_others

ROOT, SERVICE, SOMEBODY = 0, 10001, 10002


def _status(owner: int, mode: int) -> os.stat_result:
    return os.stat_result((0o100000 | mode, 1, 1, 1, owner, 10001, 1, 0, 0, 0))


@pytest.fixture(params=[ROOT, SERVICE])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Under whose number the program runs."""
    monkeypatch.setattr(os, "geteuid", lambda: request.param)
    return int(request.param)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
@pytest.mark.parametrize("owner", [ROOT, SERVICE])
def test_its_owner_alone_is_nobody_else(reader: int, owner: int, mode: int) -> None:
    assert not open_to_others(_status(owner, mode))


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o444, 0o644, 0o666, 0o620, 0o660, 0o610])
@pytest.mark.parametrize("owner", [ROOT, SERVICE, SOMEBODY])
def test_others_and_a_group_that_may_write_are_others(reader: int, owner: int, mode: int) -> None:
    assert open_to_others(_status(owner, mode))


@pytest.mark.parametrize("mode", [0o440, 0o640])
def test_only_root_lends_a_file_to_a_group_and_never_to_itself(reader: int, mode: int) -> None:
    assert open_to_others(_status(ROOT, mode)) == (reader == ROOT)
    assert open_to_others(_status(SERVICE, mode))
    assert open_to_others(_status(SOMEBODY, mode))
