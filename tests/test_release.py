"""What is published: one version, wheel and sdist hold what they should, installing works, uninstalling leaves nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from traces import __version__

ROOT = Path(__file__).parent.parent
SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")


def test_one_version_everywhere() -> None:
    """pyproject, package and changelog say the same, and it is a semantic version; the changelog's newest stands on top."""
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert project is not None
    assert project[1] == __version__ == headings[0]
    assert all(SEMVER.fullmatch(version) for version in headings)
    assert headings == sorted(headings, key=lambda v: [int(n) for n in v.split("-")[0].split(".")], reverse=True)


def test_locks_pin_by_hash_and_name_no_host() -> None:
    """Every pinned package has a hash; where it comes from is the user's business."""
    for lock in ROOT.glob("requirements*.lock"):
        text = lock.read_text()
        assert "http://" not in text
        assert "index-url" not in text
        assert text.count("==") <= text.count("--hash=sha256:")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel built from that sdist), as ``make build`` makes them."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_packages_and_nothing_else(built: tuple[Path, Path]) -> None:
    """Every module of the three packages, every migration, every shipped trace and its licence; no test, no scratch."""
    names = set(zipfile.ZipFile(built[1]).namelist())
    about = f"steelyard-{__version__}.dist-info/"
    assert {name.split("/")[0] for name in names} == {"traces", "loadgen", "advisor", "steelyard.py", about.rstrip("/")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if tracked:  # in a clone; an sdist has no list
        wanted = {n for n in tracked if n.split("/")[0] in ("traces", "loadgen", "advisor")}
        wanted |= {
            "traces/_migrations/" + n.removeprefix("migrations/") for n in tracked if n.startswith("migrations/")
        }
        held = {n for n in names if not n.startswith(about)} - {"steelyard.py"}
        assert {n for n in held if not n.endswith(".so")} == wanted
    assert {about + "METADATA", about + "entry_points.txt", about + "licenses/LICENSE"} <= names
    assert any(name.startswith(about + "licenses/traces/data/LICENSES/") for name in names)
    assert built[1].stat().st_size < 3_000_000


def test_the_sdist_builds_tests_and_documents(built: tuple[Path, Path]) -> None:
    """Sources, tests, docs, Makefile and locks; nothing of an environment or a build."""
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "mkdocs.yml", "steelyard.py"} <= names
    assert {"requirements.lock", "requirements-dev.lock", "requirements-docs.lock", "requirements-pip.lock"} <= names
    assert {"tests/test_release.py", "docs/start.md", "migrations/versions/0001_first.py"} <= names
    assert not [n for n in names if re.search(r"(^|/)(\.venv|\.git|dist|build|__pycache__|.*\.db)(/|$)", n)]
    assert built[0].stat().st_size < 8_000_000


def test_the_metadata_is_valid(built: tuple[Path, Path]) -> None:
    """By the rules of the package index: names, versions, licence expression, markers, README as Markdown."""
    wheel = zipfile.ZipFile(built[1])
    about = Metadata.from_email(wheel.read(f"steelyard-{__version__}.dist-info/METADATA"), validate=True)
    assert (about.name, str(about.version), about.license_expression) == ("steelyard", __version__, "Apache-2.0")
    assert about.description_content_type == "text/markdown"
    assert (about.description or "").startswith("# Steelyard")
    assert about.requires_python is not None
    assert "3.11" in about.requires_python
    assert {"postgres", "parquet", "pandas", "tokenizer"} <= set(about.provides_extra or ())


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def test_installed_it_works_and_uninstalled_it_is_gone(built: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own (libraries are borrowed): the command, the module, a shipped trace, the migrations, doctor;
    after pip uninstall the environment holds what it held before."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    before = files(home)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(built[1])], check=True)
    work = tmp_path / "work"
    work.mkdir()
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    held = {k: v for k, v in os.environ.items() if not k.startswith(("STEELYARD_", "PYTHON"))} | state

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=work, env=held, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert f"version {__version__}" in run(str(python), "-m", "steelyard", "--version")
    where = run(str(python), "-c", "import traces, loadgen.swarm, advisor.advise; print(traces.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert json.loads(run(str(home / "bin" / "steelyard"), "ingest", "azure-2023-conv", "--json"))["rows_kept"] == 9754
    checks = json.loads(run("steelyard", "doctor", "--json"))["checks"]
    assert "revision" in next(c["found"] for c in checks if c["name"] == "database")
    assert sorted(p.name for p in work.iterdir()) == ["steelyard.db"]
    subprocess.run([*pip, "uninstall", "--yes", "steelyard"], check=True)
    assert files(home) == before
