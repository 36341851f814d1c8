"""The README's tour runs as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tour() -> list[str]:
    block = re.search(r"<!-- tour:.*?-->\s*```\n(.*?)```", README, re.S)
    assert block is not None
    return block[1].strip().splitlines()


def test_the_two_commands_stand_at_the_top() -> None:
    """A newcomer sees ``make demo`` and ``make test`` first."""
    assert README.split("```")[1].split()[0:2] == ["make", "demo"]
    assert "make test" in README.split("```")[1]


@pytest.mark.paced
def test_the_tour_runs_as_printed(tmp_path: Path) -> None:
    """Every command of the tour succeeds in a fresh folder, in order; the last one has written the report."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("STEELYARD_DB", None)
    server: subprocess.Popen[bytes] | None = None
    try:
        for line in tour():
            words = shlex.split(line.removesuffix("&"))
            if line.endswith("&"):
                server = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
                port = words[words.index("--port") + 1]
                for _ in range(600):
                    try:
                        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                        break
                    except OSError:
                        time.sleep(0.1)
                else:
                    pytest.fail(f"nothing listens at {port}")
                continue
            done = subprocess.run(
                words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    finally:
        if server is not None:
            server.terminate()
            server.wait(10)
    assert "Run 2 prefill : 6 decode" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_documents_named_in_the_readme_exist() -> None:
    """No link of README or docs leads nowhere."""
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+?)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
