"""The best items for a vector: as brute force finds them, whatever the blocks; and by a graph."""

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.errors import ConfigurationError
from secagg_recommender import index as module
from secagg_recommender.graph_index import GraphIndex, recall
from secagg_recommender.index import ExactIndex, Hits, best_of
from secagg_recommender.index_files import open_index, save_index
from secagg_recommender.interactions import DataError

Table = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def table(n_items: int, d: int = 4, seed: int = 0, whole: bool = False) -> Table:
    """Vectors and biases; small integers tie often, and their scores are exact."""
    rng = np.random.default_rng(seed)
    if whole:
        drawn = rng.integers(-2, 3, (n_items, d + 1)).astype(np.float32)
    else:
        drawn = rng.normal(size=(n_items, d + 1)).astype(np.float32)
    return drawn[:, :d].copy(), drawn[:, d].copy()


def brute(made: Table, query: npt.NDArray[np.floating], k: int, own: set[int]) -> list[int]:
    scores = made[0].astype(float) @ query.astype(float) + made[1]
    allowed = [item for item in range(len(scores)) if item not in own]
    return sorted(allowed, key=lambda item: (-scores[item], item))[:k]


@given(
    st.integers(1, 70),
    st.integers(1, 6),
    st.integers(1, 80),
    st.integers(1, 9),
    st.integers(0, 99),
    st.data(),
)
def test_any_catalogue_in_any_blocks_is_as_brute_force_has_it(
    n_items: int, d: int, k: int, block: int, seed: int, draw: st.DataObject
) -> None:
    made = table(n_items, d, seed, whole=True)
    own = draw.draw(st.sets(st.integers(0, n_items - 1)))
    query = np.random.default_rng(seed).integers(-2, 3, d).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_BLOCK_ITEMS", block)
        cut = draw.draw(st.integers(1, n_items))
        index = ExactIndex(made[0][:cut], made[1][:cut])
        if cut < n_items:
            assert index.add(made[0][cut:], made[1][cut:]).tolist() == list(range(cut, n_items))
        found = index.search(query, k, list(own))
    assert found.items.tolist() == brute(made, query, k, own)
    assert found.scores.tolist() == [
        float(made[0][item] @ query + made[1][item]) for item in found.items
    ]


@given(st.lists(st.integers(-2, 2), max_size=30), st.integers(1, 40))
def test_best_places_are_those_of_a_stable_sort(levels: list[int], k: int) -> None:
    scores = np.array(levels, dtype=float)
    assert best_of(scores, k).tolist() == np.argsort(-scores, kind="stable")[:k].tolist()


def test_vectors_in_a_file_larger_than_the_budget_are_read_in_blocks(tmp_path: Path) -> None:
    made = table(9000, 16, whole=True)
    with pytest.raises(DataError, match=r"budget_bytes=150000.*save_index"):
        ExactIndex(*made, budget_bytes=150_000)
    save_index(ExactIndex(*made), tmp_path)
    opened = open_index(tmp_path, budget_bytes=150_000)
    query = made[0][7]
    tracemalloc.start()
    found = opened.search(query, 20, [7])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.items.tolist() == brute(made, query, 20, {7})
    assert peak + made[1].nbytes < 150_000


def test_a_budget_that_even_a_block_does_not_fit_into_is_refused() -> None:
    with pytest.raises(DataError, match="allow more memory"):
        ExactIndex(*table(3), budget_bytes=1000)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tables_that_are_not_finite_are_refused_and_nothing_is_added(bad: float) -> None:
    index = ExactIndex(*table(10))
    before = index.digest
    for place in range(2):
        made = table(5, seed=1)
        made[place].reshape(-1)[3] = bad
        with pytest.raises(DataError, match="NaN or infinity in items 10 to 14"):
            index.add(*made)
    assert (index.n_items, index.digest) == (10, before)


@pytest.mark.parametrize(
    "made",
    [
        (np.zeros((3, 5), np.float32), np.zeros(3, np.float32)),
        (np.zeros((3, 4), np.float32), np.zeros(2, np.float32)),
        (np.zeros((3, 4)), np.zeros(3)),
        (np.zeros((0, 4), np.float32), np.zeros(0, np.float32)),
        (np.zeros(4, np.float32), np.zeros(4, np.float32)),
    ],
)
def test_tables_that_do_not_fit_are_refused(made: Table) -> None:
    with pytest.raises(DataError, match="expected float32 vectors"):
        ExactIndex(*table(10)).add(*made)


@pytest.mark.parametrize(
    ("query", "k", "own", "what"),
    [
        (np.zeros(3, np.float32), 1, [], r"finite vector \(4,\)"),
        (np.full(4, np.nan), 1, [], "non_finite=4"),
        (np.zeros(4), 0, [], "k >= 1"),
        (np.zeros(4), 1, [10], "own items in"),
        (np.zeros(4), 1, [-1], "own items in"),
    ],
)
@pytest.mark.parametrize("kind", [lambda exact: exact, GraphIndex])
def test_requests_that_cannot_be_served_are_refused(
    kind: type, query: npt.NDArray[np.floating], k: int, own: list[int], what: str
) -> None:
    with pytest.raises(DataError, match=what):
        kind(ExactIndex(*table(10))).search(query, k, own)


def test_scores_that_overflow_are_refused() -> None:
    index = ExactIndex(np.full((2, 4), 1e30, np.float32), np.zeros(2, np.float32))
    with pytest.raises(DataError, match="finite scores, got non_finite=2"):
        index.search(np.full(4, 1e30), 1)


# --- graphs -------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 80), st.sets(st.integers(0, 59), max_size=20))
@settings(max_examples=25)
def test_a_graph_of_few_items_is_exact(n_items: int, k: int, own: set[int]) -> None:
    made, mine = table(n_items, whole=True), {item for item in own if item < n_items}
    graph = GraphIndex(ExactIndex(*made))
    assert graph.search(made[0][0], k, list(mine)).items.tolist() == brute(
        made, made[0][0], k, mine
    )


def test_a_graph_finds_nearly_all_and_scores_them_exactly() -> None:
    made = table(3000, 8)
    exact, queries = ExactIndex(*made), table(40, 8, seed=1)[0]
    graph = GraphIndex(exact)
    assert recall(graph, exact, queries, 10) > 0.95
    for query in queries[:5]:
        found, own = graph.search(query, 10, [1, 2, 3]), {1, 2, 3}
        assert not own & set(found.items.tolist())
        assert np.allclose(found.scores, made[0][found.items] @ query + made[1][found.items])
        assert (np.diff(found.scores) <= 0).all()


def test_new_items_are_found_without_building_again() -> None:
    graph = GraphIndex(ExactIndex(*table(500, 4)))
    query = np.ones(4, np.float32)
    # Longer than every vector the graph was built from: there is no place for them in it.
    ids = graph.add(np.full((2, 4), 50.0, np.float32), np.array([0.0, 1.0], np.float32))
    assert graph.search(query, 2).items.tolist() == [501, 500] == ids[::-1].tolist()
    graph.add(*table(100, 4, seed=5))
    assert len(graph.graph) < graph.n_items == 602
    assert recall(graph, graph.exact, table(10, 4, seed=2)[0], 5) > 0.9


def test_recall_counts_what_is_missing() -> None:
    exact = ExactIndex(*table(50))

    class Half:
        n_items = 50

        def search(self, query: npt.NDArray[np.floating], k: int, own: object) -> Hits:
            found = exact.search(query, k, ())
            return Hits(found.items[::2], found.scores[::2])

    assert recall(Half(), exact, table(5, seed=1)[0], 10) == 0.5
    with pytest.raises(DataError, match="at least one query"):
        recall(exact, exact, np.empty((0, 4)), 10)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(ConfigurationError, match=r"secagg\[index\]"):
        GraphIndex(ExactIndex(*table(10)))


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lambda exact: exact, GraphIndex])
def test_a_saved_index_is_the_same_again(kind: type, tmp_path: Path) -> None:
    made = kind(ExactIndex(*table(200, 4)))
    made.add(*table(20, 4, seed=3))
    made.add(np.full((1, 4), 9.0, np.float32), np.zeros(1, np.float32))
    save_index(made, tmp_path)
    opened = open_index(tmp_path, model=made.digest)
    assert type(opened) is type(made)
    for query in table(5, 4, seed=1)[0]:
        mine, its = made.search(query, 7, [3]), opened.search(query, 7, [3])
        assert mine.items.tolist() == its.items.tolist()
        assert np.allclose(mine.scores, its.scores)
    opened.add(*table(1, 4, seed=4))
    with pytest.raises(DataError, match="another folder"):
        save_index(opened, tmp_path)


def test_a_digest_is_of_the_rows_alone() -> None:
    vectors, bias = table(30)
    whole, parts = ExactIndex(vectors, bias), ExactIndex(vectors[:11], bias[:11])
    parts.add(vectors[11:], bias[11:])
    assert whole.digest == parts.digest
    changed = bias.copy()
    changed[29] += 1e-6
    assert ExactIndex(vectors, changed).digest != whole.digest


def test_a_stale_index_is_refused(tmp_path: Path) -> None:
    save_index(ExactIndex(*table(30)), tmp_path)
    with pytest.raises(DataError, match="stale"):
        open_index(tmp_path, model=ExactIndex(*table(30, seed=1)).digest)


@pytest.mark.parametrize("name", ["vectors.npy", "bias.npy", "graph.usearch"])
@pytest.mark.parametrize("harm", ["cut", "flip", "lose"])
def test_a_damaged_file_is_refused(name: str, harm: str, tmp_path: Path) -> None:
    save_index(GraphIndex(ExactIndex(*table(60))), tmp_path)
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x40
    file.write_bytes(content[:-9] if harm == "cut" else content)
    if harm == "lose":
        file.unlink()
    with pytest.raises(DataError, match=r"damaged|NaN"):
        open_index(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 9, "graph": null}', "\x00"])
def test_a_folder_that_is_no_index_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder of an index"):
        open_index(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match="expected"):
        open_index(tmp_path)


def test_files_that_the_description_omits_are_no_way_around_its_check(tmp_path: Path) -> None:
    save_index(ExactIndex(*table(60)), tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(about | {"files": {}}))
    with pytest.raises(DataError, match="damaged"):
        open_index(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(about | {"graph": "../x"}))
    with pytest.raises(DataError, match="format"):
        open_index(tmp_path)


def test_a_graph_of_other_items_is_refused() -> None:
    graph = GraphIndex(ExactIndex(*table(20))).graph
    with pytest.raises(DataError, match="expected a graph of 21 items"):
        GraphIndex(ExactIndex(*table(21)), graph=(graph, 99.0))
