"""`secagg-client data`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secagg_client.cli import app

RUNNER = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "s3rec_Beauty.txt").write_text("1 2 3 2\n\n2 3\n2 9\n", encoding="utf-8")
    (tmp_path / "s3rec_Beauty_item2attributes.json").write_text('{"2": [1]}', encoding="utf-8")
    return tmp_path


def test_json_tells_every_row_and_size(folder: Path) -> None:
    call = ["data", "--dataset", "amazon-beauty", "--data-dir", str(folder), "--format", "json"]
    done = RUNNER.invoke(app, call)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["files"][0] == {
        "what": "sequences in s3rec_Beauty.txt",
        "read": 4,
        "kept": 2,
        "dropped": {"blank": 1, "repeated_user": 1},
        "noted": {},
    }
    assert found["files"][1]["dropped"] == {"repeated_item": 1}
    assert (found["name"], found["generated"]) == ("amazon-beauty", None)
    sizes = found["interactions"]
    assert [sizes[name] for name in ("users", "items", "interactions")] == [2, 2, 3]
    assert (sizes["density"], sizes["items without attributes"]) == (0.75, 1)


def test_the_table_tells_the_same(folder: Path) -> None:
    done = RUNNER.invoke(app, ["data", "--dataset", "amazon-beauty", "--data-dir", str(folder)])
    assert done.exit_code == 0
    for words in ("sequences in s3rec_Beauty.txt", "repeated_user", "repeated_item", "75.000%"):
        assert words in done.stdout


def test_generated_data_is_called_generated() -> None:
    done = RUNNER.invoke(app, ["data", "--dataset", "marketplace"])
    assert done.exit_code == 0
    assert "generated: products, shoppers and purchases" in done.stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--dataset", "amazon-reviews-2023"], 65, "data_dir=None"),
        (["--dataset", "amazon-reviews-2023", "--data-dir", "{}"], 65, "no pair in path"),
        (["--dataset", "netflix"], 78, "'amazon-beauty'"),
    ],
)
def test_errors_are_one_line(folder: Path, options: list[str], code: int, message: str) -> None:
    done = RUNNER.invoke(app, ["data", *(option.format(folder) for option in options)])
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.output
