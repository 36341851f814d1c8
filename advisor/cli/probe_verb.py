"""The verb probe."""

from __future__ import annotations

from typing import Any

import click

from advisor.cli.common import emit_json, example, json_option, messages
from advisor.cli.reaching import reached, reaching


def told(found: Any) -> dict[str, Any]:
    """What was found, as JSON."""
    from loadgen.client import unsaid

    ok = [row for row in found.rows if row.status == "ok"]
    fleet = found.found.fleet
    offset = found.clock
    return {
        "endpoint": found.endpoint,
        "engine": found.found.engine.name,
        "known_by": found.found.why,
        "version": found.found.version,
        "model": found.model,
        "models": list(found.models),
        "fleet": {"prefill": fleet.prefill, "decode": fleet.decode, "mixed": fleet.mixed} if fleet else None,
        "settable": found.settable,
        "workers": [
            {
                "name": w.name,
                "role": w.role or None,
                "url": unsaid(w.url) or None,
                "metrics": unsaid(w.metrics) or None,
                "weight": w.weight,
                "healthy": w.healthy,
            }
            for w in found.found.workers
        ],
        "pages": [
            {
                "worker": p.worker.name or None,
                "role": p.worker.role or None,
                "metrics": unsaid(p.worker.metrics),
                "fields": list(p.fields),
                "histograms": list(p.histograms),
                "problem": p.problem or None,
            }
            for p in found.pages
        ],
        "request": {
            "path": found.dialect.path,
            "token_ids": found.dialect.token_ids,
            "asked": len(found.rows),
            "ok": len(ok),
            "usage": bool(ok) and all(r.output_tokens >= 0 for r in ok),
            "output_tokens": [r.output_tokens for r in ok],
            "events": [r.chunks for r in ok],
            "facts": [dict(r.facts or {}) for r in ok],
        },
        "clock": None if offset is None else {"ahead_s": offset[0], "within_s": offset[1]},
        "known": list(found.known),
        "missing": [{"what": one.what, "costs": one.costs, "do": one.do} for one in found.lacks],
    }


@click.command(**example("steelyard probe http://127.0.0.1:8123"))
@click.argument("url")
@reaching
@json_option
def probe(url: str, as_json: bool, **options: Any) -> None:
    """Find out what an endpoint is: engine, workers, roles, what it tells, and what the advice lacks.

    Sends about ten small requests. Workers come from --targets, from the router's list or from its metrics. Prints what is
    known, what is missing, and what each missing thing costs the advice.
    """
    from loadgen.client import unsaid
    from loadgen.control import Endpoint
    from loadgen.discover import read_targets
    from loadgen.probe import probe as run

    targets = read_targets(options["targets"]) if options["targets"] else None
    (where,) = reached([url], options)
    found = run(
        Endpoint(where), engine=options["engine"], model=options["model"], chat=options["chat"], targets=targets
    )
    if as_json:
        emit_json(told(found))
        return
    console = messages()
    console.print(f"{found.endpoint}, model {found.model}", markup=False)
    for line in found.known:
        console.print(f"  known    {line}", markup=False, soft_wrap=True)
    for worker in found.found.workers:
        state = "" if worker.healthy is not False else ", not healthy"
        console.print(
            f"  worker   {worker.name}: {worker.role or 'unknown role'}{state}"
            + (f", metrics {unsaid(worker.metrics)}" if worker.metrics else ""),
            markup=False,
            soft_wrap=True,
        )
    for one in found.lacks:
        console.print(f"  missing  {one.what}", markup=False, soft_wrap=True)
        console.print(f"           costs: {one.costs}", markup=False, soft_wrap=True)
        console.print(f"           do: {one.do}", markup=False, soft_wrap=True)
