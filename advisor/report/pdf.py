"""A report as PDF: Chromium prints the page, so that there is one layout and no library for another."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from traces.errors import InputError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PATIENCE_S = 90


def browser() -> str | None:
    """The Chromium on this machine, or None."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def pdf(page: str) -> bytes:
    """The page printed. InputError when there is no Chromium, or it fails."""
    found = browser()
    if found is None:
        raise InputError(
            f"--format pdf prints with Chromium, and none is installed (looked for {', '.join(BROWSERS[:3])}). Install one "
            "(apt install chromium), or open the HTML report and print it."
        )
    with tempfile.TemporaryDirectory(prefix="steelyard-pdf-") as folder:
        source, target = Path(folder) / "report.html", Path(folder) / "report.pdf"
        source.write_text(page, encoding="utf-8")
        command = [found, "--headless", "--disable-gpu", "--no-first-run", "--no-pdf-header-footer"]
        command += [
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={folder}/profile",
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # as root Chromium refuses its sandbox; the page runs one script of ours
        command += [f"--print-to-pdf={target}", source.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        except subprocess.TimeoutExpired:
            raise InputError(
                f"Chromium ({found}) did not print within {PATIENCE_S} s. Print the HTML report instead."
            ) from None
        if not target.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"Chromium ({found}) could not print: {last[:200]}. Print the HTML report instead.")
        return target.read_bytes()
