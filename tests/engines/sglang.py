"""sglang-router in PD mode, before two prefill and two decode stand-ins of SGLang's engines (``sglang_worker.py``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.engines.lab import Rig, environment, free_ports, get, process, until
from traces.records import Fleet

NAME = "sglang-router 0.3.2, stand-ins"
INSTALL = (["sglang-router==0.3.2"],)
WORKER = Path(__file__).with_name("sglang_worker.py")


def install() -> Path:
    return environment("sglang", INSTALL)


@contextlib.contextmanager
def started(python: Path, folder: Path) -> Iterator[Rig]:
    """Two workers of each role; the router begins with 2:1, so that 1:2 takes one out and puts one in."""
    router, page, *ports = free_ports(8)
    prefill, bootstrap, decode = ports[:2], ports[2:4], ports[4:]
    url = f"http://127.0.0.1:{router}"
    with contextlib.ExitStack() as stack:

        def worker(role: str, port: int, *more: int) -> None:
            words = [str(python), str(WORKER), role, str(port), *map(str, more)]
            one = stack.enter_context(process(words, folder / f"{role}-{port}.log"))
            until(
                lambda: bool(get(f"http://127.0.0.1:{port}/server_info")),
                30,
                f"the {role} stand-in does not answer",
                [one],
            )

        for port, at in zip(prefill, bootstrap, strict=True):
            worker("prefill", port, at)
        for port in decode:
            worker("decode", port)
        words = [str(python), "-m", "sglang_router.launch_router", "--pd-disaggregation", "--policy", "round_robin"]
        for port, at in zip(prefill, bootstrap, strict=True):
            words += ["--prefill", f"http://127.0.0.1:{port}", str(at)]
        words += ["--decode", f"http://127.0.0.1:{decode[0]}", "--host", "127.0.0.1", "--port", str(router)]
        words += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(page), "--log-level", "warn"]
        one = stack.enter_context(process(words, folder / "router.log", HF_HUB_OFFLINE="1"))
        until(
            lambda: sum(w["is_healthy"] for w in get(f"{url}/workers")["workers"]) == 3,
            60,
            "sglang-router is not up",
            [one],
        )
        control = folder / "sglang.toml"
        control.write_text(
            f'kind = "sglang"\nrouter = "{url}"\ndrain_s = 30\n'
            + "".join(
                f'[[worker]]\nurl = "http://127.0.0.1:{port}"\nrole = "prefill"\nbootstrap_port = {at}\n'
                for port, at in zip(prefill, bootstrap, strict=True)
            )
            + "".join(f'[[worker]]\nurl = "http://127.0.0.1:{port}"\nrole = "decode"\n' for port in decode)
        )
        targets = folder / "router.toml"  # its workers it lists itself; its metrics are at a port of their own
        targets.write_text(f'router_metrics = "http://127.0.0.1:{page}/metrics"\n')
        yield Rig(
            NAME,
            url,
            "sglang",
            str(control),
            Fleet(2, 1),
            Fleet(1, 2),
            reach=["--targets", str(targets)],
            told={"prefill": ("prompt_tokens_total",), "decode": ("output_tokens_total", "transfers_total")},
        )
