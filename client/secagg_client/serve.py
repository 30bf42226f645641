"""Recommendations on the device, with reasons, and refined by a server where the user allows it.

By a trained vector, one fitted to a few items, a model of histories, or a cohort. What is fetched
is whole: a model, a table for all items. Nothing that is asked of a server depends on who asks,
what they have, or what they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from secagg.archive import read_npz
from secagg.errors import ConfigurationError
from secagg_client.config import ClientSettings
from secagg_client.learners import train_config
from secagg_client.session import ClientSession
from secagg_client.session_task import session_model_of
from secagg_client.state_dir import StateDir
from secagg_recommender.cohorts import AGE_GENDER, CohortTable
from secagg_recommender.datasets import Dataset, read_dataset
from secagg_recommender.explain import fit_effects, history_effects, reasons
from secagg_recommender.factorisation import ITEM_BIAS, ITEM_FACTORS, SharedTensors, fit_user
from secagg_recommender.graph_index import GraphIndex
from secagg_recommender.histories import HistoryModel, history_model
from secagg_recommender.hybrid import ServerScores, refine
from secagg_recommender.index import ExactIndex, Hits, ItemIndex
from secagg_recommender.index_files import open_index, save_index
from secagg_recommender.interactions import DataError, Interactions, split_leave_one_out
from secagg_recommender.recommend import best_items, titled
from secagg_recommender.session_model import SESSION_TENSORS, SessionModel
from secagg_recommender.stacked import StackedModel
from secagg_recommender.transitions import Transitions

__all__ = ["CohortStart", "IndexKind", "ServerHelp", "Suggestion", "recommend_for"]

IndexKind = Literal["exact", "usearch"]
_Tensors = dict[str, NDArray[Any]]
_Ids = NDArray[np.int64]

# So many times the list is what a server's scores may choose from.
_CANDIDATES = 5


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One line of the list, with the item's own label and title.

    Attributes:
        because: titles of the own items that add most to the score; empty unless asked for.
    """

    rank: int
    item: str
    title: str
    score: float
    because: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CohortStart:
    """Where somebody new starts from.

    Attributes:
        name: the cohort, in `AGE_GENDER`. It stays on the device.
        table: archive with the released ``cohort_counts``, or a cohort task's model.
        clients: who took part, where the table is a model, hence a mean.
        least: the threshold of that task.
    """

    name: str
    table: Path
    clients: int = 1
    least: int = 5


@dataclass(frozen=True, slots=True)
class ServerHelp:
    """A server's scores: of a task by its name, or an archive; and what they weigh, 0 to 1."""

    source: str
    weight: float = 0.3


class _Ranker(Protocol):
    """Finds candidates for a history, and says what of it they are due to."""

    def best(self, own: _Ids, k: int) -> Hits: ...

    def effects(self, own: _Ids, items: _Ids) -> NDArray[np.float64]: ...


def recommend_for(
    settings: ClientSettings,
    *,
    user: str | None,
    items: str | None,
    top: int,
    model: Path | None,
    pairs: Path | None = None,
    explain: bool = False,
    index: IndexKind = "exact",
    memory_mb: int = 1024,
    cohort: CohortStart | None = None,
    server: ServerHelp | None = None,
) -> list[Suggestion]:
    """The ``top`` best items for a user of the data set, or for somebody who likes ``items``.

    Args:
        user: label of a user; its own training items are left out.
        items: comma-separated labels of items that an unseen user likes; may be empty with a
            cohort.
        model: ``.npz`` with the shared tensors, or of a model of histories; the server's newest
            version when None. With a cohort and no items, none is needed.
        pairs: what `count-model` made of a round of ``--model transitions``, to put on top of a
            session model.
        explain: say for each item which of the own items it is due to.
        index: how to find the best items of a factor model; ``"usearch"`` keeps its graph in the
            state directory and builds it again when the model is another.
        memory_mb: most memory for an exact index.
        cohort: start from what people of a cohort have, in place of what all have.
        server: refine by a server's scores; needs ``allow_server_scores``.

    Raises:
        ConfigurationError: server scores that the user has not allowed, or usearch is missing.
        DataError: neither or both given, an unknown label or cohort, or a model that does not fit.
        SecaggError: the server cannot be reached.
    """
    if server is not None and not settings.allow_server_scores:
        raise ConfigurationError(
            "expected the user's permission to use server scores; got none; set "
            "allow_server_scores (the server learns that this client fetches the table, and "
            "nothing else), or leave --server-scores out"
        )
    if (user is None) == (items is None) and (user is not None or cohort is None):
        raise DataError(
            "expected either a user or a list of items, or a cohort alone; give exactly one of them"
        )
    dataset = read_dataset(settings.dataset, settings.data_dir)
    interactions = dataset.interactions
    own = _history(interactions, user, items, may_be_empty=cohort is not None)
    start = None if cohort is None else _start(cohort, interactions.n_items)
    if start is not None and own.size == 0:
        ranker: _Ranker = _Start(start)
    else:
        tensors = read_npz(model) if model else _fetched(settings, settings.task)
        of_histories = _history_model(tensors, dataset, pairs)
        ranker = _ranker(
            settings, interactions, tensors, of_histories, user, start, index, memory_mb
        )
    found = ranker.best(own, top if server is None else _CANDIDATES * top)
    if server is not None:
        scores = ServerScores.from_model(_server_tensors(settings, server.source))
        found = refine(found, scores.of(0, interactions.n_items), top, server.weight)
    suggestions = _labelled(found, interactions)
    if not explain or own.size == 0:
        return suggestions
    return _explained(suggestions, own, ranker.effects(own, found.items), interactions)


@dataclass(frozen=True)
class _Start:
    """A cohort alone, for an empty history."""

    scores: NDArray[np.float64]

    def best(self, own: _Ids, k: int) -> Hits:
        return best_items(self.scores, own, k)

    def effects(self, own: _Ids, items: _Ids) -> NDArray[np.float64]:
        return np.zeros((own.size, items.size))


@dataclass(frozen=True)
class _ByHistory:
    model: HistoryModel

    def best(self, own: _Ids, k: int) -> Hits:
        return best_items(self.model.score(own), own, k)

    def effects(self, own: _Ids, items: _Ids) -> NDArray[np.float64]:
        return history_effects(self.model, own, items)


@dataclass(frozen=True)
class _ByFactors:
    """A factor model; its biases give way to a cohort's start for ranking, not for fitting."""

    settings: ClientSettings
    shared: SharedTensors
    user: int | None
    start: NDArray[np.float64] | None
    index: IndexKind
    memory_mb: int

    def best(self, own: _Ids, k: int) -> Hits:
        return self._index().search(self._vector(own), k, own)

    def effects(self, own: _Ids, items: _Ids) -> NDArray[np.float64]:
        config = train_config(self.settings)
        return fit_effects(
            self._vector(own), self.shared, own, items, l2=config.l2, negatives=config.negatives
        )

    def _vector(self, own: _Ids) -> NDArray[np.float32]:
        state = StateDir(self.settings.state_dir, self.settings.task)
        trained = None if self.user is None else state.user_vector(self.user)
        return (
            fit_user(self.shared, own, train_config(self.settings)) if trained is None else trained
        )

    def _index(self) -> ItemIndex:
        bias = self.shared[ITEM_BIAS] if self.start is None else self.start.astype(np.float32)
        budget = self.memory_mb << 20
        exact = ExactIndex(self.shared[ITEM_FACTORS], bias, budget_bytes=budget)
        if self.index == "exact":
            return exact
        folder = self.settings.state_dir / "index"
        try:
            return open_index(folder, model=exact.digest, budget_bytes=budget)
        except DataError:  # none yet, or another model's
            built = GraphIndex(exact)
            save_index(built, folder)
            return built


def _ranker(
    settings: ClientSettings,
    interactions: Interactions,
    tensors: _Tensors,
    by_history: HistoryModel | None,
    user: str | None,
    start: NDArray[np.float64] | None,
    index: IndexKind,
    memory_mb: int,
) -> _Ranker:
    """The way to rank by this model, if it is one of this catalogue."""
    if by_history is None and not {ITEM_FACTORS, ITEM_BIAS} <= tensors.keys():
        raise DataError(
            f"expected a model with {ITEM_FACTORS} and {ITEM_BIAS}, or one of histories; it has "
            f"{sorted(tensors)}"
        )
    n_items = tensors[ITEM_BIAS].size if by_history is None else by_history.n_items
    if n_items != interactions.n_items:
        raise DataError(
            f"expected a model of {interactions.n_items} items; got {n_items}; "
            "use the data set that the model was trained on"
        )
    if by_history is not None:
        if start is not None or index != "exact":
            raise DataError(
                "expected a factor model for an index or for a cohort beside a history; got a "
                "model of histories; leave --index and --cohort out"
            )
        return _ByHistory(by_history)
    shared = {name: tensors[name] for name in (ITEM_FACTORS, ITEM_BIAS)}
    number = None if user is None else interactions.user_labels.index(user)
    return _ByFactors(settings, shared, number, start, index, memory_mb)


def _history_model(tensors: _Tensors, dataset: Dataset, pairs: Path | None) -> HistoryModel | None:
    """The model of histories that this is, on top of which counted pairs may be put."""
    found = history_model(tensors)
    if found is None and tensors.keys() >= SESSION_TENSORS:
        found = session_model_of(tensors, dataset)
    if pairs is None:
        return found
    counted = history_model(read_npz(pairs))
    if not (isinstance(found, SessionModel) and isinstance(counted, Transitions)):
        raise DataError(
            "expected a session model, and pairs of --model transitions to put on top of it; got "
            "another kind of one of the two; leave --pairs out"
        )
    return StackedModel(found, counted)


def _fetched(settings: ClientSettings, task: str) -> _Tensors:
    """The newest model of a task, whole."""
    with ClientSession(
        settings.server, task, settings.credentials(), insecure=settings.insecure
    ) as session:
        return dict(session.latest_model().tensors)


def _server_tensors(settings: ClientSettings, source: str) -> _Tensors:
    return read_npz(Path(source)) if source.endswith(".npz") else _fetched(settings, source)


def _start(cohort: CohortStart, n_items: int) -> NDArray[np.float64]:
    """Log-odds of the catalogue for a cohort."""
    if cohort.name not in AGE_GENDER:
        raise DataError(
            f"expected a cohort in {list(AGE_GENDER)}, got another; leave it out to start from "
            "what is popular"
        )
    tensors = read_npz(cohort.table)
    table = CohortTable.from_model(tensors, len(AGE_GENDER), cohort.least, cohort.clients)
    if table.n_items != n_items:
        raise DataError(
            f"expected cohort counts of {n_items} items, got {table.n_items}; use the data set "
            "that they were counted in"
        )
    return table.start(AGE_GENDER.index(cohort.name))


def _history(
    interactions: Interactions, user: str | None, items: str | None, *, may_be_empty: bool
) -> _Ids:
    """Own items: a user's in time order, or those named."""
    if user is not None:
        number = int(_ids("user", interactions.user_labels, [user])[0])
        return split_leave_one_out(interactions).items_of(number).astype(np.int64)
    wanted = [label.strip() for label in (items or "").split(",") if label.strip()]
    if may_be_empty and not wanted:
        return np.empty(0, dtype=np.int64)
    # Once each: what is liked twice is liked.
    return _ids("item", interactions.item_labels, list(dict.fromkeys(wanted)))


def _ids(kind: str, labels: tuple[str, ...], wanted: list[str]) -> _Ids:
    numbers = {label: number for number, label in enumerate(labels)}
    unknown = [label for label in wanted if label not in numbers]
    if unknown or not wanted:
        # Who is in the data is nobody's business; what is in the shop is no secret.
        such = f", such as {', '.join(labels[:3])}" if kind == "item" else ""
        raise DataError(
            f"expected {kind} labels of this data set{such}; got unknown={unknown[:5]}; correct "
            "them, or start from a cohort where there are none"
        )
    return np.array([numbers[label] for label in wanted], dtype=np.int64)


def _labelled(found: Hits, interactions: Interactions) -> list[Suggestion]:
    return [
        Suggestion(row.rank, interactions.item_labels[row.item], row.title, row.score)
        for row in titled(found, interactions.item_titles, interactions.n_items)
    ]


def _explained(
    suggestions: list[Suggestion],
    own: _Ids,
    effects: NDArray[np.float64],
    interactions: Interactions,
) -> list[Suggestion]:
    titles = interactions.item_titles
    return [
        replace(row, because=tuple(titles[reason.item] for reason in reasons(own, column)))
        for row, column in zip(suggestions, effects.T, strict=True)
    ]
