"""Known vulnerabilities of what the lock files pin, by pip-audit: ``make audit``.

    python -m tests.advisories PIP_AUDIT [LOCK ..]

Exit code 0: every package was looked up and none has a known vulnerability. 1: some have, or were not looked up. 3: no service
answered, so nothing is known. A mirror of the package index may know no advisories at all, of which pip-audit says "No known
vulnerabilities found": each service is first asked about a release that is known to be vulnerable, and has to say so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-docs.lock", "requirements-pip.lock")
SERVICES = ("pypi", "osv")
VULNERABLE = "jinja2==2.4.1"
"""CVE-2014-0012, CVE-2016-10745, CVE-2019-10906 and others."""

Answer = list[dict[str, Any]]


def audit(ask: Callable[[str, Path], Answer], locks: Sequence[Path]) -> tuple[int, list[str]]:
    """(exit code, what to say). ask: service, requirements -> pip-audit's "dependencies", [] where it did not answer."""
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "vulnerable.txt"
        known.write_text(VULNERABLE + "\n", encoding="utf-8")
        service = next((s for s in SERVICES if any(d.get("vulns") for d in ask(s, known))), None)
    if service is None:
        return 3, [f"nothing is known: neither of {', '.join(SERVICES)} said that {VULNERABLE} is vulnerable"]
    failed, said = False, []
    for lock in locks:
        found = ask(service, lock)
        bad = [d for d in found if d.get("vulns")]
        unknown = [d["name"] for d in found if "vulns" not in d]
        failed |= bool(bad or unknown or not found)
        said.append(
            f"{lock.name}: {len(found) - len(unknown)} looked up at {service}, {len(bad)} with known vulnerabilities"
        )
        said += [f"  not looked up: {', '.join(unknown)}"] if unknown else []
        for package in bad:
            for one in package["vulns"]:
                mended = ", ".join(one.get("fix_versions", [])) or "nowhere yet"
                said.append(f"  {package['name']} {package['version']}: {one['id']}, mended in {mended}")
    return int(failed), said


def main(program: str, *locks: str) -> int:
    """Ask, print, and say by the exit code."""

    def ask(service: str, requirements: Path) -> Answer:
        command = [program, "-s", service, "-r", str(requirements), "--disable-pip", "--no-deps", "-f", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        try:
            found: Answer = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError):
            return []
        return found

    code, said = audit(ask, [ROOT / lock for lock in locks or LOCKS])
    print(*said, sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
