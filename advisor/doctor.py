"""Is this machine, this database, this endpoint fit for a measurement? Each check says what it found and what to do."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import joblib
import numpy as np
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from traces import __version__
from traces.errors import SteelyardError

if TYPE_CHECKING:
    from loadgen.client import Target

Word = Literal["ok", "note", "warning", "problem"]

OPEN_FILES = 8192
"""Fewer make a replay of thousands of open streams fail; each request in flight holds one."""

WAKE_P99_MS = 5.0
"""A process that wakes later than this at p99 sends late: a tenth of the lag that degrades a run with a TTFT limit of 1 s."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. word: ok; note, nothing to do; warning, figures may suffer; problem, work will fail."""

    name: str
    word: Word
    found: str
    advice: str = ""


def python() -> Check:
    """The interpreter, and whether this version runs on it."""
    found = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    wanted = _requires_python()
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Check("Python", "problem", found, f"steelyard needs {wanted}.")
    return Check("Python", "ok", found)


def libraries() -> Iterator[Check]:
    """Every library that the distribution asks for, at a version that it accepts; extras that are there; who else's modules."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("steelyard") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Check("libraries", "problem", "steelyard is not installed", "Install it: pip install steelyard")
        return
    bad, count = [], 0
    extras: dict[str, bool] = {}
    for need in wanted:
        mark = re.search(r"extra\s*==\s*['\"]([^'\"]+)", str(need.marker or ""))
        if need.marker is not None and not need.marker.evaluate({"extra": mark[1] if mark else ""}):
            continue
        version = _version(need.name)
        fits = version is not None and need.specifier.contains(version, prereleases=True)
        if mark:
            extras[mark[1]] = extras.get(mark[1], True) and fits
            continue
        count += 1
        if not fits:
            bad.append(f"{need.name}{need.specifier} (found {version or 'none'})")
    if bad:
        yield Check("libraries", "problem", ", ".join(bad), f"Install them: pip install 'steelyard=={__version__}'")
    else:
        yield Check("libraries", "ok", f"{count} libraries of steelyard {__version__} fit")
    for extra, there in sorted(extras.items()):
        word = "there" if there else "not installed"
        yield Check(
            f"extra {extra}", "ok" if there else "note", word, "" if there else f"pip install 'steelyard[{extra}]'"
        )
    ours = Path(__file__).parent.parent
    for name in ("traces", "loadgen", "advisor"):
        spec = importlib.util.find_spec(name)
        where = Path(spec.origin).parent.parent if spec is not None and spec.origin else None
        if where != ours:
            advice = "Another distribution has a module of this name: give steelyard an environment of its own (pipx)."
            yield Check(f"module {name}", "problem", f"comes from {where}", advice)


def _requires_python() -> str:
    try:
        return str(importlib.metadata.metadata("steelyard")["Requires-Python"] or "")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def database(url: str) -> Iterator[Check]:
    """Does it open, is its revision this version's, what does it hold, is there room, do rows wait for it?"""
    from loadgen.spool import waiting
    from traces.store import head_revision, open_store, option, redact

    shown = redact(url)
    try:
        with open_store(url, create=False) as store:
            traces, runs = len(store.traces()), len(store.runs())
            yield Check("database", "ok", f"{shown}: revision {head_revision()}, {traces} traces, {runs} runs")
            held = waiting(store)
            if held:
                yield Check(
                    "rows on disk",
                    "warning",
                    f"{len(held)} files wait",
                    f"Store them: steelyard runs recover{option(url)}",
                )
    except SteelyardError as error:
        new = "no such database" in str(error) or "is empty" in str(error)
        yield Check("database", "note" if new else "problem", str(error))
    if url.startswith("sqlite:///"):
        folder = Path(url.removeprefix("sqlite:///")).parent
        if not os.access(folder, os.W_OK):
            yield Check(
                "disk", "problem", f"{folder} cannot be written", "Give another --db, or change the folder's mode."
            )
        elif (free := shutil.disk_usage(folder).free) < 1 << 30:
            yield Check(
                "disk", "warning", f"{free / 2**30:.2f} GiB free", "A million requests take about 0.15 GB: make room."
            )
        else:
            yield Check("disk", "ok", f"{free / 2**30:.0f} GiB free")


def open_files() -> Check:
    """The limit on open files; load workers raise their soft one to the hard one by themselves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
    found = f"{soft} (at most {shown})"
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        return Check(
            "open files",
            "warning",
            found,
            f"Each request in flight holds one. Only root raises the hard limit: {OPEN_FILES} in /etc/security/limits.conf, "
            f"a service's LimitNOFILE={OPEN_FILES}, docker run --ulimit nofile={OPEN_FILES}",
        )
    return Check("open files", "ok", found)


def ports() -> Check:
    """How many connections to one address this machine can hold."""
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return Check("ports", "note", "the range of local ports cannot be read")
    count = high - low + 1
    advice = (
        ""
        if count >= 16_000
        else "More in flight to one address fail: sysctl net.ipv4.ip_local_port_range='1024 65535'"
    )
    return Check("ports", "warning" if advice else "ok", f"{count} connections to one address", advice)


def cores() -> Iterator[Check]:
    """Cores this process may use (its affinity and its container's share), and how busy the machine is."""
    count = joblib.cpu_count()
    yield Check(
        "cores",
        "ok" if count > 1 else "warning",
        f"{count} usable of {os.cpu_count()}",
        ""
        if count > 1
        else "Load workers and the master share one core: expect lag; use another machine for high rates.",
    )
    load = os.getloadavg()[0]
    if load > count:
        advice = "Others use this machine: a replay will be late. Wait, or measure from another machine."
        yield Check("load", "warning", f"{load:.1f} runnable on {count} cores", advice)
    else:
        yield Check("load", "ok", f"{load:.1f} on {count} cores")


def clock(naps: int = 100) -> Iterator[Check]:
    """How late does this process wake, and does the machine's clock follow a time server?"""
    late = np.empty(naps)
    for k in range(naps):
        until = time.monotonic() + 0.002
        time.sleep(0.002)
        late[k] = (time.monotonic() - until) * 1e3
    p99 = float(np.quantile(late, 0.99))
    found = f"wakes {np.median(late):.2f} ms late at p50, {p99:.2f} ms at p99 (n = {naps})"
    if p99 > WAKE_P99_MS:
        yield Check(
            "clock", "warning", found, "Requests will leave late: stop what else runs here, or use fewer --workers."
        )
    else:
        yield Check("clock", "ok", found)
    if Path("/run/systemd/timesync").is_dir():
        synchronised = Path("/run/systemd/timesync/synchronized").exists()
        yield Check(
            "time server",
            "ok" if synchronised else "warning",
            "synchronised" if synchronised else "not synchronised",
            ""
            if synchronised
            else "Rows carry wall-clock times: to join them to the servers' logs run timedatectl set-ntp true",
        )


def endpoint(where: Target, *, engine: str = "auto", model: str | None = None, chat: bool = False) -> Iterator[Check]:
    """Does it answer, whose is it, does it stream, can its metrics and its fleet be read? Sends one request of two tokens."""
    from loadgen.control import Endpoint
    from loadgen.discover import discover
    from loadgen.engines import Worker
    from loadgen.probe import pages
    from loadgen.scrape import samples

    try:
        server = Endpoint(where)
        began = time.monotonic()
        name, owner = server.choose_model(model)
        took = (time.monotonic() - began) * 1e3
        yield Check(
            "endpoint", "ok", f"{server.shown} serves {name} ({owner or 'owner unknown'}), asked in {took:.1f} ms"
        )
        workers = discover(server, engine=engine)
        known = workers.engine
        dialect = known.dialect(chat=chat)
        began = time.monotonic()
        server.try_one(dialect, name)
        yield Check("stream", "ok", f"two tokens in {(time.monotonic() - began) * 1e3:.0f} ms, {dialect.name} dialect")
        reply = server.fetch("GET", known.page)
        read = []
        with contextlib.suppress(ValueError):  # no Prometheus text
            read = samples(reply.text, Worker(""), 0.0, known.name) if reply.status == 200 else []
        told = [] if read else [page for page in pages(server, workers) if page.fields or page.histograms]
        if read:
            yield Check("metrics", "ok", f"{len(read)} workers: " + ", ".join(sorted({s.role for s in read})))
        elif told:
            roles = ", ".join(sorted({page.worker.role or "unknown role" for page in told}))
            yield Check("metrics", "ok", f"pages of {len(told)} workers and routers: {roles}")
        else:
            advice = "Replay works; advice from server readings (queues, utilisation) does not. See docs: engines."
            yield Check("metrics", "warning", f"{known.page}: HTTP {reply.status}, nothing we can read", advice)
        fleet = server.fleet()
        found = (
            f"{fleet}, can be set"
            if fleet
            else "no /fleet: say what it is with --fleet P:D, or how it is set with --control"
        )
        if not fleet and workers.fleet:
            found = f"{workers.fleet}, by {workers.shown}; no /fleet: say how it is set with --control"
        yield Check("fleet", "ok" if fleet else "note", found)
    except SteelyardError as error:
        yield Check("endpoint", "problem", str(error))


def configuration(path: str | None) -> Check:
    """The file of options, if there is one; a wrong one has been refused before."""
    from advisor.cli.config import read

    file, said = read(path)
    return Check("configuration", "ok", f"{file}: {len(said)} entries" if file else "no steelyard.toml here")


def examine(
    db: str,
    *,
    where: Target | None = None,
    engine: str = "auto",
    model: str | None = None,
    chat: bool = False,
    config: str | None = None,
) -> Iterator[Check]:
    """All checks, in order; the endpoint's only if one is named."""
    yield python()
    yield from libraries()
    yield configuration(config)
    yield from database(db)
    yield open_files()
    yield ports()
    yield from cores()
    yield from clock()
    if where is not None:
        yield from endpoint(where, engine=engine, model=model, chat=chat)


__all__ = ["Check", "examine"]
