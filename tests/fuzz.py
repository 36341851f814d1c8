"""Spoil files, answers and databases in many ways and see what reads them: it takes them, or says on one line what is wrong.

    python -m tests.fuzz [--inputs 2000] [--only WORDS] [--seed 0]

For each kind of input real ones are cut, repeated, crossed and sprinkled with what breaks parsers, by seed. Counted as bad:
another exception than a refusal, a refusal of several lines or with control codes, more than SECONDS of processor, more than
MEMORY_MIB above the start. The table says how many inputs there were of each kind. Exit code 1 when one was bad; its bytes are
kept then.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import random
import re
import resource
import sqlite3
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadgen.cluster import simulate
from loadgen.cluster.laws import Profile, shipped_profiles
from loadgen.discover import Worker, read_targets
from loadgen.imports import observations
from loadgen.imports import read as read_results
from loadgen.scrape import read as read_metrics
from loadgen.stream import Answer
from traces import store
from traces.errors import CONTROLS, SteelyardError, StoreError
from traces.ingest import ingest
from traces.profiles import servegen
from traces.records import Decision, Fleet, FleetChange, Histogram, Run, Sample
from traces.store import open_store
from traces.transfer import export_runs, import_runs

DATA = Path(__file__).parent / "data"
SECONDS = 5.0
MEMORY_MIB = 400

BREAKERS = [
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\x1b[2J", b"\r", b"\n", b"\r\n", b"\n\n", b'"', b"'", b"\\", b"{", b"}", b"[", b"]",
    b",", b":", b"NaN", b"nan", b"inf", b"-inf", b"Infinity", b"1e999", b"-1", b"0", b"1e-400", b"9" * 30, b"9" * 5000,
    b"0x10", b"1_000", b"null", b"true", b"[]", b"{}", b'""', b"[" * 3000, b'{"a":' * 3000, b"\xf0\x9f\x92\xa9",
    b"\xed\xa0\x80", "\u202e".encode(), "\u2028".encode(), b"data:", b"data: [DONE]\n\n", b"#", b"=", b"..", b"/" * 50,
    b"%s%n", b"{0}", b"${x}", b"<script>", b"2023-13-45 99:99:99", b"\x80" * 9, b"a" * 70000, b" " * 5000, b"\t",
]  # fmt: skip


def spoiled(seeds: list[bytes], rng: random.Random) -> bytes:
    """One of the seeds after one accident, or up to six."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(8)
        if what == 0 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at:at] = rng.choice(BREAKERS)
        elif what == 2:
            del data[at : at + rng.randint(1, 1 + len(data) // 3)]
        elif what == 3:
            piece = data[at : at + rng.randint(1, 300)]
            data[at:at] = piece * rng.randint(1, 20)
        elif what == 4:
            other = rng.choice(seeds)
            cut = rng.randrange(len(other) + 1)
            data[at:] = other[cut : cut + 20_000]
        elif what == 5:
            numbers = list(re.finditer(rb"-?\d+(\.\d+)?", bytes(data)))
            if numbers:
                found = rng.choice(numbers)
                data[found.start() : found.end()] = rng.choice(BREAKERS)
        elif what == 6:
            lines = bytes(data).split(b"\n")
            rng.shuffle(lines)
            data = bytearray(b"\n".join(lines))
        else:
            data[at : at + 1] = rng.randbytes(rng.randint(1, 8))
    return bytes(data[:400_000])


# --- what reads them -----------------------------------------------------------------------------------------------------


def traces(data: bytes, folder: Path) -> None:
    path = folder / "t"
    path.write_bytes(data)
    with open_store("sqlite:///:memory:") as store:
        report = ingest(store, [path], max_bad=1.0, name="t")
        kept = report.rows_kept + sum(s.count for s in report.skipped.values()) + report.other_events
        if report.rows_read != kept:
            raise AssertionError(f"{report.rows_read} rows read, {kept} accounted for")
        if report.rows_kept:
            store.schedule("t", blocks=True, sessions=True)


def parquet(data: bytes, folder: Path) -> None:
    """As a trace that a map describes, and as the runs of a dump."""
    path = folder / "runs.parquet"
    path.write_bytes(data)
    with open_store("sqlite:///:memory:") as store:
        if len(data) % 2:
            ingest(store, [path], max_bad=1.0, name="t", columns="arrival=at,input=use.in,output=out")
        else:
            import_runs(store, folder)


@functools.cache
def parquet_files() -> list[bytes]:
    """Of texts and numbers, packed in three ways, with and without a dictionary; and the runs of a dump."""
    import pyarrow
    import pyarrow.parquet

    n = range(300)
    uses = [{"in": k, "x": [k] * (k % 3)} for k in n]
    table = pyarrow.table(
        {"at": [k / 7 for k in n], "use": uses, "out": [str(k % 9 + 1) for k in n], "id": [f"r{k}" for k in n]}
    )
    found = []
    for compression, coded in (("snappy", True), ("zstd", False), ("gzip", True), ("none", False)):
        pyarrow.parquet.write_table(
            table, held := io.BytesIO(), compression=compression, use_dictionary=coded, row_group_size=170
        )
        found.append(held.getvalue())
    with tempfile.TemporaryDirectory() as folder, open_store("sqlite:///:memory:") as store:
        run = store.begin_run(Run("r", "t", "d", 1, "http://h", "reference", "m", Fleet(1, 1), 1e9, 1))
        export_runs(store, [run.id], Path(folder) / "out")
        found += [(Path(folder) / "out" / "runs.parquet").read_bytes()] * 2
    return found


def profile(data: bytes, folder: Path) -> None:
    path = folder / "p.toml"
    path.write_bytes(data)
    known = Profile.load(path)
    (folder / "again.toml").write_text(known.to_toml(), encoding="utf-8")
    if Profile.load(folder / "again.toml") != known:
        raise AssertionError("written and read again it is another profile")


def clients(data: bytes, folder: Path) -> None:
    windows, lengths = folder / "chunk-1-trace.csv", folder / "chunk-1-dataset.json"
    if data.lstrip()[:1] == b"{":
        windows.write_text("0,1,1,Gamma,1,1\n", encoding="utf-8")
        lengths.write_bytes(data)
    else:
        windows.write_bytes(data)
        lengths.write_bytes((DATA / "servegen" / "chunk-1-dataset.json").read_bytes())
    servegen(folder)


def results(data: bytes, folder: Path) -> None:
    path = folder / "r"
    path.write_bytes(data)
    for one in read_results(path):
        observations(one)


def targets(data: bytes, folder: Path) -> None:
    path = folder / ("w.json" if data.lstrip()[:1] == b"{" else "w.toml")
    path.write_bytes(data)
    read_targets(path)


def configuration(data: bytes, folder: Path) -> None:
    from advisor.cli import VERBS, config, load

    path = folder / "steelyard.toml"
    path.write_bytes(data)
    file, said = config.read(str(path))
    assert file is not None
    config.checked(file, said, {verb: load(verb) for verb in VERBS})


def metrics(data: bytes, folder: Path) -> None:
    del folder
    with contextlib.suppress(ValueError):  # its refusal; whoever reads a page takes it as one
        read_metrics(data.decode("utf-8", "replace"), Worker("w", "decode"), "vllm")


def answer(data: bytes, folder: Path) -> None:
    del folder
    found = Answer(("usage", "id"))
    for k in range(0, len(data), 700):
        found.push(k / 700, data[k : k + 700])
    found.finish(whole=bool(len(data) % 2))
    if found.error not in ("", "malformed", "stream_error") or len(found.detail) > 200 or not (found.chunks >= 0):
        raise AssertionError(f"{found.error} {found.detail} {found.chunks}")


ODD: list[Any] = [
    None, 0, -1, 2**40, -(2**62), 0.5, 9e999, -1e300, "", "{}", "[]", "null", "5", '"x"', "1e999", "NaN", '{"a": null}',
    '{"a": "b"}', '{"0": 1}', "[null]", "[[]]", '[{"a": 1}]', "[" * 3000,
]  # fmt: skip


def spoiled_json(text: str, rng: random.Random) -> str:
    """The same with one of its values another, or gone."""
    held = whole = json.loads(text)
    while held:
        key = rng.choice(list(held) if isinstance(held, dict) else range(len(held)))
        if isinstance(held[key], (dict, list)) and rng.random() < 0.8:
            held = held[key]
        elif rng.random() < 0.3:
            del held[key]
            break
        else:
            held[key] = rng.choice(["", "x", None, -1, 0, 1e300, 2**70, True, [], {}, [None], {"a": "b"}])
            break
    return json.dumps(whole)


def database(data: bytes, folder: Path) -> None:
    """A column of a database with a trace, three runs and an answer gets another value; the bytes say which, and what value."""
    from advisor.cli import main as steelyard

    rng = random.Random(data)
    store.EXACT_ROWS = rng.choice([10, 10_000])  # from kept counts, or from rows
    (folder / "odd.db").write_bytes(whole_database())
    with contextlib.closing(sqlite3.connect(folder / "odd.db")) as connection, connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'alembic_version'")
        table = rng.choice(sorted(name for (name,) in tables))
        column = rng.choice([name for _, name, *_ in connection.execute(f'PRAGMA table_info("{table}")')])
        (was,) = connection.execute(f'SELECT "{column}" FROM "{table}"').fetchone() or ("",)
        text = data.decode("utf-8", "replace")
        odd = rng.choice([*ODD, text, data])
        if str(was)[:1] in ("{", "["):
            odd = rng.choice([odd, spoiled_json(was, rng), spoiled_json(was, rng)])
        with contextlib.suppress(sqlite3.IntegrityError):
            connection.execute(f'UPDATE "{table}" SET "{column}" = ?', [odd])
    db = ["--db", f"sqlite:///{folder / 'odd.db'}"]
    few = ["--requests", "20", "--trace", "t", "--rate", "5", "--gpus", "3"]
    refused = ""
    for verb in (
        [], ["traces"], ["traces", "show", "t"], ["runs"], ["runs", "show", "1"], ["compare", "1", "2"], ["runs", "export", "1"],
        ["report", "--recommendation", "latest"], ["advise", *few],
    ):  # fmt: skip
        out = ["--out", str(folder / "out")] if verb[:1] == ["report"] or "export" in verb else []
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = steelyard([*verb, *out, *db] if verb else db)
        if code == 1:  # what comes before the last line is what was found until then
            refused = said.getvalue().strip().rpartition("\n")[2]
    if refused:
        raise StoreError(refused)


@functools.cache
def whole_database() -> bytes:
    """A SQLite file with something in every table that a reader asks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.db"
        store.EXACT_ROWS = 10
        make_database(path)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")  # one file
        return path.read_bytes()


def make_database(path: Path) -> None:
    from advisor.cli import main as steelyard

    profile = Profile.load("demo")
    with open_store(f"sqlite:///{path}") as held:
        times = "".join(f"2023-11-16 18:15:{46 + k / 10:09.6f}0,{200 + k % 7},{20 + k % 5}\n" for k in range(80))
        (path.parent / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + times)
        ingest(held, [path.parent / "t.csv"], name="t")
        schedule = held.schedule("t")
        for prefill in (1, 2, 1):
            fleet = Fleet(prefill, 3 - prefill)
            rows = simulate(schedule, fleet, profile).observations
            run = held.begin_run(
                Run("r", "t", schedule.digest(), len(rows), "http://h", "reference", "m", fleet, 1e9, 1, slo="ttft<0.5s",
                    rate_per_s=10.0)
            )  # fmt: skip
            held.add_observations(run.id, rows)
            held.add_samples(run.id, [Sample(at, "w", "decode", running_requests=1.0) for at in (0.5, 1.5)])
            held.add_histograms(
                run.id, [Histogram("w", "prefill", "queue_s", "q", 2.0, 0.2, ((0.1, 1.0), (math.inf, 2.0)))]
            )
            change = FleetChange(1.0, 2.0, fleet, Fleet(3 - prefill, prefill), "why")
            held.add_fleet_change(run.id, change)
            held.add_decision(run.id, Decision(1.0, 2.0, "hold", fleet, None, "why", 3), "c", 1e9)
            lag = {"lag_p50_ms": 0.1, "lag_p99_ms": 0.2, "lag_max_ms": 0.3}
            more = {"costs": {"0": {"cpu_s": 1.0, "max_stall_s": 0.1}}, "sources": {"w": {"role": "decode"}}}
            more |= {"counts": {"ok": len(rows)}}
            held.end_run(replace(run, complete=True, verdict="valid", **lag, **more))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if steelyard(["advise", "--requests", "20", "--gpus", "3", "--db", f"sqlite:///{path}"]):
            raise AssertionError("no advice")


def odd_values() -> list[bytes]:
    whole_database()
    return ANSWERS + CONFIGURATION


def files(*names: str) -> list[bytes]:
    found = [p.read_bytes()[:60_000] for name in names for p in sorted(DATA.glob(name)) if p.is_file()]
    assert found, names
    return found


TARGETS = [
    b'engine = "vllm"\nrouter_metrics = "http://r:1/metrics"\n[[worker]]\nname = "p0"\nrole = "prefill"\n'
    b'metrics = "http://p:1/metrics"\n[[worker]]\nrole = "decode"\nurl = "http://d:1"\nweight = 2\n',
    b'{"workers": [{"role": "prefill", "url": "http://p:1"}, {"role": "decode", "metrics": "http://d:1/metrics"}]}',
    b'{"items": [{"metadata": {"name": "p", "labels": {"llm-d.ai/role": "prefill"}, '
    b'"annotations": {"prometheus.io/port": "8000"}}, "spec": {"containers": [{"ports": [{"containerPort": 8000}]}]}, '
    b'"status": {"podIP": "10.0.0.1", "phase": "Running"}}]}',
]
CONFIGURATION = [
    b'db = "sqlite:///x.db"\n[replay]\nrate = 3.5\nslo = "ttft<1s"\nworkers = 2\n[sweep]\nfleets = "1:3 2:2"\n'
    b"[runs.show]\njson = true\n"
]
ANSWERS = [
    b'data: {"id": "x", "choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
    b'data: {"choices": [{"index": 0, "delta": {"content": "b", "reasoning": "c"}, "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\ndata: [DONE]\n\n',
    b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n' * 40 + b'data: {"error": {"message": "out of memory"}}\n\n',
    b': keep-alive\r\n\r\nevent: x\r\ndata: {"choices"\r\ndata: :[{"text":"a"}]}\r\n\r\n',
]

KINDS: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes, Path], None], float]] = {
    # what: (real ones, what reads them, share of --inputs)
    "trace files": (lambda: files("traces/*.csv", "traces/*.json", "traces/*.jsonl", "traces/*.gz"), traces, 1.0),
    "Parquet": (parquet_files, parquet, 0.1),
    "profiles (TOML)": (lambda: [Profile.load(n).to_toml().encode() for n in shipped_profiles()], profile, 1.0),
    "ServeGen clients": (lambda: files("servegen/*.csv", "servegen/*.json"), clients, 0.5),
    "results of other clients": (lambda: files("results/*.json", "results/*.jsonl"), results, 0.5),
    "targets files": (lambda: TARGETS, targets, 1.0),
    "configuration (TOML)": (lambda: CONFIGURATION, configuration, 0.5),
    "metrics pages": (lambda: [d for d in files("samples/*/*") if b"# " in d[:200]], metrics, 1.0),
    "streamed answers": (lambda: ANSWERS, answer, 2.0),
    "what a database holds": (odd_values, database, 0.1),
}


def refused_badly(error: SteelyardError) -> str:
    said = str(error)
    if "\n" in said or said != said.translate(CONTROLS):
        return f"not one plain line: {said!r}"
    return "" if len(said) < 2000 else f"a refusal of {len(said)} characters"


@contextlib.contextmanager
def timed(found: list[float]) -> Iterator[None]:
    began = time.process_time()
    yield
    found.append(time.process_time() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="of each kind, about")
    parser.add_argument("--only", default="", help="kinds whose name this regular expression finds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kept = Path(tempfile.mkdtemp(prefix="fuzz-bad-"))
    bad = total = 0
    print(
        "| what | inputs | taken | refused | bad | longest, ms | memory grew, MiB |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, (seeds, read, share) in KINDS.items():
        if not re.search(options.only, name):
            continue
        rng = random.Random(f"{options.seed} {name}")
        real = seeds()
        taken = refused = wrong = 0
        took: list[float] = []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory(prefix="fuzz-") as where:
            for number in range(round(options.inputs * share)):
                data = spoiled(real, rng)
                why = ""
                with timed(took):
                    try:
                        read(data, Path(where))
                        taken += 1
                    except SteelyardError as error:
                        refused += 1
                        why = refused_badly(error)
                    except BaseException:
                        why = traceback.format_exc(limit=-3)
                if took[-1] > SECONDS:
                    why = f"{took[-1]:.1f} s"
                if why:
                    wrong += 1
                    (kept / f"{name.split()[0]}-{number}").write_bytes(data)
                    if wrong < 4:
                        print(f"BAD {name} {number}: {why}", file=sys.stderr, flush=True)
        grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        wrong += grew > MEMORY_MIB
        bad, total = bad + wrong, total + len(took)
        print(
            f"| {name} | {len(took)} | {taken} | {refused} | {wrong} | {1e3 * max(took):.0f} | {grew:.0f} |", flush=True
        )
    print(f"\n{total} inputs, {bad} bad" + (f"; kept in {kept}" if bad else "."))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
