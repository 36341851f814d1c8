"""Figures of a run by sums in SQL, for runs too long to load: counts and rates exactly, quantiles from bins 1 % wide.

The formulas are those of :mod:`traces.measures` and :mod:`traces.records`, said once more in SQL; a test holds them together.
A bin k holds values from 1.01^k to 1.01^(k+1) seconds; its middle stands for them, so a quantile is off by half a per cent at
most, beside the step from one value to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import sqlalchemy as sa

from traces.measures import QUANTILES, Figures, Slo

WIDTH = math.log(1.01)

LOWEST = math.floor(math.log(1e-7) / WIDTH)
"""The bin of everything at or below 0.1 microseconds, zero and negative values (of a client that was early) included."""

Bins = Mapping[str, list[list[int]]]
"""Measure -> [[bin, requests], ..], ascending."""


def measures(rows: sa.Table) -> dict[str, Any]:
    """Latencies in seconds as SQL; null where a time did not come."""
    t = rows.c
    tokens = _tokens(rows)
    return {
        "ttft_s": t.first_token_s - t.due_s,
        "tpot_s": sa.case((tokens > 1, (t.last_token_s - t.first_token_s) / (tokens - 1))),
        "e2e_s": t.last_token_s - t.due_s,
        "ttft_sent_s": t.first_token_s - t.sent_s,
        "e2e_sent_s": t.last_token_s - t.sent_s,
    }


def _tokens(rows: sa.Table) -> Any:
    return sa.func.coalesce(rows.c.output_tokens, rows.c.requested_tokens)


def _counted(rows: sa.Table, run_id: int, warmup_s: float) -> list[Any]:
    found = [rows.c.run_id == run_id]
    return [*found, rows.c.due_s >= warmup_s] if warmup_s > 0 else found


def totals(connection: sa.Connection, rows: sa.Table, run_id: int, slo: Slo, warmup_s: float) -> dict[str, float]:
    """n, ok, good, tokens, span_s, and the largest of each measure over ok requests (``max_ttft_s``, ..)."""
    t, known = rows.c, measures(rows)
    ok = t.status == "ok"
    good: list[Any] = [ok]
    for metric, limit in slo.limits:
        keeps: Any = known[f"{metric}_s"] <= limit
        good.append(sa.or_(keeps, _tokens(rows) <= 1) if metric == "tpot" else keeps)
    query = sa.select(
        sa.func.count().label("n"),
        sa.func.sum(sa.case((ok, 1), else_=0)).label("ok"),
        sa.func.sum(sa.case((sa.and_(*good), 1), else_=0)).label("good"),
        sa.func.sum(sa.case((ok, _tokens(rows)), else_=0)).label("tokens"),
        sa.func.min(t.due_s).label("first"),
        sa.func.max(t.due_s).label("last_due"),
        sa.func.max(t.last_token_s).label("last_token"),
        *(sa.func.max(sa.case((ok, value))).label(f"max_{name}") for name, value in known.items()),
    ).where(*_counted(rows, run_id, warmup_s))
    row = connection.execute(query).one()._mapping
    ends = [float(v) for v in (row["last_due"], row["last_token"]) if v is not None]
    span = max(ends) - float(row["first"]) if ends and row["first"] is not None else 0.0
    found = {name: float(row[name] or 0) for name in ("n", "ok", "good", "tokens")}
    largest = {f"max_{n}": math.nan if row[f"max_{n}"] is None else float(row[f"max_{n}"]) for n in known}
    return found | largest | {"span_s": span}


def bins(connection: sa.Connection, rows: sa.Table, run_id: int, warmup_s: float) -> dict[str, list[list[int]]]:
    """Every measure's bins over ok requests."""
    found: dict[str, list[list[int]]] = {}
    for name, value in measures(rows).items():
        # One pass a measure over the rows of one run, which lie side by side under their key.
        place = sa.case((value > 1e-7, sa.cast(sa.func.floor(sa.func.ln(value) / WIDTH), sa.Integer)), else_=LOWEST)
        inner = (
            sa.select(place.label("bin"))
            .where(*_counted(rows, run_id, warmup_s), rows.c.status == "ok", value.is_not(None))
            .subquery()
        )
        query = sa.select(inner.c.bin, sa.func.count()).group_by(inner.c.bin).order_by(inner.c.bin)
        found[name] = [[int(k), int(n)] for k, n in connection.execute(query)]
    return found


def quantile(held: list[list[int]], q: float, largest: float) -> float:
    """The q-quantile (0..1) in seconds; largest: the exact maximum. NaN without values."""
    if not held:
        return math.nan
    places = np.array(held, dtype=np.int64)
    upto = np.cumsum(places[:, 1])
    if q >= 1:
        return largest
    k = int(places[int(np.searchsorted(upto, q * (upto[-1] - 1), side="right")), 0])
    return min(math.exp((k + 0.5) * WIDTH) if k > LOWEST else 0.0, largest)


def figures(total: Mapping[str, float], held: Bins) -> Figures:
    """What :func:`totals` and :func:`bins` say."""
    span = total["span_s"]

    def rate(name: str) -> float:
        return total[name] / span if span > 0 else math.nan

    return Figures(
        n=int(total["n"]),
        ok=int(total["ok"]),
        goodput_per_s=rate("good"),
        throughput_per_s=rate("ok"),
        output_tokens_per_s=rate("tokens"),
        attainment=total["good"] / total["n"] if total["n"] else math.nan,
        span_s=span,
        exact=False,
        quantiles={
            name: {word: quantile(counts, q, total[f"max_{name}"]) for word, q in QUANTILES.items()}
            for name, counts in held.items()
        },
    )
