"""Fit the realistic profiles to published measurements, and say how well they fit.

    python -m benchmarks.fit_profiles [--write]

Sources (benchmarks/data, with their licences in benchmarks/data/README.md):
- llama-2-70b-splitwise.csv: prefill and token times of single batches on 8 A100 and 8 H100 (SplitwiseSim, ISCA 2024).
- llama-3.1-h100.csv: TTFT and TPOT of colocated servers at fixed concurrency (aiconfigurator's sample of real runs).

The second kind holds no stage times. In a closed loop with B users, each step makes B tokens and takes in B/osl prompts,
so TPOT = c0 + c1 B + c2 B (isl + osl/2) + (B/osl) (b isl): linear in the laws, and fitted as such.
All fits: non-negative least squares on relative errors. What was not measured (transfer, flip, KV capacity) is computed
from link speed and memory size and said to be so in the profile's source.
"""

from __future__ import annotations

import argparse
import csv
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from loadgen.cluster import Profile

DATA = Path(__file__).parent / "data"
PROFILES = Path(__file__).parent.parent / "loadgen" / "cluster" / "profiles"

LINK_BYTES_PER_S = 50e9  # one 400 Gb/s card a GPU pair, as H100 nodes have
A100_LINK_BYTES_PER_S = 25e9


def fit(columns: list[np.ndarray], y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients >= 0 of least squares on relative errors, and the relative error of every row."""
    x = np.stack(columns, axis=1)
    scale = 1.0 / np.linalg.norm(x / y[:, None], axis=0).clip(1e-300)
    coefficients, _ = nnls(x / y[:, None] * scale, np.ones(len(y)), maxiter=10_000)
    coefficients = coefficients * scale
    return coefficients, x @ coefficients / y - 1


def words(errors: np.ndarray) -> str:
    """Median and largest absolute relative error."""
    return f"median {np.median(np.abs(errors)):.1%}, worst {np.abs(errors).max():.1%} of {len(errors)} rows"


def rows(name: str, **where: str) -> dict[str, np.ndarray]:
    """Columns of a file, the rows that match."""
    with (DATA / name).open() as file:
        held = [r for r in csv.DictReader(file) if all(r[k] == v for k, v in where.items())]
    numbers: dict[str, Any] = {}
    for key in held[0]:
        try:
            numbers[key] = np.array([float(r[key]) for r in held])
        except ValueError:
            continue
    return numbers


def splitwise(hardware: str, link: float) -> Profile:
    """Llama-2-70B, tensor parallel over 8 GPUs: single batches."""
    d = rows("llama-2-70b-splitwise.csv", hardware=hardware)
    n, batch, prefill, token = d["prompt_tokens"], d["batch"], d["prefill_ms"] / 1e3, d["token_ms"] / 1e3
    served = n * batch <= 8192  # larger steps are never made: the profile's budget is 8192 tokens
    (a, b, c), prefill_off = fit([c[served] for c in (np.ones_like(n), n * batch, batch * n * n)], prefill[served])
    best = None
    for knee in (8.0, 16.0, 32.0):
        decode = fit([np.ones_like(n), batch, batch * (n + 64), np.maximum(0, batch - knee)], token)
        if best is None or np.abs(decode[1]).mean() < np.abs(best[1][1]).mean():
            best = (knee, decode)
    assert best is not None
    knee, ((c0, c1, c2, extra), decode_off) = best
    kv = 2 * 80 * 8 * 128 * 2  # bytes a token: 80 layers, 8 KV heads of 128, 16 bit
    return Profile(
        name=f"llama2-70b-{hardware}",
        description=f"Llama-2-70B on 8 {hardware.upper()}-80GB (tensor parallel), one worker",
        a_s=a, b_s_per_token=b, c_s_per_token2=c, max_batch_tokens=8192, max_batch_requests=32,
        transfer_s_per_token=kv / link, transfer_t0_s=0.005, transfer_link="sender",
        c0_s=c0, c1_s=c1, c2_s=c2, knee_batch=int(knee), knee_s=extra, max_batch=64,
        kv_tokens=int((8 * 80e9 * 0.9 - 140e9) / kv), kv_policy="preempt", flip_s=1.0,
        source=f"fitted to SplitwiseSim's data/perf_model.csv (MIT, medians of 5): prefill {words(prefill_off)}; "
        f"decode step {words(decode_off)}. Not measured: transfer (KV bytes over {link / 1e9:g} GB/s and 5 ms), "
        "KV capacity (memory arithmetic), flip 1 s, overhead 0.",
    )  # fmt: skip


def colocated(model: str, name: str, about: str, kv: int, memory: float, gpus: int) -> Profile:
    """Llama-3.1 on H100: TPOT of colocated servers at fixed concurrency."""
    d = rows("llama-3.1-h100.csv", model=model)
    isl, osl, batch, tpot = d["isl"], d["osl"], d["concurrency"], d["tpot_ms"] / 1e3
    (c0, c1, c2, b), off = fit([np.ones_like(isl), batch, batch * (isl + osl / 2), batch / osl * isl], tpot)
    return Profile(
        name=name,
        description=about,
        a_s=c0, b_s_per_token=b, max_batch_tokens=8192, max_batch_requests=64, chunked=True,
        transfer_s_per_token=kv / LINK_BYTES_PER_S / gpus, transfer_t0_s=0.005, transfer_link="sender",
        c0_s=c0, c1_s=c1, c2_s=c2, max_batch=256,
        kv_tokens=int(memory / kv), kv_policy="preempt", flip_s=1.0,
        source=f"fitted to TPOT of colocated servers in aiconfigurator-core 0.12.0's sample of real runs (Apache-2.0): "
        f"{words(off)}. Not measured: the fixed cost of a prefill step (taken as that of a decode step: both read "
        "the weights), transfer (KV bytes over 50 GB/s a GPU and 5 ms), KV capacity (memory arithmetic), flip 1 s.",
    )  # fmt: skip


def main() -> None:
    """Print the fits; with --write put them beside the other profiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    print(f"Python {platform.python_version()}, numpy {np.__version__}")
    found = [
        colocated(
            "meta-llama/Llama-3.1-8B-Instruct", "llama-8b-h100", "Llama-3.1-8B on one H100 SXM (TensorRT-LLM)",
            2 * 32 * 8 * 128 * 2, 80e9 * 0.9 - 16e9, 1,
        ),
        colocated(
            "meta-llama/Llama-3.1-70B", "llama-70b-h100", "Llama-3.1-70B FP8 on 4 H100 SXM (vLLM, tensor parallel)",
            2 * 80 * 8 * 128 * 2, 4 * 80e9 * 0.9 - 70e9, 4,
        ),
        splitwise("a100", A100_LINK_BYTES_PER_S),
        splitwise("h100", LINK_BYTES_PER_S),
    ]  # fmt: skip
    for p in found:
        rounded = replace(p, **{k: float(f"{getattr(p, k):.4g}") for k in (
            "a_s", "b_s_per_token", "c_s_per_token2", "transfer_s_per_token", "c0_s", "c1_s", "c2_s", "knee_s")})  # fmt: skip
        print(f"{p.name}: {p.description}\n  {p.source}")
        print(f"  prefill {rounded.a_s:g} + {rounded.b_s_per_token:g} n + {rounded.c_s_per_token2:g} n context s")
        print(
            f"  decode {rounded.c0_s:g} + {rounded.c1_s:g} B + {rounded.c2_s:g} context + {rounded.knee_s:g} over {p.knee_batch}"
        )
        if write:
            head = "# Made by benchmarks/fit_profiles.py from published measurements; do not edit by hand.\n"
            (PROFILES / f"{p.name}.toml").write_text(head + rounded.to_toml())


if __name__ == "__main__":
    main()
