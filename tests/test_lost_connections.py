"""A connection that breaks in the middle costs nothing: what was sent is sent again, and is stored once."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa

import traces.store
from tests.test_store import a_run, same, some_rows
from traces.errors import StoreError
from traces.records import Fleet, FleetChange, Observations, Sample
from traces.store import Store, open_store


class Proxy:
    """A TCP proxy on loopback that cuts the next connection after a number of bytes, in either direction.

    to: (host, port), or the path of a socket.
    """

    def __init__(self, to: tuple[str, int] | str) -> None:
        self._to = to
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.cut_after: int | None = None
        self.cuts = 0
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX if isinstance(self._to, str) else socket.AF_INET)
            far.connect(self._to)
            left, self.cut_after = [self.cut_after], None
            self._open |= {near, far}
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(a, b, left), daemon=True).start()

    def _pump(self, a: socket.socket, b: socket.socket, left: list[int | None]) -> None:
        try:
            while data := a.recv(65536):
                if left[0] is not None:
                    left[0] -= len(data)
                    if left[0] < 0:
                        self.cuts += 1
                        left[0] = None
                        break
                b.sendall(data)
        except OSError:
            pass
        for one in (a, b):
            self._open.discard(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._listening.close()
        for one in list(self._open):
            one.close()


@pytest.fixture(params=["postgres", "mariadb"])
def server_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def proxied(server_url: str) -> Iterator[tuple[Proxy, Store]]:
    """A store behind a proxy that can cut it off."""
    url = sa.make_url(server_url)
    folder = url.query.get("host")
    proxy = Proxy(f"{folder}/.s.PGSQL.5432" if isinstance(folder, str) else (str(url.host), url.port or 5432))
    at = url.set(host="127.0.0.1", port=proxy.port, query={})
    shown = at.render_as_string(hide_password=False)
    with open_store(shown) as store:
        yield proxy, store
    proxy.close()


def test_rows_sent_through_connections_that_are_cut_are_there_once(proxied: tuple[Proxy, Store]) -> None:
    """Cut at any byte, also between the commit and its answer, each batch is in the database once."""
    proxy, store = proxied
    rng = random.Random(7)
    rows = some_rows(600)
    run = store.begin_run(a_run())
    readings = [Sample(float(k), "w", "decode", running_requests=1.0) for k in range(60)]
    for k in range(60):
        store._engine.dispose()  # a new connection, with its own budget of bytes
        proxy.cut_after = None if k % 6 == 5 else rng.randrange(200, 9000)
        store.add_observations(run.id, rows.take(np.arange(10 * k, 10 * k + 10)))
        store.add_samples(run.id, readings[k : k + 1])
        store.add_fleet_change(run.id, FleetChange(float(k), 1.0, Fleet(1, 1), Fleet(1, 2), "r"))
    proxy.cut_after = None
    store._engine.dispose()
    assert proxy.cuts > 20
    same(store.observations(run.id), Observations.concat([rows]))
    assert store.samples(run.id) == readings
    assert len(store.fleet_changes(run.id)) == 60


def test_a_run_begun_through_a_cut_connection_is_begun_once(proxied: tuple[Proxy, Store]) -> None:
    """Whether or not the database had heard of it before the cut, one begin_run is one run."""
    proxy, store = proxied
    begun = 0
    for budget in range(200, 6000, 200):
        store._engine.dispose()
        proxy.cut_after = budget
        store.begin_run(replace(a_run(), group="cut"))
        begun += 1
    store._engine.dispose()
    proxy.cut_after = None
    assert len(store.runs(group="cut")) == begun
    assert proxy.cuts >= 3


def test_a_backend_that_the_administrator_ends_costs_nothing(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While pg_terminate_backend ends every connection again and again, ten masters write their runs: all is there, once."""
    # Ten at once on few cores may need as long for a transaction as the axe rests: how often one is tried is not the question.
    monkeypatch.setattr(traces.store, "RETRIES_S", (*traces.store.RETRIES_S, *[0.2] * 100))
    rows = some_rows(1000)
    with open_store(postgres_url) as store:
        over = threading.Event()
        ended = [0]

        def axe() -> None:
            url = sa.make_url(postgres_url).set(drivername="postgresql+psycopg")
            engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
            query = sa.text(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            with engine.connect() as connection:
                while not over.wait(0.25):
                    ended[0] += connection.execute(query).scalar_one()
            engine.dispose()

        until = time.monotonic() + 120

        def master(number: int) -> int:
            with open_store_patiently(postgres_url, until) as mine:
                run = mine.begin_run(replace(a_run(), group=f"m{number}"))
                for start in range(0, 1000, 50):
                    while True:
                        try:
                            mine.add_observations(run.id, rows.take(np.arange(start, start + 50)))
                            break
                        except StoreError:
                            if time.monotonic() > until:
                                raise
                mine.end_run(run)
                return run.id

        axeman = threading.Thread(target=axe)
        axeman.start()
        try:
            with ThreadPoolExecutor(10) as pool:
                ids = list(pool.map(master, range(10)))
        finally:
            over.set()
            axeman.join()
        assert ended[0] >= 10
        assert len(set(ids)) == 10
        for number, one in enumerate(ids):
            assert [r.id for r in store.runs(group=f"m{number}")] == [one]
            same(store.observations(one), Observations.concat([rows]))


def open_store_patiently(url: str, until: float) -> Store:
    """Opening is not retried by the store: a person is there."""
    while True:
        try:
            return open_store(url)
        except StoreError:
            if time.monotonic() > until:
                raise


def test_ten_masters_write_at_once_and_a_reader_does_not_hold_them_up(any_url: str) -> None:
    """Ten writers, each its own run, beside a reader that keeps a transaction open: nobody waits for it, all rows are there."""
    rows = some_rows(300)
    with open_store(any_url) as store:
        first = store.begin_run(a_run())
        store.add_observations(first.id, rows)
        with store._engine.connect() as reading:
            if any_url.startswith("sqlite"):
                reading.exec_driver_sql("BEGIN")  # its driver begins none before it writes
            count = sa.text("SELECT count(*) FROM observations")
            assert reading.execute(count).scalar_one() == 300

            def master(_: int) -> int:
                with open_store(any_url) as mine:
                    run = mine.begin_run(a_run())
                    for start in range(0, 300, 60):
                        mine.add_observations(run.id, rows.take(np.arange(start, start + 60)))
                    mine.end_run(run)
                    return run.id

            with ThreadPoolExecutor(10) as pool:
                ids = list(pool.map(master, range(10)))
            assert any_url.startswith("sqlite") is (
                reading.execute(count).scalar_one() == 300
            )  # the others read what is committed
        assert len(set(ids)) == 10
        for one in ids:
            same(store.observations(one), Observations.concat([rows]))
