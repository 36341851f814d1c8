"""What is copied into PostgreSQL in binary is what was meant, to the last bit."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_store import a_run, same
from traces import pgcopy
from traces.errors import StoreError
from traces.records import Observations
from traces.store import observations, open_store

TIMES = st.floats(allow_nan=True, allow_infinity=True, width=64)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
SMALL = {"worker": 2**15 - 1, "http_status": 2**15 - 1, "index": 2**63 - 1}


@st.composite
def some(draw: st.DrawFn) -> Observations:
    """Rows of anything that a column holds, numbered."""
    n = draw(st.integers(1, 12))
    rows = Observations.empty(n)
    for f in fields(Observations):
        column = getattr(rows, f.name)
        if column.dtype == np.float64:
            kind = TIMES
        elif column.dtype == object:
            kind = st.just("ok") if f.name in ("status", "error") else WORDS
        else:
            kind = st.integers(-1, SMALL.get(f.name, 2**31 - 1))
        column[:] = draw(st.lists(kind, min_size=n, max_size=n))
    rows.index[:] = np.arange(n) * (2**61 // n)
    rows.due_s[:] = np.arange(n)  # rows are read in this order
    return rows


def test_rows_of_anything_come_back(made_postgres_url: str) -> None:
    """Every float (subnormal, -0; an infinite one is not known, as in every database), count at its limit, text of any script."""
    with open_store(made_postgres_url) as store:

        @settings(max_examples=60, suppress_health_check=list(HealthCheck))
        @given(some())
        def check(rows: Observations) -> None:
            run = store.begin_run(a_run())
            store.add_observations(run.id, rows)
            wanted = Observations.concat([rows])
            for f in fields(Observations):
                column = getattr(wanted, f.name)
                if column.dtype == np.float64:
                    column[np.isinf(column)] = np.nan
            same(store.observations(run.id), wanted)

        check()


def test_a_column_of_numbers_is_as_wide_as_the_database_has_it(made_postgres_url: str) -> None:
    """The widths that COPY is told are those of the table; a number that does not fit is refused by name, not wrapped."""
    for size, name in pgcopy.INTS.items():
        most = 2 ** (8 * size - 1) - 1
        assert pgcopy.fits(np.array([most, -most - 1]), size), name
        assert size == 8 or not pgcopy.fits(np.array([most + 1]), size)
        assert size == 8 or not pgcopy.fits(np.array([-most - 2]), size)
    assert pgcopy.fits(np.array([], dtype=np.int64), 2)
    with open_store(made_postgres_url) as store:
        with store._engine.connect() as connection:
            query = "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = 'observations'"
            found: dict[str, str] = {row[0]: row[1] for row in connection.execute(sa.text(query))}
        for column in observations.columns:
            if isinstance(column.type, sa.Float):
                assert found[column.name] == "double precision"
            elif isinstance(column.type, sa.Integer):
                small, big = isinstance(column.type, sa.SmallInteger), isinstance(column.type, sa.BigInteger)
                assert found[column.name] == pgcopy.INTS[2 if small else 8 if big else 4]
        run = store.begin_run(a_run())
        rows = Observations.empty(2)
        rows.index[:], rows.chunks[:] = [0, 1], [0, 2**31]
        with pytest.raises(StoreError, match="out of range"):
            store.add_observations(run.id, rows)
        assert len(store.observations(run.id)) == 0
