"""The archs that a search evaluates: each once, and none above the cost limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from proard.config import UserError

Predict = Callable[[np.ndarray], np.ndarray]  # genotypes (n, genes) -> clean and robust accuracy (n, 2)
Cost = Callable[[np.ndarray], np.ndarray]  # genotypes (n, genes) -> one or several costs (n, costs)
Canonical = Callable[[np.ndarray], np.ndarray]  # genotypes (n, genes) -> the same archs, one genotype per arch

UNIFORM_ROUNDS, SCALED_ROUNDS, ROUNDS = 8, 8, 40  # of drawing new archs
DRAWS_PER_ROUND = 16_384  # at most


@dataclass(frozen=True)
class Archive:
    """Distinct archs in the order of their evaluation.

    Attributes
    ----------
    genotypes : ndarray of shape (n, genes)
        Canonical.
    accuracies : ndarray of shape (n, 2)
        Predicted clean and robust accuracy, fractions.
    costs : ndarray of shape (n, costs)
        In the units of the cost function.
    generations : ndarray of shape (n,)
        Generation of the evaluation, from 1.
    """

    genotypes: np.ndarray
    accuracies: np.ndarray
    costs: np.ndarray
    generations: np.ndarray

    def __len__(self) -> int:
        """Archs evaluated."""
        return len(self.costs)

    @property
    def objectives(self) -> np.ndarray:
        """To be minimised: minus clean, minus robust accuracy, each cost; of shape (n, 2 + costs)."""
        return np.column_stack([-self.accuracies, self.costs])


class Evaluations:
    """Evaluates the objectives and keeps all results.

    Parameters
    ----------
    predict, cost, canonical : callable
        Functions of whole populations.
    choices : sequence of int
        Number of choices of every gene; a limited cost must not decrease when a gene increases.
    max_cost : sequence of float, optional
        A limit of each cost, infinity for none; archs above one are never evaluated, as costs are exact and take no
        prediction.

    Raises
    ------
    UserError
        No arch is within a limit; the message names the smallest feasible cost.
    """

    def __init__(
        self,
        predict: Predict,
        cost: Cost,
        choices: Sequence[int],
        canonical: Canonical,
        *,
        max_cost: Sequence[float] | None,
    ) -> None:
        self.predict, self.cost, self.canonical, self.max_cost = predict, cost, canonical, max_cost
        self.choices = np.asarray(choices)
        smallest = cost(np.zeros((1, len(self.choices)), dtype=np.int64))[0].tolist()
        self.num_objectives = 2 + len(smallest)
        for limit, least in zip(max_cost or (), smallest, strict=max_cost is not None):
            if limit < least:
                raise UserError(
                    f"search_front.max_cost is {limit:.0f}; no arch of the space is that small, "
                    f"the smallest feasible cost is {least:.0f}"
                )
        self.seen: set[bytes] = set()
        self.batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def keys(self, genotypes: np.ndarray) -> list[bytes]:
        """Equal bytes for equal archs, different ones for different archs."""
        rows = np.ascontiguousarray(self.canonical(genotypes), dtype=np.int16)
        return rows.view(f"S{rows.dtype.itemsize * rows.shape[1]}")[
            :, 0
        ].tolist()  # equally long, but for zeros at the end

    def fresh(self, genotypes: np.ndarray, *, besides: Iterable[bytes] = ()) -> np.ndarray:
        """Rows within the limits that are not evaluated, not in `besides` and not repeated; bool of shape (n,)."""
        genotypes = np.asarray(genotypes, dtype=np.int64)
        rows = np.arange(len(genotypes))
        if self.max_cost is not None:
            rows = np.flatnonzero(np.all(self.cost(genotypes) <= self.max_cost, axis=1))
        keys = self.keys(genotypes[rows])
        first = dict(zip(reversed(keys), reversed(rows.tolist()), strict=True))  # dict keeps the last of equal keys
        kept = np.zeros(len(genotypes), dtype=bool)
        kept[[first[key] for key in set(first).difference(self.seen).difference(besides)]] = True
        return kept

    def evaluate(self, genotypes: np.ndarray) -> np.ndarray:
        """Objectives of a population as `Archive.objectives`; stored as one generation."""
        genotypes = self.canonical(np.asarray(genotypes, dtype=np.int64))
        accuracies, costs = self.predict(genotypes), self.cost(genotypes)
        self.seen.update(self.keys(genotypes))
        self.batches.append((genotypes, accuracies, costs))
        return np.column_stack([-accuracies, costs])

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Up to `count` fresh genotypes, genes uniform and independent; fewer only if hardly any arch is left.

        If the cost limit rejects nearly all such draws, later rounds bound all genes by a common random upper end, and
        the last rounds change genes of archs already found. So archs are found under a tight limit too.
        """
        found = np.zeros((0, len(self.choices)), dtype=np.int64)
        size = 2 * count
        for attempt in range(ROUNDS):
            draws = self._propose(attempt, size, found, rng)
            draws = draws[self.fresh(draws, besides=self.keys(found))]
            found = np.concatenate([found, draws[: count - len(found)]])
            if len(found) == count:
                break
            size = min(2 * size, max(DRAWS_PER_ROUND, count))
        return found

    def _propose(self, attempt: int, size: int, found: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw `size` genotypes for one round of `draw`."""
        scale = rng.random((size, 1)) if attempt >= UNIFORM_ROUNDS else np.ones((size, 1))
        ends = np.minimum(np.floor(scale * self.choices) + 1, self.choices)  # (size, genes)
        draws = np.floor(rng.random(ends.shape) * ends).astype(np.int64)
        if attempt < UNIFORM_ROUNDS + SCALED_ROUNDS:
            return draws
        known = np.concatenate([np.zeros((1, len(self.choices)), dtype=np.int64), found])
        changed = rng.random(draws.shape) < 2 / draws.shape[1]
        return np.where(changed, draws, known[rng.integers(0, len(known), size)])

    def archive(self) -> Archive:
        """Everything evaluated so far."""
        genotypes, accuracies, costs = (np.concatenate(parts) for parts in zip(*self.batches, strict=True))
        generations = np.repeat(np.arange(len(self.batches)) + 1, [len(batch[0]) for batch in self.batches])
        return Archive(genotypes, accuracies, costs, generations)
