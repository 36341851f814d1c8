"""What every rig needs: an environment of its own, processes on loopback, and the measurement that all of them pass."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from traces.records import Fleet, FleetChange, Sample
from traces.store import open_store

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / ".venv-engines"
INSTALL_S = 1800.0
REQUESTS = 200
RATE = 10.0
TRACE = "azure-2023-conv"


class Failed(Exception):
    """What went wrong, in words for the one who ran it."""


class Absent(Failed):
    """The package index did not deliver: nothing was measured."""


def free_ports(n: int, among: range = range(20_000, 32_000)) -> list[int]:
    """Below 32768: Dynamo reads its system port as a signed 16-bit number."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in random.sample(among, len(among)):
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == n:
                return found
    raise Failed("no free ports on loopback")


def environment(name: str, steps: Sequence[Sequence[str]], then: Callable[[Path], Sequence[str]] | None = None) -> Path:
    """The Python of ``.venv-engines/NAME``, made once, within INSTALL_S. steps: arguments of ``pip install``, one list a step;
    then: asked, when these are in, for what else the last step is to install."""
    folder = ENVIRONMENTS / name
    python, done = folder / "bin" / "python", folder / "installed.json"
    wanted = [list(step) for step in steps]
    with contextlib.suppress(OSError, ValueError):
        if json.loads(done.read_text()) == wanted and python.exists():
            return python
    run([sys.executable, "-m", "venv", "--clear", str(folder)], f"{name}: no environment could be made", 120)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--timeout=20", "--retries=1"]
    until = time.monotonic() + INSTALL_S
    for step in [*wanted, None]:
        words = step if step is not None else then(folder) if then is not None else ()
        what = " ".join(step) if step is not None else "what it depends on"
        if words:
            try:
                run(
                    [*pip, *words],
                    f"{name}: {what} could not be installed; is the package index reached?",
                    max(1.0, until - time.monotonic()),
                )
            except Failed as error:
                raise Absent(str(error)) from None
    done.write_text(json.dumps(wanted))
    return python


def needed(folder: Path, packages: Sequence[str], left_out: tuple[str, ...]) -> Sequence[str]:
    """What installed wheels say they need, less what cannot be had or is not wanted: arguments of ``pip install``."""
    found = []
    for one in distributions(path=[str(path) for path in folder.glob("lib/python*/site-packages")]):
        if one.metadata["Name"] in packages:
            found += [r for r in one.requires or () if "extra ==" not in r and not r.startswith(left_out)]
    return found


WORDS = 32_768
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tiny_model(folder: Path) -> Path:
    """A model without weights: a configuration and a tokenizer whose tokens are words. Mock engines and random weights need no
    more."""
    folder.mkdir(exist_ok=True)
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{n}": n for n in range(2, WORDS)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": n, "content": text, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for n, text in enumerate(("<unk>", "</s>"))
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": WORDS, "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 64, "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 1, "torch_dtype": "float16",
    }  # fmt: skip
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    for name, held in (
        ("tokenizer.json", tokenizer),
        ("config.json", config),
        ("tokenizer_config.json", names | {"chat_template": CHAT}),
        ("generation_config.json", {"eos_token_id": 1}),
    ):
        (folder / name).write_text(json.dumps(held))
    return folder


def run(command: Sequence[str], otherwise: str, timeout_s: float) -> str:
    """What a command printed. Failed, with its last line, when it does not end well or in time."""
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"{otherwise} (it took more than {timeout_s:g} s)") from None
    if ended.returncode:
        said = [line for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")]
        raise Failed(
            f"{otherwise} (exit code {ended.returncode}: {(errors or said or ['nothing said'])[-1].strip()[:300]})"
        )
    return ended.stdout


def get(url: str, timeout_s: float = 5.0) -> Any:
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        return json.loads(answer.read() or b"null")


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped when the block ends: by SIGTERM, in ten seconds by SIGKILL, with what it started itself."""
    with log.open("ab") as out:
        started = subprocess.Popen(
            command, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(10)
        with contextlib.suppress(ProcessLookupError):  # children that outlive it, as an engine that still starts has
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def until(
    true: Callable[[], bool], seconds: float, otherwise: str, alive: Sequence[subprocess.Popen[bytes]] = ()
) -> None:
    """Wait. Failed when it does not come true in time, or when a process that must live has ended."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError):
            if true():
                return
        dead = [p for p in alive if p.poll() is not None]
        if dead or time.monotonic() > end:
            why = f"a process of it ended with {dead[0].returncode}" if dead else f"not within {seconds:g} s"
            raise Failed(f"{otherwise} ({why})")
        time.sleep(0.1)


@dataclass
class Rig:
    """A started engine. url: where requests go. control: of ``--control``. before, then: the fleet at the start and after the
    first change; the second one goes back; None: nothing is changed. reach: options of probe and replay; options: of replay.
    told: by worker role, the fields of readings that must have had a value, whichever they are where none is named."""

    name: str
    url: str
    engine: str
    control: str
    before: Fleet
    then: Fleet | None
    reach: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    rate: float = RATE
    requests: int = REQUESTS
    told: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"prefill": (), "decode": ()})


@dataclass
class Line:
    """A line of the table."""

    name: str
    install_s: float = float("nan")
    run_s: float = float("nan")
    ok: int = 0
    asked: int = 0
    rate: float = float("nan")
    ttft_ms: tuple[float, float] = (float("nan"), float("nan"))
    readings: dict[str, int] = field(default_factory=dict)
    changes: list[FleetChange] = field(default_factory=list)
    verdict: str = ""
    absent: bool = False
    wrong: list[str] = field(default_factory=list)

    def row(self) -> str:
        moves = "; ".join(
            f"{c.before} to {c.after} in {c.ready_s - c.asked_s:.1f} s, {c.in_flight} under way, {c.failed} failed, "
            f"{c.slowed} slowed"
            for c in self.changes
        )
        told = ", ".join(f"{role} {n}" for role, n in sorted(self.readings.items()))
        wrong = "".join(f" **{one}**" for one in self.wrong)
        return (
            f"| {self.name} | {self.install_s:.0f} + {self.run_s:.0f} | {self.ok} of {self.asked} at {self.rate:g}/s | "
            f"{self.ttft_ms[0]:.0f}, {self.ttft_ms[1]:.0f} | {told} | {moves or 'none'} | {self.verdict}{wrong} |"
        )


HEAD = (
    "| engine | install + run [s] | answered | TTFT p50, p95 [ms] | readings with a value | changes under load | verdict |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def steelyard(*words: str, timeout_s: float = 180.0, fine: Sequence[int] = (0,)) -> Any:
    """What ``steelyard .. --json`` printed, of this clone and without the user's settings."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith("STEELYARD_")}
    command = [sys.executable, "-m", "steelyard", *words, "--json"]
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"steelyard {words[0]} did not end within {timeout_s:g} s") from None
    if ended.returncode not in fine:
        said = ended.stderr.strip().splitlines() or ["nothing said"]
        raise Failed(f"steelyard {words[0]} ended with {ended.returncode}: {said[-1][:300]}")
    return json.loads(ended.stdout)


GAUGES = [f.name for f in fields(Sample)[3:]]


def measure(rig: Rig, folder: Path, line: Line) -> None:
    """Probe, replay a real trace while the fleet changes twice, and look at the rows. What is not right goes to line.wrong."""
    line.asked, line.rate = rig.requests, rig.rate
    found = steelyard("probe", rig.url, *rig.reach)
    if found["engine"] != rig.engine:
        line.wrong.append(f"probe takes it for {found['engine']}")
    listed = Counter(w["role"] for w in found["workers"])
    if (listed["prefill"], listed["decode"]) != (rig.before.prefill, rig.before.decode):
        line.wrong.append(f"probe sees {dict(listed)} where {rig.before} runs")
    asked = found["request"]
    if asked["ok"] != asked["asked"] or not asked["usage"] or min(asked["events"], default=0) < 2:
        line.wrong.append(f"probe: no stream with usage: {asked}")
    db = f"sqlite:///{folder / 'engines.db'}"
    steelyard("ingest", TRACE, "--db", db)
    seconds = rig.requests / rig.rate
    change = [("--change", f"{seconds * 0.25:g}={rig.then}"), ("--change", f"{seconds * 0.6:g}={rig.before}")]
    ran = steelyard(
        "replay", TRACE, "--endpoint", rig.url, "--db", db, "--requests", str(rig.requests), "--rate", f"{rig.rate:g}",
        "--max-prompt", "2000", "--max-output", "32", "--control", rig.control, "--fleet", str(rig.before),
        *(word for pair in change if rig.then for word in pair), "--timeout", "60", *rig.reach, *rig.options, fine=(0, 4),
    )  # fmt: skip
    with open_store(db, create=False) as store:
        run = store.runs()[-1]
        rows, samples, line.changes = store.observations(run.id), store.samples(run.id), store.fleet_changes(run.id)
    line.verdict = f"{'complete' if run.complete else 'incomplete'}, {run.verdict}: {run.reason}"
    line.ok = int(rows.ok.sum())
    if len(rows) != rig.requests or line.ok != rig.requests or not run.complete:
        line.wrong.append(f"lost: {len(rows)} rows, {line.ok} answered, {run.counts}")
    if ran["run"] != run.id:
        line.wrong.append("the run that it printed is not the one stored")
    ttft = sorted((rows.first_token_s - rows.sent_s)[rows.ok] * 1e3)
    if ttft:
        line.ttft_ms = (float(ttft[len(ttft) // 2]), float(ttft[int(len(ttft) * 0.95)]))
    line.readings = Counter(s.role for s in samples if any(getattr(s, name) is not None for name in GAUGES))
    then = rig.then or rig.before
    for role, names in rig.told.items():
        told = {s.worker for s in samples if s.role == role and any(getattr(s, name) is not None for name in GAUGES)}
        most = max(getattr(rig.before, role, 1), getattr(then, role, 1))
        if len(told) < most:
            line.wrong.append(f"only {len(told)} of {most} {role} workers told something")
        lacking = [n for n in names if not any(getattr(s, n) for s in samples if s.role == role)]
        line.wrong += [f"no {role} worker told {name}" for name in lacking]
    moves = [(c.before, c.after) for c in line.changes]
    if moves != ([(rig.before, then), (then, rig.before)] if rig.then else []):
        line.wrong.append(f"changes stored: {[f'{a} to {b}' for a, b in moves]}")
    for one in line.changes:
        if not one.ready_s > one.asked_s or one.in_flight < 0:
            line.wrong.append(f"the cost of {one.before} to {one.after} was not measured")
        if one.failed > 0:
            line.wrong.append(f"{one.failed} requests failed by {one.before} to {one.after}")
