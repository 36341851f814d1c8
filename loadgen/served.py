"""What the servers did during a run that changes what its figures mean; the generator's own verdict is made elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loadgen.discover import Discovery
from loadgen.engines import engines
from loadgen.scrape import Scraper
from traces.records import Observations, Run

SEVERITY = ("", "valid", "degraded", "invalid")

DENIED = (401, 403)

AT_ONCE_S = 1e-3
"""Eight or more tokens that arrive within this time were held back by somebody."""


class Served:
    """Counts rows as they come, judges at the end."""

    def __init__(self) -> None:
        self.ok = 0
        self.without_usage = 0
        self.short = 0
        self.streams = 0
        self.at_once = 0
        self.denied = 0
        self.denied_from_s = np.inf

    def add(self, rows: Observations) -> None:
        """Rows of the run; each comes once."""
        ok = rows.ok
        self.ok += int(ok.sum())
        self.without_usage += int((ok & (rows.output_tokens < 0)).sum())
        self.short += int((ok & (rows.output_tokens >= 0) & (rows.output_tokens < rows.requested_tokens)).sum())
        long = ok & (rows.tokens >= 8)
        self.streams += int(long.sum())
        self.at_once += int((long & (rows.last_token_s - rows.first_token_s < AT_ONCE_S)).sum())
        denied = np.isin(rows.http_status, DENIED)
        if denied.any():
            self.denied += int(denied.sum())
            self.denied_from_s = min(self.denied_from_s, float(rows.due_s[denied].min()))

    def reasons(
        self, began: Discovery, ended: Discovery | None, scraper: Scraper | None, *, moved: bool
    ) -> list[tuple[str, str]]:
        """(verdict, why) for everything that the rows, readings and workers show. moved: we changed roles ourselves."""
        found: list[tuple[str, str]] = []
        if self.denied:
            found.append(
                (
                    "invalid",
                    f"{self.denied} requests from {self.denied_from_s:.1f} s on were refused for their credentials: the token "
                    "expired or was revoked; get another and measure again",
                )
            )
        if self.without_usage:
            found.append(
                (
                    "degraded",
                    f"the server sent no usage with {self.without_usage} of {self.ok} answers: their tokens are those asked "
                    "for, so TPOT and the laws of decode are guesses",
                )
            )
        if self.at_once > self.streams / 2:
            found.append(
                (
                    "degraded",
                    f"the tokens of {self.at_once} of {self.streams} answers came at once: somebody holds streams back, so TTFT "
                    "is the whole latency and TPOT nothing",
                )
            )
        if self.short:
            words = f"{self.short} of {self.ok} answers were shorter than asked: the server does not keep ignore_eos"
            found.append(("valid", words))
        found += [("valid", note) for note in began.notes]
        if scraper is not None:
            found += self._readings(scraper, moved=moved)
        if ended is not None and any(w.role != "router" for w in ended.workers) and not moved:
            before, after = ({r: d.count(r) for r in ("prefill", "decode", "mixed")} for d in (began, ended))
            if before != after:
                found.append(
                    (
                        "invalid",
                        f"the fleet changed during the run, from {began.shown} to {ended.shown}: its figures belong to no "
                        "one P:D",
                    )
                )
        return found

    def _readings(self, scraper: Scraper, *, moved: bool) -> list[tuple[str, str]]:
        silent = scraper.silent()
        if silent and len(silent) == len(scraper.last):
            at = max(s.at_s for s in silent)
            return [("degraded", f"no metrics came after {at:.1f} s: what the servers did then is not known")]
        word, why = (
            ("valid", "we changed roles, it may have left so")
            if moved
            else ("degraded", "it went away, or its metrics did")
        )
        found = [(word, f"the {s.role} worker {s.worker} told nothing after {s.at_s:.1f} s: {why}") for s in silent]
        unheard = scraper.unheard() if any(s.role in ("prefill", "decode") for s in scraper.last.values()) else {}
        for role in sorted(set(unheard.values())):
            names = sorted(name for name in unheard if unheard[name] == role)
            shown = ", ".join(names[:3]) + (", .." if len(names) > 3 else "")
            found.append(
                ("valid", f"no metrics of {role} came from {shown}: what is read of the role is of the others")
            )
        for name, listed in {} if moved else scraper.listed().items():
            first, last = scraper.first.get(name), scraper.last.get(name)
            if first is None or last is None or listed not in ("prefill", "decode"):
                continue
            betrayed = next(filter(None, (e.role(first, last) for e in engines().values())), "")
            if betrayed in ("prefill", "decode") and betrayed != listed:
                found.append(
                    ("invalid", f"the worker {name} is listed as {listed}, but its metrics show that it did {betrayed}")
                )
        return found


def judged(run: Run, reasons: list[tuple[str, str]]) -> Run:
    """The run with the worst of its verdicts, and all reasons, the worst first."""
    if not reasons:
        return run
    ordered = sorted(reasons, key=lambda r: -SEVERITY.index(r[0]))
    word = max((run.verdict, ordered[0][0]), key=SEVERITY.index)
    return replace(run, verdict=word, reason="; ".join(filter(None, (*(why for _, why in ordered), run.reason))))
