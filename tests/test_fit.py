"""Fits find what traces were made of, say how good they are, and make traces that look alike."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.cli import main
from traces import shape
from traces.errors import InputError
from traces.fit import _arrivals, alike, fit
from traces.ingest import ingest
from traces.records import Schedule
from traces.shape import LogNormal, synthesize
from traces.shipped import shipped
from traces.store import open_store

DATA = Path(__file__).parent / "data" / "traces"


def conv() -> Schedule:
    with open_store("sqlite:///:memory:") as store:
        ingest(store, [shipped("azure-2023-conv")], name="conv")
        return store.schedule("conv")


@pytest.mark.parametrize(("mu", "sigma"), [(6.0, 1.0), (5.0, 0.8), (7.5, 0.3)])
def test_a_log_normal_is_found_again(mu: float, sigma: float) -> None:
    """mu, sigma and the mean come back from 10,000 draws, and the distance is that of rounding and chance."""
    drawn = synthesize(10_000, LogNormal(mu, sigma), LogNormal(5.0, 0.8), rate_per_s=10, seed=1)
    law = fit(drawn).prompt["lognormal"]
    (part,) = law.parts
    assert part.mu == pytest.approx(mu, abs=0.03)
    assert part.sigma == pytest.approx(sigma, abs=0.02)
    assert law.ks < 0.015
    assert law.mean_tokens == pytest.approx(math.exp(mu + sigma**2 / 2), rel=0.05)


def test_two_kinds_of_requests_are_two_log_normals() -> None:
    """A mixture finds both and their shares where a single law cannot."""
    rng = np.random.default_rng(2)
    long = rng.random(10_000) < 0.3
    prompts = np.where(long, LogNormal(8.0, 0.2).draw(10_000, rng), LogNormal(4.0, 0.5).draw(10_000, rng))
    schedule = Schedule("s", np.arange(10_000), np.arange(10_000) * 0.1, prompts, np.full(10_000, 5))
    law = fit(schedule).prompt
    assert law["mixture"].ks < 0.03 < law["lognormal"].ks
    assert sum(p.weight for p in law["mixture"].parts if p.mu > 7) == pytest.approx(0.3, abs=0.02)


def test_arrivals_are_named_after_what_they_are() -> None:
    """Poisson, constant, bursty and all at once are told apart by CV and dispersion."""
    lengths = LogNormal(5.0, 0.5), LogNormal(4.0, 0.5)
    for process, cv in (("poisson", 1.0), ("constant", 0.0), ("gamma", 3.0)):
        found = _arrivals(synthesize(5000, *lengths, rate_per_s=8, arrivals=process, cv=3.0, seed=3))
        assert found.process == process
        assert found.cv == pytest.approx(cv, abs=0.25)
        assert found.rate_per_s == pytest.approx(8, rel=0.1)
    poisson = _arrivals(synthesize(5000, *lengths, rate_per_s=8, seed=4))
    assert poisson.dispersion["1s"] == pytest.approx(1, abs=0.15)
    assert len(poisson.rate_by_tenth) == 10
    assert fit(synthesize(50, *lengths, rate_per_s=8, arrivals="burst")).arrivals.process == "burst"


def test_a_real_trace_is_like_no_single_law() -> None:
    """Azure's conversation: the distances of a log-normal are large, as its spikes make them, and the tool says so."""
    found = fit(conv())
    assert found.prompt["lognormal"].ks > 0.1
    assert found.use == "empirical"
    assert found.arrivals.dispersion["60s"] > 5 * found.arrivals.dispersion["1s"]
    assert found.arrivals.cv == pytest.approx(1.07, abs=0.02)


def test_a_trace_made_alike_has_its_lengths_and_rate() -> None:
    """Recorded pairs are drawn together; laws keep the mean; the rate is the trace's unless given."""
    source = conv()
    pairs = set(zip(source.prompt_tokens.tolist(), source.output_tokens.tolist(), strict=True))
    made = alike(source, 5000, name="m", seed=1)
    assert set(zip(made.prompt_tokens.tolist(), made.output_tokens.tolist(), strict=True)) <= pairs
    assert made.rate_per_s == pytest.approx(source.rate_per_s, rel=0.05)
    assert made.prompt_tokens.mean() == pytest.approx(source.prompt_tokens.mean(), rel=0.05)
    mixed = alike(source, 5000, name="m", lengths="mixture", rate_per_s=2.0, arrivals="poisson", seed=1)
    assert mixed.rate_per_s == pytest.approx(2.0, rel=0.05)
    assert mixed.output_tokens.mean() == pytest.approx(source.output_tokens.mean(), rel=0.06)
    assert alike(source, 50, name="m", seed=1).digest() == alike(source, 50, name="m", seed=1).digest()
    with pytest.raises(InputError, match="at least 20"):
        fit(shape.head(source, 5))


def test_a_trace_is_shown_over_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """traces show draws rate, lengths and mix by window; what drifts is said; the same figures are in the JSON."""
    db = ["--db", f"sqlite:///{tmp_path}/s.db"]
    assert main(["ingest", str(DATA / "synthetic_trace.first.jsonl"), "--name", "m", *db]) == 0
    assert main(["traces", "show", "m", *db]) == 0
    words = capsys.readouterr().out
    assert "█" in words
    assert "drift: the mix" in words
    assert main(["traces", "show", "m", "--json", *db]) == 0
    windows = json.loads(capsys.readouterr().out)["windows"]
    assert sum(windows["rate_per_s"]) * windows["seconds"] == pytest.approx(1091)
    one = tmp_path / "one.jsonl"
    one.write_text('{"timestamp": 5, "input_length": 3, "output_length": 2}\n')
    for name in ("one", "log[prod]", "[/x]"):
        assert main(["ingest", str(one), "--name", name, *db]) == 0
        assert main(["traces", "show", name, *db]) == 0
    assert main(["traces", *db]) == 0
    listed = capsys.readouterr().out
    assert "log[prod] " in listed[listed.index("output tokens") :]
    assert "[/x] " in listed[listed.index("output tokens") :]


def test_the_verbs_fit_and_make_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """traces fit prints KS and means; synth --like stores what it made, and how."""
    db = ["--db", f"sqlite:///{tmp_path}/f.db"]
    assert main(["ingest", str(DATA / "synthetic_trace.first.jsonl"), "--name", "m", *db]) == 0
    assert main(["traces", "fit", "m", *db]) == 0
    words = capsys.readouterr().out
    assert "KS" in words
    assert "recorded" in words
    assert main(["traces", "fit", "m", "--json", *db]) == 0
    assert json.loads(capsys.readouterr().out)["arrivals"]["process"] == "poisson"
    assert (
        main(["synth", "--name", "like", "--like", "m", "--requests", "100", "--max-prompt", "900", "--json", *db]) == 0
    )
    made = json.loads(capsys.readouterr().out)
    assert made["rows_kept"] == 100
    assert "like m" in made["notes"][0]
    assert main(["synth", "--name", "x", "--like", "m", "--preset", "origin", *db]) == 1


def test_a_trace_like_a_burst_is_one_unless_a_rate_is_given() -> None:
    """At a rate it is Poisson; an arrival process with gaps needs one."""
    source = Schedule("b", np.arange(30), np.zeros(30), np.arange(1, 31), np.arange(1, 31))
    assert alike(source, 50, name="m").span_s == alike(source, 50, name="m", arrivals="burst").span_s == 0
    assert alike(source, 5000, name="m", rate_per_s=2.0).rate_per_s == pytest.approx(2.0, rel=0.05)
    with pytest.raises(InputError, match=r"are due at one instant\. Give --rate"):
        alike(source, 50, name="m", arrivals="poisson")


# --- shapes ----------------------------------------------------------------------------------------------------------

SCHEDULES = st.builds(
    lambda gaps, seed: Schedule(
        "s",
        np.arange(len(gaps)),
        np.floor(np.cumsum(np.array(gaps, dtype=float)) * 1e6) / 1e6,
        np.random.default_rng(seed).integers(1, 5000, len(gaps)),
        np.random.default_rng(seed + 1).integers(1, 900, len(gaps)),
    ),
    st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=2, max_size=60),
    st.integers(0, 1000),
)


@given(SCHEDULES, st.sampled_from([1.0, 3.0]), st.integers(0, 5))
def test_spreading_keeps_every_request_within_its_tick(schedule: Schedule, tick: float, seed: int) -> None:
    """Only due times change, none leaves its tick, order stays, and what shared no instant does not move."""
    made = shape.spread(schedule, tick, seed)
    assert made.index.tolist() == schedule.index.tolist()
    assert made.prompt_tokens.tolist() == schedule.prompt_tokens.tolist()
    moved = made.due_s != schedule.due_s
    assert (np.floor(made.due_s[moved] / tick + 1e-9) == np.floor(schedule.due_s[moved] / tick + 1e-9)).all()
    if moved.any():
        assert f"{moved.sum()} requests spread" in made.changes[-1]


@given(SCHEDULES, st.integers(1, 4), st.integers(0, 5))
def test_copies_keep_the_mix_and_multiply_the_rate(schedule: Schedule, copies: int, seed: int) -> None:
    """Laid over itself k times a trace has k times the requests in the same span, each length k times."""
    made = shape.superpose(schedule, copies, seed)
    assert len(made) == copies * len(schedule)
    assert sorted(made.prompt_tokens.tolist()) == sorted(schedule.prompt_tokens.tolist() * copies)
    n = len(schedule)
    assert made.span_s <= schedule.span_s * n / (n - 1) + 1e-6
    assert len(set(made.index.tolist())) == len(made)


@given(SCHEDULES, st.floats(0.05, 1), st.integers(0, 5))
def test_thinning_takes_a_part_and_says_so(schedule: Schedule, share: float, seed: int) -> None:
    """What is left is a part in order; nothing else changes."""
    try:
        made = shape.thin(schedule, share, seed)
    except InputError as error:
        assert "none is left" in str(error)  # noqa: PT017 - either is right
        return
    assert set(made.index.tolist()) <= set(schedule.index.tolist())
    if share < 1:
        assert f"thinned to {len(made)} of {len(schedule)}" in made.changes[-1]


def test_lengths_are_scaled_and_never_empty() -> None:
    """Half of one token is one token; blocks that no longer fit are gone."""
    schedule = Schedule("s", np.arange(3), np.arange(3.0), np.array([1, 10, 101]), np.array([1, 5, 9]))
    made = shape.scale_tokens(schedule, prompt=0.5, output=2.0)
    assert made.prompt_tokens.tolist() == [1, 5, 50]
    assert made.output_tokens.tolist() == [2, 10, 18]
    assert made.changes == ("prompts x0.5, outputs x2",)
    assert shape.scale_tokens(schedule) is schedule


def test_copies_of_a_conversation_share_no_blocks() -> None:
    """Another user's copy has the same lengths and other prefixes."""
    with open_store("sqlite:///:memory:") as store:
        ingest(store, [DATA / "synthetic_trace.first.jsonl"], name="m")
        schedule = shape.head(store.schedule("m", blocks=True), 40)
    made = shape.superpose(schedule, 2)
    assert made.blocks is not None
    assert schedule.blocks is not None
    ids = [set(b) for b in schedule.blocks]
    union = set().union(*ids)
    doubled = set().union(*(set(b) for b in made.blocks))
    assert len(doubled) == 2 * len(union)


@pytest.mark.parametrize("window", ["5-3", "x", "1h-"])
def test_a_window_that_is_none_is_a_usage_error(window: str, tmp_path: Path) -> None:
    """--window wants FROM-TO."""
    db = f"sqlite:///{tmp_path}/w.db"
    assert main(["ingest", str(DATA / "test_trace.csv"), "--name", "t", "--db", db]) == 0
    assert main(["simulate", "t", "--window", window, "--db", db]) == 2
