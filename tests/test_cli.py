"""The command: keys that other programs rely on, exit codes, and one clear line for whatever is wrong."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.cli import VERBS, main
from loadgen.cluster.embedded import embedded
from traces.records import Fleet, Observations

DATA = Path(__file__).parent / "data" / "traces"
CSV = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{i // 10:02d}.{i % 10}00000,{50 + i},{4 + i % 5}\n" for i in range(40)
)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command, in this process."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The one JSON object that a command prints."""
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def db(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'cli.db'}"


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "small.csv"
    path.write_text(CSV)
    return str(path)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with embedded("constant", Fleet(4, 4)) as url:
        yield url


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` of every verb shows an example, and every verb that prints a result has ``--json``."""
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"steelyard {verb}" in out.split("Example:")[1]
    assert verb in ("worker", "completion") or "--json" in out


def test_the_list_of_verbs_needs_no_heavy_library(tmp_path: Path) -> None:
    """``steelyard --help`` imports neither Locust nor scikit-learn nor SQLAlchemy, and a replay not before its workers begin."""
    code = (
        "import sys; from advisor.cli import main; main(['--help']); "
        "import loadgen.crew; loadgen.crew.Crew.__enter__ = lambda self: sys.exit(5 if heavy & set(sys.modules) else 7);"
        "heavy = {'locust', 'gevent', 'sklearn', 'sqlalchemy', 'plotly', 'aiohttp', 'numpy'};"
        "main(['replay', 't', '--endpoint', 'http://127.0.0.1:1'])"
    )
    nothing_waits = os.environ | {"XDG_STATE_HOME": str(tmp_path)}  # rows that another test left on disk need the store
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=nothing_waits).returncode
        == 7
    )


def test_ingest_and_show_print_the_keys_of_the_house(db: str, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``ingest --json`` and ``traces show --json`` have every promised key, and add up."""
    keys = {
        "name",
        "format",
        "rows_read",
        "rows_kept",
        "skipped",
        "other_events",
        "sum_prompt_tokens",
        "sum_output_tokens",
        "span_s",
        "distinct_arrivals",
        "prefix_hit_tokens",
    }
    for held in (
        result(capsys, "ingest", trace, "--db", db),
        result(capsys, "traces", "show", "small", "--db", db),
    ):
        assert keys <= set(held)
        assert held["rows_read"] == held["rows_kept"] == 40
        assert held["sum_prompt_tokens"] == sum(50 + i for i in range(40))


@pytest.mark.timed
def test_replay_prints_the_keys_of_the_house_and_stores_what_it_says(
    db: str, trace: str, endpoint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``replay --json`` has every promised key; its run is listed, shown, exported with the columns of the records."""
    result(capsys, "ingest", trace, "--db", db)
    asked = ("--rate", "40", "--slo", "ttft<0.5s", "--workers", "1")
    held = result(capsys, "replay", "small", "--endpoint", endpoint, *asked, "--db", db)
    keys = {
        "run",
        "scheduled",
        "ok",
        "failed",
        "unsent",
        "verdict",
        "lag_ms",
        "ttft_ms",
        "tpot_ms",
        "e2e_ms",
        "goodput_per_s",
        "fleet",
    }
    assert keys <= set(held)
    assert (held["scheduled"], held["ok"], held["unsent"]) == (40, 40, 0)
    assert {"p50", "p99", "max"} <= set(held["lag_ms"])
    assert held["fleet"] == {"prefill": 4, "decode": 4}
    assert 45 < held["ttft_ms"]["p50"] < 80
    listed = result(capsys, "runs", "--db", db)
    assert str(held["run"]) in json.dumps(listed)
    out = tmp_path / "rows.csv"
    assert run(capsys, "runs", "export", str(held["run"]), "--out", str(out), "--db", db)[0] == 0
    header, *rows = out.read_text().splitlines()
    assert set(Observations.columns()) <= set(header.split(","))
    assert len(rows) == 40


def test_synth_makes_the_origin_workload_by_name(db: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The preset is stored, seeded, and the same again is a no-op."""
    arguments = ("synth", "--name", "o", "--preset", "origin", "--requests", "100", "--seed", "3", "--db", db)
    first, again = result(capsys, *arguments), result(capsys, *arguments)
    assert first["rows_kept"] == 100
    assert first["span_s"] <= 60
    assert (first["already"], again["already"]) == (False, True)


def test_simulate_gives_every_split(db: str, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``simulate`` evaluates all seven splits of eight GPUs."""
    result(capsys, "ingest", trace, "--db", db)
    held = result(capsys, "simulate", "small", "--profile", "demo", "--gpus", "8", "--db", db)
    assert [(f["prefill"], f["decode"]) for f in held["fleets"]] == [(p, 8 - p) for p in range(1, 8)]
    assert all("mixed" not in f for f in held["fleets"])
    fleet = ("simulate", "small", "--profile", "demo", "--fleet", "0:0+8", "--db", db)
    (mixed,) = result(capsys, *fleet)["fleets"]
    assert (mixed["prefill"], mixed["decode"], mixed["mixed"]) == (0, 0, 8)
    assert main(list(fleet)) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("0:0+8"))
    assert "nan" not in row
    assert row.endswith(f"{mixed['utilisation']['mixed']:.0%}")


# --- wrong input ----------------------------------------------------------------------------------------------------


WRONG = [
    # (arguments, exit code, words)
    (["replay", "nope", "--endpoint", "http://127.0.0.1:1"], 1, "no trace is named 'nope'"),
    (["replay", "smal", "--endpoint", "http://127.0.0.1:1"], 1, "Did you mean 'small'?"),
    (["replay", "small", "--endpoint", "http://127.0.0.1:1"], 1, "refused"),
    (["replay", "small", "--endpoint", "ftp://x"], 1, "http"),
    (["replay", "small", "--endpoint", "{endpoint}", "--fleet", "0:8"], 1, "at least one worker"),
    (["replay", "small", "--endpoint", "{endpoint}", "--fleet", "9:0"], 1, "at least one worker"),
    (["replay", "small", "--endpoint", "{endpoint}", "--fleet", "4:5"], 1, "impossible"),
    (["replay", "small", "--endpoint", "{endpoint}", "--fleet", "three"], 1, "prefill:decode"),
    (["replay", "small", "--endpoint", "{endpoint}", "--slo", "fast"], 1, "SLO term"),
    (["replay", "small", "--endpoint", "{endpoint}", "--model", "gpt-9"], 1, "gpt-9"),
    (["replay", "small", "--endpoint", "{endpoint}", "--gpus-per-worker", "\u00b2,1"], 2, "--gpus-per-worker"),
    (["replay", "small", "--endpoint", "{endpoint}", "--gpus-per-worker", "1,3000000000"], 2, "--gpus-per-worker"),
    (["replay", "small", "--endpoint", "{endpoint}", "--seed", str(2**63)], 2, "--seed"),
    (["replay", "small", "--endpoint", "{endpoint}", "--web", "\u00b2"], 2, "--web"),
    (["replay", "small"], 2, "--endpoint"),
    (
        ["ingest", "{tmp}/none.csv"],
        1,
        "no such file. Check the path. Shipped traces, by name: azure-2023-conv, azure-2023-code.",
    ),
    (["ingest", "{tmp}"], 1, "folder"),
    (["ingest", "{tmp}/small.csv", "--max-bad", "lots"], 1, "--max-bad"),
    (["ingest", "{tmp}/small.csv", "--format", "parquet9"], 1, "--format"),
    (["synth", "--name", "x"], 1, "--preset origin"),
    (
        ["synth", "--name", "x", "--prompt", "normal:5", "--output", "lognormal:mu=1,sigma=1", "--rate", "1"],
        1,
        "lognormal",
    ),
    (["traces", "show", "nope"], 1, "no trace is named"),
    (["advise"], 5, "no ended run"),
    (["advise", "--gpus", "1"], 5, "no ended run"),
    (["report", "--out", "{tmp}/r.html"], 5, "no ended run"),
    (["runs", "show", "77"], 1, "no run has id 77"),
    (["simulate", "small", "--profile", "nope"], 1, "neither a shipped one"),
    (["serve", "--fleet", "0:8"], 1, "at least one worker"),
    (["serve", "--host", "0.0.0.0"], 1, "token"),
    (["serve", "--speed", "0"], 1, "--speed"),
    (["serv"], 2, "Did you mean 'serve'?"),
    (["advise", "--gpus", "many"], 2, "--gpus"),
    (["sweep", "small", "--all", "--gpus", "3", "--gpus-per-worker", "2,2"], 1, "no fleet with both roles"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(w[0])[:60] for w in WRONG])
def test_wrong_input_is_one_clear_line(
    arguments: list[str],
    code: int,
    words: str,
    db: str,
    trace: str,
    endpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What, where, got, next step; the exit code of the house; no traceback; nothing on stdout but JSON's error."""
    monkeypatch.setenv("STEELYARD_DB", db)
    assert main(["ingest", trace]) == 0
    capsys.readouterr()
    one = ["--workers", "1"] if arguments[0] == "replay" else []  # some begin workers before the mistake is seen
    got, out, err = run(capsys, *(a.format(tmp=tmp_path, endpoint=endpoint) for a in arguments), *one)
    assert got == code, err
    assert words in err
    assert "Traceback" not in err
    assert out == ""
    if code != 2:
        assert len(err.strip().splitlines()) == 1


def test_an_error_with_json_is_json(db: str, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``--json`` an error is one JSON object on stdout beside the line on stderr."""
    main(["ingest", trace, "--db", db])
    capsys.readouterr()
    code, out, err = run(capsys, "traces", "show", "nope", "--db", db, "--json")
    assert code == 1
    assert json.loads(out)["error"] in err


def test_a_quiet_sweep_says_nothing_on_the_way(db: str, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``--quiet``: not how it would go on either."""
    main(["ingest", trace, "--db", db])
    capsys.readouterr()
    sweep = ("sweep", "small", "--fleets", "1:1", "--endpoint", "http://127.0.0.1:1", "--workers", "0", "--db", db)
    assert "if this is broken off" in run(capsys, *sweep)[1]
    code, out, err = run(capsys, *sweep, "-q")
    assert (code, out) == (1, "")
    assert "at least one worker" in err


@contextlib.contextmanager
def odd_server(status: int, body: bytes, kind: str, stall: bool = False) -> Iterator[str]:
    """A real HTTP server that answers everything alike, or never."""
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            if stall:
                release.wait(30)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        release.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (500, b"boom", "text/plain", "HTTP 500"),
        (200, b"<!doctype html><html>hello</html>", "text/html", "web page"),
        (404, b"{}", "application/json", ""),
        (401, b"{}", "application/json", "credentials"),
    ],
)
def test_an_endpoint_that_is_none_is_said_to_be_none(
    status: int, body: bytes, kind: str, words: str, db: str, trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An endpoint that answers 500, HTML, 404 or 401 is one line, and no run is stored."""
    main(["ingest", trace, "--db", db])
    capsys.readouterr()
    with odd_server(status, body, kind) as url:
        code, _, err = run(capsys, "replay", "small", "--endpoint", url, "--workers", "1", "--db", db)
    assert code == 1
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert result(capsys, "runs", "--db", db)["runs"] == []


def test_an_endpoint_that_never_answers_is_given_up(
    db: str, trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint that accepts and stays silent is one line within the time for questions."""
    monkeypatch.setattr("loadgen.control.endpoint.PREFLIGHT_S", 1.0)
    main(["ingest", trace, "--db", db])
    capsys.readouterr()
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        port = listener.getsockname()[1]
        silent = f"http://127.0.0.1:{port}"
        code, _, err = run(capsys, "replay", "small", "--endpoint", silent, "--workers", "1", "--db", db)
    finally:
        listener.close()
    assert code == 1
    assert "no answer within" in err


def test_a_database_of_another_revision_is_refused_by_every_verb(
    db: str, trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A newer database is refused by each verb that opens one, with the same line."""
    import sqlite3

    main(["ingest", trace, "--db", db])
    with sqlite3.connect(db.removeprefix("sqlite:///")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    capsys.readouterr()
    for arguments in (["ingest", trace], ["traces"], ["runs"], ["advise"], ["migrate"]):
        code, _, err = run(capsys, *arguments, "--db", db)
        assert code == 1
        assert "9999" in err


@pytest.mark.timed
def test_secrets_reach_neither_rows_nor_messages(
    db: str,
    trace: str,
    endpoint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A key in the environment, a header and a password in the URL appear nowhere in what was written or printed."""
    monkeypatch.setenv("STEELYARD_API_KEY", "sk-PLANTED-1")
    main(["ingest", trace, "--db", db])
    url = endpoint.replace("http://", "http://user:PLANTED-2@")
    code, out, err = run(
        capsys,
        "replay",
        "small",
        "--endpoint",
        url,
        "--header",
        "X-Key:PLANTED-3",
        "--workers",
        "1",
        "--rate",
        "50",
        "--db",
        db,
        "--json",
    )
    assert code == 0, err
    for name in os.listdir(tmp_path):
        assert b"PLANTED" not in (tmp_path / name).read_bytes(), name
    assert "PLANTED" not in out + err


# --- strategies at the client ----------------------------------------------------------------------------------------


@pytest.mark.timed
def test_an_online_replay_stores_every_move_with_its_reason(
    db: str, trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The controller runs beside the replay: what it moved, when it was in force, and why are rows and in the JSON."""
    result(capsys, "ingest", trace, "--name", "t", "--db", db)
    with embedded("origin", Fleet(3, 1), speed=10.0) as url:
        found = result(
            capsys, "replay", "t", "--endpoint", url, "--policy", "online-report", "--workers", "1", "--rate", "40",
            "--output-scale", "20", "--db", db,
        )  # fmt: skip
    assert found["fleet_changes"]
    assert found["fleet_changes"][0]["before"] == "3:1"
    assert "answers wait" in found["fleet_changes"][0]["reason"]
    assert found["fleet_changes"][0]["first_served_s"] > found["fleet_changes"][0]["asked_s"]
    code, _, err = run(capsys, "replay", "t", "--endpoint", url, "--policy", "online", "--db", db)
    assert (code, "needs thresholds: give --recommendation ID" in err) == (1, True), err
    how = ("--policy", "online-report", "--ratio", "3")
    code, _, err = run(capsys, "replay", "t", "--endpoint", url, *how, "--db", db)
    assert (code, "--ratio would not count: the 1.5x counts" in err) == (2, True), err


@pytest.mark.parametrize("verb", ["replay", "sweep"])
def test_a_group_that_no_database_could_hold_is_refused_before_anything_moves(
    db: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The URL is nobody's: it would be asked for its fleet first."""
    how = ("t", "--endpoint", "http://127.0.0.1:9", "--group", "g" * 201, "--db", db)
    code, _, err = run(capsys, verb, *how)
    assert (code, "at most 200 characters (got 201)" in err) == (2, True), err


def test_no_memory_is_one_line(db: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by tests.faults: a program that is denied memory says so, without a traceback."""
    laws = ("--prompt", "lognormal:median=9,sigma=1", "--output", "lognormal:median=9,sigma=1", "--rate", "1")
    code, _, err = run(capsys, "synth", "--name", "x", "--requests", str(10**15), *laws, "--db", db)
    assert (code, err.count("\n")) == (1, 1)
    assert "out of memory" in err


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Found by tests.faults: whatever the program waits for, Ctrl-C ends it with 130 and no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        held: list[socket.socket] = []

        def interrupt() -> None:  # once the command waits for its answer
            held.append(silent.accept()[0])
            os.kill(os.getpid(), signal.SIGINT)

        alarm = threading.Thread(target=interrupt, daemon=True)
        alarm.start()
        code, _, err = run(capsys, "runs", "--db", f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x")
        alarm.join(10)
        held[0].close()
    assert (code, err.strip()) == (130, "steelyard: interrupted")


NULL = """
import ctypes, resource, sys
import advisor.cli
def starve(*args, **kwargs):
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), resource.RLIM_INFINITY))
    ctypes.pythonapi.PyErr_BadInternalCall()  # raises SystemError, as a C function does that gives NULL and no exception
advisor.cli.steelyard.main = starve
sys.exit(advisor.cli.main(["runs"]))
"""


def test_a_library_that_does_not_say_that_it_was_denied_memory() -> None:
    """Under a limit of the address space a C function's NULL without an exception is said as what it is; without a limit
    it is a mistake, and stays a traceback."""
    limited, free = (
        subprocess.run([sys.executable, "-c", NULL, most], capture_output=True, text=True, check=False)
        for most in (str(1 << 40), "-1")
    )
    assert (limited.returncode, limited.stderr.count("\n")) == (1, 1), limited.stderr
    assert "out of memory" in limited.stderr
    assert "SystemError" in free.stderr


@pytest.mark.timed
def test_an_offline_replay_dispatches_in_its_own_order(db: str, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All due at 0, longest prompt first, two in flight: dispatch is another column than due, and lag counts from it."""
    from traces.store import open_store

    result(capsys, "ingest", trace, "--name", "t", "--db", db)
    with embedded("constant", Fleet(1, 1)) as url:
        found = result(
            capsys, "replay", "t", "--endpoint", url, "--order", "longest-prompt", "--in-flight", "2", "--workers", "2",
            "--requests", "12", "--db", db,
        )  # fmt: skip
        assert run(capsys, "replay", "t", "--endpoint", url, "--in-flight", "2", "--db", db)[0] == 2
        assert run(capsys, "replay", "t", "--endpoint", url, "--order", "two-stage", "--db", db)[0] == 1
        assert run(capsys, "replay", "t", "--endpoint", url, "--order", "predicted-decode", "--db", db)[0] == 2
        few = ("replay", "t", "--endpoint", url, "--requests", "4", "--workers", "1", "--db", db, "--json")
        _, foretold, _ = run(capsys, *few, "--order", "predicted-decode", "--history", "t")
        _, oracle, _ = run(capsys, *few, "--order", "longest-decode")
    assert (found["ok"], found["verdict"]) == (12, "valid")
    with open_store(db) as store:
        rows = store.observations(found["run"])
        changes = [" ".join(store.run(json.loads(said)["run"]).changes) for said in (foretold, oracle)]
    assert "lengths that t foretells (rank correlation with the recorded ones" in changes[0]
    assert "an oracle, no deployment knows them" in changes[1]
    assert set(rows.due_s.tolist()) == {0.0}
    by_sent = rows.take(np.argsort(rows.sent_s, kind="stable"))
    assert by_sent.requested_prompt_tokens.tolist() == sorted(rows.requested_prompt_tokens.tolist(), reverse=True)
    ends = np.sort(rows.last_token_s)
    assert (by_sent.dispatch_s[2:] >= ends[:-2] - 0.05).all()  # a third request waits for the first to end
