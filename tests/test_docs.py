"""The documentation is true: references are fresh, commands are known and run where they can, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from advisor.cli import VERBS, load, main, steelyard
from docs import generate, site
from loadgen.cluster.embedded import embedded
from traces.records import Fleet
from traces.store import open_store

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\s*)?^```(?P<kind>\w*)\n(?P<text>.*?)^```", re.M | re.S)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """(mark, kind, text) of each fenced block."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield (found["mark"] or "").strip(), found["kind"], found["text"]


def commands(text: str) -> list[str]:
    """Lines of a block that begin with steelyard, continuations joined."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [line.strip() for line in lines if re.match(r"\s*steelyard(\s|$)", line)]


def parsed(line: str) -> click.Context:
    """The command line as click understands it, nothing run; UsageError if it does not."""
    words = shlex.split(line, comments=True)
    for cut in ("|", ">", "&", ";", "||", "&&"):
        if cut in words:
            words = words[: words.index(cut)]
    words = [word.rstrip(";") for word in words]
    context = steelyard.make_context("steelyard", words[1:])
    rest, command = [*context._protected_args, *context.args], context.command
    while isinstance(command, click.Group) and rest:
        name, below, rest = command.resolve_command(context, rest)
        assert below is not None
        context = below.make_context(name, rest, parent=context)
        command, rest = below, [*context._protected_args, *context.args]
    return context


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_is_one_that_we_know(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Verbs, options and the kinds of their values; of verbs' own examples too (reference/cli.md)."""
    monkeypatch.chdir(tmp_path)
    indented = "\n".join(re.findall(r"^    (steelyard .*)$", page.read_text(encoding="utf-8"), re.M))
    for _, kind, text in (*blocks(page), ("", "", indented)):
        for line in commands(text) if kind in ("", "bash", "sh", "console") else ():
            if "..." in line or re.search(r"\b(verb|VERB)\b|\[", line):
                continue
            try:
                parsed(line)
            except click.ClickException as error:
                pytest.fail(f"{named(page)}: {line}\n{error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file(page: Path) -> None:
    """Inside the repository; and headings that are linked exist."""
    for link in re.findall(r"\]\(([^)#:\s]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{named(page)}: {link}"


@pytest.mark.parametrize("page", list(generate.PAGES))
def test_references_are_fresh(page: str) -> None:
    """What the generator writes today is what the page says."""
    held = (DOCS / "reference" / page).read_text(encoding="utf-8")
    if (
        page == "licences.md"
    ):  # what is installed here may be newer than what is pinned: names and versions are the lock's
        rows = re.findall(r"^\| ([a-z0-9._-]+) \| ([^ |]+) \|", held, re.M)
        pinned = generate.requirements() + generate.extras()
        assert [r for r in rows if r[0] not in ("package", "---")] == pinned, "run: make reference"
        return
    assert held == generate.PAGES[page]().rstrip("\n") + "\n", "run: make reference"


def test_no_dependency_has_a_licence_that_binds_users() -> None:
    """Of everything pinned, the extras too: known, and none of the GPL family (LGPL apart) or one that forbids a use."""
    page = (DOCS / "reference" / "licences.md").read_text(encoding="utf-8")
    held = dict(re.findall(r"^\| ([a-z0-9._-]+) \| [^|]+ \| ([^|]+) \|$", page, re.M))
    assert {"psycopg", "pymysql", "pyarrow", "pandas", "keyring", "kubernetes", "tokenizers"} <= held.keys()
    assert {name: text for name, text in held.items() if generate.DISALLOWED.search(text)} == {}
    assert [name for name, text in held.items() if text == "unknown"] == []
    for name, text in held.items():  # and the installed ones still say so
        now = generate.licence(name)
        assert now is None or not generate.DISALLOWED.search(now), (name, text, now)


def test_the_licence_rule_can_fail() -> None:
    """GPL and its kin are caught; MIT, BSD, LGPL are not."""
    for bad in ("GPL-3.0-or-later", "GNU AGPL v3", "GPLv2", "SSPL-1.0", "Proprietary"):
        assert generate.DISALLOWED.search(bad), bad
    for good in ("MIT", "BSD-3-Clause", "LGPL-3.0-only", "GNU Lesser General Public License v3 (LGPLv3)", "Apache-2.0"):
        assert not generate.DISALLOWED.search(good), good


def test_five_minutes_are_the_readmes_tour() -> None:
    """The page's commands, in order, are those of the README, which tests/test_readme.py runs."""
    tour = [line for mark, _, text in blocks(DOCS / "start.md") if mark == "tour" for line in text.strip().splitlines()]
    readme = next(text for mark, _, text in blocks(ROOT / "README.md") if mark.startswith("tour"))
    assert tour == readme.strip().splitlines()


def runnable() -> list[Path]:
    return [page for page in PAGES if any(mark.startswith("run") for mark, _, _ in blocks(page))]


@pytest.mark.paced
@pytest.mark.parametrize("page", runnable(), ids=named)
def test_marked_commands_run_as_printed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """In order, in an empty folder. Exit code 4, an untrusted run on a busy machine, is no fault of the page."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("STEELYARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    running: list[subprocess.Popen[bytes]] = []
    try:
        for mark, _, text in blocks(page):
            if mark.startswith("file:"):
                (tmp_path / mark.removeprefix("file:").strip()).write_text(text, encoding="utf-8")
            if not mark.startswith("run"):
                continue
            if "postgresql" in mark:
                monkeypatch.setenv("STEELYARD_DB", request.getfixturevalue("postgres_url"))
            for line in text.strip().splitlines():
                words = shlex.split(line.removesuffix("&"))
                if words[0] == "export":
                    monkeypatch.setenv(*words[1].split("=", 1))
                elif line.endswith("&"):
                    running.append(subprocess.Popen(words))
                    wait_for(words)
                elif "worker" in words[:2]:  # ends its process
                    assert subprocess.run(words, timeout=60, check=False).returncode == 0
                else:
                    assert main(words[1:]) in (0, 4), f"{line}\n{capfd.readouterr()}"
    finally:
        for child in reversed(running):
            child.terminate()
            child.wait(20)


def test_commands_for_a_cluster_run_against_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks marked with an engine, as printed but for the address, the amount and the CA: the reference endpoint in that
    engine's metric names answers every request. The trace is there because the page ingests it before its first replay."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("STEELYARD_")]:
        monkeypatch.delenv(name)
    printed = [(m, line) for m, _, t in blocks(DOCS / "howto" / "staging.md") for line in commands(t)]
    first = next(i for i, (_, line) in enumerate(printed) if line.startswith("steelyard replay"))
    for line in (line for m, line in printed[:first] if m == "run"):
        assert main(shlex.split(line)[1:]) == 0, line
    marked = [(m.partition(": ")[2], t) for p in PAGES for m, _, t in blocks(p) if m.startswith("stand-in: ")]
    assert {dialect for dialect, _ in marked} == {"vllm", "sglang", "dynamo"}
    for dialect in sorted({dialect for dialect, _ in marked}):
        with embedded("constant", Fleet(2, 6), dialect=dialect) as url:
            for line in (line for found, text in marked if found == dialect for line in text.strip().splitlines()):
                less = re.sub(r"https?://[\w.-]+staging(:\d+)?", url, line).replace(" --ca-file ca.pem", "")
                few = "--requests 6 --rate 20 --workers 1 --output-scale 0.1"
                words = shlex.split(re.sub(r"--requests \d+ --rate \d+", few, less))
                assert main(words[1:]) in (0, 4), f"{line}\n{capsys.readouterr()}"
    with open_store("sqlite:///steelyard.db", create=False) as store:
        assert [run.counts for run in store.runs()] == [{"ok": 6}] * 4


def wait_for(words: list[str]) -> None:
    """Until the port that the command names takes connections."""
    option = "--bind" if "--bind" in words else "--port"
    port = int(words[words.index(option) + 1].rpartition(":")[2])
    for _ in range(300):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"nothing listens at {port}")


def test_every_page_is_in_the_navigation_once() -> None:
    """Pages join by themselves; the order of sections is fixed."""
    nav = site.navigation(DOCS)
    listed = [path for section in nav for page in next(iter(section.values())) for path in page.values()]
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
    assert [next(iter(section)) for section in nav] == ["Start", "How to", "Explanation", "Reference"]


def test_every_verb_is_in_the_reference_and_in_the_readme() -> None:
    """A new verb is documented the day it comes."""
    reference, readme = (DOCS / "reference" / "cli.md").read_text(), (ROOT / "README.md").read_text()
    for verb in VERBS:
        assert f"\n## steelyard {verb}\n" in reference
        assert re.search(rf"`{verb}[ `]", readme), verb
        assert load(verb).help


def test_the_kubernetes_manifest_fits_itself_and_us() -> None:
    """Its commands parse, workers look for the master where its Service is, as many join as are waited for."""
    yaml = pytest.importorskip("yaml")
    held = {d["kind"]: d for d in yaml.safe_load_all((DOCS / "kubernetes" / "steelyard.yaml").read_text())}
    (master,) = held["Job"]["spec"]["template"]["spec"]["containers"]
    (worker,) = held["Deployment"]["spec"]["template"]["spec"]["containers"]
    asked = parsed(shlex.join(master["command"])).params
    joins = parsed(shlex.join(worker["command"])).params
    service, port = joins["master"].split(":")
    assert joins["wait"]
    assert service == held["Service"]["metadata"]["name"]
    assert int(port) == held["Service"]["spec"]["ports"][0]["port"] == int(asked["bind"].rpartition(":")[2])
    assert held["Service"]["spec"]["selector"] == held["Job"]["spec"]["template"]["metadata"]["labels"]
    assert asked["expect_workers"] == held["Deployment"]["spec"]["replicas"]
    (first,) = held["Job"]["spec"]["template"]["spec"]["initContainers"]
    assert parsed(shlex.join(first["command"])).params["name"] == asked["trace"]
    assert worker["image"] == master["image"] == first["image"]
    (rule,) = held["NetworkPolicy"]["spec"]["ingress"]
    assert held["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == held["Service"]["spec"]["selector"]
    assert rule["ports"] == held["Service"]["spec"]["ports"]
    labels = held["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert rule["from"] == [{"podSelector": {"matchLabels": labels}}]
    volumes = held["Job"]["spec"]["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"]["claimName"] == held["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_dashboard_is_json() -> None:
    """Grafana imports it as it is."""
    assert json.loads((DOCS / "grafana" / "steelyard.json").read_text())["title"]
