"""Profiles hold no requests: what is generated from them has their rates, mixes and drift, by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.cli import main
from traces.errors import InputError
from traces.profiles import from_servegen, from_usage, servegen

DATA = Path(__file__).parent / "data" / "servegen"


def test_clients_are_read_as_they_are() -> None:
    """Five clients of the R1 profile: windows of 600 s in which they send, four histograms a day."""
    clients = servegen(DATA)
    assert [c.name for c in clients] == ["chunk-1", "chunk-26", "chunk-29", "chunk-33", "chunk-8"]
    first = clients[0]
    lines = (DATA / "chunk-1-trace.csv").read_text().splitlines()
    assert len(lines) == 144
    assert len(first.windows) == sum(float(line.split(",")[1]) > 0 for line in lines)
    assert first.windows[0] == (0.0, 0.105, "Gamma", 1.1681033415865265, 8.05582170861377)
    assert [w[0] for w in first.lengths] == [0, 21600, 43200, 64800]


def test_a_day_made_from_clients_has_their_rate_and_mix() -> None:
    """Requests a window follow the profile's rates, lengths its histograms, and the same seed gives the same day."""
    clients = servegen(DATA)
    day = from_servegen(clients, start_s=0, end_s=86_400, name="day", seed=1)
    wanted = sum(w[1] * 600 for c in clients for w in c.windows)
    assert len(day) == pytest.approx(wanted, rel=0.05)
    for quarter in range(4):
        low, high = quarter * 21_600, (quarter + 1) * 21_600
        inside = (day.due_s >= low) & (day.due_s < high)
        rates = [sum(w[1] for w in c.windows if low <= w[0] < high) * 600 for c in clients]
        means = [
            float((w[1][0] * w[1][1]).sum())
            for c in clients
            for w in [next((x for x in c.lengths if x[0] == low), c.lengths[0])]
        ]
        mean = sum(r * m for r, m in zip(rates, means, strict=True)) / sum(rates)
        assert day.prompt_tokens[inside].mean() == pytest.approx(mean, rel=0.25)
    again = from_servegen(clients, start_s=0, end_s=86_400, name="day", seed=1)
    assert again.digest() == day.digest()
    hour = from_servegen(clients, start_s=3600, end_s=7200, name="hour", seed=1, rate_factor=4.0)
    assert hour.span_s <= 3600
    slow = from_servegen(clients, start_s=3600, end_s=7200, name="hour", seed=1)
    assert len(hour) == pytest.approx(4 * len(slow), rel=0.25)


def test_nothing_in_a_profile_is_evaluated(tmp_path: Path) -> None:
    """A dict that is code is refused, in one line that names the file."""
    (tmp_path / "chunk-1-trace.csv").write_text("0,1.0,1.0,Gamma,1.0,1.0\n")
    data = tmp_path / "chunk-1-dataset.json"
    marker = tmp_path / "ran"
    hostile: list[Any] = [
        f"__import__('pathlib').Path({str(marker)!r}).touch()",
        "{1: 0.5, 2: -1}",
        "[1, 2]",
        "{" * 300,
        {"a": "b"},
    ]
    for value in hostile:
        data.write_text(json.dumps({"0": {"input_tokens": value, "output_tokens": "{1: 1.0}"}}))
        with pytest.raises(InputError, match=r"chunk-1-dataset\.json"):
            servegen(tmp_path)
    assert not marker.exists()
    (tmp_path / "chunk-1-trace.csv").write_text("0,1.0,1.0,Pareto,1.0,1.0\n")
    with pytest.raises(InputError, match=r"chunk-1-trace\.csv:1: Gamma or Weibull"):
        servegen(tmp_path)
    for law in ("Gamma,1e-300", "Weibull,0.005", "Weibull,0.02", "Gamma,1e300"):  # gaps of 0 without end
        (tmp_path / "chunk-1-trace.csv").write_text(f"0,1.0,1.0,{law},1.0\n")
        with pytest.raises(InputError, match=r"chunk-1-trace\.csv:1: a \w+ shape must be from"):
            servegen(tmp_path)
    with pytest.raises(InputError, match="holds no chunk"):
        servegen(tmp_path / "nowhere")


def test_usage_buckets_keep_their_counts_and_means(tmp_path: Path) -> None:
    """As many requests as the bucket had, in its time, with its mean lengths."""
    path = tmp_path / "usage.json"
    results = [{"input_tokens": 4_000_000, "output_tokens": 800_000, "num_model_requests": 4000}]
    buckets = [
        {"start_time": 1_700_000_000, "end_time": 1_700_003_600, "results": results},
        {"start_time": 1_700_003_600, "end_time": 1_700_007_200, "results": []},
    ]
    path.write_text(json.dumps({"data": buckets}))
    made = from_usage(path, name="u", seed=2)
    assert len(made) == 4000
    assert made.span_s == pytest.approx(3600, rel=0.01)
    assert made.prompt_tokens.mean() == pytest.approx(1000, rel=0.07)
    assert made.output_tokens.mean() == pytest.approx(200, rel=0.07)
    path.write_text('{"data": [{"start_time": 5}]}')
    with pytest.raises(InputError, match="bucket 1 needs"):
        from_usage(path, name="u")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([("1e999", 5)], "bucket 1 needs"),
        ([(5, "1e999")], "bucket 1 has impossible"),
        ([(5, "NaN")], "bucket 1 has impossible"),
        ([(5, 1e300)], "bucket 1 has impossible"),
        ([(-1, 5)], "bucket 1 has impossible"),
        ([(1, 5), (50_000_000, 5)], "more than 50,000,000 requests"),
    ],
)
def test_usage_of_no_sense_is_refused(counts: list[tuple[Any, Any]], words: str, tmp_path: Path) -> None:
    """A count that is no number, tokens beyond any prompt, more requests in all than a trace takes: one line each."""
    path = tmp_path / "usage.json"
    rows = [f'{{"num_model_requests": {n}, "input_tokens": {t}, "output_tokens": 5}}' for n, t in counts]
    path.write_text(f'{{"data": [{{"start_time": 0, "end_time": 60, "results": [{", ".join(rows)}]}}]}}')
    with pytest.raises(InputError, match=words):
        from_usage(path, name="u")


def test_the_verb_makes_traces_from_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """synth --servegen takes a window of the profile's day; what it was made from stands in the notes."""
    db = ["--db", f"sqlite:///{tmp_path}/p.db"]
    command = ["synth", "--name", "r1", "--servegen", str(DATA), "--window", "1h-2h", "--json", *db]
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["rows_kept"] > 100
    assert "servegen servegen, clients 5, window_s 3600-7200" in made["notes"][0]
    assert main(["synth", "--name", "x", "--usage", str(tmp_path / "no.json"), *db]) == 1
    assert np.isfinite(made["span_s"])


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (
            ["--servegen", str(DATA)],
            ["--rate 2", "--requests 9", "--arrivals gamma", "--cv 3", "--lengths mixture", "--output x"],
        ),
        (["--usage", "u.json"], ["--rate 2", "--requests 9", "--arrivals gamma", "--output x", "--rate-factor 2"]),
        (["--like", "m"], ["--cv 3", "--output x", "--rate-factor 2"]),
        (["--preset", "origin"], ["--output x", "--lengths mixture", "--rate-factor 2", "--cv 3"]),
        (["--prompt", "x"], ["--lengths mixture", "--rate-factor 2", "--cv 3"]),
    ],
    ids=["servegen", "usage", "like", "preset", "prompt"],
)
def test_an_option_that_would_not_count_is_refused(
    source: list[str], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is read or stored."""
    for option in options:
        name, value = option.split()
        assert main(["synth", "--name", "r1", *source, name, value, "--db", f"sqlite:///{tmp_path}/p.db"]) == 2
        assert f"{name} would not count" in capsys.readouterr().err
    assert not (tmp_path / "p.db").exists()
