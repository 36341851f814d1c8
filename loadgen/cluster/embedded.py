"""The reference endpoint as a child process, for the demo, sweeps and tests."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from traces.errors import EndpointError
from traces.records import Fleet

START_S = 20.0


@contextmanager
def embedded(profile: str, fleet: Fleet, **options: Any) -> Iterator[str]:
    """Start the endpoint on a free loopback port, give its base URL, stop it at the end.

    profile: a shipped name or a TOML file. options: those of :func:`loadgen.cluster.server.serve` (speed, fail_every,
    fail_kind), and host, port, token, cert and key of a :class:`loadgen.ports.Door`. EndpointError when it does not come up
    within START_S; the child ends with its parent.
    """
    token = {"STEELYARD_EMBEDDED_TOKEN": options.pop("token")} if "token" in options else {}
    arguments = json.dumps({"profile": profile, "fleet": str(fleet), **options})
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "loadgen.cluster.server", arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"STEELYARD_WITH_PARENT": "1"} | token,
        start_new_session=True,  # Ctrl-C is the caller's to handle: answers in flight are drained first
    )
    try:
        yield _url(child)
    finally:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(5)
        for pipe in (child.stdout, child.stderr):
            if pipe:
                pipe.close()


def _url(child: subprocess.Popen[str]) -> str:
    end = time.monotonic() + START_S
    assert child.stdout is not None and child.stderr is not None  # noqa: S101, PT018 - both were asked for as pipes
    while time.monotonic() < end:
        if select.select([child.stdout], [], [], 0.2)[0]:
            line = child.stdout.readline()
            if line.startswith("listening on "):
                return line.split()[-1]
        if child.poll() is not None:
            said = child.stderr.read().strip().splitlines()
            raise EndpointError(f"the embedded endpoint did not start: {said[-1] if said else 'it said nothing'}")
    raise EndpointError(f"the embedded endpoint did not start within {START_S:g} s.")
