"""Fuzz target: data files of other people, dirty as they come: text, CSV, JSON lines, gzip."""

from __future__ import annotations

import atexit
import gzip
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from fuzz_inputs import Target, altered, refusable

from secagg_recommender.catalogue import load_catalogue
from secagg_recommender.interactions import DataError
from secagg_recommender.movielens import load_movielens_users, read_movielens
from secagg_recommender.reading import Rows
from secagg_recommender.reviews import load_reviews
from secagg_recommender.sequences import load_sequences

__all__ = ["DATASETS"]

_BETWEEN = b"\x1d"  # parts the bytes of two files
_PACKED, _CUT = 1, 2  # bits of the second byte


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="secagg-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _sequences(main: Path, beside: Path | None) -> None:
    found = load_sequences(main, beside)
    _counted(found.rows)
    if found.attributes is not None:
        assert found.attributes.n_items == found.interactions.n_items


def _reviews(main: Path, beside: Path | None) -> None:
    found = load_reviews(main, beside, min_rating=2.0)
    _counted(found.rows)
    if found.attributes is not None:
        assert found.attributes.n_items == found.interactions.n_items


def _ratings(main: Path, beside: Path | None) -> None:
    _counted(read_movielens(_named(main, beside, "ratings.csv", "recbole_ml-100k.item.tsv")).rows)


def _interactions(main: Path, beside: Path | None) -> None:
    _counted(read_movielens(_named(main, beside, "ml-100k.inter", "ml-100k.item")).rows)


def _users(main: Path, _beside: Path | None) -> None:
    assert all(int(label) >= -(2**53) for label in load_movielens_users(main))


def _products(main: Path, beside: Path | None) -> None:
    found = load_catalogue(*([main, beside] if beside else [main]))
    _counted(found.rows)
    assert found.attributes().n_items == len(found.frame)


def _named(main: Path, beside: Path | None, name: str, other: str) -> Path:
    folder = _folder() / "movielens"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(main, folder / name)
    if beside:
        shutil.copy(beside, folder / other)
    return folder


def _counted(rows: tuple[Rows, ...]) -> None:
    """No row is lost without being counted."""
    for each in rows:
        assert each.read == each.kept + sum(each.dropped.values())
        assert each.kept > 0
        assert str(each)


# Inputs that are kept count on these places: new ones go to the end.
_KINDS: tuple[Callable[[Path, Path | None], None], ...] = (
    *(_sequences, _reviews, _ratings, _interactions, _users, _products),
)


def _one(data: bytes) -> None:
    if len(data) < 2:
        return
    contents, *more = data[2:].split(_BETWEEN, 1)
    main, beside = _folder() / "main", _folder() / "beside"
    if data[1] & _PACKED:
        contents = gzip.compress(contents, 1, mtime=0)
        if data[1] & _CUT:
            contents = contents[: max(18, len(contents) - 1 - data[1] // 4)]
    main.write_bytes(contents)
    if more:
        beside.write_bytes(more[0])
    with refusable(DataError):
        _KINDS[data[0] % len(_KINDS)](main, beside if more else None)


_CELLS = (
    *(
        b"",
        b"0",
        b"-1",
        b"1",
        b"1e400",
        b"nan",
        b"inf",
        b"1" * 30,
        b"1" * 5000,
        b"9007199254740993",
    ),
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'"',
        b'""',
        b"\xff",
        b"\xe2\x82\xb9399",
        b"\x81",
        b"\0",
        b"\r",
    ),
    *(
        b"4.5",
        b"1,234",
        b"64%",
        b"B000000001",
        b"[" * 500,
        b"1e22",
        b"-0",
        b"2147483648",
        b"\xef\xbb\xbf",
    ),
)
_MARKS = (b",", b"\t", b" ", b"\n", b":", b'"')


def _mutate(data: bytes, random: Random) -> bytes:
    """A line or a cell is lost, repeated, moved or something else."""
    head, body = data[:2], data[2:]
    if random.random() < 0.1:
        head = bytes([data[0] if data else 0, random.randrange(256)])
    if random.random() < 0.2:
        return head + altered(body, random)
    mark = random.choice(_MARKS)
    cells = body.split(mark)
    at, kind = random.randrange(len(cells)), random.randrange(5)
    if kind == 0:
        del cells[at]
    elif kind == 1:
        cells.insert(random.randrange(len(cells)), cells[at])
    elif kind == 2:
        cells[at] = random.choice(cells)
    elif kind == 3:
        cells[at] = cells[at] + random.choice(_CELLS)
    else:
        cells[at] = random.choice(_CELLS)
    return head + mark.join(cells)


_REVIEW = (
    b'{"user_id":"%s","parent_asin":"%s","rating":%d.0,"timestamp":%d,"title":"a","text":"b"}\n'
)
_META = (
    b'{"parent_asin":"B1","title":"Lamp","price":"$12.99","store":"Lumen","main_category":"Home",'
    b'"categories":["Home","Light"],"details":{"Brand":"Lumen"}}\n'
    b'{"parent_asin":"B2","title":null,"price":null,"store":null,"categories":[]}\n'
)
_LISTS = (
    b"name,main_category,sub_category,image,link,ratings,no_of_ratings,discount_price,actual_price\n"
    b'Speaker,tv,Speakers,i,https://a/dp/B000000001/ref,4.1,"1,234",\xe2\x82\xb9399,\xe2\x82\xb9999\n'
    b'"Two\nlines",tv,Speakers,i,https://a/dp/B000000002/ref,Get,,,\xe2\x82\xb9999\n'
)
_SALES = (
    b"product_id,product_name,category,discounted_price,actual_price,discount_percentage,rating,"
    b'rating_count\nB000000003,Cable,A|B|C,\xe2\x82\xb9399,\xe2\x82\xb91099,64%,4.2,"24,269"\n'
)


def _seeds() -> dict[str, bytes]:
    reviews = b"".join(
        _REVIEW % (user, item, rating, 1_600_000_000_000 + rating)
        for user, item, rating in ((b"A", b"B1", 5), (b"B", b"B2", 1), (b"A", b"B2", 4))
    )
    ratings = b"1,10,4.0,881250949\n1,20,3,881250950\n2,10,5,881250951\n"
    table = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    films = b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    films += b"10\tToy Story\t1995\tAnimation Comedy\n20\tHeat\t\tAction\n"
    people = b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    attributes = b'{"1": [5, 6], "2": [6], "3": []}'
    return {
        "sequences": b"\0\0" + b"1 1 2 3\n2 2 3\n3 1\n" + _BETWEEN + attributes,
        "sequences packed": b"\0\1" + b"1 1 2 3\n2 2 3\n",
        "a cut archive": b"\0\x17" + b"1 1 2 3\n2 2 3\n" * 9,
        "reviews": b"\1\0" + reviews + _BETWEEN + _META,
        "ratings": b"\2\0" + ratings + _BETWEEN + films,
        "interactions": b"\3\0" + table + ratings.replace(b",", b"\t") + _BETWEEN + films,
        "users": b"\4\0" + people + b"1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\t94043\n",
        "products": b"\5\0" + _LISTS + _BETWEEN + _SALES,
    }


DATASETS = Target(
    "datasets",
    "data files: sequences, reviews, ratings, product lists; CSV, JSON lines, gzip",
    ("load_sequences", "load_reviews", "read_movielens", "load_catalogue"),
    _one,
    _seeds,
    _mutate,
    _folder,
)
