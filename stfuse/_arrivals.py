"""Arrivals of requests: random ones of many shapes, or those of a file.

Times are seconds from the start. Axes: R requests, N tenants.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Arrivals(NamedTuple):
    """Who asks when.

    Attributes:
        due_s: float64 [R], ascending.
        tenants: int [R], from 0.
    """

    due_s: np.ndarray
    tenants: np.ndarray


def zipf_shares(num_tenants: int, exponent: float = 1.0) -> np.ndarray:
    """Return shares of tenants by Zipf's law.

    Args:
        num_tenants: N.
        exponent: how fast they fall with rank; 0 for equal ones.

    Returns:
        float64 ``[N]``, summing to 1.
    """
    shares = np.arange(1, num_tenants + 1, dtype=float) ** -exponent
    return shares / shares.sum()


def poisson(
    rate: float,
    num_requests: int,
    num_tenants: int,
    *,
    seed: int,
    cv: float = 1.0,
    exponent: float = 0.0,
) -> Arrivals:
    """Return arrivals at a constant rate.

    Args:
        rate: requests per second of all tenants.
        num_requests: R.
        num_tenants: N.
        seed: of times and tenants.
        cv: standard deviation over mean of the gaps: 1 is Poisson, above it requests
            come in bursts (Gamma gaps).
        exponent: of Zipf's law over tenants; 0 makes them equal.

    Returns:
        The trace, ascending in time.

    Raises:
        ValueError: the rate or the spread is not above 0.
    """
    _check_positive("poisson", rate=rate, cv=cv)
    rng = np.random.default_rng(seed)
    shape = 1 / cv**2
    gaps = rng.gamma(shape, 1 / (rate * shape), num_requests)
    shares = zipf_shares(num_tenants, exponent)
    return Arrivals(np.cumsum(gaps), rng.choice(num_tenants, num_requests, p=shares))


def varying(
    trace: Arrivals, times_s: Sequence[float], rates: Sequence[float]
) -> Arrivals:
    """Return a trace whose rate follows a curve: a day, or a crowd that comes at once.

    Args:
        trace: at a mean rate of 1 request a second, such as ``poisson(1.0, ...)``.
        times_s: ascending, from 0; beyond the last one its rate stays.
        rates: requests per second at those times, > 0; linear between them.

    Returns:
        The trace, ascending in time.

    Raises:
        ValueError: a rate is not above 0.
    """
    for level in rates:
        _check_positive("varying", rate=level)
    # The time at which as many requests as at rate 1 have come, on a fine grid.
    grid = np.union1d(np.linspace(times_s[0], times_s[-1], 4096), times_s)
    levels = np.interp(grid, times_s, rates)
    fine = np.append(0.0, np.cumsum(np.diff(grid) * (levels[1:] + levels[:-1]) / 2))
    due_s = np.interp(trace.due_s, fine, grid)
    beyond = trace.due_s > fine[-1]
    due_s[beyond] = grid[-1] + (trace.due_s[beyond] - fine[-1]) / rates[-1]
    return Arrivals(due_s, trace.tenants)


def diurnal(trace: Arrivals, period_s: float, mean: float, swing: float) -> Arrivals:
    """Return a trace at a rate that rises and falls as over a day.

    Args:
        trace: at a mean rate of 1 request a second.
        period_s: of one day.
        mean: requests per second.
        swing: from 0 to below 1: how far the rate goes above and below the mean.

    Returns:
        The trace, ascending in time.
    """
    num_periods = max(1, math.ceil(trace.due_s[-1] / mean / period_s))
    times_s = np.linspace(0, num_periods * period_s, 64 * num_periods + 1)
    rates = mean * (1 + swing * np.sin(2 * math.pi * times_s / period_s))
    return varying(trace, times_s.tolist(), rates.tolist())


def flash_crowd(
    trace: Arrivals, start_s: float, length_s: float, base: float, peak: float
) -> Arrivals:
    """Return a trace whose rate jumps from ``base`` to ``peak`` for a while.

    Args:
        trace: at a mean rate of 1 request a second.
        start_s: when the crowd comes.
        length_s: for how long it stays.
        base: requests per second before and after.
        peak: requests per second meanwhile.

    Returns:
        The trace, ascending in time.
    """
    end_s, edge_s = start_s + length_s, length_s * 1e-3
    times_s = [0.0, start_s, start_s + edge_s, end_s, end_s + edge_s]
    return varying(trace, times_s, [base, base, peak, peak, base])


def read_arrivals(path: str) -> Arrivals:
    """Return the arrivals of a CSV file with columns ``timestamp`` and ``tenant``.

    Args:
        path: of the file; timestamps in seconds, in any order, tenants of any name.

    Returns:
        The trace, from its first arrival on; tenants numbered as they first appear.

    Raises:
        ValueError: the columns are not there, or a timestamp is no finite number.
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        if not {"timestamp", "tenant"} <= set(columns):
            raise ValueError(
                f"`read_arrivals`: {path} has columns {list(columns)}; it needs "
                f"'timestamp' and 'tenant'."
            )
        rows = [(row["timestamp"], row["tenant"]) for row in reader]
    numbers: dict[str, int] = {}
    due_s = np.empty(len(rows))
    tenants = np.empty(len(rows), int)
    for i, (text, name) in enumerate(rows):
        try:
            due_s[i] = float(text)
        except (TypeError, ValueError):
            due_s[i] = math.nan
        if not math.isfinite(due_s[i]):
            raise ValueError(
                f"`read_arrivals`: {path}, line {i + 2}: timestamp is {text!r}; "
                f"expected seconds."
            )
        tenants[i] = numbers.setdefault(name, len(numbers))
    order = np.argsort(due_s, kind="stable")
    first_s = due_s[order[0]] if len(order) else 0.0
    return Arrivals(due_s[order] - first_s, tenants[order])


def _check_positive(call: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"`{call}`: {name} is {value}; pass a finite number above 0."
            )
