"""Federated training with attackers among the clients, all in one process.

Undefended, sums of integers in the clear: exactly what encryption gives, in a plan so wide that
nothing wraps. Defended, the real thing: encryption, sketches, verdicts, release. A round whose sum
cannot be read is lost, and the model stays as it is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secagg.aggregator import Aggregator
from secagg.challenger import Challenger
from secagg.context import rotation_string
from secagg.direction import Direction
from secagg.encryptor import encrypt_quantized
from secagg.errors import ReleaseError
from secagg.keyholder import KeyHolder
from secagg.packing import pack
from secagg.parameters import FloatSegment, NormCheck, Plan, TensorSpec
from secagg.planner import make_plan
from secagg.quantize import Quantized, flatten, quantize_update, unflatten
from secagg.receipts import SigningKey
from secagg.release import Release
from secagg.upload import Upload
from secagg_bench.gallery import uploads
from secagg_bench.gallery.attacks import Attack, Situation, with_flipped_labels
from secagg_client.repeatable import repeatable_rounding
from secagg_recommender.evaluation import Evaluator, Metrics, factor_scores
from secagg_recommender.factorisation import (
    ITEM_BIAS,
    ITEM_FACTORS,
    SharedTensors,
    Silo,
    TrainConfig,
    init_shared,
)
from secagg_recommender.interactions import NO_TEST_ITEM, Split
from secagg_recommender.partition import partition_users

__all__ = ["Defence", "Federation", "Run", "Setting", "partition", "target_item", "taste_silos"]

TASK = "task"
Defence = Literal["none", "norm", "norm and direction"]
Users = list[NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of a gallery share.

    Attributes:
        silos: clients, each with its part of the users.
        rounds: of training.
        dimensions: length of user and item vectors.
        clip: L2 norm to which honest updates are cut, in model units.
        weight_cap: training interactions beyond which a silo gains no more weight; 0 for equal
            weights.
        min_cosine: of the direction check, where it is on.
        seed: of training, attacks and evaluation.
    """

    silos: int = 10
    rounds: int = 8
    dimensions: int = 16
    clip: float = 40.0
    weight_cap: int = 0
    min_cosine: float = 0.0
    seed: int = 0

    def plan(self, n_items: int, defence: Defence) -> Plan:
        """The plan of every round."""
        tensors = (
            TensorSpec(ITEM_FACTORS, (n_items, self.dimensions)),
            TensorSpec(ITEM_BIAS, (n_items,)),
        )
        weighting = "samples" if self.weight_cap else "equal"
        update = FloatSegment("update", tensors, self.clip, 8, weighting, max(1, self.weight_cap))
        check = None
        if defence != "none":
            cosine = self.min_cosine if defence == "norm and direction" else None
            check = NormCheck(min_cosine=cosine)
        return make_plan([update], max_clients=self.silos, norm_check=check)


@dataclass(frozen=True, slots=True)
class Run:
    """What became of one run.

    Attributes:
        hr10, ndcg10, full_hr10: of honest clients' users, on the last model; 0 if not finite.
        target_rank: median over the same users of the promoted item's place, from 1, among all
            items that the user has not trained on.
        target_share: of users that have it in their first ten.
        attacker_uploads, attacker_refusals: over all rounds.
        honest_uploads, honest_refusals: over all rounds.
        lost_rounds: whose sum could not be read.
        models: SHA-256 of the model after each round.
        cosines: of each honest update with the last aggregate, from the second round on.
        norms: of each honest update before it is cut, in each round.
    """

    hr10: float
    ndcg10: float
    full_hr10: float
    target_rank: float
    target_share: float
    attacker_uploads: int
    attacker_refusals: int
    honest_uploads: int
    honest_refusals: int
    lost_rounds: int
    models: tuple[str, ...] = field(repr=False)
    cosines: tuple[tuple[float, ...], ...] = field(repr=False)
    norms: tuple[tuple[float, ...], ...] = field(repr=False)

    def summary(self) -> dict[str, float]:
        """All numbers but the lists."""
        return {k: v for k, v in asdict(self).items() if not isinstance(v, tuple)}


def taste_silos(split: Split, silos: int) -> Users:
    """Users in the order of the second left singular vector of the training matrix, cut up.

    The first singular vector is how much somebody watches, the second the coarsest taste.
    """
    matrix = np.zeros((split.n_users, split.n_items), dtype=np.float32)
    matrix[split.train_users, split.train_items] = 1.0
    left, _, _ = np.linalg.svd(matrix, full_matrices=False)
    order = np.argsort(left[:, 1], kind="stable")
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, silos)]


def partition(split: Split, silos: int, kind: str, seed: int) -> Users:
    """Users of each silo: ``"taste"`` or ``"random"``."""
    return (
        taste_silos(split, silos)
        if kind == "taste"
        else partition_users(split.n_users, silos, seed)
    )


def target_item(split: Split) -> int:
    """The item that fewest people have, of those that somebody has."""
    counts = np.bincount(split.train_items, minlength=split.n_items)
    return int(np.argmin(np.where(counts > 0, counts, np.iinfo(np.int64).max)))


@dataclass(frozen=True, slots=True)
class _Sent:
    """One client's integers of one round."""

    client: int
    values: NDArray[np.int64]


class Federation:
    """Clients, some of which attack, and one model.

    Args:
        split: everybody's interactions.
        users: of each client.
        setting: see the class.
        attack: what attackers do; nobody attacks when omitted.
        attackers: which clients do it.
        absent: clients that do not take part, and whose users do not count, as attackers' do not.
    """

    def __init__(
        self,
        split: Split,
        users: Users,
        setting: Setting,
        attack: Attack | None = None,
        attackers: Sequence[int] = (),
        absent: Sequence[int] = (),
    ) -> None:
        self._split, self._users, self._setting = split, users, setting
        self._attack, self._attackers = attack, frozenset(attackers)
        self._absent = frozenset(absent)
        config = TrainConfig(dimensions=setting.dimensions, seed=setting.seed)
        taught = split
        if attack is not None and attack.labels == "flipped":
            theirs = np.concatenate([users[index] for index in sorted(self._attackers)])
            taught = with_flipped_labels(split, theirs, setting.seed)
        self._silos = [
            Silo(index, taught if index in self._attackers else split, part, config)
            for index, part in enumerate(users)
        ]
        self._rng = np.random.default_rng([setting.seed, 7])
        self._keys = [SigningKey.generate() for _ in users]
        self._target = target_item(split)
        self._served = np.sort(
            np.concatenate(
                [
                    part
                    for index, part in enumerate(users)
                    if index not in self._attackers | self._absent
                ]
            )
        )

    def run(self, defence: Defence, *, clear: bool = False) -> Run:
        """Train all rounds.

        Args:
            defence: what stands between the uploads and the sum.
            clear: add the same integers in the clear, and check nothing.
        """
        setting = self._setting
        plan = setting.plan(self._split.n_items, defence)
        (segment,) = plan.segments
        assert isinstance(segment, FloatSegment)  # noqa: S101 - for the type checker
        model = flatten(segment, init_shared(self._split.n_items, setting.dimensions, setting.seed))
        sent_by, refused_of = Counter[str](), Counter[str]()
        moved: NDArray[np.float32] | None = None
        models, cosines, norms, lost = [], [], [], 0
        for number in range(1, setting.rounds + 1):
            sent, updates = self._round(plan, segment, model, number)
            norms.append(tuple(float(np.linalg.norm(each)) for each in updates))
            if moved is not None:
                cosines.append(tuple(_cosine(each, moved) for each in updates))
            accepted, release = (
                self._in_the_clear(plan, sent, number)
                if clear or defence == "none"
                else self._encrypted(plan, segment, sent, number, moved)
            )
            for each in sent:
                who = "attacker" if each.client in self._attackers else "honest"
                sent_by[who] += 1
                refused_of[who] += each.client not in accepted
            try:
                after = release.applied_to(model) if release else model
            except ReleaseError:
                release, after = None, model
            lost += release is None
            moved = after - model if release else None
            model = after
            models.append(hashlib.sha256(model.astype("<f4").tobytes()).hexdigest())
        metrics, rank, share = self._measured(segment, model)
        return Run(
            hr10=metrics.hr10,
            ndcg10=metrics.ndcg10,
            full_hr10=metrics.full_hr10,
            target_rank=rank,
            target_share=share,
            attacker_uploads=sent_by["attacker"],
            attacker_refusals=refused_of["attacker"],
            honest_uploads=sent_by["honest"],
            honest_refusals=refused_of["honest"],
            lost_rounds=lost,
            models=tuple(models),
            cosines=tuple(cosines),
            norms=tuple(norms),
        )

    def _round(
        self, plan: Plan, segment: FloatSegment, model: NDArray[np.float32], number: int
    ) -> tuple[list[_Sent], list[NDArray[np.float32]]]:
        """What every client sends, and the honest clients' updates."""
        rotation = rotation_string(TASK, number, plan)
        sent, updates = [], []
        tensors = _tensors(segment, model)
        for index, silo in enumerate(self._silos):
            if index in self._absent:
                continue
            trained = silo.train(tensors, number)
            if index in self._attackers and self._attack is not None:
                seen = Situation(
                    segment,
                    rotation,
                    flatten(segment, trained.update),
                    model,
                    len(self._silos),
                    len(self._attackers),
                    self._target,
                    self._rng,
                )
                sent.append(_Sent(index, self._attack.integers(seen)))
                continue
            updates.append(flatten(segment, trained.update))
            quantized = quantize_update(
                segment,
                trained.update,
                samples=trained.samples,
                rotation=rotation,
                randomness=repeatable_rounding(self._setting.seed, index, number),
            )
            sent.append(_Sent(index, quantized.values))
        return sent, updates

    def _in_the_clear(self, plan: Plan, sent: list[_Sent], number: int) -> tuple[set[int], Release]:
        total = np.sum([each.values for each in sent], axis=0)
        rotation = rotation_string(TASK, number, plan)
        return {each.client for each in sent}, Release(plan, rotation, len(sent), (total,))

    def _encrypted(
        self,
        plan: Plan,
        segment: FloatSegment,
        sent: list[_Sent],
        number: int,
        moved: NDArray[np.float32] | None,
    ) -> tuple[set[int], Release | None]:
        holder = KeyHolder(plan, task_id=TASK, round_number=number)
        context = holder.context
        compared = plan.norm_check is not None and plan.norm_check.min_cosine is not None
        direction = None
        if compared and moved is not None:
            direction = Direction.of(segment, moved, context.rotation)
        challenger = Challenger(context, direction=direction)
        arrived: dict[bytes, tuple[int, Upload]] = {}
        for each in sent:
            key = self._keys[each.client]
            commitment = challenger.commitment(key.public)
            if each.client in self._attackers:
                plaintext = pack(plan.layouts[0], each.values)
                upload = uploads.upload(context, plaintext, key, commitment)
            else:
                upload = encrypt_quantized(context, [Quantized(each.values)], key, commitment)
            arrived[upload.admission.receipt.upload_digest] = (each.client, upload)
            holder.admit(upload.admission)
            holder.submit_sketch(challenger.sketch(upload))
        aggregator, accepted = Aggregator(context), set()
        for verdict in holder.verdicts():
            client, upload = arrived[verdict.receipt.upload_digest]
            if verdict.accepted:
                aggregator.add(upload)
                accepted.add(client)
        if len(accepted) < plan.min_clients:
            return accepted, None
        try:
            return accepted, holder.release(aggregator.aggregate())
        except ReleaseError:
            return accepted, None

    def _measured(
        self, segment: FloatSegment, model: NDArray[np.float32]
    ) -> tuple[Metrics, float, float]:
        """Quality, and where the target stands."""
        if not np.isfinite(model).all():
            return Metrics(0.0, 0.0, 0.0, 0.0), float(self._split.n_items), 0.0
        vectors = np.empty((self._split.n_users, self._setting.dimensions), dtype=np.float32)
        for silo in self._silos:
            vectors[silo.users] = silo.user_vectors
        shared = _tensors(segment, model)
        scores = factor_scores(vectors, shared)
        measured = self._evaluator.evaluate(scores)
        everything = scores(self._served)
        owned = np.zeros((self._split.n_users, self._split.n_items), dtype=bool)
        owned[self._split.train_users, self._split.train_items] = True
        owned = owned[self._served]
        own = everything[:, [self._target]]
        ranks = 1 + np.count_nonzero((everything > own) & ~owned, axis=1)
        ranks = ranks[~owned[:, self._target]]
        return (
            measured,
            float(np.median(ranks)),
            float(np.mean(ranks <= 10)),
        )

    @cached_property
    def _evaluator(self) -> Evaluator:
        test_item = np.full_like(self._split.test_item, NO_TEST_ITEM)
        test_item[self._served] = self._split.test_item[self._served]
        return Evaluator(replace(self._split, test_item=test_item), self._setting.seed + 1)


def _tensors(segment: FloatSegment, model: NDArray[np.float32]) -> SharedTensors:
    return {
        name: part.astype(np.float32)
        for name, part in unflatten(segment, model.astype(np.float64)).items()
    }


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0
