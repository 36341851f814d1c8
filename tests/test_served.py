"""What servers do during a run is stored, and the run's verdict says what it means: real endpoints, a real swarm, real SQL."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.cli import main
from loadgen.client import target
from loadgen.discover import read_targets
from loadgen.live import Live
from loadgen.replay import replay
from loadgen.spool import folder
from loadgen.swarm import Outcome, Swarm
from tests.pages import Ask, Pages, endpoint, event, stream
from tests.test_probe import pool
from traces.errors import EndpointError, StoreError
from traces.measures import ttft_parts
from traces.records import Fleet, Histogram, Observations, Run, Schedule
from traces.store import Store, open_store

PAIR = "cmpl-___prefill_addr_{}___decode_addr_{}_0123456789abcdef"


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm(1) as made:
        yield made


@pytest.fixture
def store(made_url: str) -> Iterator[Store]:
    with open_store(made_url) as made:
        yield made


def schedule(seconds: float = 2.0, rate_per_s: float = 10.0) -> Schedule:
    n = int(seconds * rate_per_s)
    return Schedule("t", np.arange(n), np.arange(n) / rate_per_s, np.full(n, 20), np.full(n, 4))


def asked(store: Store, swarm: Swarm, pages: Pages, *, seconds: float = 2.0, **more: Any) -> Run:
    """A run of a few seconds against a server of this test, whose metrics are read ten times a second."""
    return replay(store, swarm, schedule(seconds), target(pages.url), scrape_s=0.1, **more)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is silent after a second."""
    monkeypatch.setattr("loadgen.scrape.SILENT_S", 1.0)


def counting(mean_s: float) -> Any:
    """A metrics page whose queue histogram counts one request of mean_s with each reading."""
    n = itertools.count(100)

    def page(_: Ask) -> str:
        k = next(n)
        return (
            f"vllm:num_requests_waiting 2\nvllm:request_queue_time_seconds_count {k}\n"
            f"vllm:request_queue_time_seconds_sum {k * mean_s}\nvllm:request_prefill_time_seconds_count {k}\n"
            f"vllm:request_prefill_time_seconds_sum {k * mean_s * 2}\n"
        )

    return page


def test_facts_readings_histograms_and_sources_are_rows(store: Store, swarm: Swarm, tmp_path: Path) -> None:
    """Who served each request and how long its stages took, by worker and role; exported; TTFT in its parts."""
    with Pages() as p, Pages() as d, endpoint("vllm") as pages:
        names = [one.url.removeprefix("http://") for one in (p, d)]
        said = {"queue_time_ms": 3.0, "time_to_first_token_ms": 2.0}
        pages["/v1/completions"] = partial(stream, id=PAIR.format(*names), metrics=said)
        p["/metrics"], d["/metrics"] = counting(0.004), counting(0.001)
        pages["/workers"] = {
            "workers": [
                {"url": p.url, "worker_type": "prefill", "connection_mode": "Http", "is_healthy": True},
                {"url": d.url, "worker_type": "decode", "connection_mode": "Http", "is_healthy": True},
            ]
        }
        run = asked(store, swarm, pages)
    assert (run.complete, run.fleet, run.engine) == (True, Fleet(1, 1), "vllm")
    rows = store.observations(run.id)
    assert set(rows.prefill_worker) == {names[0]}
    assert set(rows.decode_worker) == {names[1]}
    assert rows.transfer_s == pytest.approx(0.003)
    assert rows.first_step_s == pytest.approx(0.002)
    assert np.isnan(rows.queue_s).all()
    assert (rows.cached_tokens == -1).all()
    samples = store.samples(run.id)
    assert {(s.worker, s.role, s.waiting_requests) for s in samples} == {
        (names[0], "prefill", 2),
        (names[1], "decode", 2),
    }
    assert min(s.at_s for s in samples) < 0.3
    found = {(h.worker, h.role, h.name): h for h in store.histograms(run.id)}
    assert found[names[0], "prefill", "queue_s"].mean == pytest.approx(0.004)
    assert found[names[1], "decode", "prefill_s"].mean == pytest.approx(0.002)
    source = store.run(run.id).sources[names[0]]
    assert source["metrics"] == f"http://{names[0]}/metrics"
    assert source["fields"] == {"waiting_requests": "vllm:num_requests_waiting"}
    parts = {p.name: p for p in ttft_parts(rows, store.histograms(run.id))}
    assert parts["queue_s"].mean_s == pytest.approx(0.004)  # of the prefill worker's histogram
    assert parts["queue_s"].source == "vllm:request_queue_time_seconds of prefill"
    assert parts["transfer_s"].source == "answers"
    ttft = rows.ttft_sent_s.mean()
    assert parts["rest"].mean_s == pytest.approx(ttft - 0.004 - 0.008 - 0.003 - 0.002)
    out = tmp_path / "run.csv"
    assert main(["runs", "export", str(run.id), "--out", str(out), "--db", store.url]) == 0
    with out.open() as file:
        first = next(csv.DictReader(file))
    assert (first["prefill_worker"], first["transfer_s"], first["queue_s"]) == (names[0], "0.003", "")
    assert main(["runs", "show", str(run.id), "--db", store.url]) == 0


def test_histograms_wait_on_disk_for_a_database_that_is_locked(store: Store, swarm: Swarm, tmp_path: Path) -> None:
    """They are given to the thread that may wait, like the end of the run: no longer than its patience."""
    ended: list[float] = []
    path = tmp_path / "made.db"
    with endpoint("vllm") as pages, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        pages["/metrics"] = counting(0.004)

        def lock(_: Outcome) -> None:
            other.execute("BEGIN IMMEDIATE")
            ended.append(time.monotonic())

        with pytest.raises(StoreError, match="Nothing is lost"):
            asked(store, swarm, pages, seconds=1.0, patience_s=0.5, on_outcome=lock)
        assert time.monotonic() - ended[0] < 10
        assert '"histograms": [' in "".join(path.read_text() for path in folder().iterdir())
        other.execute("ROLLBACK")
    until = time.monotonic() + 20
    while not store.run(1).ended and time.monotonic() < until:
        assert main(["runs", "recover", "--db", store.url]) in (0, 1)  # 1: the replay's own thread is at it
        time.sleep(0.1)
    assert {h.name for h in store.histograms(1)} == {"queue_s", "prefill_s"}


def test_an_endpoint_without_usage_degrades_the_run(store: Store, swarm: Swarm) -> None:
    """Tokens are then those asked for, and the run says so; 0 tokens beside content are no usage either."""
    nothing = event({"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0}})
    between = itertools.cycle([[], [nothing]])
    with endpoint(answer=lambda ask: itertools.chain(stream(ask, usage=False), next(between))) as pages:
        run = asked(store, swarm, pages)
    assert run.complete
    assert run.verdict in ("degraded", "invalid")
    assert "sent no usage with 20 of 20 answers" in run.reason


def test_a_proxy_that_holds_streams_back_degrades_the_run(store: Store, swarm: Swarm) -> None:
    """Whole answers arrive, though as streams: TTFT is then no TTFT."""
    with endpoint(answer=lambda ask: b"".join(stream(ask, gap_s=0)).decode()) as pages:
        asking = replace(schedule(), output_tokens=np.full(20, 12))
        run = replay(store, swarm, asking, target(pages.url), scrape_s=0.1)
    assert run.complete
    assert run.verdict in ("degraded", "invalid")
    assert "the tokens of 20 of 20 answers came at once" in run.reason


def test_a_token_that_expires_spoils_the_run(store: Store, swarm: Swarm) -> None:
    """Refusals for credentials are not the server's speed; the run says from when on."""
    until = math.inf

    def answer(ask: Ask) -> Any:
        return stream(ask) if time.monotonic() < until else (401, {"error": {"message": "token expired"}})

    def prepared(_: Live) -> None:
        nonlocal until
        until = time.monotonic() + 2.0  # schedule zero lies half a second to a second after it

    with endpoint(answer=answer) as pages:
        run = asked(store, swarm, pages, seconds=3.0, on_live=prepared)
    assert run.verdict == "invalid"
    assert "s on were refused for their credentials: the token expired or was revoked" in run.reason
    assert run.counts["failed.status"] >= 1


def test_a_list_that_does_not_answer_at_the_end_says_nothing_of_the_fleet(
    store: Store, swarm: Swarm, tmp_path: Path
) -> None:
    """A router whose page is known is no worker: with it alone nobody lists any, and no fleet is said to have changed."""
    with Pages() as p, Pages() as d, endpoint("vllm") as pages:
        p["/metrics"] = d["/metrics"] = pages["/metrics"] = "vllm:num_requests_waiting 1\n"
        both = ((p, "prefill"), (d, "decode"))
        listed = [{"url": one.url, "worker_type": kind, "connection_mode": "Http"} for one, kind in both]
        pages["/workers"] = {"workers": listed}
        (tmp_path / "t.json").write_text(json.dumps({"router_metrics": f"{pages.url}/metrics"}))

        def answer(ask: Ask) -> Any:
            pages.pop("/workers", None)
            return stream(ask)

        targets = read_targets(tmp_path / "t.json")
        run = asked(
            store,
            swarm,
            pages,
            seconds=0.5,
            targets=targets,
            on_live=lambda _: pages.update({"/v1/completions": answer}),
        )
    assert run.fleet == Fleet(1, 1)
    assert "the fleet changed" not in run.reason


@pytest.mark.usefixtures("soon")
def test_a_worker_that_vanishes_is_named(store: Store, swarm: Swarm) -> None:
    """Its last reading is told; where the router drops it, the run has no one P:D."""
    with Pages() as gone, Pages() as stays, endpoint("vllm") as pages:
        gone["/metrics"] = stays["/metrics"] = "vllm:num_requests_waiting 1\n"
        listed = [
            {"url": one.url, "worker_type": kind, "connection_mode": "Http"}
            for one, kind in ((stays, "prefill"), (stays, "prefill"), (gone, "decode"))
        ]
        both = [listed[0], listed[2], {**listed[2], "url": stays.url + "/second"}]
        stays["/second/metrics"] = "vllm:num_requests_waiting 1\n"
        pages["/workers"] = {"workers": both}
        answers = itertools.count()

        def answer(ask: Ask) -> Any:
            if next(answers) == 12:
                gone.clear()
                pages["/workers"] = {"workers": [both[0], both[2]]}
            return stream(ask)

        pages["/v1/completions"] = answer
        run = asked(store, swarm, pages, seconds=3.0)
    name = gone.url.removeprefix("http://")
    assert run.fleet == Fleet(1, 2)
    assert f"the decode worker {name} told nothing after" in run.reason
    assert run.verdict == "invalid"
    assert "the fleet changed during the run, from 1 prefill, 2 decode" in run.reason


@pytest.mark.usefixtures("soon")
def test_metrics_that_stop_degrade_the_run(store: Store, swarm: Swarm) -> None:
    """What the servers did afterwards is not known, and the run says since when."""
    with endpoint("vllm") as pages:
        pages["/metrics"] = "vllm:num_requests_waiting 1\n"
        answers = itertools.count()

        def answer(ask: Ask) -> Any:
            if next(answers) == 10:
                del pages["/metrics"]
            return stream(ask)

        pages["/v1/completions"] = answer
        run = asked(store, swarm, pages, seconds=3.0)
    assert run.complete
    assert run.verdict in ("degraded", "invalid")
    assert "no metrics came after" in run.reason


def test_a_fleet_that_the_workers_are_not_is_refused(store: Store, swarm: Swarm, tmp_path: Path) -> None:
    """Before any load: the line names both, and what to give instead; nothing is stored."""
    with endpoint("vllm") as pages:
        pages["/workers"] = pool(pages, "ppd")
        with pytest.raises(
            EndpointError, match=r"--fleet 1:2 disagrees with its workers, 2 prefill, 1 decode .*--fleet 2:1"
        ):
            asked(store, swarm, pages, fleet=Fleet(1, 2))
        pages["/workers"] = pool(pages, "pp")
        with pytest.raises(EndpointError, match="no decode worker is behind it, 2 prefill, 0 decode"):
            asked(store, swarm, pages)
        path = tmp_path / "t.json"
        path.write_text(json.dumps({"workers": [{"role": "decode", "url": f"{pages.url}/w0"}]}))
        with pytest.raises(EndpointError, match="no prefill worker is behind it, 0 prefill, 1 decode"):
            asked(store, swarm, pages, targets=read_targets(path))
    assert store.runs() == []


def test_a_worker_that_does_other_work_than_listed_spoils_the_run(store: Store, swarm: Swarm, tmp_path: Path) -> None:
    """A targets file says decode, its metrics show that it prefilled."""
    n = itertools.count(1)

    def prefilling(_: Ask) -> str:
        k = next(n)
        return (
            f'vllm:prompt_tokens_by_source_total{{source="local_compute"}} {k * 100}\n'
            f'vllm:prompt_tokens_by_source_total{{source="external_kv_transfer"}} 0\n'
            f"vllm:generation_tokens_total {k}\nvllm:request_success_total {k}\n"
        )

    with Pages() as one, Pages() as other, endpoint("vllm") as pages:
        one["/metrics"] = other["/metrics"] = prefilling
        path = tmp_path / "t.toml"
        path.write_text(
            f'[[worker]]\nname = "p0"\nrole = "prefill"\nurl = "{one.url}"\n'
            f'[[worker]]\nname = "d0"\nrole = "decode"\nurl = "{other.url}"\n'
        )
        run = asked(store, swarm, pages, targets=read_targets(path))
    assert run.verdict == "invalid"
    assert "the worker d0 is listed as decode, but its metrics show that it did prefill" in run.reason
    assert "p0 is listed" not in run.reason
    assert {(s.worker, s.role) for s in store.samples(run.id)} == {("p0", "prefill"), ("d0", "decode")}


# --- histograms and parts -------------------------------------------------------------------------------------------


def test_quantiles_of_a_histogram_are_linear_within_a_bucket() -> None:
    """As Prometheus computes them; beyond the last finite bound nothing more is known."""
    held = Histogram("w", "decode", "ttft_s", "x", 10, 5.0, ((0.1, 4), (0.2, 8), (math.inf, 10)))
    assert [held.quantile(q) for q in (0.2, 0.4, 0.6, 0.99)] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert held.mean == 0.5
    assert math.isnan(Histogram("w", "decode", "ttft_s", "x", 0, 0.0).mean)
    assert math.isnan(Histogram("w", "decode", "ttft_s", "x", 3, 1.0).quantile(0.5))


def test_without_any_part_nothing_is_split() -> None:
    """TTFT alone is no decomposition."""
    assert ttft_parts(Observations.unsent(schedule()), []) == []


def test_histograms_come_back_as_they_went_in(made_db_url: str) -> None:
    """In both databases, infinity and all."""
    held = [Histogram("w", "decode", "ttft_s", "vllm:x", 3, 1.5, ((0.1, 1), (math.inf, 3)))]
    with open_store(made_db_url) as store:
        run = store.begin_run(
            Run("n", "t", "d", 1, "http://x", "vllm", "m", None, 0.0, 1, sources={"w": {"role": "decode"}})
        )
        store.add_histograms(run.id, held)
        rows = Observations.unsent(schedule(0.2))
        rows.prefill_worker[:] = "729612501040516471"
        rows.facts[0] = '{"kv_hit_rate":0.5}'
        rows.cached_tokens[0] = 7
        store.add_observations(run.id, rows)
        assert store.histograms(run.id) == held
        assert store.run(run.id).sources == {"w": {"role": "decode"}}
        again = store.observations(run.id)
        assert (set(again.prefill_worker), list(again.decode_worker)) == ({"729612501040516471"}, ["", ""])
        assert (list(again.facts), list(again.cached_tokens)) == (['{"kv_hit_rate":0.5}', ""], [7, -1])
        assert store.compare_schema() == []
