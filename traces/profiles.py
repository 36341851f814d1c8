"""Sources that hold no requests, only what requests are like: ServeGen's clients, and a provider's usage by the hour.

Traces are generated from them, by seed; nothing in them is a recorded request.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import InputError
from traces.records import Floats, Ints, Schedule

MOST_BYTES = 256 << 20
MOST_REQUESTS = 50_000_000
LEAST_SHAPE = {"Gamma": 1e-4, "Weibull": 0.05}
MOST_SHAPE = 1e6
"""Outside of these nearly all gaps are drawn as 0, and no number of them fills a window."""

MOST_MEAN = 1_000_000
"""Mean tokens a request of a bucket; a draw above it still fits the store's 32 bits."""


@dataclass(frozen=True)
class Client:
    """One ServeGen client: arrival windows (start_s, rate_per_s, family, shape, scale) and token histograms by start."""

    name: str
    windows: tuple[tuple[float, float, str, float, float], ...]
    lengths: tuple[tuple[float, tuple[Ints, Floats], tuple[Ints, Floats]], ...]


def servegen(folder: Path) -> list[Client]:
    """Read a folder of ``chunk-<i>-trace.csv`` (no header: start_s, rate, cv, Gamma or Weibull, shape, scale; windows of 600 s)
    and ``chunk-<i>-dataset.json`` (window start -> field -> a Python dict as text). Nothing is evaluated.

    InputError names file and line.
    """
    traces = sorted(folder.glob("chunk-*-trace.csv")) if folder.is_dir() else []
    if not traces:
        raise InputError(f"{folder}: holds no chunk-*-trace.csv. Give a folder of ServeGen clients.")
    return [_client(path, path.with_name(path.name.replace("-trace.csv", "-dataset.json"))) for path in traces]


def _client(trace: Path, dataset: Path) -> Client:
    windows = []
    for number, line in enumerate(_text(trace).splitlines(), start=1):
        fields = line.split(",")
        try:
            start, rate = float(fields[0]), float(fields[1])
            shape, scale = float(fields[4]), float(fields[5])
        except (ValueError, IndexError):
            raise InputError(
                f"{trace}:{number}: start_s,rate,cv,family,shape,scale expected (got {line[:60]!r})."
            ) from None
        if not all(map(math.isfinite, (start, rate, shape, scale))) or start < 0 or rate < 0:
            raise InputError(f"{trace}:{number}: numbers must be finite and >= 0 (got {line[:60]!r}).")
        if rate > 0:
            if fields[3] not in LEAST_SHAPE or shape <= 0 or scale <= 0:
                raise InputError(
                    f"{trace}:{number}: Gamma or Weibull with shape and scale above 0 (got {line[:60]!r})."
                )
            if not LEAST_SHAPE[fields[3]] <= shape <= MOST_SHAPE:
                raise InputError(
                    f"{trace}:{number}: a {fields[3]} shape must be from {LEAST_SHAPE[fields[3]]:g} to {MOST_SHAPE:g} "
                    f"(got {line[:60]!r}). Repair or remove the line."
                )
            windows.append((start, rate, fields[3], shape, scale))
    try:
        held = json.loads(_text(dataset))
    except (ValueError, RecursionError):
        raise InputError(f"{dataset}: is not JSON.") from None
    if not isinstance(held, dict) or not held:
        raise InputError(f"{dataset}: must be an object of windows.")
    lengths = []
    for key, fields_ in held.items():
        if not re.fullmatch(r"\d{1,9}", key) or not isinstance(fields_, dict):
            raise InputError(f"{dataset}: a window is a number of seconds with its fields (got {key[:20]!r}).")
        found = [_histogram(fields_.get(f), f"{dataset}, window {key}, {f}") for f in ("input_tokens", "output_tokens")]
        if found[0] is not None and found[1] is not None:
            lengths.append((float(key), found[0], found[1]))
    return Client(trace.name.removesuffix("-trace.csv"), tuple(windows), tuple(sorted(lengths, key=lambda w: w[0])))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: larger than {MOST_BYTES >> 20} MiB.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from None


def _histogram(value: Any, where: str) -> tuple[Ints, Floats] | None:
    try:
        held = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise InputError(f"{where}: must be a dict of lengths and shares.") from None
    if held in (None, {}):
        return None
    try:
        tokens = np.array([int(k) for k in held], dtype=np.int64)
        share = np.array([float(v) for v in held.values()])
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"{where}: must be a dict of lengths and shares.") from None
    if share.min() < 0 or not np.isfinite(share).all() or tokens.min() < 0:
        raise InputError(f"{where}: lengths and shares must be >= 0.")
    return (np.maximum(1, tokens), share / share.sum()) if share.sum() > 0 else None


def from_servegen(
    clients: Sequence[Client], *, start_s: float, end_s: float, name: str, seed: int = 0, rate_factor: float = 1.0
) -> Schedule:
    """The requests of all clients in [start, end) of the profile's days, by seed. rate_factor scales every client alike.

    In each window of 600 s a client's gaps are drawn from its Gamma or Weibull, its lengths from the histogram in force,
    prompt and answer independently (the profile has no joint).
    """
    due: list[Floats] = []
    prompt: list[Ints] = []
    output: list[Ints] = []
    expected = sum(w[1] * 600 for c in clients for w in c.windows if start_s - 600 < w[0] < end_s) * rate_factor
    if expected > MOST_REQUESTS:
        raise InputError(f"about {expected:.3g} requests: give a shorter --window or a smaller --rate-factor.")
    for number, client in enumerate(clients):
        rng = np.random.default_rng([seed, number])
        for at, rate, family, shape, _ in client.windows:
            low, high = max(at, start_s), min(at + 600.0, end_s)
            if low >= high or not client.lengths:
                continue
            times = _arrivals(rng, rate * rate_factor, family, shape, 600.0)
            times = times[(times >= low - at) & (times < high - at)] + at
            if not len(times):
                continue
            window = max((w for w in client.lengths if w[0] <= at), default=client.lengths[0], key=lambda w: w[0])
            due.append(times)
            prompt.append(rng.choice(window[1][0], size=len(times), p=window[1][1]))
            output.append(rng.choice(window[2][0], size=len(times), p=window[2][1]))
    if not due:
        raise InputError(f"no client sends anything between {start_s:g} and {end_s:g} s.")
    return _sorted(name, np.concatenate(due) - start_s, np.concatenate(prompt), np.concatenate(output))


def _arrivals(rng: np.random.Generator, rate: float, family: str, shape: float, span_s: float) -> Floats:
    """Instants in [0, span) of a renewal process that has run for five spans already.

    The rate is the profile's; of the fitted law only the shape is taken, since its scale implies another rate where a
    client is bursty (chunk-26 of the R1 profile: 2.5 times as many requests).
    One that began at 0 would send (cv^2 - 1) / 2 requests too many in each window, which for bursty clients doubles them.
    """
    mean = 1 / rate
    scale = mean / (shape if family == "Gamma" else math.gamma(1 + 1 / shape))
    before = 5 * span_s
    parts: list[Floats] = []
    reached = 0.0
    while reached < before + span_s:
        many = int((before + span_s - reached) / mean * 1.1) + 50
        gaps = rng.gamma(shape, scale, many) if family == "Gamma" else scale * rng.weibull(shape, many)
        parts.append(reached + np.cumsum(gaps))
        reached = float(parts[-1][-1])
    times = np.concatenate(parts) - before
    return np.asarray(times[(times >= 0) & (times < span_s)], dtype=np.float64)


def from_usage(path: Path, *, name: str, seed: int = 0, sigma: float = 1.0) -> Schedule:
    """Requests from an OpenAI usage answer: buckets with input_tokens, output_tokens and num_model_requests.

    Within a bucket times are uniform; lengths are log-normal with the bucket's mean and ``sigma``, which is an assumption: a
    bucket says nothing of the spread. From the API's documentation, no real answer seen.
    """
    try:
        held = json.loads(_text(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not JSON.") from None
    buckets = held.get("data") if isinstance(held, dict) else None
    if not isinstance(buckets, list):
        raise InputError(f"{path}: an OpenAI usage answer has a list named data.")
    rng = np.random.default_rng(seed)
    due: list[Floats] = []
    prompt: list[Ints] = []
    output: list[Ints] = []
    total = 0
    for number, bucket in enumerate(buckets, start=1):
        try:
            start, end = float(bucket["start_time"]), float(bucket["end_time"])
            rows = [
                (int(r["num_model_requests"]), float(r["input_tokens"]), float(r["output_tokens"]))
                for r in bucket["results"]
            ]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InputError(f"{path}: bucket {number} needs start_time, end_time and results with counts.") from None
        for n, tokens_in, tokens_out in rows:
            most = max(n, 1) * MOST_MEAN
            if n < 0 or not (0 < end - start < math.inf and tokens_in <= most and tokens_out <= most):  # NaN neither
                raise InputError(f"{path}: bucket {number} has impossible counts or times.")
            if n == 0:
                continue
            total += n
            if total > MOST_REQUESTS:
                raise InputError(
                    f"{path}: more than {MOST_REQUESTS:,} requests up to bucket {number}. Give fewer buckets."
                )
            due.append(rng.uniform(start, end, n))
            for column, mean in ((prompt, tokens_in / n), (output, tokens_out / n)):
                mu = math.log(max(mean, 1.0)) - sigma * sigma / 2
                column.append(np.maximum(1, np.rint(np.exp(rng.normal(mu, sigma, n)))).astype(np.int64))
    if not due:
        raise InputError(f"{path}: its buckets hold no requests.")
    times = np.concatenate(due)
    return _sorted(name, times - times.min(), np.concatenate(prompt), np.concatenate(output))


def _sorted(name: str, due: Floats, prompt: Ints, output: Ints) -> Schedule:
    order = np.argsort(due, kind="stable")
    due = np.floor((due[order] - due[order[0]]) * 1e6) / 1e6
    return Schedule(name, np.arange(len(due), dtype=np.int64), due, prompt[order], output[order])
