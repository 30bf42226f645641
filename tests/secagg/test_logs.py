"""Logs let nothing secret through, whatever is logged and however, and never fail."""

from __future__ import annotations

import ast
import collections
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from secagg import logs
from secagg.errors import MalformedError
from secagg.receipts import SigningKey

RAW = bytes(range(100, 132))
WORD = "correct-horse-battery"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = [*logging.root.handlers]
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers


@pytest.fixture(params=[io.StringIO, Terminal], ids=["file", "terminal"])
def stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error of a program whose logs are configured: a file's, and a terminal's."""
    return configured(request.param(), monkeypatch)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    return configured(io.StringIO(), monkeypatch)


def configured(stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(sys, "stderr", stderr)
    logs.configure("debug")
    return stderr


def log() -> Any:  # noqa: ANN401 - structlog's own type
    return structlog.get_logger()


def logged(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    return json.loads(line, parse_constant=pytest.fail)


def redacted(value: object) -> object:
    return logs.redact(None, "info", {"event": "x", "it": value})["it"]


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return WORD


class State(StrEnum):
    OPEN = "open"


class Code(IntEnum):
    ONE = 1


class Colour(Enum):
    RED = "red"


@dataclass
class Keys:
    private: bytes = RAW
    word: str = WORD


class Model(BaseModel):
    word: str = WORD


Pair = collections.namedtuple("Pair", "word raw")

SECRETS: dict[str, object] = {
    "bytes": RAW,
    "bytearray": bytearray(RAW),
    "memoryview": memoryview(RAW),
    "hex in bytes": RAW.hex().encode(),
    "SecretStr": SecretStr(WORD),
    "SigningKey": SigningKey.from_bytes(RAW),
    "its method": SigningKey.from_bytes(RAW).to_bytes,
    "X25519": X25519PrivateKey.from_private_bytes(RAW),
    "dataclass": Keys(),
    "model": Model(),
    "named tuple": Pair(WORD, RAW),
    "array": np.frombuffer(RAW, np.uint8),
    "array of objects": np.array([WORD, RAW], dtype=object),
    "numpy scalar": np.bytes_(RAW),
    "exception": ValueError(WORD, RAW),
    "own error": MalformedError(WORD),
    "set": {WORD, RAW},
    "generator": (value for value in [RAW]),
    "subclass of str": Text(WORD),
    "subclass of dict": collections.OrderedDict(word=WORD),
    "subclass of list": type("Words", (list,), {})([WORD]),
    "big integer": int.from_bytes(RAW),
    "path": Path(WORD),
    "function": lambda: WORD,
    "class": Keys,
    "module": sys,
}
SHOWN = [
    WORD,
    RAW.hex(),
    RAW.hex().upper(),
    repr(RAW)[2:-1],
    RAW.decode("latin-1"),
    str(int.from_bytes(RAW)),
    ", ".join(map(str, RAW)),
    " ".join(map(str, RAW)),
    "100, 101, 102",
    "100 101 102",
]


def assert_silent(text: str) -> None:
    for secret in SHOWN:
        assert secret not in text
        assert secret not in text.replace("\\\\", "\\")


@pytest.mark.parametrize("kind", SECRETS)
def test_no_kind_of_secret_survives(kind: str, stream: io.StringIO) -> None:
    value = SECRETS[kind]
    log().info("made", it=value)
    log().bind(bound=value).warning("made", nested={"a": [1, (value, {"b": [value]})]})
    log().error(value)
    log().info("made", **{WORD[:3]: 1}, table={1: value, "x": {"y": value}})
    assert_silent(stream.getvalue())
    assert stream.getvalue().count("made") == 3


@pytest.mark.parametrize("kind", ["bytes", "SecretStr", "SigningKey", "exception", "named tuple"])
def test_no_secret_survives_as_a_key(kind: str, stream: io.StringIO) -> None:
    log().info("made", table={SECRETS[kind]: 1})
    assert_silent(stream.getvalue())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (RAW, "<32 bytes>"),
        (b"", "<0 bytes>"),
        (bytearray(3), "<3 bytes>"),
        (SecretStr(WORD), "<SecretStr>"),
        (SigningKey.from_bytes(RAW), "<SigningKey>"),
        (Keys(), "<Keys>"),
        (np.zeros(3), "<ndarray>"),
        (np.float64(1.5), "<float64>"),
        (np.int64(1), "<int64>"),
        (ValueError(WORD), "<ValueError>"),
        (datetime(2024, 1, 1, tzinfo=UTC), "<datetime>"),
        (Text("x"), "<Text>"),
        (Pair(1, 2), "<Pair>"),
        ({1}, "<set>"),
        (Colour.RED, "<Colour>"),
        (Code.ONE, "<Code>"),
        (2**64, "<int>"),
        (10**5000, "<int>"),
        (-(2**64), "<int>"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_what_is_no_text_or_number_is_named_by_its_type(value: object, shown: str) -> None:
    assert redacted(value) == shown
    assert redacted([value]) == [shown]
    assert redacted({"a": (value,)}) == {"a": [shown]}


@pytest.mark.parametrize(
    "value", ["text", "größe", "", 0, -1, 2**64 - 1, 1.5, True, False, None, [], {}, [1, [None]]]
)
def test_text_and_numbers_are_shown_as_they_are(value: object) -> None:
    assert redacted(value) == value
    assert type(redacted(value)) is type(value)


def test_a_state_is_shown_by_its_text() -> None:
    assert redacted(State.OPEN) == "open"
    assert type(redacted(State.OPEN)) is str


@pytest.mark.parametrize(("value", "shown"), [("nan", "nan"), ("inf", "inf"), ("-inf", "-inf")])
def test_numbers_that_json_lacks_become_text(value: str, shown: str) -> None:
    assert redacted(float(value)) == shown


def test_long_text_is_cut() -> None:
    assert redacted("x" * 2000) == "x" * 2000
    assert redacted("x" * 2001) == "x" * 1999 + "…"
    assert len(str(redacted("\x00" * 10_000_000))) == 2000


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "a\rb", "\x07", "\u202e", "\ud800", "\x9b"])
def test_text_that_a_terminal_would_obey_is_escaped(text: str, stream: io.StringIO) -> None:
    before = stream.getvalue()
    log().info("made", it=text)
    line = stream.getvalue().removeprefix(before)
    assert text not in line
    assert len(line.splitlines()) == 1
    line.encode()


@pytest.mark.parametrize(
    "name",
    [
        "passphrase",
        "private_key",
        "privateKey",
        "private-key",
        "PRIVATE.KEY",
        "key_private_key_pem",
        "seed",
        "sealed_seeds",
        "share",
        "share_1",
        "password",
        "db_password",
        "token",
        "access_token",
        "secret",
        "client_secret",
        "mnemonic",
    ],
)
@pytest.mark.parametrize("value", [WORD, 7, None, [WORD], {"a": WORD}])
def test_what_is_named_like_a_secret_is_left_out(
    name: str, value: object, stream: io.StringIO
) -> None:
    log().info("made", **{name: value})
    log().bind(**{name: value}).info("made", at=[{"x": {name: value}}])
    assert stream.getvalue().count("<omitted>") == 3
    assert_silent(stream.getvalue())


@pytest.mark.parametrize("name", ["round", "attempt", "public_key_sha256", "count", "at", "why"])
def test_other_names_are_kept(name: str) -> None:
    assert logs.redact(None, "info", {name: 5}) == {name: 5}


def fail() -> None:
    raise ValueError(WORD, RAW)


@pytest.mark.parametrize("exc_info", [True, "error", "tuple"])
def test_stack_traces_are_never_printed(exc_info: object, stream: io.StringIO) -> None:
    try:
        fail()
    except ValueError as error:
        given = {
            True: True,
            "error": error,
            "tuple": (type(error), error, error.__traceback__),
        }[exc_info]
        log().error("failed", exc_info=given, stack_info=True, at=logs.where(error))
        log().exception("failed")
    text = stream.getvalue()
    assert_silent(text)
    assert "Traceback" not in text
    assert "exc_info" not in text
    assert "raise" not in text
    assert "test_logs.py" in text
    assert len(text.splitlines()) == 2


def test_a_line_says_when_what_and_how_bad(file: io.StringIO) -> None:
    log().warning("made", round=3)
    line = logged(file)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "made", "level": "warning", "round": 3}


def test_lines_below_the_level_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    logs.configure("warning")
    log().info("made")
    assert stderr.getvalue() == ""


def test_where_stays(file: io.StringIO) -> None:
    try:
        fail()
    except ValueError as error:
        log().error("failed", error=type(error).__name__, at=logs.where(error))
    line = logged(file)
    assert line["error"] == "ValueError"
    assert line["at"][-1].endswith(" fail")


def cycle(kind: type) -> object:
    if kind is dict:
        table: dict[str, object] = {}
        table["self"] = [table, table]
        return table
    items: list[object] = []
    items.extend([items, (items,), {"a": items}])
    return items


def deep(levels: int) -> object:
    value: object = RAW
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("value", [cycle(list), cycle(dict), deep(9), deep(100_000)])
def test_values_without_end_are_cut(value: object, file: io.StringIO) -> None:
    log().info("made", it=value)
    assert len(file.getvalue()) < 2000
    logged(file)


def test_a_value_twice_is_no_cycle() -> None:
    twice = [1]
    assert redacted([twice, twice]) == [[1], [1]]


anything: st.SearchStrategy[object] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=2**63, max_value=2**20000),
        st.floats(),
        st.text(st.characters(exclude_categories=())),
        st.binary(),
        st.complex_numbers(),
        st.dates(),
        st.decimals(),
        st.uuids(),
        st.sampled_from([State.OPEN, Code.ONE, Colour.RED, Ellipsis, object(), *SECRETS.values()]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
            inner,
            max_size=3,
        ),
        st.frozensets(st.integers(), max_size=2),
    ),
    max_leaves=12,
)


@given(anything, st.text(st.characters(exclude_categories=()), max_size=9), anything)
def test_any_value_makes_one_line_of_json(value: object, name: str, event: object) -> None:
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        configured(stderr, patch)
        log().bind(**{f"x{name}": value}).info(event, value=value)
        line = logged(stderr)
    assert line["level"] == "info"
    assert_silent(stderr.getvalue())


@given(anything)
def test_what_was_let_through_is_let_through_again(value: object) -> None:
    """So that nothing is left in the result that should have been replaced."""
    assert redacted(redacted(value)) == redacted(value)


# --- what others log --------------------------------------------------------------------------


def test_warnings_of_libraries_keep_their_place_and_lose_their_text(stream: io.StringIO) -> None:
    logger = logging.getLogger("somebody.else")
    logger.warning("connection of %s", WORD)
    logger.error("future: <exception=ValueError(%r)>" % WORD)  # noqa: UP031
    try:
        fail()
    except ValueError:
        logger.exception("Task exception was never retrieved: %s", WORD)
    logger.info("nothing")
    text = stream.getvalue()
    assert_silent(text)
    assert "Traceback" not in text
    assert len(text.splitlines()) == 3
    assert text.count("somebody.else") == text.count("library_warning") == 3
    assert text.count("ValueError") == 1


def test_a_record_that_cannot_be_formatted_is_logged_all_the_same(file: io.StringIO) -> None:
    # The test runner's own handlers would raise.
    logging.root.handlers[:] = [
        handler for handler in logging.root.handlers if type(handler).__module__ == logs.__name__
    ]
    logging.getLogger("somebody.else").warning("%d", WORD)
    assert logged(file)["library"] == "somebody.else"


def test_a_closed_standard_error_stops_nobody(file: io.StringIO) -> None:
    file.close()
    with warnings.catch_warnings(record=True) as caught:
        logging.getLogger("somebody.else").warning("x")
    assert caught == []


def test_configuring_twice_logs_once(file: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    again = configured(io.StringIO(), monkeypatch)
    logging.getLogger("somebody.else").warning("x")
    assert file.getvalue() == ""
    assert logged(again)["event"] == "library_warning"


# --- what we log ------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
SOURCES = [
    file for folder in ("secagg", "server", "client") for file in (ROOT / folder).rglob("*.py")
]
METHODS = {"debug", "info", "warning", "error", "critical", "exception", "fatal", "msg", "log"}
ADAPTERS = {ROOT / "secagg" / "flower", ROOT / "secagg" / "nvflare"}


def test_every_event_is_a_constant_and_everything_else_a_keyword() -> None:
    """Text that is put together before it is logged cannot be told from any other text."""
    calls = [(file, call) for file in SOURCES for call in log_calls(file)]
    assert len(calls) > 5
    for file, call in calls:
        arguments = call.args[1:] if called(call) == "log" else call.args
        if file.parent in ADAPTERS:
            # The framework's own logger: a constant template, and what it is filled with beside it.
            arguments = arguments[:1]
            assert not any(isinstance(each, ast.JoinedStr) for each in call.args)
        assert [type(argument) for argument in arguments] == [ast.Constant], (
            f"{file.relative_to(ROOT)}:{call.lineno} logs more than a constant and keywords"
        )
        for keyword in call.keywords:
            assert not isinstance(keyword.value, ast.JoinedStr), (
                f"{file.relative_to(ROOT)}:{call.lineno} formats {keyword.arg}"
            )


def log_calls(file: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in METHODS
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id.lower().strip("_") in ("log", "logger")
        ):
            yield node


def called(call: ast.Call) -> str:
    assert isinstance(call.func, ast.Attribute)
    return call.func.attr
