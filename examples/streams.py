"""Request streams: who asks what, and when. All of it is drawn before anything is sent.

Axes: R requests, N tenants. Times are seconds from the start of a stream.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """Who asks what, and when.

    Attributes:
        due_s: intended send times, ascending, float64 [R].
        tenants: index of the asking tenant, int [R].
        rows: index of what it asks, of its target's inputs, int [R].
    """

    due_s: np.ndarray
    tenants: np.ndarray
    rows: np.ndarray


def zipf(num_tenants: int, seed: int, exponent: float = 1.0) -> np.ndarray:
    """Return shares of very unequal tenants, ``k ** -exponent`` for the k-th [N].

    Args:
        num_tenants: N.
        seed: decides who is how popular.
        exponent: of the law; 0 makes all equal.
    """
    shares = np.arange(1, num_tenants + 1, dtype=float) ** -exponent
    return np.random.default_rng(seed).permutation(shares / shares.sum())


def make_stream(
    rate: float,
    seconds: float,
    shares: np.ndarray,
    num_inputs: int,
    seed: int,
    cv: float = 1.0,
) -> Stream:
    """Draw arrivals whose gaps follow a Gamma law; at ``cv`` 1 they are Poisson's.

    Args:
        rate: mean requests per second, all tenants together.
        seconds: length of the stream.
        shares: of each tenant, float [N]; they need not sum to one.
        num_inputs: requests that each target has.
        seed: decides everything; the same draws serve every rate.
        cv: coefficient of variation of the gaps; above 1 is bursty.

    Returns:
        About ``rate * seconds`` requests.
    """
    rng = np.random.default_rng(seed)
    num_requests = max(1, round(rate * seconds))
    gaps_s = rng.gamma(1 / cv**2, cv**2 / rate, num_requests)
    return Stream(
        np.cumsum(gaps_s),
        rng.choice(len(shares), num_requests, p=shares / shares.sum()),
        rng.integers(num_inputs, size=num_requests),
    )


def in_turn(num_requests: int, num_tenants: int, num_inputs: int) -> Stream:
    """Return a stream for a closed loop that asks each tenant in turn."""
    number = np.arange(num_requests)
    rows = number // num_tenants % num_inputs
    return Stream(np.zeros(num_requests), number % num_tenants, rows)
