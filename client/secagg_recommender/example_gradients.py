"""One noisy gradient step over a batch of examples, with opacus: DP-SGD that bounds every example.

DP-SGD is Abadi et al. 2016 (arXiv 1607.00133): the gradient of each example is cut to an L2 norm,
over **all** parameters together, the cut gradients are added, and noise goes on every sum. opacus
tells the examples' gradients apart and runs the step; this module replaces what floating point
would make unsound:

* each cut gradient is truncated to integers, on a grid of 2⁻³⁰ of the norm, *before* it is added.
  Truncation shortens, so the norm holds exactly, and integer sums do not depend on their order
  (added as floats they do, and one example then moves the sum by more than the norm: Casacuberta et
  al. 2022, arXiv 2207.10635);
* the noise is an integer too, a discrete Gaussian from a cryptographic stream, so that its low bits
  tell nothing (Mironov 2012); opacus' secure mode would need a package that is not to be had;
* batches are padded, so that an example's gradient has the same bits whatever it is batched with.

The accountant counts continuous Gaussian noise. Rounded to integers, which costs nothing where the
sums are integers, its mass at x is that of the discrete one times 1 + (x²/s² − 1) / 24s² (midpoint
rule; s is the deviation on the grid). So n draws are within total variation √n / 24s² of it (χ²
bounds KL, which adds up; Pinsker), and a guarantee's delta grows by (1 + exp(epsilon)) times that
and the sampler's own n 2⁻⁷²: by under 2⁻²⁶ in all for n = 2³⁴, a noise multiplier from ½ and
epsilon = 8.

Needs opacus; import it late. Read ``example_privacy`` first.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import nn
from torch.nn import functional

from secagg.discrete_gaussian import discrete_gaussian
from secagg.sampling import Stream

__all__ = ["BOUND", "Examples", "GridOptimizer", "Recommender"]

BOUND: Final = 1 << 30
"""L2 norm of the integers that one example adds at most: how finely gradients are resolved."""

# Keeps the rounding of norm and quotient, 2**-52 each, below the bound.
_REACH: Final = BOUND * (1.0 - 2.0**-40)
# Vector instructions treat the last few numbers of an array differently; with this many rows there
# are no last few. A test compares bits.
_ROWS: Final = 64


class Examples:
    """A batch, padded to a multiple of 64 rows that weigh nothing; it may be empty.

    *Shapes*: ``users`` ``(m,)`` and ``items`` ``(m, 1 + negatives)``, the positive first; int64.
    """

    def __init__(self, users: npt.NDArray[np.int64], items: npt.NDArray[np.int64]) -> None:
        empty = -users.size % _ROWS or (_ROWS if users.size == 0 else 0)
        self.users = torch.from_numpy(np.pad(users, (0, empty))[:, None])
        self.items = torch.from_numpy(np.pad(items, ((0, empty), (0, 0))))
        self.weights = (torch.arange(users.size + empty) < users.size).double()


class _TouchedRows(nn.Embedding):
    """A table of which an example touches few rows: gradients are kept of those rows alone."""


@register_grad_sampler(_TouchedRows)  # type: ignore[untyped-decorator]
def _touched_gradients(
    layer: _TouchedRows, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Gradient of each example, ``(m, slots, width)``; the rows it is for, ``weight.touched``.

    A row that an example touches twice has its whole gradient in the first of its slots and zeros
    in the other, as the norm is one of sums. opacus' own sampler gives ``(m, rows, width)``, mostly
    zeros: with a catalogue of n items, n / slots times the memory.
    """
    rows = activations[0]
    first = (rows[:, :, None] == rows[:, None, :]).byte().argmax(dim=2)
    merged = torch.zeros_like(backprops)
    merged.scatter_add_(1, first[:, :, None].expand_as(backprops), backprops)
    layer.weight.touched = rows  # type: ignore[attr-defined]
    return {layer.weight: merged}


class Recommender(nn.Module):
    """All that training changes, in float64, the private user vectors included.

    An example's gradient depends on its user's vector. Were that fitted outside, to the other
    interactions of the user, then each of these would reach the sums through every example of the
    user, and no norm would bound that.

    *Shapes*: ``vectors`` ``(users, d)``, ``factors`` ``(n_items, d)``, ``bias`` ``(n_items,)``.
    """

    def __init__(
        self,
        vectors: npt.NDArray[np.float32],
        factors: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
    ) -> None:
        super().__init__()
        self.vectors = _table(vectors)
        self.factors = _table(factors)
        self.bias = _table(bias[:, None])

    def forward(self, batch: Examples, l2: float) -> torch.Tensor:
        """Loss of each example, ``(m,)``: what `model.Silo` minimises the mean of."""
        user, item = self.vectors(batch.users), self.factors(batch.items)
        item_bias = self.bias(batch.items)[:, :, 0]
        # Not a matrix product: its order of additions may depend on the size of the batch.
        logits = (item * user).sum(dim=2) + item_bias
        target = torch.zeros_like(logits)
        target[:, 0] = 1.0
        entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        penalty = user.square().sum(dim=(1, 2)) + item.square().sum(dim=2).mean(dim=1)
        penalty = penalty + item_bias.square().mean(dim=1)
        loss: torch.Tensor = entropy.mean(dim=1) + 0.5 * l2 * penalty
        return loss


class GridOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus is not typed
    """opacus' optimiser over :class:`Recommender`, with integers where privacy is decided.

    Args:
        model: what :meth:`descend` trains.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``, rounded up on the
            grid; 0 adds none, which protects nothing.
        max_grad_norm: L2 norm to which an example's gradient over all parameters is cut.
        expected_batch_size: what sums are divided by; the true size of a batch is private.
        learning_rate: of plain gradient descent, which needs no state.
        stream: where the noise comes from; secret.
    """

    def __init__(
        self,
        model: Recommender,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        learning_rate: float,
        stream: Stream,
    ) -> None:
        self._module = GradSampleModule(model, loss_reduction="sum")
        super().__init__(
            torch.optim.SGD(model.parameters(), lr=learning_rate),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._std = math.ceil(noise_multiplier * BOUND)
        self._stream = stream

    def descend(self, batch: Examples, l2: float) -> None:
        """One step: a batch's gradients, cut, added, hidden in noise, and followed."""
        self.zero_grad()
        loss = (self._module(batch, l2) * batch.weights).sum()
        with warnings.catch_warnings():
            # torch tells opacus' hooks what they know: row numbers have no gradient.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            loss.backward()
        self.step()

    def clip_and_accumulate(self) -> None:
        """Cut and truncate each example; ``summed_grad`` of a parameter is int64 on the grid.

        The sums without any one example differ by integers of an L2 norm of at most :data:`BOUND`,
        over all parameters together: checked in exact arithmetic, for whatever gradients come.
        """
        cut = _truncated(self.grad_samples, self.max_grad_norm)
        for parameter, integers in zip(self.params, cut, strict=True):
            _check_processed_flag(parameter.grad_sample)
            total = torch.zeros(parameter.shape, dtype=torch.int64)
            rows = parameter.touched.reshape(-1)
            parameter.summed_grad = total.index_add_(0, rows, integers.flatten(0, 1))
            _mark_as_processed(parameter.grad_sample)

    def add_noise(self) -> None:
        """Add a discrete Gaussian to every integer; ``grad`` is what results, in model units."""
        for parameter in self.params:
            total = parameter.summed_grad
            _check_processed_flag(total)
            if self._std:
                noise = discrete_gaussian(self._stream, self._std, total.numel())
                total = total + torch.from_numpy(noise).view_as(total)
            parameter.grad = total.double() * (self.max_grad_norm / BOUND)
            _mark_as_processed(parameter.summed_grad)


def _truncated(gradients: list[torch.Tensor], max_grad_norm: float) -> list[torch.Tensor]:
    """Gradients of each example as integers within the bound, int64 of the same shapes."""
    flat = [gradient.flatten(1) / max_grad_norm for gradient in gradients]
    squares = sum((part.square().sum(dim=1) for part in flat), torch.zeros(len(flat[0])).double())
    scale = _REACH / squares.sqrt().clamp(min=1.0)
    integers = [(part * scale[:, None]).nan_to_num(0.0, 0.0, 0.0).long() for part in flat]
    # Not reached by any gradient we know; keeps the promise if there is one.
    within = sum((part.square().sum(dim=1) for part in integers), torch.tensor(0)) <= BOUND**2
    return [
        (part * within[:, None]).view_as(gradient)
        for part, gradient in zip(integers, gradients, strict=True)
    ]


def _table(values: npt.NDArray[np.float32]) -> _TouchedRows:
    weights: Any = torch.from_numpy(values.astype(np.float64))
    return _TouchedRows.from_pretrained(weights, freeze=False)  # type: ignore[no-any-return,no-untyped-call]
