"""The command as people meet it: where they stand, what is wrong with their machine, names completed, options from elsewhere."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import sqlalchemy as sa
from click.shell_completion import ShellComplete
from rich.console import Console

from advisor.cli import VERBS, load, main, steelyard
from advisor.cli.config import settable, tree, variables
from advisor.cli.progress import Bars, Lines, Steps
from loadgen import policy
from loadgen.cluster import Profile
from loadgen.cluster.embedded import embedded
from traces.ingest import ingest
from traces.records import Fleet, Observations, Run
from traces.shipped import shipped
from traces.store import open_store


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, no settings in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("STEELYARD_")]:
        monkeypatch.delenv(name)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """stdout of a command that must end with the code."""
    got = main(list(arguments))
    out, err = capsys.readouterr()
    assert got == code, out + err
    return out if code == 0 else err


def status(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(said(capsys, "--json", *arguments))


def a_run(**changes: Any) -> Run:
    held: dict[str, Any] = {
        "name": "night", "trace": "conv", "schedule_digest": "d", "scheduled": 2, "endpoint": "http://x", "engine": "openai",
        "model": "m", "fleet": Fleet(1, 3), "started_unix_s": 1.0, "workers": 1, "group": "g1",
    }  # fmt: skip
    return Run(**held | changes)


# --- where the user stands ------------------------------------------------------------------------------------------


def test_without_a_verb_each_state_names_its_next_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing, a trace, a run, advice, a newer run: each time the command that comes next, and one that parses."""
    found = status(capsys)
    assert found["next"]["command"] == "steelyard demo"
    assert "no such database" in found["problem"]
    said(capsys, "ingest", "azure-2023-conv")
    found = status(capsys)
    assert found["next"]["command"].startswith("steelyard replay azure-2023-conv ")
    assert found["traces"] == [{"name": "azure-2023-conv", "requests": 9754}]
    with open_store("sqlite:///steelyard.db") as store:
        broken = store.begin_run(a_run())
        assert status(capsys)["runs"] == {"count": 1, "latest": None, "unfinished": [broken.id]}
        store.end_run(Run(**{f: getattr(broken, f) for f in broken.__dataclass_fields__} | {"verdict": "invalid"}))
        untrusted = "no run can be trusted so far (run {}: {})"
        assert status(capsys)["next"]["why"] == untrusted.format(1, "its verdict is invalid ()")
        whole: dict[str, Any] = {"complete": True, "verdict": "valid", "counts": {"ok": 20}}
        gone = {"counts": {"ok": 85, "failed": 15, "failed.status": 12, "failed.reset": 3}}
        many = "15% of its requests failed (12 status, 3 reset), more than 10%: see steelyard runs show 3"
        few = "2 finished requests, fewer than 20"
        for k, (change, why) in enumerate([({"counts": {"ok": 2}}, few), (gone, many), ({"warmup_s": 2.0}, few)]):
            run = store.begin_run(a_run(**whole | change))  # advise would leave each out
            if "warmup_s" in change:
                rows = Observations.empty(25)
                rows.index[:], rows.due_s[:] = range(25), [1.0] * 20 + [3.0] * 5
                rows.status[:] = ["ok"] * 22 + ["lost"] * 3  # none failed
                store.add_observations(run.id, rows)
            store.end_run(run)
            found = status(capsys)["next"]
            assert found["why"] == untrusted.format(k + 2, why)
            assert found["command"].startswith("steelyard replay azure-2023-conv ")
        other = store.end_run(store.begin_run(a_run(**whole, model="other")))
        assert status(capsys)["next"]["command"] == "steelyard advise"
        store.end_run(store.begin_run(a_run(**whole | {"counts": {"ok": 2}})))
        assert status(capsys)["next"]["why"] == untrusted.format(6, few)  # advise asks the latest system alone
        store.delete_run(other.id)
        good = store.end_run(store.begin_run(a_run(**whole)))
        assert status(capsys)["next"] == {"command": "steelyard advise", "why": "no recommendation yet"}
        probe = {"command": "steelyard replay conv --endpoint URL --fleet 2:2", "why": "nearest rival"}
        store.add_recommendation("static", {"sentence": "Run 1:3.", "next_probe": probe}, [good.id], "h", 0)
        assert status(capsys)["next"] == probe
        for change in ({"policy": "online"}, {"policy": "offline-groups"}, {"changes": ("prefixes shared",)}):
            store.end_run(store.begin_run(a_run(**whole, **change)))  # nor does it learn from these
        assert status(capsys)["next"] == probe
        store.end_run(store.begin_run(a_run(**whole)))
    found = status(capsys)
    assert found["next"] == {"command": "steelyard advise", "why": "run 11 is newer than the recommendation"}
    assert found["recommendation"]["sentence"] == "Run 1:3."
    text = said(capsys)
    for part in ("azure-2023-conv (9754 requests)", "Run 1:3.", "the latest, 11", "Next:     steelyard advise"):
        assert part in text
    with open_store("sqlite:///steelyard.db") as store:  # asked again, for a reason that the rows of run 11 tell
        warned = {
            "sentence": "Run 1:3.",
            "next_probe": probe,
            "warnings": ["run 11 left out: 40% of its requests failed"],
        }
        store.add_recommendation("static", warned, [good.id], "h", 0)
    assert status(capsys)["next"] == probe
    assert " --db sqlite:///steelyard.db" in status(capsys, "--db", "sqlite:///steelyard.db")["next"]["command"]


def test_a_url_that_holds_a_user_is_in_no_next_command(
    here: Path, postgres_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its user it would open nothing; one that holds none is told as a shell takes it."""
    open_store(postgres_url).close()
    assert status(capsys, "--db", postgres_url)["next"]["command"] == "steelyard ingest FILE --db URL"
    engine = sa.create_engine(postgres_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    engine.dispose()
    found = status(capsys, "--db", postgres_url)
    assert found["problem"].endswith("Run: steelyard migrate --db URL")
    assert found["next"]["command"] == "steelyard migrate --db URL"
    monkeypatch.setenv("STEELYARD_DB", postgres_url)
    found = status(capsys)
    assert found["problem"].endswith("Run: steelyard migrate")
    assert found["next"]["command"] == "steelyard migrate"
    old = f"sqlite:///{here / 'old one.db'}"
    said(capsys, "ingest", "azure-2023-conv", "--db", old)
    with sqlite3.connect(here / "old one.db") as other:
        other.execute("UPDATE alembic_version SET version_num = '0001'")
    assert status(capsys, "--db", old)["problem"].endswith(f"Run: steelyard migrate --db '{old}'")


def test_the_module_of_the_distributions_name_is_the_command(here: Path) -> None:
    """``python -m steelyard`` is ``steelyard``."""
    done = subprocess.run([sys.executable, "-m", "steelyard", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["next"]["command"] == "steelyard demo"


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_looks_at_everything_and_says_what_to_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part is named with what was found; a real endpoint is asked; one that is away is a problem and exit 1."""
    with embedded("constant", Fleet(2, 1)) as url:
        held = json.loads(said(capsys, "doctor", "--endpoint", url, "--json"))
    checks = {c["name"]: c for c in held["checks"]}
    assert {"Python", "libraries", "configuration", "database", "open files", "ports", "cores", "clock"} <= set(checks)
    assert "constant" in checks["endpoint"]["found"]
    assert checks["metrics"]["found"].startswith("3 workers: decode, prefill")
    assert checks["fleet"]["found"].startswith("2:1")
    assert held["ok"]
    err_code = main(["doctor", "--endpoint", url, "--json"])
    held = json.loads(capsys.readouterr().out)
    assert (err_code, held["problems"]) == (1, 1)
    assert "connection refused. Start the server" in held["checks"][-1]["found"]


def test_doctor_names_an_old_database_and_its_cure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A revision that is too old is a problem, and the cure stands beside it."""
    said(capsys, "ingest", "azure-2023-conv")
    with sqlite3.connect("steelyard.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "steelyard migrate" in out
    assert "1 problems" in out
    assert status(capsys)["next"]["command"] == "steelyard migrate"


# --- names ----------------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What the shell would offer for the last word."""
    complete = ShellComplete(steelyard, {}, "steelyard", "_STEELYARD_COMPLETE")
    return [item.value for item in complete.get_completions(list(words[:-1]), words[-1])]


def test_the_shell_completes_verbs_options_traces_runs_and_groups(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the database at hand or that of --db; a database that is not there completes nothing and says nothing."""
    assert completed("re") == ["replay", "report"]
    assert "--fleet" in completed("replay", "t", "--fl")
    assert completed("replay", "") == []
    said(capsys, "ingest", "azure-2023-conv", "--db", "sqlite:///other.db")
    with open_store("sqlite:///other.db") as store:
        store.begin_run(a_run())
    assert completed("--db", "sqlite:///other.db", "replay", "az") == ["azure-2023-conv"]
    assert completed("traces", "show", "--db", "sqlite:///other.db", "") == ["azure-2023-conv"]
    assert completed("runs", "--db", "sqlite:///other.db", "show", "") == ["1"]
    assert completed("advise", "--db", "sqlite:///other.db", "--group", "g") == ["g1"]
    assert capsys.readouterr() == ("", "")
    for shell in ("bash", "zsh", "fish"):
        assert "_STEELYARD_COMPLETE" in said(capsys, "completion", shell)


def test_bash_itself_completes(here: Path) -> None:
    """The printed script, sourced by a real bash, offers the verbs that begin alike."""
    script = (
        'eval "$(steelyard completion bash)"; COMP_WORDS=(steelyard re); COMP_CWORD=1; _steelyard_completion steelyard;'
        ' echo "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    )
    assert done.stdout.split() == ["replay", "report"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["replya", "x"], "Did you mean 'replay'?"),
        (["traces", "show", "azure-2023-cov"], "Did you mean 'azure-2023-conv'?"),
        (["traces", "shw", "x"], "Did you mean 'show'?"),
        (["runs", "show", "nigth"], "Did you mean 'night'?"),
        (["runs", "show", "9"], "Stored: 1 to 1."),
        (["runs", "--grup", "x"], "--group"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_name_nearly_right_gets_its_neighbour(
    arguments: list[str], hint: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verbs, verbs of verbs, options, traces, runs."""
    said(capsys, "ingest", "azure-2023-conv")
    with open_store("sqlite:///steelyard.db") as store:
        store.begin_run(a_run())
    assert main(arguments) in (1, 2)
    assert hint in capsys.readouterr().err


def test_a_run_is_named_by_number_name_or_latest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that two runs have is refused with their numbers."""
    with open_store("sqlite:///steelyard.db") as store:
        for name in ("night", "day", "day"):
            store.end_run(store.begin_run(a_run(name=name)))
    for word, run in (("night", 1), ("2", 2), ("latest", 3)):
        assert json.loads(said(capsys, "runs", "show", word, "--json"))["run"] == run
    assert "the name of runs 2, 3" in said(capsys, "runs", "show", "day", code=2)


# --- options from elsewhere -----------------------------------------------------------------------------------------


def test_the_command_line_beats_the_environment_beats_the_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one option: the verb's table over the file's top, the environment over both, the command line over all."""
    said(capsys, "ingest", "azure-2023-conv")

    def rate(*arguments: str) -> float:
        held = json.loads(said(capsys, "simulate", "azure-2023-conv", "--requests", "50", "--json", *arguments))
        return round(float(held["rate_per_s"]), 6)

    config = here / "steelyard.toml"
    config.write_text('fleet = "2:2"\nrate = 2\n')
    assert rate() == 2
    config.write_text('fleet = "2:2"\nrate = 2\n[simulate]\nrate = 3\n[traces.show]\njson = true\n')
    assert rate() == 3
    monkeypatch.setenv("STEELYARD_RATE", "4")
    assert rate() == 4
    monkeypatch.setenv("STEELYARD_SIMULATE_RATE", "5")
    assert rate() == 5
    assert rate("--rate", "6") == 6
    assert json.loads(said(capsys, "traces", "show", "azure-2023-conv"))["name"] == "azure-2023-conv"
    other = here / "other.toml"
    other.write_text("[simulate]\nspeed = 1\n")
    assert "other.toml: [simulate] speed is no option of [simulate]." in said(
        capsys, "--config", "other.toml", "simulate", "azure-2023-conv", code=1
    )


def test_what_stands_before_the_verb_was_typed_too(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--db`` before a verb, or before the verb of a verb, beats environment and file: what is pruned is what was named."""
    for name in "abcd":
        with open_store(f"sqlite:///{name}.db") as store:
            store.end_run(store.begin_run(a_run(name=name)))
    monkeypatch.setenv("STEELYARD_DB", "sqlite:///a.db")
    (here / "steelyard.toml").write_text('db = "sqlite:///b.db"\n[demo]\nworkers = 1\n')

    def name(*arguments: str) -> str:
        return str(json.loads(said(capsys, *arguments, "--json"))["name"])

    typed = ("--db", "sqlite:///c.db")
    assert [run["name"] for run in json.loads(said(capsys, *typed, "runs", "--json"))["runs"]] == ["c"]
    assert name(*typed, "runs", "show", "1") == "c"
    assert name("runs", *typed, "show", "1") == "c"
    assert name("runs", "show", "1", *typed) == "c"
    assert name(*typed, "runs", "show", "1", "--db", "sqlite:///d.db") == "d"
    assert name(*typed, "runs", "--db", "sqlite:///d.db", "show", "latest") == "d"
    assert name("runs", "show", "1") == "a"
    monkeypatch.delenv("STEELYARD_DB")
    assert name("runs", "show", "1") == "b"
    assert name(*typed, "runs", "show", "latest") == "c"
    with steelyard.make_context("steelyard", ["--db", "sqlite:///c.db", "demo"]) as above:
        demo = steelyard.get_command(above, "demo")
        assert demo is not None
        assert demo.make_context("demo", [], parent=above).params["db"] == "sqlite:///c.db"


@pytest.mark.parametrize("group", ["control", "runs", "traces"])
def test_a_verb_below_a_group_takes_what_stands_before_it_and_what_the_file_says(group: str, here: Path) -> None:
    (here / "steelyard.toml").write_text('db = "sqlite:///b.db"\n')
    for typed, db in (([], "b"), (["--db", "sqlite:///c.db", "--json"], "c")):
        for above, before in (([], typed), (typed, [])):
            with (
                steelyard.make_context("steelyard", [*before, group]) as top,
                load(group).make_context(group, [*above, "?"], parent=top) as middle,
            ):
                assert isinstance(middle.command, click.Group)
                for verb in middle.command.commands.values():
                    known = {option.name for option in verb.params}
                    found = verb.make_context(verb.name, [], parent=middle, resilient_parsing=True).params
                    assert "db" not in known or found["db"] == f"sqlite:///{db}.db"
                    assert "as_json" not in known or found["as_json"] is bool(typed)


SENT = "azure-2023-conv --endpoint http://127.0.0.1:9 --workers 1"


@pytest.mark.parametrize(
    ("variable", "value", "arguments", "code", "words"),
    [
        ("ENDPOINT", "http://127.0.0.1:9", "advise", 5, "no ended run"),
        ("RATE", "3", "advise --concurrency 8", 5, "no ended run"),
        ("SLO", "ttft<1s", "report --recommendation latest", 1, "no recommendation 'latest'"),
        ("GROUP", "none", "compare 1 2", 1, "no run has id 1"),
        ("RATE", "3", "sweep t --fleets 1:1 --rates 4,8", 1, "no trace is named"),
        ("RATES", "4,8", "sweep t --fleets 1:1 --rate 3", 1, "no trace is named"),
        ("RATE", "3", "replay t --endpoint http://127.0.0.1:9 --rate-factor 2", 1, "no trace is named"),
        ("FLEETS", "1:1", "sweep t --all", 1, "no trace is named"),
        ("RECOMMENDATION", "3", "replay azure-2023-conv --endpoint http://127.0.0.1:9 --workers 1", 1, "refused"),
        ("IN_FLIGHT", "8", "replay azure-2023-conv --endpoint http://127.0.0.1:9 --workers 1", 1, "refused"),
        ("RECOMMENDATION", "latest", "report --gpus 8", 5, "no ended run"),
        ("GROUP", "none", "advise --auto --trace t --endpoint http://127.0.0.1:9", 1, "refused"),
        ("POLICY", "online", f"replay {SENT} --order arrival", 1, "refused"),
        ("POLICY", "online", f"replay {SENT} --change 1=1:1", 1, "refused"),
        ("ORDER", "arrival", f"replay {SENT} --policy online-report", 1, "refused"),
        ("ORDER", "arrival", f"replay {SENT} --change 1=1:1", 1, "refused"),
        ("CHANGE", "1=1:1", f"replay {SENT} --order arrival", 1, "refused"),
        ("HISTORY", "azure-2023-conv", f"replay {SENT} --order arrival", 1, "refused"),
        ("CONCURRENCY", "8", "advise --rate 3", 5, "no ended run"),
        ("CONCURRENCY", "8", "advise --auto --trace t --endpoint http://127.0.0.1:9", 1, "refused"),
        ("AUTO", "1", "advise --run 1", 1, "no ended run has id 1"),
    ],
)
def test_what_nobody_typed_refuses_nothing(
    variable: str,
    value: str,
    arguments: str,
    code: int,
    words: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An option from the environment gives way to one that was typed and that excludes it."""
    with open_store("sqlite:///steelyard.db") as store:
        if "azure" in arguments:
            ingest(store, [shipped("azure-2023-conv")], name="azure-2023-conv")
    monkeypatch.setenv(f"STEELYARD_{variable}", value)
    assert words in said(capsys, *arguments.split(), code=code)


def test_json_may_be_asked_for_anywhere(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the verb, in the environment or in the file: results are JSON then, and so are errors."""
    with open_store("sqlite:///steelyard.db") as store:
        store.end_run(store.begin_run(a_run()))

    def error(*arguments: str) -> str:
        assert main(list(arguments)) == 1
        return str(json.loads(capsys.readouterr().out)["error"])

    assert json.loads(said(capsys, "--json", "runs"))["runs"][0]["run"] == 1
    assert json.loads(said(capsys, "--json", "runs", "show", "1"))["run"] == 1
    assert json.loads(said(capsys, "runs", "--json", "show", "1"))["run"] == 1
    assert "no run has id 7" in error("--json", "runs", "show", "7")
    monkeypatch.setenv("STEELYARD_JSON", "1")
    assert "no run has id 7" in error("runs", "show", "7")
    monkeypatch.delenv("STEELYARD_JSON")
    (here / "steelyard.toml").write_text("[runs]\njson = true\n[traces.show]\njson = true\n")
    assert "no trace is named" in error("traces", "show", "nope")
    assert main(["runs", "show", "7"]) == 1
    assert capsys.readouterr().out == ""


def test_without_a_verb_and_at_a_tab_the_file_of_options_is_read(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database that it names is the one looked at; what is wrong with it is said, but not at every TAB."""
    said(capsys, "ingest", "azure-2023-conv", "--db", "sqlite:///other.db")
    (here / "steelyard.toml").write_text('db = "sqlite:///other.db"\n')
    assert status(capsys)["next"]["command"].startswith("steelyard replay azure-2023-conv ")
    assert completed("replay", "az") == ["azure-2023-conv"]
    assert completed("traces", "show", "az") == ["azure-2023-conv"]
    assert status(capsys, "--db", "sqlite:///none.db")["next"]["command"] == "steelyard demo"
    monkeypatch.setenv("STEELYARD_DB", "sqlite:///none.db")
    assert status(capsys)["next"]["command"] == "steelyard demo"
    monkeypatch.delenv("STEELYARD_DB")
    (here / "mine.toml").write_text('[traces]\ndb = "sqlite:///other.db"\n')
    (here / "steelyard.toml").unlink()
    assert completed("--config", "mine.toml", "traces", "show", "az") == ["azure-2023-conv"]
    assert "nowhere.toml: cannot be read" in said(capsys, "--config", "nowhere.toml", code=1)
    (here / "steelyard.toml").write_text("db = \n")
    assert "is not TOML" in said(capsys, code=1)
    assert completed("replay", "--fl") == ["--fleet"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[replay]\nrat = 3\n", "[replay] rat is no option of [replay]. Did you mean rate?"),
        ("[replai]\nrate = 3\n", "no verb is called 'replai'. Did you mean [replay]?"),
        ("sloo = 3\n", "sloo is no option of any verb. Did you mean slo?"),
        ("replay = 3\n", "replay is a verb: write its options under [replay]"),
        ("rate = [1, 2]\n", "rate must be one value"),
        ('rate = "fast"\n', "rate: 'fast' is not a valid float"),
        ("[replay]\nworkers = inf\n", "[replay] workers: 'inf' is not a valid integer range."),
        ("[replay]\nworkers = 2.7\n", "[replay] workers: '2.7' is not a valid integer range."),
        ("workers = true\n", "workers: 'True' is not a valid integer range."),
        (f"rate = 0x{'f' * 5000}\n", "rate holds a number that is too long."),
        ("rate = nan\n", "rate: 'nan' is not a finite number."),
        ("rate = 2024-01-01\n", "rate: '2024-01-01' is not a valid float range."),
        ('[replay]\ntokenizer = "a\\u0000"\n', "[replay] tokenizer: 'a\\x00' is no "),
        ('json = "yes"\n', "json must be true or false"),
        ("[replay]\nheader = ['X-Key: 1']\n", "header may hold a secret"),
        ('api_key = "sk-1"\n', "api_key may hold a secret"),
        ('db = "postgresql://me:hidden@h/d"\n', "db holds a password"),
        ('db = ["postgresql://me:hidden@h/d"]\n', "db holds a password"),
        ('db = "postgresql://me:p/hidden@h/d"\n', "db holds a password"),
        ('db = "postgresql://h/d?user=me&password=hidden"\n', "db holds a password"),
        ('[replay]\nendpoint = ["https://me:hidden@h"]\n', "endpoint holds a password"),
        ('[replay]\nendpoint = [{ a = "https://me:hidden@h" }]\n', "endpoint holds a password"),
        ('[replay]\nendpoint = [{ a = "hidden" }]\n', "endpoint must be one value (got a list)"),
        ("rate = \n", "is not TOML"),
    ],
    ids=lambda v: v.splitlines()[-1][:30] if v.endswith("\n") else "",
)
def test_a_wrong_file_of_options_is_one_clear_line(
    text: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the verb, before anything is done; what was secret is not repeated."""
    (here / "steelyard.toml").write_text(text)
    err = said(capsys, "runs", code=1)
    assert words in err
    assert err.count("\n") == 1
    assert "hidden" not in err
    assert "sk-1" not in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"start": {}}, "start of the thresholds: fleet must be like"),
        ({"start": {"prefill": math.inf, "decode": 1}}, "start of the thresholds: fleet must be like"),
        ({"start": {"prefill": 2.9, "decode": 1}}, "start of the thresholds: fleet must be like"),
        ({"tick_s": "soon"}, "tick_s of the thresholds must be seconds above 0"),
        ({"tick_s": 0}, "tick_s of the thresholds must be seconds above 0"),
        ({"tick_s": math.nan}, "tick_s of the thresholds must be seconds above 0"),
    ],
    ids=["start", "start inf", "start 2.9", "tick", "tick 0", "tick nan"],
)
def test_thresholds_that_were_edited_by_hand_are_read_with_care(
    more: dict[str, Any], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands beside the rule as well: the fleet to begin with, the seconds between decisions."""
    said(capsys, "synth", "--name", "t", "--preset", "origin", "--requests", "20", "--rate", "2")
    table = policy.table_of(policy.DemandRule(Profile.load("demo"), 100, 100)) | more
    (here / "how.json").write_text(json.dumps(table))
    how = ("--policy", "online", "--thresholds", "how.json", "--dry-run")
    err = said(capsys, "replay", "t", "--endpoint", "http://127.0.0.1:9", *how, code=1)
    assert f"how.json: {words}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_are_finite(number: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN lies beyond no bound; without end nothing is asked, waited or scaled."""
    for words in (
        ("synth", "t", "--rate", number),
        ("control", "run", "x", "--tick", number),
        ("replay", "t", "--warmup", number),
    ):
        err = said(capsys, *words, code=2)
        assert f"'{number}' is not" in err or f"{number} is not in the range" in err


def test_what_the_folders_file_decides_is_said(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom a verb talks to, by a file that nobody named: one line on stderr, none for what was typed, named or is in the
    environment; a file that asks for quiet does not hush it."""
    open_store("sqlite:///other.db").close()
    text = 'db = "sqlite:///other.db"\nquiet = true\n[doctor]\nendpoint = "http://127.0.0.1:9"\nproxy = "http://127.0.0.1:9"\n'
    (here / "steelyard.toml").write_text(text)

    def noted(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        told = capsys.readouterr()
        if "--json" in arguments:
            json.loads(told.out)
        return "\n".join(line for line in told.err.splitlines() if "this folder" in line)

    line = "steelyard: steelyard.toml of this folder sets db"
    assert [noted("runs"), noted("traces", "--json"), noted(), noted("--json")] == [line] * 4
    assert noted("runs", "--db", "sqlite:///other.db") == noted("--db", "sqlite:///other.db", "runs") == ""
    assert noted("runs", "--quiet") == noted("--config", "steelyard.toml", "runs") == ""
    assert main(["doctor", "--json"]) == 1
    assert f"{line.removesuffix('db')}endpoint, proxy, db\n" in capsys.readouterr().err
    monkeypatch.setenv("STEELYARD_DB", "sqlite:///other.db")
    assert noted("runs") == noted() == ""


def test_every_option_has_its_variable_and_no_two_share_one() -> None:
    """The more particular variable of each option is its own; none is that of an endpoint's token."""
    seen: dict[str, str] = {}
    for verb in VERBS:
        for path, command, parent in tree(verb, load(verb)):
            for option in settable(command, parent):
                name = variables(path, option)[0]
                assert seen.setdefault(name, " ".join(path)) == " ".join(path)
                assert re.fullmatch(r"STEELYARD_[A-Z0-9_]+", name)
                assert not {"STEELYARD_API_KEY", "STEELYARD_SERVE_TOKEN"} & set(variables(path, option))


# --- progress -------------------------------------------------------------------------------------------------------


def test_lines_say_what_is_done_how_long_it_takes_and_what_was_found() -> None:
    """One a task every so often, one at its end if it was shown; short work says nothing."""
    lines: list[str] = []
    with Lines(lines.append, every_s=0.5) as shown:
        short = shown.add_task("short", total=2)
        shown.update(short, completed=2)
        task = shown.add_task("replay t", total=40, note=lambda: "TTFT p50 3 ms", left=lambda: 75.0)
        shown.update(task, completed=10)
        until = time.monotonic() + 5
        while not lines and time.monotonic() < until:
            time.sleep(0.02)
        shown.update(task, completed=40, note="all well")
    assert re.fullmatch(r"replay t: 10 of 40, 0:0\d, about 1:15 left; TTFT p50 3 ms", lines[0])
    assert re.fullmatch(r"replay t: 40 of 40, 0:0\d; all well", lines[-1])
    assert not any(line.startswith("short") for line in lines)


def test_what_a_step_found_stays_when_it_has_ended() -> None:
    """While it goes on it stands beside the amount; at the end it is a line of its own, once; silence when quiet."""
    lines: list[str] = []
    with Lines(lines.append, every_s=0.05) as shown:
        steps = Steps(shown)
        steps("splits", 0, 3)
        steps("splits", 2, 3, "3:5 serves most so far")
        until = time.monotonic() + 5
        while not any("2 of 3" in line for line in lines) and time.monotonic() < until:
            time.sleep(0.01)
        steps("splits", 3, 3, "2:6 serves most")
        shown._every_s = 60.0  # what comes now is short, however long this machine takes
        steps("windows", 1, 1)
    assert any(re.fullmatch(r"splits: 2 of 3, 0:0\d; 3:5 serves most so far", line) for line in lines)
    assert [line for line in lines if "2:6" in line] == ["splits: 2:6 serves most"]
    assert not any(line.startswith("windows") for line in lines)
    with Lines(None) as silent:
        Steps(silent)("splits", 3, 3, "2:6 serves most")


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_bars_show_the_same_on_a_terminal(environment: dict[str, str], coloured: bool) -> None:
    """Amount, time left, note; colour unless NO_COLOR."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, _environ=environment | {"TERM": "xterm-256color"})
    with Bars(console) as bars:
        task = bars.add_task("replay t", total=40, note="TTFT p50 3 ms", left=lambda: 75.0)
        bars.add_task("read", total=2_000_000, completed=1_000_000, unit="bytes")
        bars.update(task, completed=10)
    assert "10 of 40" in text.getvalue()
    assert "1:15 left" in text.getvalue()
    assert "1.0 MB of 2.0 MB" in text.getvalue()
    assert "TTFT p50 3 ms" in text.getvalue()
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", text.getvalue())) is coloured


def test_every_verb_with_a_result_can_be_quiet() -> None:
    """``--quiet`` stands wherever ``--json`` does."""
    for verb in VERBS:
        for _, command, _ in tree(verb, load(verb)):
            names = {name for p in command.params if isinstance(p, click.Option) for name in p.opts}
            assert ("--quiet" in names) == ("--json" in names)
