"""Move latents until their norms, distances and angles to a domain's latents are those of the domain.

Three ways: `reject` draws until the released rules accept, `project` is a closed form, `descend` follows
gradients. A latent z enters only through ``|z|^2`` and its inner products with the n references, so all
three work on an (m, n) table and the (n, n) Gram matrix. The law to reach is that of the references, each
compared with the *others*: compared with themselves they would look closer than any new latent can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np

from ood_lib import gram
from ood_lib.geometry import Targets, accept, law_of_cosines
from ood_lib.gram import BLOCK, Samples

__all__ = [
    "STATISTICS",
    "History",
    "Optimised",
    "TwoMoments",
    "descend",
    "inside",
    "leave_one_out",
    "optimise",
    "project",
    "reachable",
    "reject",
    "statistics",
    "two_moments",
]

STATISTICS = ("norm", "distance", "origin angle", "vertex angle", "inner spread")
STEERED = ("norm", "distance", "origin angle", "inner spread")
STUCK = 1e6  # damping at which a step is too short to matter
NARROW = 1e-3  # standard deviation over mean below which a statistic counts as constant
FLAT = 1e-9  # sine below which an angle has no gradient worth following
ROUNDING = 1e-12  # squared distance over squared norms below which two float64 latents are equal


# ------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class History:
    """What it took to get the latents.

    Parameters
    ----------
    method : str
        Name of the optimiser.
    wanted : int
        Latents asked for.
    candidates : int
        Candidates spent.
    accepted : int
        Those that met their targets.
    network_calls : int
        0: none of the optimisers decodes.
    seconds : float
        Wall-clock time.
    trace : ndarray of shape (rounds, 2)
        Candidates spent and accepted after each round: a batch of `reject`, a step of `descend`.

    Examples
    --------
    >>> History("reject", 5, 100, 2, 0, 0.1, np.array([[100, 2]])).outcome
    'reject: 2 of 5 latents from 100 candidates; partial'
    """

    method: str
    wanted: int
    candidates: int
    accepted: int
    network_calls: int
    seconds: float
    trace: np.ndarray

    @property
    def rate(self) -> float:
        """Share of the candidates that were accepted, in [0, 1]."""
        return self.accepted / self.candidates

    @property
    def complete(self) -> bool:
        """Whether all latents asked for were found."""
        return self.accepted >= self.wanted

    @property
    def outcome(self) -> str:
        """One line that says what was found and whether it is all."""
        end = "complete" if self.complete else "partial"
        counts = f"{self.accepted} of {self.wanted} latents from {self.candidates} candidates"
        return f"{self.method}: {counts}; {end}"


@dataclass(frozen=True)
class Optimised:
    """Accepted latents, where they come from, and what they cost.

    Parameters
    ----------
    latents : ndarray of shape (k, d)
        The accepted ones.
    indices : ndarray of shape (k,)
        Which candidate each comes from, in the order in which they were given or drawn.
    history : History
        The cost. A partial result says so there.

    Examples
    --------
    >>> history = History("project", 1, 1, 1, 0, 0.1, np.array([[1, 1]]))
    >>> Optimised(np.zeros((1, 3)), np.array([0]), history).history.complete
    True
    """

    latents: np.ndarray
    indices: np.ndarray
    history: History


@dataclass(frozen=True)
class TwoMoments:
    """How much of the rules' statistics two moments say; made by `two_moments`, angles in degrees.

    Parameters
    ----------
    measured : ndarray of shape (4,)
        Means over the latents of the first four `STATISTICS`.
    expected : ndarray of shape (4,)
        The same for any domain with the references' ``|mu|^2`` and ``tr S``.
    share : ndarray of shape (4,)
        Share of each statistic's variance over the latents that ``|z|^2`` and ``z . mean`` explain by
        closed form, nothing fitted: 1 where they say all, 0 or below where they say nothing.

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=(60, 500))
    >>> bool((two_moments(z[30:], z[:30]).share > 0.9).all())
    True
    """

    measured: np.ndarray
    expected: np.ndarray
    share: np.ndarray


# ---------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class _References:
    """Gram matrix of the references, squared norms (n,), and squared distances between neighbours (n,)."""

    gram: np.ndarray
    squares: np.ndarray
    across: np.ndarray

    @property
    def distances(self) -> np.ndarray:
        """Squared distances of all pairs, (n, n)."""
        sums = self.squares[:, None] + self.squares
        return _exact_zeros(sums - 2 * self.gram, sums)


def _exact_zeros(differences: np.ndarray, sums: np.ndarray) -> np.ndarray:
    return np.where(differences > ROUNDING * sums, differences, 0)


def _references(references: Samples, block: int) -> _References:
    products = gram.gram_matrix(references, block=block)
    n, squares = len(products), products.diagonal().copy()
    if n < 4:
        raise ValueError(
            f"{n} references; give 4 or more, so that each can be compared with 3 others"
        )
    if not squares.all():
        raise ValueError(
            f"reference {int(squares.argmin())} is zero everywhere and has no angle at the origin; "
            "leave it out"
        )
    found = _References(products, squares, np.empty(0))
    apart = found.distances
    first, second = np.nonzero(np.triu(apart == 0, 1))
    if len(first):
        raise ValueError(
            f"references {first[0]} and {second[0]} are equal ({len(first)} such pairs); keep one of each"
        )
    return _References(products, squares, apart[np.arange(n), _ahead(n)])


def _ahead(n: int) -> np.ndarray:
    """Neighbour i + 1 of each reference; the first follows the last."""
    return np.roll(np.arange(n), -1)


@dataclass(frozen=True)
class _Table:
    """Squared norms (m,) of latents, their inner products (m, n) with references, and what follows."""

    squares: np.ndarray
    inner: np.ndarray
    references: _References

    @property
    def distances(self) -> np.ndarray:
        """Squared distances (m, n)."""
        sums = self.squares[:, None] + self.references.squares
        return _exact_zeros(sums - 2 * self.inner, sums)

    @property
    def cosines(self) -> np.ndarray:
        """Cosines at the origin (m, n)."""
        norms = np.sqrt(self.squares[:, None] * self.references.squares)
        return np.clip(self.inner / norms, -1, 1)


def _table(candidates: np.ndarray, references: Samples, known: _References, block: int) -> _Table:
    inner = gram.gram_matrix(candidates, references, block=block)
    squares = np.einsum("ij,ij->i", candidates, candidates, dtype=np.float64)
    if not squares.all():
        raise ValueError(
            f"candidate {int(squares.argmin())} is zero everywhere and has no angle at the origin; "
            "leave it out"
        )
    return _Table(squares, inner, known)


def _degrees(cosines: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(cosines))


def _values(table: _Table, name: str) -> np.ndarray:
    """One statistic of latents that are none of the references, (m,)."""
    if name == "norm":
        return np.sqrt(table.squares)
    if name == "distance":
        return np.sqrt(table.distances).mean(axis=1)
    if name == "origin angle":
        return _degrees(table.cosines).mean(axis=1)
    if name == "inner spread":
        return table.inner.std(axis=1)
    apart = table.distances
    right = apart[:, _ahead(apart.shape[1])]
    return _degrees(law_of_cosines(apart, right, table.references.across)).mean(axis=1)


def _means(table: _Table, names: Sequence[str] = STATISTICS) -> np.ndarray:
    return np.stack([_values(table, name) for name in names], axis=1)


def _left_out_means(known: _References) -> np.ndarray:
    """All statistics of each reference against the others, (n, 5)."""
    table, apart = _Table(known.squares, known.gram, known), known.distances
    n = len(apart)
    itself, ahead = np.arange(n), _ahead(n)
    right, across = apart[:, ahead], np.tile(known.across, (n, 1))
    # the neighbours of the one left out become neighbours
    right[ahead, itself] = apart[ahead, ahead[ahead]]
    across[ahead, itself] = apart[itself, ahead[ahead]]
    others = ~np.eye(n, dtype=bool)
    values = [np.sqrt(apart), _degrees(table.cosines)]
    values.append(_degrees(law_of_cosines(apart, right, across)))
    means = [np.sqrt(known.squares), *(v.mean(axis=1, where=others) for v in values)]
    return np.stack([*means, known.gram.std(axis=1, where=others)], axis=1)


def statistics(candidates: np.ndarray, references: Samples, *, block: int = BLOCK) -> np.ndarray:
    """Norm, and mean distance and angles to all references, of each candidate.

    Parameters
    ----------
    candidates : ndarray of shape (m, d)
        Latents, none of them a reference.
    references : samples of shape (n, d)
        Latents of the domain, four or more, no two of them equal and none zero.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    ndarray of shape (m, 5)
        In the order of `STATISTICS`: norm, mean distance, mean angle at the origin, mean angle at the
        candidate between references i and i + 1, both in degrees, and the standard deviation of the
        inner products with the references. The vertex angle of a copy of a reference is NaN.

    Raises
    ------
    ValueError
        If there are fewer than four references, two are equal, a latent is zero, d differs, or a number
        is not finite.

    Notes
    -----
    The released rules (Zhu et al., arXiv:2310.09213) take ten references at random for each mean; all
    of them give the same expectation without the luck of the draw. The inner spread is new: for a mean
    of zero its square is ``z^T S z`` with the references' S, the only one here that sees directions.

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=(20, 2500))
    >>> statistics(z[:1], z[1:]).round(0)[0, :4]
    array([50., 71., 90., 60.])
    """
    return _means(_table(candidates, references, _references(references, block), block))


def leave_one_out(references: Samples, *, block: int = BLOCK) -> np.ndarray:
    """Statistics of each reference against the others: the law that a new latent should follow.

    Parameters
    ----------
    references : samples of shape (n, d)
        As in `statistics`.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    ndarray of shape (n, 5)
        In the order of `STATISTICS`.

    Raises
    ------
    ValueError
        As in `statistics`.

    Notes
    -----
    For latents of one law each row is distributed exactly as a new latent's against n - 1 references.
    The rows are n values of that law, so that it is known up to 1 / sqrt(n).

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=(6, 400))
    >>> np.allclose(leave_one_out(z)[0], statistics(z[:1], z[1:])[0])
    True
    """
    return _left_out_means(_references(references, block))


def inside(values: np.ndarray, law: np.ndarray, *, share: float = 0.998) -> np.ndarray:
    """Whether values lie in the central part of a law that a sample stands for.

    Parameters
    ----------
    values : ndarray of shape (m, k)
        Values of k statistics.
    law : ndarray of shape (n, k)
        A sample of each.
    share : float, default 0.998
        Central share, in (0, 1].

    Returns
    -------
    ndarray of shape (m, k)
        Booleans. The ends are members of the sample, the smallest interval of them that holds at least
        the share: all of it where n is below 1,000.

    Raises
    ------
    ValueError
        If the share is outside (0, 1].

    Examples
    --------
    >>> inside(np.array([[0.5], [2.0]]), np.array([[0.0], [1.0]])).ravel()
    array([ True, False])
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; a central share lies in (0, 1]")
    tail = (1 - share) / 2
    low = np.quantile(law, tail, axis=0, method="lower")
    high = np.quantile(law, 1 - tail, axis=0, method="higher")
    return (values >= low) & (values <= high)


def reachable(references: Samples, *, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Bounds that no latent whatever can leave, by the triangle inequality.

    Parameters
    ----------
    references : samples of shape (n, d)
        As in `statistics`.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    tuple of ndarray of shape (5,)
        Lowest and highest values, in the order of `STATISTICS`.

    Raises
    ------
    ValueError
        As in `statistics`.

    Notes
    -----
    ``|z - z_j| + |z - z_k| >= |z_j - z_k|``, so a mean distance is at least half the mean distance of
    two references. Angles at the origin obey the same, and those of z and of -z sum to 180 degrees.

    Examples
    --------
    >>> low, high = reachable(np.eye(4))
    >>> low.round(2), high.round(2)
    (array([ 0.  ,  0.71, 45.  ,  0.  ,  0.  ]), array([ inf,  inf, 135., 180.,  inf]))
    """
    return _bounds(_references(references, block))


def _bounds(known: _References) -> tuple[np.ndarray, np.ndarray]:
    others = ~np.eye(len(known.gram), dtype=bool)
    apart = np.sqrt(known.distances).mean(where=others)
    norms = np.sqrt(known.squares)
    turn = _degrees(np.clip(known.gram / np.outer(norms, norms), -1, 1)).mean(where=others)
    return (
        np.array([0, apart / 2, turn / 2, 0, 0]),
        np.array([np.inf, np.inf, 180 - turn / 2, 180, np.inf]),
    )


def _refuse_unreachable(
    targets: np.ndarray, names: Sequence[str], low: np.ndarray, high: np.ndarray
) -> None:
    wrong = ~((targets >= low) & (targets <= high))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"target {names[column]} is {targets[row, column]:.6g}, but a latent can only have "
            f"{low[column]:.6g} to {high[column]:.6g} to these references; take targets from "
            "leave_one_out(references), or give the references that the targets belong to"
        )


def two_moments(latents: np.ndarray, references: Samples, *, block: int = BLOCK) -> TwoMoments:
    """Say how much of the rules' statistics two moments explain.

    Parameters
    ----------
    latents : ndarray of shape (m, d)
        Latents held out of the references.
    references : samples of shape (n, d)
        As in `statistics`.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    TwoMoments
        Means and shares of norm, distance, origin angle and vertex angle.

    Raises
    ------
    ValueError
        As in `statistics`, or if there are fewer than two latents.

    Notes
    -----
    With root mean squares for means, all four are functions of ``|z|^2`` and ``z . m``, where m is the
    references' mean: ``D^2 = |z|^2 - 2 z . m + M`` with M their mean squared norm; the origin cosine
    is ``z . m / (|z| sqrt(M))``, the vertex cosine ``1 - P / (2 D^2)`` with P their mean squared
    distance. The averages of the two are ``|mu|^2 + tr S`` and ``|mu|^2``: that is the law of any
    other domain with the same two moments, whatever its images show.

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=(60, 500))
    >>> two_moments(z[30:], z[:30]).expected.round(0)
    array([22., 32., 90., 60.])
    """
    if len(latents) < 2:
        raise ValueError(f"{len(latents)} latents; a variance needs 2 or more")
    known = _references(references, block)
    table = _table(latents, references, known, block)
    found = _means(table, STATISTICS[:4])
    closed = _closed_means(table.squares, table.inner.mean(axis=1), known)
    n = len(known.gram)
    mean_square = (known.gram.sum() - known.gram.trace()) / n / (n - 1)
    average = _closed_means(known.squares.mean()[None], mean_square[None], known)[0]
    share = 1 - (found - closed).var(axis=0) / found.var(axis=0)
    return TwoMoments(found.mean(axis=0), average, share)


def _closed_means(squares: np.ndarray, along: np.ndarray, known: _References) -> np.ndarray:
    """Compute the rules' statistics from ``|z|^2`` and ``z . mean`` alone, (m, 4)."""
    size = known.squares.mean()
    distance = squares - 2 * along + size
    cosines = along / np.sqrt(squares * size), 1 - known.across.mean() / 2 / distance
    angles = (_degrees(np.clip(c, -1, 1)) for c in cosines)
    return np.stack([np.sqrt(squares), np.sqrt(distance), *angles], axis=1)


# ----------------------------------------------------------------------------------------- rejection


def reject(
    draw: Callable[[int, np.random.Generator], np.ndarray],
    references: np.ndarray,
    targets: Targets,
    *,
    n: int,
    rng: np.random.Generator,
    budget: int = 50_000,
    batch: int = 1000,
    n_references: int = 10,
    block: int = BLOCK,
) -> Optimised:
    """Draw candidates until the three released rules have accepted enough, or the budget is spent.

    Parameters
    ----------
    draw : callable ``(m, rng) -> (m, d)``
        Source of candidates, as a prior's `sample`. Fewer than m candidates end the loop.
    references : array of shape (k, d)
        Latents of the domain, two or more.
    targets : Targets
        The rules, as of `Targets.from_reference`.
    n : int
        Latents wanted.
    rng : numpy.random.Generator
        Source of the candidates and of the references drawn.
    budget : int, default 50,000
        Candidates after which the loop stops.
    batch : int, default 1000
        Candidates judged at a time.
    n_references : int, default 10
        References drawn for each candidate, as in `accept`.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    Optimised
        The first n accepted, or fewer where the budget did not suffice: `history.complete` says which.
        Candidates after the last one wanted do not count.

    Raises
    ------
    ValueError
        If a number wanted is not positive, a target angle or distance is one that nothing can have, or
        as in `accept`.

    Notes
    -----
    The released loop (Zhu et al., arXiv:2310.09213) has no budget and does not end where nothing
    passes. Targets out of reach of the *prior* cannot be known before; targets out of reach of any
    latent are refused.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(100, 500))
    >>> rules = Targets.from_reference(z, rng=rng)
    >>> draw = lambda m, rng: rng.normal(size=(m, 500))
    >>> reject(draw, z, rules, n=20, rng=rng).latents.shape
    (20, 500)
    """
    if min(n, budget, batch) < 1:
        raise ValueError(f"n = {n}, budget = {budget}, batch = {batch}; each must be 1 or more")
    ends = (
        np.array([0, 0, 0]) - targets.tolerances,
        np.array([np.inf, 180, 180]) + targets.tolerances,
    )
    _refuse_unreachable(targets.centres[None], STATISTICS[1:4], *ends)
    start, spent, kept, places, trace = perf_counter(), 0, [], [], []
    judge = partial(accept, n_references=n_references, rng=rng, block=block)
    while spent < budget and (left := n - sum(map(len, places))):
        asked = min(batch, budget - spent)
        candidates = draw(asked, rng)
        if not len(candidates):
            break
        found = np.nonzero(judge(candidates, references, targets).accepted)[0][:left]
        kept.append(candidates[found])
        places.append(spent + found)
        spent += int(found[-1]) + 1 if len(found) == left else len(candidates)
        trace.append((spent, n - left + len(found)))
        if len(candidates) < asked:
            break
    if not trace:
        raise ValueError("draw gave no candidate at all; it must return (m, d) latents")
    indices = np.concatenate(places)
    seconds = perf_counter() - start
    history = History("reject", n, spent, len(indices), 0, seconds, np.array(trace))
    return Optimised(np.concatenate(kept), indices, history)


# --------------------------------------------------------------------------------------- closed form


def _draw_rows(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows 0 to n - 1 in random order, all of them before one comes again."""
    rounds = [rng.permutation(n) for _ in range(-(-m // n))]
    return np.concatenate(rounds)[:m]


def _checked(candidates: np.ndarray) -> np.ndarray:
    if candidates.ndim != 2 or not len(candidates):
        raise ValueError(
            f"candidates have shape {candidates.shape}; they must be (m, d) with m > 0"
        )
    return candidates.astype(np.result_type(candidates, np.float32), copy=False)


def project(
    candidates: np.ndarray,
    references: Samples,
    *,
    rng: np.random.Generator,
    block: int = BLOCK,
) -> Optimised:
    """Give candidates exactly the references' law of norm and distance, in closed form.

    Parameters
    ----------
    candidates : ndarray of shape (m, d)
        Latents of any law; each keeps its direction across the references' mean.
    references : samples of shape (n, d)
        As in `statistics`, with a mean that is not zero.
    rng : numpy.random.Generator
        Decides which reference lends its values to which candidate.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    Optimised
        In the float type of the candidates. A candidate is left out if it lies along the mean, or if the
        values lent to it belong together for no latent (few references in few coordinates).

    Raises
    ------
    ValueError
        As in `statistics`, or if the references' mean is zero.

    Notes
    -----
    Reference i has the norm N and to the n - 1 others the root mean square distance D. Let m be the mean
    of all references, e its direction, M their mean squared norm, and u the direction of the part of
    candidate z across e. The result is ``x = a e + sqrt(N^2 - a^2) u`` with
    ``a = (N^2 + M - D^2) / (2 |m|)``. *Proof.* e and u are orthonormal, so ``|x| = N``; and the mean
    of ``|x - z_j|^2`` is ``|x|^2 - 2 x . m + M = N^2 - 2 a |m| + M = D^2``. So the pair (norm,
    distance) takes values that occur in the references' own leave-one-out law, and the angles follow, as
    in `two_moments`: the cosine to the mean is ``a / N``, the vertex cosine a function of D. What `project`
    does not touch is u. Each reference lends its values once before any lends them again, so for m <= n
    the m values are themselves a sample of the law of new latents: a two-sample test against held-out
    latents keeps its level. For m > n they repeat, and it rejects more often.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> references = 0.5 + rng.normal(size=(50, 900))
    >>> found = project(rng.normal(size=(50, 900)), references, rng=rng)
    >>> norms = [np.sort(np.linalg.norm(z, axis=1)) for z in (found.latents, references)]
    >>> np.allclose(*norms)
    True
    """
    start, z = perf_counter(), _checked(candidates)
    known = _references(references, block)
    centre = gram.mean(references, block=block)
    length = float(np.sqrt(centre @ centre))
    if length <= np.sqrt(ROUNDING * known.squares.mean()):
        raise ValueError("the references' mean is zero and gives no direction; use descend")
    n, m = len(known.gram), len(z)
    rows = _draw_rows(m, n, rng)
    left_out = known.distances.sum(axis=1) / (n - 1)
    along = ((known.squares + known.squares.mean() - left_out) / 2 / length)[rows]
    now = gram.gram_matrix(z, centre[None], block=block)[:, 0] / length
    squares = np.einsum("ij,ij->i", z, z, dtype=np.float64)
    across = _exact_zeros(squares - now**2, squares)
    wanted = known.squares[rows] - along**2
    kept = np.nonzero((wanted >= 0) & (across > 0))[0]
    scale = np.sqrt(wanted[kept] / across[kept])
    shift = (along[kept] - scale * now[kept]) / length
    latents = _combine(z, kept, scale, shift[:, None], centre[None], block)
    trace = np.array([[m, len(kept)]])
    seconds = perf_counter() - start
    return Optimised(latents, kept, History("project", m, m, len(kept), 0, seconds, trace))


def _combine(
    latents: np.ndarray,
    kept: np.ndarray,
    scale: np.ndarray,
    weights: np.ndarray,
    rows: Samples,
    block: int,
) -> np.ndarray:
    """``scale * latents[kept] + weights @ rows``, block by block, in the float type of the latents."""
    out = np.empty((len(kept), latents.shape[1]), latents.dtype)
    for first in range(0, out.shape[1], block):
        here = slice(first, first + block)
        added = weights @ np.asarray(rows[:, here], dtype=np.float64)
        out[:, here] = scale[:, None] * latents[kept, here] + added
    return out


# ------------------------------------------------------------------------------------------- descent


def _slopes(table: _Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Differentiate a statistic by ``|z|^2``, (m,), and by the inner products, (m, n)."""
    squares, inner, n = table.squares, table.inner, table.inner.shape[1]
    if name == "norm":
        return 0.5 / np.sqrt(squares), np.zeros_like(inner)
    if name == "origin angle":
        cosines = table.cosines
        turns = _turns(cosines)
        by_inner = turns / np.sqrt(squares[:, None] * table.references.squares)
        return -np.einsum("mn,mn->m", turns, cosines) / 2 / squares, by_inner
    if name == "inner spread":
        centred = inner - inner.mean(axis=1, keepdims=True)
        spread = np.maximum(inner.std(axis=1, keepdims=True), np.finfo(float).tiny)
        return np.zeros(len(inner)), centred / n / spread
    slopes = _vertex_slopes(table) if name == "vertex angle" else 0.5 / n / np.sqrt(table.distances)
    # a squared distance is |z|^2 + |z_j|^2 - 2 z . z_j
    return slopes.sum(axis=1), -2 * slopes


def _vertex_slopes(table: _Table) -> np.ndarray:
    """Differentiate the mean vertex angle by each squared distance, of which it holds each twice."""
    apart = table.distances
    ahead = _ahead(apart.shape[1])
    right = apart[:, ahead]
    cosines = law_of_cosines(apart, right, table.references.across)
    turns, sides = _turns(cosines) / 2, 1 / np.sqrt(apart * right)
    slopes = turns * (sides - cosines / apart)
    slopes[:, ahead] += turns * (sides - cosines / right)
    return slopes


def _turns(cosines: np.ndarray) -> np.ndarray:
    """Differentiate a mean angle in degrees by each of its cosines."""
    sines = np.sqrt(np.maximum(1 - cosines**2, FLAT**2))
    return -np.degrees(1 / sines) / cosines.shape[1]


def _step(
    table: _Table, gaps: np.ndarray, spread: np.ndarray, names: Sequence[str], damping: np.ndarray
) -> tuple[_Table, np.ndarray, np.ndarray]:
    """One damped Gauss-Newton step of each latent: the new table, scales (m,) and weights (m, n).

    A gradient is ``a z + sum_j b_j z_j``, so inner products of gradients, and the step along them,
    need the Gram matrix only.
    """
    by_square, by_inner = (
        np.stack(x) for x in zip(*(_slopes(table, k) for k in names), strict=True)
    )
    twice = 2 * by_square / spread[:, None]
    by_inner /= spread[:, None, None]
    known = table.references.gram
    # a statistic such as the norm has no part in the references' span to carry
    carried = np.stack([b @ known if b.any() else b for b in by_inner])
    dots = np.einsum("kmn,mn->km", by_inner, table.inner)
    products = by_inner.transpose(1, 0, 2) @ carried.transpose(1, 2, 0)
    products += np.einsum("km,lm->mkl", twice, twice * table.squares + dots)
    products += np.einsum("km,lm->mkl", dots, twice)
    # a multiple of the identity: with any other ridge a step here, in gaps, may lead uphill
    ridge = damping * np.trace(products, axis1=1, axis2=2) / len(names)
    products += ridge[:, None, None] * np.eye(len(names))
    moves = np.linalg.solve(products, -(gaps / spread)[..., None])
    scale = 1 + np.einsum("mk,km->m", moves[..., 0], twice)
    weights, shifts = ((moves * x.transpose(1, 0, 2)).sum(axis=1) for x in (by_inner, carried))
    inner = scale[:, None] * table.inner + shifts
    squares = scale**2 * table.squares
    squares += np.einsum("mn,mn->m", weights, scale[:, None] * table.inner + inner)
    return _Table(squares, inner, table.references), scale, weights


def descend(
    start: np.ndarray,
    references: Samples,
    targets: np.ndarray | None = None,
    *,
    statistics: Sequence[str] = STEERED,
    rng: np.random.Generator | None = None,
    tolerance: float | None = None,
    steps: int = 30,
    block: int = BLOCK,
) -> Optimised:
    """Move latents by gradients until their statistics are the targets, each latent by itself.

    Parameters
    ----------
    start : ndarray of shape (m, d)
        Latents to move, none of them a reference.
    references : samples of shape (n, d)
        As in `statistics`.
    targets : ndarray of shape (m, k) or (k,), optional
        Wanted values, in the order of `statistics`. By default each latent is lent those of a reference
        against the others, as in `project`, so that together they follow the references' law.
    statistics : sequence of str, default all of `STATISTICS` but the vertex angle
        What to steer. The vertex angle follows from the distance and the inner spread; to steer it
        as well asks twice for almost the same, and is slow.
    rng : numpy.random.Generator, optional
        Decides which reference lends its values; needed without `targets`.
    tolerance : float, optional
        Largest gap that is accepted, in standard deviations of the statistic over the references; by
        default ``1 / (2 sqrt(n))``, half of what is not known of their law.
    steps : int, default 30
        Steps after which a latent that has not arrived is given up.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    Optimised
        Those that arrived, in the float type of `start`. Targets that no latent meets together leave
        a partial result, and `history.complete` is false.

    Raises
    ------
    ValueError
        As in `statistics`; if a target is out of the bounds of `reachable`; if a name is unknown; if a
        latent to move is a copy of a reference; if neither targets nor `rng` are given.

    Notes
    -----
    Levenberg and Marquardt's method on ``sum_k ((f_k - target_k) / s_k)^2`` with s_k the standard
    deviation over the references. The gradients of all statistics lie in the span of z and the
    references, so steps are taken on the (m, n) table of inner products and the latents are formed once,
    at the end; the cost of a step is k m n^2, whatever d is. Of all moves with the same first-order
    effect, a step is the shortest. A latent in the span of n << d references has too large an inner
    spread, as a draw of an unshrunk covariance has, and no gradient leads out of the span: few arrive.

    References
    ----------
    Marquardt. An algorithm for least-squares estimation of nonlinear parameters. Journal of the Society
    for Industrial and Applied Mathematics 11 (1963) 431-441.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> references = 0.5 + rng.normal(size=(50, 900))
    >>> found = descend(rng.normal(size=(20, 900)), references, rng=rng)
    >>> found.history.outcome
    'descend: 20 of 20 latents from 20 candidates; complete'
    """
    began, z = perf_counter(), _checked(start)
    _refuse_unknown(statistics)
    known = _references(references, block)
    law = _left_out_means(known)[:, _columns(statistics)]
    wanted = _wanted(targets, law, known, statistics, len(z), rng)
    table = _table(z, references, known, block)
    if not table.distances.all():
        raise ValueError("a latent to move is a copy of a reference and has no angle; leave it out")
    near = 0.5 / np.sqrt(len(law)) if tolerance is None else tolerance
    # references on a sphere have one norm, which no float meets exactly
    spread = np.maximum(law.std(axis=0), NARROW * np.abs(law.mean(axis=0)))
    scale, weights, trace, arrived = _walk(table, wanted, spread, statistics, near, steps)
    kept = np.nonzero(arrived)[0]
    latents = _combine(z, kept, scale[kept], weights[kept], references, block)
    seconds = perf_counter() - began
    return Optimised(
        latents, kept, History("descend", len(z), len(z), len(kept), 0, seconds, trace)
    )


def _columns(names: Sequence[str]) -> list[int]:
    return [STATISTICS.index(name) for name in names]


def _refuse_unknown(names: Sequence[str]) -> None:
    if not names or not set(names) <= set(STATISTICS):
        raise ValueError(f"statistics are {list(names)}; use some of {', '.join(STATISTICS)}")


def _wanted(
    targets: np.ndarray | None,
    law: np.ndarray,
    known: _References,
    names: Sequence[str],
    m: int,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """Targets of each latent, (m, k): those given, or the references' own."""
    if targets is None:
        if rng is None:
            raise ValueError("without targets the references lend theirs; pass rng to say which")
        return law[_draw_rows(m, len(law), rng)]
    try:
        wanted = np.broadcast_to(np.asarray(targets, dtype=np.float64), (m, len(names)))
    except ValueError as error:
        raise ValueError(
            f"targets have shape {np.shape(targets)}; give {(len(names),)} or {(m, len(names))}"
        ) from error
    low, high = (ends[_columns(names)] for ends in _bounds(known))
    _refuse_unreachable(wanted, names, low, high)
    return wanted


def _walk(
    table: _Table,
    wanted: np.ndarray,
    spread: np.ndarray,
    names: Sequence[str],
    tolerance: float,
    steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scales (m,) and weights (m, n) of the moves, the trace, and who arrived (m,)."""
    m, n = table.inner.shape
    scale, weights, damping = np.ones(m), np.zeros((m, n)), np.full(m, 1e-2)
    gaps = _means(table, names) - wanted
    squares, inner, trace = table.squares.copy(), table.inner.copy(), []
    for _ in range(steps + 1):
        arrived = (np.abs(gaps) <= tolerance * spread).all(axis=1)
        trace.append((m, int(arrived.sum())))
        left = np.nonzero(~arrived & (damping < STUCK))[0]
        if not len(left) or len(trace) > steps:
            break
        here = _Table(squares[left], inner[left], table.references)
        moved, grown, added = _step(here, gaps[left], spread, names, damping[left])
        new = _means(moved, names) - wanted[left]
        better = np.square(new / spread).sum(axis=1) < np.square(gaps[left] / spread).sum(axis=1)
        damping[left] *= np.where(better, 0.2, 5)
        to = left[better]
        gaps[to], squares[to], inner[to] = new[better], moved.squares[better], moved.inner[better]
        weights[to] = grown[better, None] * weights[to] + added[better]
        scale[to] *= grown[better]
    return scale, weights, np.array(trace), arrived


# --------------------------------------------------------------------------------------- one for all


def optimise(
    candidates: np.ndarray,
    references: np.ndarray,
    *,
    method: str = "project",
    rng: np.random.Generator,
    block: int = BLOCK,
) -> Optimised:
    """Bring candidates into the references' law, or keep those that the released rules accept.

    Parameters
    ----------
    candidates : ndarray of shape (m, d)
        Latents, such as draws of a prior.
    references : array of shape (n, d)
        Latents of the domain.
    method : {"project", "descend", "reject"}, default "project"
        `project`, `descend` to the references' own statistics, or the rules of
        `Targets.from_reference`, which move nothing.
    rng : numpy.random.Generator
        Source of randomness.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    Optimised
        The accepted latents.

    Raises
    ------
    ValueError
        If the method is unknown, or as in the function it names.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = 0.5 + rng.normal(size=(100, 900))
    >>> [len(optimise(z[50:], z[:50], method=m, rng=rng).latents) > 30 for m in METHODS]
    [True, True, True]
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; use one of {', '.join(METHODS)}")
    return METHODS[method](candidates, references, rng=rng, block=block)


def _filter(
    candidates: np.ndarray, references: np.ndarray, *, rng: np.random.Generator, block: int
) -> Optimised:
    """Judge the candidates given by the rules measured on the references."""
    m = len(candidates)
    rules = Targets.from_reference(references, rng=rng, block=block)
    return reject(
        lambda _, __: candidates, references, rules, n=m, budget=m, batch=m, rng=rng, block=block
    )


METHODS = {"project": project, "descend": descend, "reject": _filter}
