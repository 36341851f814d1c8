"""From an answer and the digests of its runs to a report: what is said, in which order, and the plots' data.

The answer is the JSON of ``advise --json``, fresh or from the database: what an older version did not know is left out or
said to be missing.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from advisor.believed import believed
from advisor.report.digest import METRICS, QUANTILES, Digest, Over, Traffic
from advisor.report.draw import short
from advisor.report.parts import How, Mark, Plot, Report, Rule, Section, Table
from advisor.report.reproduce import on, online_command
from advisor.report.whatif import Case, turning_points
from traces.aggregate import APPROXIMATE
from traces.measures import Slo, late_word, ttft_limit_s
from traces.records import Fleet, Floats, Run

DRAWN = 12
"""Runs in one plot at most; tables have all."""

SERVED = 4
"""Runs whose servers are drawn over time."""

LABELS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}


def build(
    answer: Mapping[str, Any],
    runs: Sequence[Digest],
    *,
    traffic: Traffic | None = None,
    cases: Sequence[Case] = (),
    strategies: Mapping[str, Any] | None = None,
    reproduce: Section | None = None,
    traces: Container[str] | None = None,
    db: str = "",
) -> Report:
    """The report of an answer. runs: what it rests on. An answer without candidates is a refusal: its sentence says why. traces:
    those that are stored, where that is known. db: the URL that its commands name."""
    slo = Slo.parse(answer["slo"]) if answer.get("slo") else Slo()
    held = bool(answer.get("candidates"))
    sections = [
        *((_goodput(answer, runs), _p99(answer, slo, runs)) if held else ()),
        *((_rules(answer),) if held and answer.get("baselines") else ()),
        *distributions(runs, slo),
        *servers(runs),
        *(traffic_sections(traffic, answer) if traffic else ()),
        *laws(runs, answer),
        lag(runs, slo),
        *_strategies(strategies, answer, db),
        *((_what_if(cases, answer),) if held else ()),
        *((_cost(answer),) if answer.get("cost") or answer.get("needed") else ()),
        *((reproduce,) if reproduce else ()),
    ]
    title = f"Run {answer['prefill']}:{answer['decode']}" if held else "No recommendation yet"
    return Report(title, answer["sentence"], _cards(answer, runs, strategies, traces, db), sections, dict(answer))


# --- small words ----------------------------------------------------------------------------------------------------


def num(value: Any) -> float:
    """A figure of a JSON answer, where null stands for what is not there."""
    return math.nan if value is None else float(value)


def _figure(one: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    figure = one.get(name) or {}
    return num(figure.get("value")), num(figure.get("low")), num(figure.get("high"))


def _fleet(one: Mapping[str, Any]) -> str:
    return f"{one['prefill']}:{one['decode']}"


def span(value: float, low: float, high: float, unit: float = 1.0, digits: int = 3) -> str:
    """``12.3 [11.9, 12.6]``; a dash where nothing is known."""
    if not math.isfinite(value):
        return "–"
    text = f"{value * unit:.{digits}g}"
    if math.isfinite(low) and math.isfinite(high):
        text += f" [{low * unit:.{digits}g}, {high * unit:.{digits}g}]"
    return text


def seconds(value: float) -> str:
    """A time in the unit in which it is read: 3.2 s, 41 ms."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3g} s" if abs(value) >= 1 else f"{value * 1e3:.3g} ms"


def _share(value: float, digits: int = 0) -> str:
    return "–" if not math.isfinite(value) else f"{value * 100:.{digits}f} %"


def _signed(share: float) -> str:
    """``+4 %``, ``−11 %``, ``0 %``."""
    if not math.isfinite(share):
        return "–"
    text = f"{share * 100:+.0f}"
    return f"{'0' if float(text) == 0 else text.replace('-', '−')} %"


def _arr(values: Sequence[float] | Sequence[tuple[float, float, float]]) -> Floats:
    return np.array(values, dtype=float)


def _drawn(runs: Sequence[Digest], most: int = DRAWN) -> tuple[Sequence[Digest], str]:
    """The runs that a plot shows, the latest, and words about those it does not."""
    if len(runs) <= most:
        return runs, ""
    return runs[-most:], f" The latest {most} of {len(runs)} runs are drawn."


def _more(lines: list[str], most: int) -> str:
    rest = len(lines) - most
    return "; ".join(lines[:most]) + (f"; and {rest} more in the table" if rest > 0 else "")


# --- the first screen -----------------------------------------------------------------------------------------------


def _cards(
    answer: Mapping[str, Any],
    runs: Sequence[Digest],
    strategies: Mapping[str, Any] | None,
    traces: Container[str] | None,
    db: str,
) -> list[tuple[str, list[str], str]]:
    probe = answer.get("next_probe") or {}
    return [
        ("How sure", _sure(answer), ""),
        ("What it rests on", _rests(answer, runs), ""),
        ("What to do next", _next(answer, probe, traces, db), on(believed(probe.get("command")), db)),
        ("What was not measured", _unmeasured(answer, runs, strategies), ""),
    ]


def _sure(answer: Mapping[str, Any]) -> list[str]:
    if not answer.get("candidates"):
        return ["Not at all: there is no answer yet."]
    best = _best(answer)
    value, low, high = _figure(best, "goodput_per_s")
    lines = []
    if math.isfinite(low):
        kind = "90 % interval" if answer.get("calibrated") else "90 % band, its coverage not yet calibrated"
        lines.append(f"Goodput {value:.3g} req/s, between {low:.3g} and {high:.3g} ({kind}).")
    wins = num(best.get("wins"))
    if math.isfinite(wins):
        lines.append(f"{_fleet(best)} has the most goodput in {_share(wins)} of the bootstrap draws.")
    rival = answer.get("runner_up")
    if rival:
        theirs = _figure(rival, "goodput_per_s")[0]
        gap = theirs / value - 1 if value > 0 else math.nan
        lines.append(
            f"Runner-up: {_fleet(rival)}, {_signed(gap)} goodput, most in {_share(num(rival.get('wins')))} of draws."
        )
    lost, most = num((answer.get("regret") or {}).get("value")), num((answer.get("regret") or {}).get("high"))
    if math.isfinite(most):
        enough = " That is little enough to stop measuring." if answer.get("sure") else ""
        lines.append(
            f"Over what the runs leave open, this split loses {_share(lost, 1)} of the best goodput on average, {_share(most, 1)} at "
            f"worst in 20.{enough}"
        )
    if best.get("extrapolated"):
        lines.append(f"Beyond what was seen: {best['extrapolated']}.")
    return lines


def _rests(answer: Mapping[str, Any], runs: Sequence[Digest]) -> list[str]:
    lines = []
    if runs:
        ids = ", ".join(str(d.run.id) for d in runs[:12]) + (", .." if len(runs) > 12 else "")
        n = int(answer.get("observations") or sum(d.summary.ok for d in runs))
        fleets = sorted({str(d.run.fleet) for d in runs if d.run.fleet})
        lines.append(
            f"{len(runs)} run{'s' * (len(runs) > 1)} ({ids}) with {n:,} finished requests, on {', '.join(fleets) or 'a fleet not known'}."
        )
        known = [d.run for d in runs if math.isfinite(d.run.lag_p99_ms)]
        if known:
            good = sum(_in_time(r) for r in known)
            worst = max(r.lag_p99_ms for r in known)
            lines.append(f"The generator was in time in {good} of {len(known)} (send lag p99 at most {worst:.3g} ms).")
        if len(known) < len(runs):
            lines.append(f"How late the client sent is not known of {len(runs) - len(known)} of {len(runs)}.")
    if answer.get("trace"):
        changes = f" ({'; '.join(answer['schedule_changes'])})" if answer.get("schedule_changes") else ""
        lines.append(
            f"Asked about: trace {answer['trace']}{changes}, {answer.get('requests', '?')} requests at {num(answer.get('rate_per_s')):.3g} req/s."
        )
    if answer.get("laws"):
        parts = [f"{law['stage']} {_share(num(law['error']))}" for law in answer["laws"][:2]]
        lines.append(f"Laws fitted by regression, median error: {', '.join(parts)}; every split simulated with them.")
    return lines or ["Nothing: no run can be used."]


def _in_time(run: Run) -> bool:
    """By the lag alone: a run can be degraded for what the servers did not say."""
    late = late_word(run.lag_p99_ms / 1e3, Slo.parse(run.slo) if run.slo else None)
    return late == "valid" and not run.counts.get("unsent")


def _next(answer: Mapping[str, Any], probe: Mapping[str, Any], traces: Container[str] | None, db: str) -> list[str]:
    lines = []
    rule = answer.get("thresholds") or {}
    if answer.get("candidates"):
        own = {"online": rule.get("start"), "offline": answer.get("offline")}.get(str(answer.get("strategy")))
        split = own or answer
        lines.append(f"Serve with {split['prefill']} prefill and {split['decode']} decode workers.")
    if answer.get("strategy") == "online" and rule.get("rule"):
        told = ", ".join(
            f"{k} {v:g}" for k, v in rule.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
        )
        lines.append(f"Let it move by rule {rule['rule']} ({told}): {online_command(answer, traces, db)}")
    elif answer.get("strategy") == "offline":
        lines.append("Collect the requests and dispatch them in the order that the section on strategies names.")
    if probe.get("why"):
        lines.append(f"Then measure once more, because {probe['why']}:")
    return lines or ["Measure: steelyard replay TRACE --endpoint URL --fleet P:D"]


def _unmeasured(answer: Mapping[str, Any], runs: Sequence[Digest], strategies: Mapping[str, Any] | None) -> list[str]:
    gaps = [f"{w[:1].upper()}{w[1:].rstrip('.')}." for w in _alike(list(map(str, answer.get("warnings", ())))) if w]
    measured = {str(d.run.fleet) for d in runs}
    never = [_fleet(c) for c in answer.get("candidates", ()) if _fleet(c) not in measured]
    if never:
        shown = ", ".join(never[:12]) + (f" and {len(never) - 12} more" if len(never) > 12 else "")
        gaps.append(f"Predicted, never run: {shown}.")
    if not any(d.readings for d in runs):
        gaps.append("What the servers held: no readings of their metrics are stored.")
    if not any(d.changes for d in runs):
        gaps.append("What it costs to change the split while serving: no run changed roles.")
    if strategies is None and not answer.get("strategies"):
        gaps.append("Whether a split that moves would do better: no strategies were compared on this traffic.")
    return gaps


def _alike(warnings: Sequence[str]) -> list[str]:
    """The warnings; those that say the same of several runs, but for figures, are one with the words of the first."""
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for w in warnings:
        of_run = re.match(r"run (\d+) (left out|is degraded|is incomplete): (.*)", w, re.S)
        key = re.sub(r"[\d.]+", "#", f"{of_run[2]} {of_run[3]}") if of_run else w
        groups.setdefault(key, []).append((of_run[1], of_run[2], of_run[3]) if of_run else ("", "", w))
    lines = []
    for held in groups.values():
        number, what, why = held[0]
        if not number:
            lines.append(why)
        elif len(held) == 1:
            lines.append(f"run {number} {what}: {why}")
        else:
            runs = ", ".join(n for n, _, _ in held)
            lines.append(f"runs {runs} {what.replace('is ', 'are ')}, all for the like of run {number}: {why}")
    return lines


def _best(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    wanted = (answer.get("prefill"), answer.get("decode"))
    found: Mapping[str, Any] = next(
        (c for c in answer["candidates"] if (c["prefill"], c["decode"]) == wanted), answer["candidates"][0]
    )
    return found


# --- splits ---------------------------------------------------------------------------------------------------------


def _ordered(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(answer["candidates"], key=lambda c: (c["prefill"] + c["decode"], c["prefill"]))


def _places(answer: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[str], dict[str, int]]:
    rows = _ordered(answer)
    names = [_fleet(c) for c in rows]
    return rows, names, {name: k for k, name in enumerate(names)}


def _roles(answer: Mapping[str, Any]) -> tuple[str, str]:
    rival = answer.get("runner_up")
    return _fleet(answer), _fleet(rival) if rival else ""


def _answered(answer: Mapping[str, Any], runs: Sequence[Digest], place: Mapping[str, int]) -> list[tuple[int, Digest]]:
    """Runs that replayed exactly the traffic that is asked about, at the place of their split."""
    asked = answer.get("schedule_digest")
    return [
        (place[str(d.run.fleet)], d)
        for d in runs
        if asked and d.run.schedule_digest == asked and str(d.run.fleet) in place
    ]


def _goodput(answer: Mapping[str, Any], runs: Sequence[Digest]) -> Section:
    rows, names, place = _places(answer)
    best, rival = _roles(answer)
    figures = [_figure(c, "goodput_per_s") for c in rows]
    marks = []
    groups = (("recommended", 2, lambda n: n == best), ("runner-up", 1, lambda n: n == rival and n != best))
    for word, look, mine in (*groups, ("other splits", 0, lambda n: n not in (best, rival))):
        at = [k for k, n in enumerate(names) if mine(n)]
        if at:
            values = _arr([figures[k] for k in at])
            marks.append(
                Mark(
                    word,
                    _arr(at),
                    values[:, 0],
                    "bars",
                    values[:, 1],
                    values[:, 2],
                    look=look,
                    strong=word == "recommended",
                )
            )
    measured = _answered(answer, runs, place)
    if measured:
        marks.append(
            Mark(
                "measured",
                _arr([k for k, _ in measured]),
                _arr([d.summary.goodput_per_s for _, d in measured]),
                "points",
                look=3,
            )
        )
    offered = num(answer.get("rate_per_s"))
    rules = [Rule("y", offered, f"offered {offered:.3g}/s")] if math.isfinite(offered) else []
    top = sorted(rows, key=lambda c: -_figure(c, "goodput_per_s")[0])
    told = [f"{_fleet(c)} {span(*_figure(c, 'goodput_per_s'))}" for c in top]
    kind = "90 % intervals" if answer.get("calibrated") else "90 % bands, not yet calibrated"
    return Section(
        "goodput",
        "Goodput by split",
        f"Requests per second within {answer.get('slo', 'the SLO')}, predicted, with {kind}: {_more(told, 4)}. "
        f"Recommended: {best}{f', runner-up: {rival}' if rival else ''}. Of splits within 1 % of each other the smaller P99 E2E decides.",
        Plot("prefill:decode", "goodput, req/s", marks, rules, categories=names),
        _splits_table(rows, best, rival),
    )


def _within(c: Mapping[str, Any]) -> str:
    """The share of requests within the SLO, or whether its constraints are met."""
    return "constraint missed" if _kept(c) < 1 else _share(num(c.get("attainment")), 1)


def _kept(c: Mapping[str, Any]) -> float:
    """How nearly its constraints are kept; 1 where there is none."""
    return num((c.get("constraints_kept") or {}).get("value", 1.0))


def _splits_table(rows: Sequence[Mapping[str, Any]], best: str, rival: str) -> Table:
    head = [
        "P:D",
        "goodput, req/s",
        "within SLO",
        "TTFT p99, s",
        "TPOT p99, ms",
        "E2E p99, s",
        "busy, P / D",
        "best in draws",
    ]
    lines = []
    for c in rows:
        name = _fleet(c)
        word = " (recommended)" if name == best else " (runner-up)" if name == rival else ""
        busy = c.get("utilisation") or {}
        lines.append(
            [
                name + word,
                span(*_figure(c, "goodput_per_s")),
                _within(c),
                span(*_figure(c, "ttft_p99_s")),
                span(*_figure(c, "tpot_p99_s"), unit=1e3),
                span(*_figure(c, "e2e_p99_s")),
                f"{_share(num(busy.get('prefill')))} / {_share(num(busy.get('decode')))}",
                _share(num(c.get("wins"))),
            ]
        )
    strong = [k for k, c in enumerate(rows) if _fleet(c) == best]
    return Table(head, lines, "Predicted on the trace; [90 % interval].", strong)


def _p99(answer: Mapping[str, Any], slo: Slo, runs: Sequence[Digest]) -> Section:
    rows, names, place = _places(answer)
    measured = _answered(answer, runs, place)
    marks: list[Mark] = []
    rules: list[Rule] = []
    told: list[str] = []
    best = _best(answer)
    for look, metric in enumerate(METRICS):
        values = _arr([_figure(c, f"{metric}_p99_s") for c in rows]) * 1e3
        shift = (look - 1) * 0.12  # side by side, so that whiskers do not hide each other
        at = _arr([k + shift for k in range(len(rows))])
        marks.append(Mark(LABELS[metric], at, values[:, 0], "points", values[:, 1], values[:, 2], look=look))
        if measured:
            theirs = _arr([getattr(d.summary, f"{metric}_p99_s") * 1e3 for _, d in measured])
            marks.append(
                Mark(
                    f"{LABELS[metric]} measured",
                    _arr([k + shift for k, _ in measured]),
                    theirs,
                    "points",
                    look=look + 3,
                )
            )
        limit = slo.limit(metric)
        if limit:
            rules.append(Rule("y", limit * 1e3, f"{LABELS[metric]} limit {seconds(limit)}", look))
        told.append(f"{LABELS[metric]} {seconds(_figure(best, f'{metric}_p99_s')[0])}")
    return Section(
        "p99",
        "P99 latency by split",
        f"Predicted 99th percentiles on a logarithmic scale, with their intervals. {_fleet(best)}: {', '.join(told)}. The figures "
        "are in the table of splits above; where a point is missing nothing finished.",
        Plot("prefill:decode", "P99, ms", marks, rules, log_y=True, categories=names),
    )


def _rules(answer: Mapping[str, Any]) -> Section:
    """What the usual rules would have said."""
    best, _ = _roles(answer)
    goodput = {_fleet(c): _figure(c, "goodput_per_s")[0] for c in answer["candidates"]}
    rows, told = [], []
    for rule in answer["baselines"]:
        name, lost = _fleet(rule), num(rule.get("regret"))
        rows.append([str(rule["name"]), name, f"{goodput.get(name, math.nan):.3g}", _share(lost, 1)])
        told.append(f"{rule['name']} says {name}, {_share(lost)} lost")
    worth = {_fleet(c): goodput[_fleet(c)] * _kept(c) for c in answer["candidates"]}
    mine, most = worth.get(best, math.nan), max(worth.values())
    lost = 1 - mine / most if most > 0 else math.nan
    rows.append(["this answer", best, f"{goodput.get(best, math.nan):.3g}", _share(lost, 1)])
    return Section(
        "rules",
        "What the usual rules would have said",
        f"Each rule's split and the share of the best predicted goodput that it loses: {_more(told, 8)}.",
        table=Table(["rule", "P:D", "goodput, req/s", "lost"], rows, "At the point estimate.", strong=[len(rows) - 1]),
    )


# --- runs -----------------------------------------------------------------------------------------------------------


def distributions(runs: Sequence[Digest], slo: Slo) -> list[Section]:
    """CDFs of TTFT, TPOT and E2E by run, against the SLO."""
    found = []
    for metric, label in LABELS.items():
        some = [d for d in runs if metric in d.cdf]
        if not some:
            continue
        drawn, note = _drawn(some)
        limit = slo.limit(metric)
        marks = [Mark(d.name, d.cdf[metric] * 1e3, QUANTILES * 100, look=k) for k, d in enumerate(drawn)]
        rules = [Rule("x", limit * 1e3, f"limit {seconds(limit)}")] if limit else []
        rows, told = [], []
        for d in some:
            # Not from the curve: its steps pass 0.99 by.
            p50, p90, p99 = (seconds(getattr(d.summary, f"{metric}_{word}_s")) for word in ("p50", "p90", "p99"))
            within = d.within.get(metric, math.nan)
            rows.append([d.name, f"{d.n[metric]:,}", p50, p90, p99, _share(within, 1)])
            told.append(
                f"{d.name}: p50 {p50}, p99 {p99}" + (f", {_share(within, 1)} within the limit" if limit else "")
            )
        found.append(
            Section(
                metric,
                f"{label} by run",
                f"Share of finished requests at or below each {label}, counted from the due time. {_more(told, 4)}.{note}{_approximate(some)}",
                Plot(f"{label}, ms", "% of requests", marks, rules, log_x=True, top=100.0),
                Table(
                    ["run", "n", "p50", "p90", "p99", f"within {seconds(limit)}" if limit else "within (no limit)"],
                    rows,
                    f"{label} of finished requests, from due; n: those that have one.",
                ),
            )
        )
    return found


def _over(runs: Sequence[Digest], names: Sequence[tuple[str, str]], unit: float = 1.0, how: How = "line") -> list[Mark]:
    """A mark for each run and each (value, words) that its readings have."""
    marks: list[Mark] = []
    for d in runs:
        if d.readings is None:
            continue
        for name, words in names:
            if name in d.readings.values:
                values = d.readings.values[name] * unit
                marks.append(
                    Mark(f"run {d.run.id} ({d.run.fleet}): {words}", d.readings.at_s, values, how, look=len(marks))
                )
    return marks


def _peak(over: Over, name: str) -> str:
    values = over.values.get(name)
    if values is None or not np.isfinite(values).any():
        return "–"
    return f"{np.nanmean(values):.3g} / {np.nanmax(values):.3g}"


def servers(runs: Sequence[Digest]) -> list[Section]:
    """Queues, utilisation and roles over time, with every role change."""
    some = sorted((d for d in runs if d.readings is not None), key=lambda d: (not d.changes, -d.run.id))
    if not some:
        return [
            Section(
                "queues",
                "What the servers held",
                "No readings of the servers' own metrics are stored: queues, utilisation and roles are not known. "
                "They are read where the engine serves Prometheus metrics (see docs/replay.md).",
                missing=True,
            )
        ]
    drawn = some[:SERVED]
    note = (
        f" {len(drawn)} of {len(some)} runs are drawn, those that changed roles first."
        if len(some) > len(drawn)
        else ""
    )
    head = [
        "run",
        "prefill waiting, mean / most",
        "decode running",
        "decode waiting",
        "prefill busy",
        "decode busy",
        "KV used, decode",
    ]
    rows = []
    told = []
    for d in some:
        over = d.readings
        assert over is not None  # noqa: S101 - chosen above
        rows.append(
            [d.name]
            + [
                _peak(over, n)
                for n in ("prefill waiting_requests", "decode running_requests", "decode waiting_requests")
            ]
            + [
                _share(float(np.nanmean(v))) if (v := over.values.get(n)) is not None and np.isfinite(v).any() else "–"
                for n in ("prefill busy", "decode busy", "decode kv_used_ratio")
            ]
        )
        told.append(
            f"{d.name}: at most {_peak(over, 'prefill waiting_requests').split(' / ')[-1]} waiting for prefill, {_peak(over, 'decode running_requests').split(' / ')[-1]} in decode"
        )
    found = []
    marks = _over(
        drawn,
        [
            ("prefill waiting_requests", "prefill waiting"),
            ("decode running_requests", "decode running"),
            ("mixed running_requests", "mixed running"),
        ],
    )
    table = Table(head, rows, "Requests summed over the workers of a role; busy: share of worker-seconds.")
    if marks:
        found.append(
            Section(
                "queues",
                "Queues over time",
                f"Requests waiting for prefill and running in decode, summed over workers. {_more(told, 4)}.{note}",
                Plot("seconds from schedule zero", "requests", marks),
                table,
            )
        )
    busy = _over(drawn, [("prefill busy", "prefill"), ("decode busy", "decode"), ("mixed busy", "mixed")], 100.0)
    if busy:
        means = [f"{m.name} {np.nanmean(m.y):.0f} %" for m in busy if np.isfinite(m.y).any()]
        found.append(
            Section(
                "busy",
                "Utilisation over time",
                f"Share of worker-seconds with work in hand, by role. Means: {_more(means, 6)}.{note}",
                Plot("seconds from schedule zero", "% busy", busy, top=100.0),
            )
        )
    found.append(_role_changes(drawn, some, note))
    return found


def _role_changes(drawn: Sequence[Digest], some: Sequence[Digest], note: str) -> Section:
    marks = _over(
        drawn,
        [
            ("prefill workers", "prefill workers"),
            ("decode workers", "decode workers"),
            ("mixed workers", "mixed workers"),
        ],
        how="steps",
    )
    rows = [
        [
            f"run {d.run.id}",
            f"{c.asked_s:.1f}",
            f"{c.ready_s:.1f}" if math.isfinite(c.ready_s) else "never",
            str(c.before),
            str(c.after),
            c.reason,
        ]
        for d in some
        for c in d.changes
    ]
    changing = [d for d in drawn if d.changes]
    rules = []
    if len(changing) == 1:
        rules = [
            Rule("x", c.asked_s, f"{c.before} → {c.after}" if len(changing[0].changes) <= 8 else "")
            for c in changing[0].changes
        ]
    if rows:
        text = f"Workers by role, and every role change ({len(rows)}) with the reason that the policy gave."
    else:
        text = "Workers by role as the servers named themselves. No run changed roles."
    table = (
        Table(
            ["run", "asked, s", "in force, s", "before", "after", "reason"],
            rows[:200],
            f"Role changes{' (the first 200)' if len(rows) > 200 else ''}.",
        )
        if rows
        else None
    )
    return Section(
        "roles", "Roles over time", text + note, Plot("seconds from schedule zero", "workers", marks, rules), table
    )


def traffic_sections(traffic: Traffic, answer: Mapping[str, Any]) -> list[Section]:
    """Rate, lengths and prefill:decode ratio over time, and the workers this keeps busy against those there are."""
    over = traffic.over
    v = over.values
    at = over.at_s

    def told(name: str) -> str:
        values = v[name][np.isfinite(v[name])]
        mean, low, high = (
            (short(float(f"{f(values):.3g}")) for f in (np.mean, np.min, np.max)) if len(values) else ("–",) * 3
        )
        return f"mean {mean}, {low} to {high}"

    at_once = "All requests come at one instant: there is no rate, and nothing to draw over time."
    found = [
        Section(
            "rate",
            "Traffic: requests over time",
            f"Arrivals per second in bins of {seconds(over.width_s)}: {told('rate_per_s')}."
            if over.width_s
            else at_once,
            Plot("seconds from the first request", "req/s", [Mark("arrivals", at, v["rate_per_s"], "steps")])
            if over.width_s
            else None,
        ),
        Section(
            "lengths",
            "Traffic: lengths and prefill:decode ratio over time",
            f"Mean tokens a request: prompts {told('prompt_tokens')}; answers {told('output_tokens')}. Prompt tokens to one output "
            f"token: {told('ratio')}. Where this ratio turns, so does the best split.",
            Plot(
                "seconds from the first request",
                "tokens, and their ratio",
                [
                    Mark("prompt tokens", at, v["prompt_tokens"], look=0),
                    Mark("output tokens", at, v["output_tokens"], look=1),
                    Mark("prompt tokens to one output token", at, v["ratio"], look=2),
                ],
                log_y=True,
            )
            if over.width_s
            else None,
        ),
    ]
    if "prefill_workers" in v:
        rules = []
        if answer.get("candidates"):
            rules = [
                Rule("y", answer["prefill"], f"{answer['prefill']} prefill", 0),
                Rule("y", answer["decode"], f"{answer['decode']} decode", 1),
            ]
            over_p = float((v["prefill_workers"] > answer["prefill"]).mean())
            over_d = float((v["decode_workers"] > answer["decode"]).mean())
            more = f" Demand exceeds the recommended prefill workers in {_share(over_p)} and the decode workers in {_share(over_d)} of the bins: queues grow there."
        else:
            more = ""
        found.append(
            Section(
                "capacity",
                "Traffic against capacity",
                f"Workers that this traffic keeps busy by the fitted laws, without queueing: prefill {told('prefill_workers')}; decode "
                f"{told('decode_workers')} (a decode worker holding {traffic.batch:.0f} sequences, the most within the limits of TPOT, batch and KV cache).{more}",
                Plot(
                    "seconds from the first request",
                    "workers",
                    [
                        Mark("prefill demand", at, v["prefill_workers"], "steps", look=0),
                        Mark("decode demand", at, v["decode_workers"], "steps", look=1),
                    ],
                    rules,
                ),
            )
        )
    return found


def laws(runs: Sequence[Digest], answer: Mapping[str, Any]) -> list[Section]:
    """Fitted laws against the observations, with residuals."""
    found = []
    for key, label, what in (
        (
            "tpot",
            "TPOT",
            "Time per output token of every answer of four tokens or more against the decode law at the batch and context its worker carried",
        ),
        (
            "ttft",
            "TTFT",
            "TTFT from sent of requests that met no other prefill, against overhead + transfer + prefill + first step; where decode workers are full it also holds the wait for admission, which this law does not speak of and the whole model does",
        ),
    ):
        held = [(d, fit) for d in runs if (fit := getattr(d, key)) is not None]
        if not held:
            continue
        drawn = held[-DRAWN:]
        told = [f"run {d.run.id} {_share(fit.error, 1)} (n = {fit.n:,})" for d, fit in held]
        only = f" {len(drawn)} of {len(runs)} runs are drawn." if len(drawn) < len(runs) else ""
        scatter, rest = [], []
        for k, (d, fit) in enumerate(drawn):
            scatter.append(Mark(d.name, fit.predicted * 1e3, fit.measured * 1e3, "points", look=k))
            rest.append(
                Mark(d.name, fit.predicted * 1e3, fit.measured / np.maximum(fit.predicted, 1e-12), "points", look=k)
            )
        most = max(len(fit.measured) for _, fit in drawn)
        found.append(
            Section(
                f"law-{key}",
                f"Does the law fit? {label}, measured against predicted",
                f"{what}. On the line is right. Median miss: {_more(told, 6)}.{only}",
                Plot(f"predicted {label}, ms", f"measured {label}, ms", scatter, log_x=True, log_y=True, diagonal=True),
            )
        )
        found.append(
            Section(
                f"residual-{key}",
                f"{label}: what the law misses",
                "Residuals, measured / predicted: 1 is right, a slope or a bend is something the law does not know. At most "
                f"{most} requests a run are drawn, spread evenly over the predictions.",
                Plot(
                    f"predicted {label}, ms", "measured / predicted", rest, [Rule("y", 1.0, "")], log_x=True, log_y=True
                ),
            )
        )
    if answer.get("laws"):
        rows = [
            [
                law["stage"],
                ", ".join(f"{k} = {num(v):.4g}" for k, v in law["coefficients"].items()),
                str(law["n"]),
                _share(num(law["error"]), 1),
                law["source"],
            ]
            for law in answer["laws"]
        ]
        code = (
            [("As a profile that steelyard serve --profile takes", str(answer["profile"]))]
            if answer.get("profile")
            else []
        )
        found.append(
            Section(
                "laws",
                "Fitted laws",
                "Regressions on physical features; coefficients in SI units.",
                table=Table(["stage", "coefficients", "rows", "median error", "from"], rows),
                code=code,
            )
        )
    residuals = answer.get("residuals") or []
    ids = list(answer.get("runs") or [])
    if residuals and len(residuals) == len(ids):
        names = list(residuals[0])
        rows = [
            [f"run {i}", *(_signed(math.exp(num(r[n])) - 1) if r.get(n) is not None else "–" for n in names)]
            for i, r in zip(ids, residuals, strict=True)
        ]
        found.append(
            Section(
                "held",
                "The whole model against every run",
                "Predicted by simulating what the run asked, against what it measured: how far each figure is off. The intervals of the answer include this.",
                table=Table(
                    ["run", *(n.removesuffix("_per_s").removesuffix("_s").replace("_", " ") for n in names)],
                    rows,
                    "(predicted - measured) / measured",
                ),
            )
        )
    return found


def lag(runs: Sequence[Digest], slo: Slo) -> Section:
    """The generator's own lag and the verdicts."""
    limit = ttft_limit_s(slo)
    known = [d for d in runs if math.isfinite(d.run.lag_p99_ms)]  # others' rows hold no time of their own
    drawn, note = _drawn([d for d in known if d.requests.width_s and np.isfinite(d.requests.values["lag_p99_s"]).any()])
    marks = [Mark(d.name, d.requests.at_s, d.requests.values["lag_p99_s"] * 1e3, look=k) for k, d in enumerate(drawn)]
    rules = [Rule("y", 0.05 * limit * 1e3, f"degraded above {0.05 * limit * 1e3:.3g} ms (p99 of the run)")]
    verdicts = [f"run {d.run.id} {d.run.verdict or 'not ended'}" for d in runs]
    return Section(
        "lag",
        "The generator's own lag, and each run's verdict",
        f"How late requests left against their due times, p99 in bins of time. A run counts only while this stays far below the TTFT "
        f"limit. {_more(verdicts, 8)}.{note}{_approximate(runs)}",
        Plot("due time, s", "send lag p99, ms", marks, rules) if marks else None,
        runs_table(runs),
    )


def _cell(*values: float, form: str) -> str:
    """``12 / 30``; a dash for what is not known."""
    return " / ".join(format(v, form) if math.isfinite(v) else "–" for v in values)


def _approximate(runs: Sequence[Digest]) -> str:
    """Where a figure of one of these comes from bins: how far it may be off."""
    return "" if all(d.exact for d in runs) else f" {APPROXIMATE}"


def runs_table(runs: Sequence[Digest]) -> Table:
    """One line a run."""
    head = [
        "run",
        "P:D",
        "trace",
        "rate, req/s",
        "n",
        "ok",
        "goodput",
        "TTFT p50 / p99, ms",
        "TPOT p50 / p99, ms",
        "E2E p50 / p99, s",
        "lag p50 / p99 / max, ms",
        "verdict",
    ]
    rows = []
    for d in runs:
        r, s = d.run, d.summary
        verdict = (r.verdict or "not ended") + ("" if r.complete or not r.ended else ", incomplete")
        rows.append(
            [
                str(r.id), str(r.fleet or "?"), r.trace,
                "at once" if math.isinf(r.rate_per_s) else _cell(r.rate_per_s, form=".3g"),
                f"{s.n:,}", f"{s.ok:,}", _cell(s.goodput_per_s, form=".3g"),
                _cell(s.ttft_p50_s * 1e3, s.ttft_p99_s * 1e3, form=".0f"),
                _cell(s.tpot_p50_s * 1e3, s.tpot_p99_s * 1e3, form=".1f"), _cell(s.e2e_p50_s, s.e2e_p99_s, form=".2f"),
                _cell(r.lag_p50_ms, r.lag_p99_ms, r.lag_max_ms, form=".1f"), verdict,
            ]
        )  # fmt: skip
    return Table(head, rows, "Latencies count from due times; goodput in requests per second within the SLO.")


def over_time(one: Digest) -> list[Section]:
    """Arrivals, failures and latencies of one run over time."""
    over = one.requests
    v = over.values
    width = f"bins of {seconds(over.width_s)}"
    failed = one.failures
    rows = [[kind, f"{n:,}", first or "–"] for kind, n, first in failed[:20]]
    told = (
        f"{sum(n for _, n, _ in failed):,} did not finish: {', '.join(f'{k} {n:,}' for k, n, _ in failed[:5])}."
        if failed
        else "All finished."
    )
    table = Table(["how", "requests", "first seen"], rows, "What did not finish.") if rows else None
    if not over.width_s:
        text = f"All requests were due at once: there is no rate, and nothing to draw over due times. {told}"
        return [Section("arrivals", "Requests over time", text, table=table)]
    latency = [
        Mark(f"{LABELS[m]} {q}", over.at_s, v[f"{m}_{q}_s"] * 1e3, look=2 * k + (q == "p99"))
        for k, m in enumerate(("ttft", "tpot"))
        for q in ("p50", "p99")
    ]
    return [
        Section(
            "arrivals",
            "Requests over time",
            f"Arrivals and requests that did not finish, by due time in {width}. {told}",
            Plot(
                "due time, s",
                "per second",
                [
                    Mark("due", over.at_s, v["rate_per_s"], "steps", look=0),
                    Mark("did not finish", over.at_s, v["failed_per_s"], "steps", look=1),
                ],
            ),
            table,
        ),
        Section(
            "latency",
            "Latency over time",
            f"TTFT and TPOT of finished requests by due time in {width}: TTFT p50 {seconds(one.summary.ttft_p50_s)}, p99 {seconds(one.summary.ttft_p99_s)} over all. A line that climbs to the end is a queue that grows.{_approximate([one])}",
            Plot("due time, s", "ms", latency, log_y=True),
        ),
    ]


def run_facts(one: Digest) -> Section:
    """What one run asked, of whom, and how it ended."""
    r, s = one.run, one.summary
    rows = [
        ["trace", r.trace + (f" ({'; '.join(r.changes)})" if r.changes else "")],
        ["asked of", f"{r.engine} serving {r.model or '?'} at {r.endpoint}"],
        ["fleet, policy", f"{r.fleet or '?'}, {r.policy}"],
        ["SLO", r.slo or "none"],
        ["goodput", f"{_cell(s.goodput_per_s, form='.4g')} req/s, {_share(s.attainment, 1)} of requests within the SLO"],
        ["latency p50 / p99", f"TTFT {seconds(s.ttft_p50_s)} / {seconds(s.ttft_p99_s)}, TPOT {seconds(s.tpot_p50_s)} / {seconds(s.tpot_p99_s)}, E2E {seconds(s.e2e_p50_s)} / {seconds(s.e2e_p99_s)}"],
        ["generator", f"{r.verdict or 'not judged yet'}; {r.reason or '–'}; {r.workers} load workers"],
        ["seed, version", f"{r.seed}, steelyard {r.version or '?'}"],
        ["schedule sha256", r.schedule_digest],
    ]  # fmt: skip
    return Section("facts", "The run", "Latencies count from due times.", table=Table(["what", "value"], rows))


# --- strategies, other worlds ---------------------------------------------------------------------------------------


def _strategies(study: Mapping[str, Any] | None, answer: Mapping[str, Any], db: str) -> list[Section]:
    found = [_chosen(answer)] if answer.get("strategies") else []
    if study is not None or not found:
        found.append(_studied(study, answer, db))
    return found


def _chosen(answer: Mapping[str, Any]) -> Section:
    """The strategies that the answer itself weighed."""
    arms = answer["strategies"]
    names = [str(a["strategy"]) for a in arms]
    values = _arr([num(a.get("goodput_per_s")) for a in arms])
    at = np.arange(len(names), dtype=float)
    mine = [n.split()[0] == answer.get("strategy") for n in names]
    good = np.where(np.array(names) == "offline", np.nan, values)  # offline's is a throughput
    marks = [
        Mark(word, at[keep], good[keep], "bars", look=look, strong=look == 2)
        for word, look, keep in (("chosen", 2, np.array(mine)), ("others", 0, ~np.array(mine)))
        if np.isfinite(good[keep]).any()
    ]
    rows = [
        [
            n,
            str(a.get("fleet") or "–"),
            f"{v:.3g}{' (throughput)' if n == 'offline' else ''}" if math.isfinite(v) else "–",
            _share(num(a.get("regret")), 1),
            f"{num(a.get('switches_per_h')):.3g}",
            str(a.get("note") or "–"),
        ]
        for n, a, v in zip(names, arms, values.tolist(), strict=True)
    ]
    windows = answer.get("windows") or {}
    lasts = (
        f" A mix lasts {seconds(num(windows.get('mix_lasts_s')))}, a move takes {seconds(num(windows.get('move_s')))}."
        if windows
        else ""
    )
    why = str(answer.get("why") or "")
    return Section(
        "chosen",
        "Should the split move?",
        f"Chosen: {answer.get('strategy')}.{f' {why[:1].upper()}{why[1:].rstrip(chr(46))}.' if why else ''}{lasts} Simulated with the fitted laws; regret is against knowing every window's best split.",
        Plot("strategy", "goodput, req/s", marks, categories=names),
        Table(
            ["strategy", "P:D", "goodput, req/s", "regret", "switches per h", "how"],
            rows,
            "Online on the later part of the traffic, by thresholds chosen on the earlier.",
        ),
    )


def _studied(study: Mapping[str, Any] | None, answer: Mapping[str, Any], db: str = "") -> Section:
    if study is None:
        trace = shlex.quote(answer.get("trace") or "TRACE")
        command = f"steelyard strategies --trace {trace} --requests 200 --gpus {answer.get('gpus', 8)}"
        return Section(
            "strategies",
            "Strategies side by side",
            "Baseline, online, offline and static were not compared on this traffic, so whether a split that moves would do better is "
            "not known. The command below compares them.",
            code=[("Compare them", on(command, db))],
            missing=True,
        )
    name, scale = next(iter(study["scales"].items()))
    mode = "arrivals" if "arrivals" in scale else "burst"
    arms = scale[mode]
    names = list(arms)
    p99 = _arr([_figure(arms[a], "p99_s") for a in names])
    mean = _arr([_figure(arms[a], "mean_s") for a in names])
    at = np.arange(len(names), dtype=float)
    rows = [
        [
            a,
            *(span(*_figure(arms[a], k)) for k in ("p99_s", "mean_s")),
            span(*_figure(arms[a], "change_p99"), unit=100),
            span(*_figure(arms[a], "goodput_per_s")),
            _share(_figure(arms[a], "utilisation")[0]),
            span(*_figure(arms[a], "switches")),
        ]
        for a in names
    ]
    least = names[int(np.nanargmin(p99[:, 0]))] if np.isfinite(p99[:, 0]).any() else names[0]
    return Section(
        "strategies",
        "Strategies side by side",
        f"{study.get('source', 'a workload')}, {scale.get('requests')} requests on {scale.get('gpus')} GPUs, {study.get('seeds')} draws, goodput within "
        f"{study.get('slo')}. Least P99 latency: {least}, {span(*_figure(arms[least], 'p99_s'))} s. An oracle is chosen on the scored requests themselves.",
        Plot(
            "strategy",
            "latency, s",
            [
                Mark("P99", at - 0.08, p99[:, 0], "points", p99[:, 1], p99[:, 2], look=0),
                Mark("mean", at + 0.08, mean[:, 0], "points", mean[:, 1], mean[:, 2], look=1),
            ],
            log_y=True,
            categories=names,
        ),
        Table(
            ["strategy", "P99, s", "mean, s", "P99 to baseline, %", "goodput, req/s", "busy", "switches"],
            rows,
            f"Mean over draws [90 % interval]; {name}, {mode}.",
        ),
    )


def _cost(answer: Mapping[str, Any]) -> Section:
    """What it costs, and what another rate would need, as the answer says it."""
    rows = []
    for part in ("cost", "needed"):
        for key, value in (answer.get(part) or {}).items():
            if isinstance(value, Mapping) and "value" in value:
                value = span(*_figure({key: value}, key))
            if value is not None and not isinstance(value, (list, Mapping)):
                rows.append(
                    [f"{part}: {key.replace('_', ' ')}", f"{value:.4g}" if isinstance(value, float) else str(value)]
                )
    return Section(
        "cost",
        "Cost, and GPUs for another rate",
        "At the price and the rate that were given.",
        table=Table(["what", "value"], rows),
    )


def _what_if(cases: Sequence[Case], answer: Mapping[str, Any]) -> Section:
    if not cases:
        return Section(
            "whatif",
            "What would change the answer",
            "Not computed: the traffic that was asked about is not at hand.",
            missing=True,
        )
    chosen = Fleet(answer["prefill"], answer["decode"])
    rates = sorted((c for c in cases if c.kind == "rate"), key=lambda c: c.rate_per_s)
    rows = [
        [
            c.what,
            f"{c.rate_per_s:.3g}",
            str(c.gpus),
            str(c.best) + (" (the answer)" if c.best == chosen else ""),
            f"{c.goodput_per_s:.3g}",
            _share(c.attainment),
            "–" if not math.isfinite(c.loss) else _share(c.loss),
        ]
        for c in cases
    ]
    x = _arr([c.rate_per_s for c in rates])
    best = _arr([c.goodput_per_s for c in rates])
    stay = _arr([c.goodput_per_s * (1 - c.loss) for c in rates])
    mixes = [f"{c.what}: {c.best}" for c in cases if c.kind == "mix"]
    counts = [f"{c.what}: {c.best}, {c.goodput_per_s:.3g} req/s" for c in cases if c.kind == "gpus"]
    turn = answer.get("break_even") or {}
    rival = _roles(answer)[1]
    words = {"prompt_factor": "prompts {} times as long", "rate_factor": "{} times the rate"}
    turns = [words[k].format(f"{num(turn[k]):.2g}") for k in words if turn.get(k) is not None]
    even = f" The runner-up {rival} overtakes at {' or at '.join(turns)}." if turns and rival else ""
    return Section(
        "whatif",
        "What would change the answer",
        f"The fitted laws asked about other worlds, without intervals. Rate: {'; '.join(turning_points(cases, chosen))}. Mix: {'; '.join(mixes)}. GPUs: {'; '.join(counts)}.{even}",
        Plot(
            "req/s offered",
            "goodput, req/s",
            [Mark("best split at that rate", x, best, look=0), Mark(f"staying with {chosen}", x, stay, look=1)],
        ),
        Table(
            [
                "what if",
                "req/s",
                "GPUs",
                "best split",
                "goodput, req/s",
                "within SLO",
                f"lost by staying with {chosen}",
            ],
            rows,
            "Simulated at the point estimate.",
        ),
        code=[],
    )
