"""A fleet is set and waited for, its way back is on disk before it moves, and every decision has a reason."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import queue
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import msgpack
import numpy as np
import pytest
import zmq

import loadgen.control
from advisor.cli import main
from advisor.cli.steering import rule_of
from loadgen.client import target
from loadgen.cluster import Profile
from loadgen.cluster.embedded import embedded
from loadgen.control import (
    Bounds,
    Connect,
    Endpoint,
    FailedError,
    Keeper,
    LostError,
    Standing,
    Steps,
    control_of,
    has_grown,
    put,
    vllm_router,
)
from loadgen.control.command import Command
from loadgen.control.endpoint import Reply
from loadgen.control.journal import Journal
from loadgen.control.online import Controller, Ledger, Planned, measured
from loadgen.control.reference import Reference
from loadgen.control.sglang import SGLang
from loadgen.engines import Worker
from loadgen.policy import CountRule, DemandRule, Forecast, Steering, table_of
from loadgen.scrape import Scraper
from tests.pages import Pages
from tests.test_replay import rename
from traces.errors import EndpointError, InputError, StoreError
from traces.records import Decision, Fleet, FleetChange, Observations, Sample, Schedule
from traces.shape import scale_rate
from traces.store import open_store


def endpoint(url: str) -> Endpoint:
    return Endpoint(target(url))


CONNECT = Connect(endpoint, endpoint)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own notes."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def serving() -> Iterator[str]:
    with embedded("constant", Fleet(3, 3)) as url:
        yield url


@pytest.fixture
def server(serving: str) -> str:
    """At 3:3, whatever a test that failed has left."""
    put(Reference(endpoint(serving)), Fleet(3, 3))
    return serving


# --- the reference endpoint


def test_a_fleet_is_put_in_force_and_back(server: str) -> None:
    control = Reference(endpoint(server))
    with Keeper(control, "sweep") as keeper:
        before = control.get().fleet
        cost = keeper.put(Fleet(2, 4))
        assert control.get().settled(Fleet(2, 4))
        assert 0 < cost.joined_s <= cost.ready_s < 10
        assert keeper.journal.entries()[0].before == str(before)
    assert control.get().settled(before or Fleet(9, 9))
    assert Journal.all() == []


def test_what_is_in_force_costs_nothing_and_leaves_no_note(server: str) -> None:
    with Keeper(Reference(endpoint(server)), "sweep") as keeper:
        assert keeper.put(keeper.get().fleet or Fleet(9, 9)).ready_s == 0.0
        assert Journal.all() == []


@pytest.mark.parametrize(
    ("fleet", "bounds", "said"),
    [
        (Fleet(5, 1), Bounds.parse("1-4:1-4"), "prefill workers must be 1 to 4"),
        (Fleet(1, 5), Bounds.parse("1-4:1-4"), "decode workers must be 1 to 4"),
        (Fleet(4, 4), Bounds.parse("1-4:1-4/6"), "workers in all must be 1 to 6"),
        (Fleet(4, 4), None, "4:4 is impossible: it has 8 workers, the endpoint has 6"),
    ],
)
def test_what_is_out_of_bounds_or_reach_is_refused_before_anything_moves(
    server: str, fleet: Fleet, bounds: Bounds | None, said: str
) -> None:
    with Keeper(Reference(endpoint(server)), "sweep", bounds=bounds) as keeper:
        with pytest.raises(InputError, match=said):
            keeper.put(fleet)
        assert keeper.before is None
    assert Journal.all() == []


@pytest.mark.parametrize("text", ["", "1:2", "3-1:1-2", "1-2:1-2/", "a-b:c-d", "1-2"])
def test_bounds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="bounds must be"):
        Bounds.parse(text)


def test_two_commands_do_not_change_one_fleet_at_once(server: str) -> None:
    control = Reference(endpoint(server))
    with (
        Keeper(control, "sweep"),
        pytest.raises(EndpointError, match=r"being changed by steelyard sweep, process \d+"),
        Keeper(control, "run"),
    ):
        raise AssertionError("both got in")


def test_an_error_in_a_replay_puts_the_fleet_back_and_a_good_end_leaves_it(server: str) -> None:
    control = Reference(endpoint(server))
    before = control.get().fleet
    keeper = Keeper(control, "replay", put_back=False)
    with pytest.raises(ZeroDivisionError), keeper:
        print(1 / int(keeper.put(Fleet(4, 2)).ready_s < 0))
    assert control.get().settled(before or Fleet(9, 9))
    with Keeper(control, "replay", put_back=False) as keeper:
        keeper.put(Fleet(4, 2))
    assert control.get().settled(Fleet(4, 2))
    assert Journal.all() == []
    put(control, before or Fleet(9, 9))


def test_a_killed_sweep_is_undone_by_restore(server: str, tmp_path: Path) -> None:
    control = Reference(endpoint(server))
    before = control.get().fleet
    code = f"""
        import time
        from loadgen.client import target
        from loadgen.control import Endpoint, Keeper
        from loadgen.control.reference import Reference
        from traces.records import Fleet
        with Keeper(Reference(Endpoint(target({server!r}))), "sweep") as keeper:
            keeper.put(Fleet(1, 5))
            print("moved", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "moved\n"
    # While it lives, nobody puts anything back behind its back.
    assert main(["control", "restore", "--db", f"sqlite:///{tmp_path / 'a.db'}"]) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert control.get().settled(Fleet(1, 5))
    assert main(["control", "restore", "--dry-run"]) == 0
    assert control.get().settled(Fleet(1, 5))
    assert main(["control", "restore", "--db", f"sqlite:///{tmp_path / 'a.db'}"]) == 0
    assert control.get().settled(before or Fleet(9, 9))
    assert Journal.all() == []
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        (change,) = store.fleet_changes(None)
        assert (change.before, change.after) == (Fleet(1, 5), before)
        assert change.ready_s > 0


def test_the_next_sweep_goes_back_to_what_stood_before_the_crash(server: str) -> None:
    control = Reference(endpoint(server))
    before = control.get().fleet or Fleet(9, 9)
    journal = Journal(control.spec, control.name)
    journal.lock("sweep")
    journal.begin("sweep", before, Fleet(1, 5))
    journal.unlock()
    put(control, Fleet(1, 5))
    said: list[str] = []
    with Keeper(control, "sweep", say=said.append) as keeper:
        keeper.put(Fleet(2, 4))
    assert "an earlier command ended without putting" in said[0]
    assert control.get().settled(before)
    assert Journal.all() == []


def test_a_replay_after_a_crash_loses_no_way_back(server: str, tmp_path: Path) -> None:
    """It leaves its own fleet, as asked; what the killed sweep noted stays for restore, and the replay says so."""
    control = Reference(endpoint(server))
    before = control.get().fleet or Fleet(9, 9)
    journal = Journal(control.spec, control.name)
    journal.lock("sweep")
    journal.begin("sweep", before, Fleet(1, 5))
    journal.unlock()
    put(control, Fleet(1, 5))
    said: list[str] = []
    with Keeper(control, "replay", put_back=False, say=said.append) as keeper:
        keeper.put(Fleet(2, 4))
    assert control.get().settled(Fleet(2, 4))
    assert main(["control", "restore", "--db", f"sqlite:///{tmp_path / 'a.db'}"]) == 0
    assert control.get().settled(before)
    assert Journal.all() == []
    assert said == [
        f"{server}: an earlier command ended without putting 3:3 back. Afterwards: steelyard control restore"
    ]


def test_a_set_on_purpose_survives_a_sweep_and_is_undone_by_restore(server: str, tmp_path: Path) -> None:
    db = ["--db", f"sqlite:///{tmp_path / 'a.db'}"]
    control = Reference(endpoint(server))
    before = control.get().fleet or Fleet(9, 9)
    assert main(["control", "set", "2:4", server, "--warm", "2", *db]) == 0
    assert main(["control", "set", "4:2", server, *db]) == 0
    with Keeper(control, "sweep") as keeper:
        keeper.put(Fleet(1, 5))
    assert control.get().settled(Fleet(4, 2))
    assert main(["control", "restore", *db]) == 0
    assert control.get().settled(before)
    with open_store(db[1]) as store:
        first, second, third = store.fleet_changes(None)
    assert (first.after, second.after, third.after) == (Fleet(2, 4), Fleet(4, 2), before)
    assert 0 < first.joined_s <= first.ready_s <= first.first_served_s
    assert (first.in_flight, first.failed) == (2, 0)


def test_a_set_after_a_crash_leaves_the_crashs_note(server: str, tmp_path: Path) -> None:
    """restore undoes one after the other; --forget drops them all."""
    db = ["--db", f"sqlite:///{tmp_path / 'a.db'}"]
    control = Reference(endpoint(server))
    before = control.get().fleet or Fleet(9, 9)
    journal = Journal(control.spec, control.name)
    journal.lock("sweep")
    journal.begin("sweep", before, Fleet(1, 5))
    journal.unlock()
    put(control, Fleet(1, 5))
    assert main(["control", "set", "2:4", server, *db]) == 0
    assert main(["control", "restore", *db]) == 0
    assert control.get().settled(Fleet(1, 5))
    assert main(["control", "restore", *db]) == 0
    assert control.get().settled(before)
    assert Journal.all() == []
    journal.begin("sweep", before, Fleet(1, 5))
    journal.begin("set", Fleet(1, 5), Fleet(2, 4))
    assert main(["control", "restore", "--forget", *db]) == 0
    assert Journal.all() == []


def test_a_note_that_cannot_be_read_is_not_thrown_away(capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal("reference:x", "x")
    journal.path.parent.mkdir(parents=True)
    journal.path.write_text("{")
    with pytest.raises(InputError, match="Put the fleet back by hand"):
        journal.entries()
    assert main(["control", "restore"]) == 1
    said = capsys.readouterr()
    assert f"{journal.path}: not restored: the note cannot be read" in said.out
    assert "The note stays" in said.err
    assert main(["control", "restore", "--json"]) == 1
    held = json.loads(capsys.readouterr().out)  # one object
    assert (len(held["restored"]), held["exit_code"]) == (1, 1)
    assert "The note stays" in held["error"]
    own = Journal("command:" + json.dumps(["x", "{prefill}", "{decode}"]), "x")
    assert main(["control", "restore", "--control", own.spec]) == 0  # another's note
    journal.path.rename(own.path)
    assert main(["control", "restore", "--control", own.spec]) == 1
    assert "cannot be read" in capsys.readouterr().out
    assert own.path.exists()


def test_a_fleet_that_is_set_is_said_to_be_though_the_database_is_away(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    db = ["--db", "sqlite:////nowhere/a.db"]
    assert main(["control", "set", "2:4", server, "--json", *db]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["fleet"] == {"prefill": 2, "decode": 4}
    assert "the fleet is 2:4 now, but what that took is not stored" in said.err
    assert main(["control", "restore", *db]) == 0
    assert endpoint(server).fleet() == Fleet(3, 3)


def test_nothing_moves_where_the_way_back_cannot_be_noted(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert main(["control", "set", "2:4", server]) == 1
    assert "the way back of" in capsys.readouterr().err
    assert endpoint(server).fleet() == Fleet(3, 3)


def test_a_dry_run_says_and_does_nothing(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = endpoint(server).fleet()
    assert main(["control", "set", "2:4", server, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == [f"PUT {server}/fleet: 3:3 -> 2:4"]
    assert endpoint(server).fleet() == before


def test_a_replay_that_plans_what_cannot_be_reached_is_refused_before_it_sends(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, nothing stored; a dry run of one that can says what would be done when."""
    db = f"sqlite:///{tmp_path / 'a.db'}"
    assert main(["ingest", "azure-2023-conv", "--db", db]) == 0
    words = ["replay", "azure-2023-conv", "--endpoint", server, "--requests", "5", "--workers", "1", "--db", db]
    capsys.readouterr()
    assert main([*words, "--change", "1=5:5"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "the fleet 5:5 is impossible: it has 10 workers, the endpoint has 6" in said[0]
    assert main([*words, "--change", "1=2:4", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [
        f"send 5 requests of azure-2023-conv to {server}",
        f"at 1 s: PUT {server}/fleet: 3:3 -> 2:4 (2:4)",
    ]
    with open_store(db) as store:
        assert store.runs() == []


def test_get_prints_the_fleet(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["control", "get", server, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fleet"] == {"prefill": 3, "decode": 3}


def test_a_worker_that_does_not_drain_is_one_clear_line() -> None:
    class Stuck:
        kind, name, spec = "stuck", "stuck", "stuck"

        def get(self) -> Standing:
            return Standing(Fleet(2, 1), Fleet(1, 2), 1)

        def steps(self, fleet: Fleet) -> list[str]:
            return ["wait"]

        def ask(self, fleet: Fleet) -> None:
            pass

    with pytest.raises(EndpointError, match=r"1:2 was not in force within 0\.3 s \(it is 2:1, 1 worker on the way\)"):
        put(Stuck(), Fleet(1, 2), 0.3)


# --- a command of the user's


def fleet_script(tmp_path: Path) -> tuple[Path, Path]:
    """(a program that keeps a fleet in a file, a TOML file that uses it)."""
    program = tmp_path / "fleet.py"
    program.write_text(
        textwrap.dedent(
            f"""\
            #!{sys.executable}
            import pathlib, sys, time
            held = pathlib.Path({str(tmp_path / "fleet")!r})
            if len(sys.argv) == 1:
                print(held.read_text())
            elif sys.argv[1] == "9":
                sys.exit("no room for nine; $(touch {tmp_path}/shell)")
            else:
                time.sleep(0.2)
                held.write_text(sys.argv[1] + ":" + sys.argv[2])
            """
        )
    )
    program.chmod(0o755)
    (tmp_path / "fleet").write_text("2:1")
    file = tmp_path / "control.toml"
    file.write_text(
        f'kind = "command"\nset = ["{program}", "{{prefill}}", "{{decode}}"]\nget = ["{program}"]\n'
        "[bounds]\nprefill = [1, 9]\ndecode = [1, 4]\n"
    )
    return program, file


SLOW = '[ "$3" = 1 ] || { (echo; exec sleep 60) > "$1" & wait; }; echo "$2:$3" > "$0"'
"""A command that puts P:1 in force at once, and says in its pipe that it is at work on another."""


@contextlib.contextmanager
def slow(tmp_path: Path, **more: Any) -> Iterator[tuple[Command, Path, Any]]:
    """(control of :data:`SLOW`, the file with its fleet, wait until nobody changes it any more)."""
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)

    def over() -> None:
        if os.read(pipe, 10):  # else it was ended before it said anything
            assert select.select([pipe], [], [], 30)[0]
            assert os.read(pipe, 10) == b""  # nobody is left who could write

    def begun() -> None:
        assert select.select([pipe], [], [], 30)[0]

    fleet = tmp_path / "fleet"
    made = Command(["sh", "-c", SLOW, str(fleet), str(tmp_path / "pipe"), "{prefill}", "{decode}"], **more)
    try:
        yield made, fleet, (begun, over)
    finally:
        os.close(pipe)


def test_a_command_sets_and_reads_the_fleet(tmp_path: Path) -> None:
    program, file = fleet_script(tmp_path)
    control = control_of(str(file), CONNECT)
    assert control is not None
    assert control.steps(Fleet(1, 2)) == [f"run {program} 1 2"]
    with Keeper(control, "sweep") as keeper:
        assert keeper.put(Fleet(1, 2)).ready_s >= 0.2
        assert (tmp_path / "fleet").read_text() == "1:2"
        with pytest.raises(InputError, match="decode workers must be 1 to 4"):
            keeper.put(Fleet(1, 5))
        with pytest.raises(LostError, match=r"exit code 1 .no room for nine"):
            keeper.put(Fleet(9, 1))
    assert (tmp_path / "fleet").read_text() == "2:1"
    assert not (tmp_path / "shell").exists()


@pytest.mark.parametrize(
    ("said", "fleet"),
    [
        ("3:5", Fleet(3, 5)),
        ('{"prefill": 3, "decode": 5, "changing": 2}', Fleet(3, 5)),
        ('{"prefill": "3", "decode": 5}', Fleet(3, 5)),
        ('{"prefill": 2.9, "decode": 5}', None),
        ('{"prefill": true, "decode": 5}', None),
        ('{"prefill": 3.0, "decode": 5, "changing": "2"}', Fleet(3, 5)),
        ('{"prefill": 3, "decode": 5, "changing": 0.5}', None),
        ('{"prefill": 3, "decode": 5, "changing": -3}', None),
        ("[" * 3000, None),
        ('{"prefill": 3}', None),
        ("[3, 5]", None),
        ("", None),
    ],
)
def test_what_a_command_prints_is_a_fleet_of_whole_workers(said: str, fleet: Fleet | None) -> None:
    """2.9 was 2, and half a worker that changes was none."""
    control = Command(["true", "{prefill}", "{decode}"], ["printf", "%s", said])
    if fleet is None:
        with pytest.raises(EndpointError, match=r"^printf: it must print P:D or .*\(it printed"):
            control.get()
    else:
        standing = control.get()
        assert (standing.fleet, standing.changing) == (fleet, 2 * ("changing" in said))


def test_a_command_gets_each_argument_as_it_is(tmp_path: Path) -> None:
    """No shell: what a shell would read as more than one word, or run, arrives as one argument."""
    seen = tmp_path / "seen"
    program = [sys.executable, "-c", f"import sys, json; json.dump(sys.argv[1:], open({str(seen)!r}, 'w'))"]
    odd = f"a b; touch {tmp_path}/shell $(id) '{{prefill}}x{{decode}}'"
    control = control_of("command:" + json.dumps([*program, odd]), CONNECT)
    assert control is not None
    put(control, Fleet(3, 4))
    assert json.loads(seen.read_text()) == [odd.replace("{prefill}", "3").replace("{decode}", "4")]
    assert not (tmp_path / "shell").exists()


def test_a_command_may_leave_something_running() -> None:
    """It is done when it has exited, also when an engine that it started still holds what it could write to."""
    control = Command(["sh", "-c", "sleep 40 & echo", "{prefill}", "{decode}"], now=Fleet(1, 1), timeout_s=60)
    assert put(control, Fleet(2, 1), 30.0).ready_s < 30


def test_a_command_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """What goes on in the background would change the fleet after steelyard has said that the change was given up."""
    with slow(tmp_path, now=Fleet(1, 1), timeout_s=1.0) as (control, _, (_, over)):
        with pytest.raises(LostError, match=r"'sh': did not end within 1 s and was killed"):
            put(control, Fleet(1, 2), 30.0)
        over()


def test_what_nobody_has_looked_at_is_never_settled(tmp_path: Path) -> None:
    """A command that reads nothing: the fleet of its file (now) is what was in force once, not what is after a change."""
    fleet, file = tmp_path / "fleet", tmp_path / "control.toml"
    program = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(':'.join(sys.argv[2:]))", str(fleet)]
    file.write_text(f'kind = "command"\nset = {json.dumps([*program, "{prefill}", "{decode}"])}\nnow = "2:1"\n')
    db = ["--db", f"sqlite:///{tmp_path / 'a.db'}"]
    assert main(["control", "set", "1:2", "--control", str(file), *db]) == 0
    assert fleet.read_text() == "1:2"
    assert main(["control", "restore", *db]) == 0
    assert fleet.read_text() == "2:1"
    put(control_of(str(file), CONNECT), Fleet(1, 2))  # type: ignore[arg-type]
    fresh = control_of(str(file), CONNECT)
    assert fresh is not None
    with Keeper(fresh, "replay", put_back=False) as keeper:
        keeper.put(Fleet(2, 1))
        assert fleet.read_text() == "2:1"
        fleet.unlink()
        keeper.put(Fleet(2, 1))  # now it is known
    assert not fleet.exists()


def test_a_command_is_waited_for_as_long_as_it_may_run(tmp_path: Path) -> None:
    """A shorter --settle would leave it behind, and nobody who knew what it does to the fleet afterwards."""
    fleet = tmp_path / "fleet"
    command = ["sh", "-c", 'sleep 0.3; echo "$1:$2" > "$0"', str(fleet), "{prefill}", "{decode}"]
    put(Command(command, now=Fleet(1, 1)), Fleet(2, 1), 0.05)
    assert fleet.read_text() == "2:1\n"
    keeper = Keeper(Command(command, now=Fleet(2, 1)), "run", put_back=False, timeout_s=0.05)
    with keeper:
        keeper.ask(Fleet(3, 1))  # its fleet is to stay, and the command would end with this process
    assert fleet.read_text() == "3:1\n"


def test_no_command_goes_on_beside_the_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadgen.control, "STEP_S", 0.05)
    with slow(tmp_path, now=Fleet(2, 1)) as (control, fleet, (begun, over)):
        with Keeper(control, "sweep") as keeper:
            keeper.ask(Fleet(1, 2))
            begun()
        over()
        assert fleet.read_text() == "2:1\n"
        assert not keeper.stranded


def test_a_command_that_is_just_starting_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has begun before the thread that starts it comes back from that; no other is started afterwards."""
    held = threading.Event()

    class Slow(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            held.wait(1.0)

    with slow(tmp_path, now=Fleet(1, 1)) as (control, _, (begun, over)):
        monkeypatch.setattr(subprocess, "Popen", Slow)
        control.ask(Fleet(1, 2))
        begun()
        control._running.end(for_good=True)
        over()
        held.set()
        assert control._steps._thread is not None
        control._steps._thread.join(30)
        with pytest.raises(LostError, match="exit code -15"):
            control.get()
        with pytest.raises(LostError, match="not started, for this process ends"):
            put(control, Fleet(1, 1), 30.0)


def test_a_command_ends_with_the_verb_that_started_it(tmp_path: Path) -> None:
    """SIGTERM, as a pod that is taken away gets it; the note stays."""
    with slow(tmp_path, now=Fleet(2, 1)) as (control, fleet, (begun, over)):
        file = tmp_path / "control.toml"
        file.write_text(f'kind = "command"\nset = {json.dumps(control._change)}\nnow = "2:1"\n')
        child = subprocess.Popen(
            [sys.executable, "-m", "advisor", "control", "set", "1:2", "--control", str(file)],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        try:
            begun()
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 130
        finally:
            child.kill()
            child.wait()
        over()
        assert not fleet.exists()
        assert Journal(str(file), "").undo() == (Fleet(2, 1), "set")


def test_what_may_not_be_ended_is_not_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's process, such as one of sudo, goes on; no other user is needed to see what is said then."""

    def refused(group: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    control = Command(["sh", "-c", "exec sleep 60", "{prefill}", "{decode}"], now=Fleet(1, 1), timeout_s=0.3)
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", refused)
        with pytest.raises(LostError, match=r"within 0\.3 s and may not be ended .*: it may go on changing the fleet"):
            put(control, Fleet(2, 1), 30.0)
        with pytest.raises(LostError, match="one from before still runs and may not be ended"):
            put(control, Fleet(1, 1), 30.0)
    assert control._running.alive()
    del control  # with it goes what it still runs


def test_where_the_old_fleet_is_not_known_that_is_said_and_no_change_of_it_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, db = 'command:["true", "{prefill}", "{decode}"]', f"sqlite:///{tmp_path / 'a.db'}"
    assert main(["control", "set", "1:2", "--control", spec, "--db", db, "--json"]) == 0
    told = capsys.readouterr()
    assert "command true: which fleet was in force is not known, so nothing can put it back." in told.err
    assert json.loads(told.out)["before"] is None
    with open_store(db) as store:
        assert store.fleet_changes(None) == []
    assert main(["control", "restore", "--db", db]) == 0
    assert capsys.readouterr().out == "nothing to restore: no old fleet is noted here.\n"
    said: list[str] = []
    control = control_of(spec, CONNECT)
    assert control is not None
    with Keeper(control, "replay", put_back=False, say=said.append) as keeper:
        for fleet in (Fleet(1, 2), Fleet(2, 1)):
            keeper.put(fleet)
            assert not keeper.journal.path.exists()
    assert len(said) == 1


def test_a_sweep_does_not_start_where_the_old_fleet_is_not_known() -> None:
    control = control_of('command:["true", "{prefill}", "{decode}"]', CONNECT)
    assert control is not None
    with Keeper(control, "sweep") as keeper, pytest.raises(InputError, match="could not be put back"):
        keeper.put(Fleet(1, 1))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nonsense", "neither a kind nor a file"),
        ("me:pw@host:8000", "--control 'host:8000' is neither"),
        ("http://me:pw@host:8000", "--control 'http://host:8000' is neither"),
        ("reference:", "needs the endpoint's URL"),
        ("sglang:", "needs the router's URL"),
        ("command:scale http://me:pw@h", "must be a list of arguments .* .got 'scale http://h'"),
        ('command:["scale"]', "needs {prefill} and {decode}"),
        ("vllm-router:x", "needs a TOML file"),
        ("kind = 1", "kind must be one of"),
        ('kind = "sglang"', "router is missing"),
        ('kind = "sglang"\nrouter = 3', "router must be a str"),
        ('kind = "sglang"\nrouter = "http://x"\ndrain_s = nan', "drain_s must be a finite number"),
        ('kind = "sglang"\nrouter = "http://x"\ndrain_s = inf', "drain_s must be a finite number"),
        ('kind = "sglang"\nrouter = ["http://me:pw@h"]', r"router must be a str .got \['http://h'\]"),
        (
            'kind = "sglang"\nrouter = "http://x"\n[[worker]]\nurl = "http://me:p w@y"\nrole = "any"',
            r"worker\]\] 1: url must be a URL without blanks",
        ),
        ('kind = "sglang"\nrouter = "http://x"\nrooter = 1', "rooter not known here"),
        ('kind = "sglang"\nrouter = "http://x"\n[[worker]]\nurl = "http://y"\nrole = "both"', "role must be"),
        ('kind = "reference"\nurl = "http://x"\n[bounds]\nprefill = [2, 1]', "two whole numbers"),
        ("kind = ", "cannot be read as TOML"),
        ('kind = "vllm-router"\ndiscovery = "x:1"\nworker = []', "at least two"),
    ],
)
def test_a_control_that_cannot_be_read_is_one_clear_line(spec: str, said: str, tmp_path: Path) -> None:
    if spec.startswith("kind"):
        file = tmp_path / "control.toml"
        file.write_text(spec)
        spec = str(file)
    with pytest.raises(InputError, match=said.replace("{", "[{]").replace("}", "[}]")) as caught:
        control_of(spec, CONNECT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/no/such/program", "there is no such program"),
        ("/etc", "may not be run"),
        ("false", "exit code 1 .it said nothing"),
    ],
)
def test_a_command_that_fails_is_one_clear_line(program: str, said: str) -> None:
    control = control_of("command:" + json.dumps([program, "{prefill}", "{decode}"]), CONNECT)
    assert control is not None
    with pytest.raises(LostError, match=said):
        put(control, Fleet(1, 1))
    assert control.get().aimed is None  # nothing is on its way to what was asked for


# --- the operator


def test_the_operator_is_asked_and_waited_for() -> None:
    asked: list[str] = []
    answers = iter(["two to one", "", "2:1", "", "no"])

    def operator(question: str) -> str:
        asked.append(question)
        return next(answers)

    control = control_of("manual:lab", Connect(endpoint, endpoint, operator))
    assert control is not None
    assert put(control, Fleet(1, 2)).before == Fleet(2, 1)
    assert "from 2:1 to 1:2" in asked[3]
    with pytest.raises(LostError, match="did not put the fleet 2:1 in force"):
        put(control, Fleet(2, 1))


def test_an_answer_is_to_the_last_question() -> None:
    """The way back while the operator has not answered yet: he is told that the change is given up, and nothing waits for that
    answer. What he enters then is about the way back, whichever question reads it."""
    asked, entered = queue.SimpleQueue[str](), queue.SimpleQueue[str]()

    def operator(question: str) -> str:
        asked.put(question)
        return entered.get()

    control = control_of("manual:lab", Connect(endpoint, endpoint, operator))
    assert control is not None
    entered.put("4:4")
    assert control.get().settled(Fleet(4, 4))
    assert "in force now" in asked.get(timeout=30)
    control.ask(Fleet(5, 3))
    assert "from 4:4 to 5:3" in asked.get(timeout=30)
    began = time.monotonic()
    control.ask(Fleet(4, 4))
    assert "The change to 5:3 is given up. Please change the fleet from what it is to 4:4." in asked.get(timeout=30)
    assert time.monotonic() - began < loadgen.control.STEP_S / 2
    assert control.get().changing
    entered.put("")
    soon(lambda: not control.get().changing)
    assert control.get().settled(Fleet(4, 4))
    entered.put("")  # to nothing: for the reader that is left


def test_the_operator_is_asked_for_the_fleet_of_the_file_too(tmp_path: Path) -> None:
    """It was in force when the file was written; once the operator has answered, the same is not asked again."""
    file = tmp_path / "control.toml"
    file.write_text('kind = "manual"\nnow = "2:1"\n')
    asked: list[str] = []

    def operator(question: str) -> str:
        asked.append(question)
        return ""

    control = control_of(str(file), Connect(endpoint, endpoint, operator))
    assert control is not None
    for _ in range(2):
        put(control, Fleet(2, 1))
    assert [one.partition(" Enter")[0] for one in asked] == ["Please change the fleet from 2:1 to 2:1."]


def test_ctrl_c_at_a_question_ends_the_command() -> None:
    """Though a thread still reads what the operator may enter."""
    command = [sys.executable, "-m", "advisor", "control", "get", "--control", "manual:"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        assert child.stdin is not None
        asked = b""
        while not asked.endswith(b"in force now (prefill:decode)? "):
            more = child.stderr.read(1)
            assert more, asked
            asked += more
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
        assert child.stderr.read() == b"\nsteelyard: interrupted\n"


def test_ctrl_c_at_a_question_is_not_lost_where_it_interrupts_no_wait() -> None:
    """As one that comes just before the wait, or that another thread takes: nothing wakes the main one."""
    answered, free = threading.Event(), threading.Event()

    def operator(question: str) -> str:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        free.wait(15)
        answered.set()
        return "4:4"

    control = control_of("manual:", Connect(endpoint, endpoint, operator))
    assert control is not None
    with pytest.raises(KeyboardInterrupt):
        control.get()
    assert not answered.is_set()
    free.set()


def test_where_nobody_can_be_asked_manual_says_so() -> None:
    control = control_of("manual:", CONNECT)
    assert control is not None
    with pytest.raises(LostError, match="no terminal"):
        control.get()


# --- SGLang's router


class Router:
    """A stand-in of sglang-router's worker API and of the engines' drain and role switch, on one port each."""

    def __init__(self, workers: list[tuple[str, str]], *, drain_s: float = 0.2, deaf: bool = False) -> None:
        self.log: list[str] = []
        self.status = 0
        self.deaf = deaf
        self.ill: set[str] = set()  # who is listed and never healthy
        self.hangs_up = 0  # how many of the next questions for metrics are not answered
        self.keeps = 0  # how many of the next DELETEs are not answered
        self.asked = {"metrics": threading.Event(), "list": threading.Event()}
        self.may = {"metrics": threading.Event(), "list": threading.Event()}  # until then these are not answered
        for may in self.may.values():
            may.set()
        self.registered: dict[str, dict[str, Any]] = {}
        self.left: dict[str, float] = {}
        self.drain_s = drain_s
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, status: int, held: Any) -> None:
                body = held.encode() if isinstance(held, str) else json.dumps(held).encode()
                self.send_response(outer.status or status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                what = "list" if self.path == "/workers" else "metrics"
                if not outer.may[what].is_set():
                    outer.asked[what].set()
                    outer.may[what].wait(10)
                if what == "list":
                    self.answer(200, {"workers": list(outer.registered.values())})
                    return
                if outer.hangs_up:
                    outer.hangs_up -= 1
                    return
                left = outer.left.get(f"http://{self.headers['Host']}", 0.0)
                busy = outer.deaf or time.monotonic() < left
                self.answer(200, f'sglang:num_running_reqs{{engine_type="decode"}} {2.0 if busy else 0.0}\n')

            def do_POST(self) -> None:
                held = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/pd_role_switch":
                    outer.log.append(f"switch {self.headers['Host']} {held['new_role']}")
                    self.answer(200, {"success": True})
                    return
                outer.log.append(f"add {held['url']} {held['worker_type']} {held.get('bootstrap_port')}")
                outer.registered[held["url"]] = held | {
                    "id": f"id-{held['url'][-5:]}", "is_healthy": held["url"] not in outer.ill,
                }  # fmt: skip
                self.answer(202, {})

            def do_DELETE(self) -> None:
                if outer.keeps:
                    outer.keeps -= 1
                    return
                known = {u: w.get("id") or quote(u, safe="") for u, w in outer.registered.items()}
                gone = [u for u, one in known.items() if f"/workers/{one}" == self.path]
                for url in gone:
                    outer.log.append(f"remove {url}")
                    outer.left[url] = time.monotonic() + outer.drain_s
                    del outer.registered[url]
                self.answer(202 if gone else 404, {})

        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(1 + len(workers))]
        for one in self.servers:
            threading.Thread(target=one.serve_forever, daemon=True).start()
        self.url, *urls = [f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers]
        self.workers = dict(zip(urls, workers, strict=True))
        for url, (_, now) in self.workers.items():
            if now:
                self.registered[url] = {
                    "id": f"id-{url[-5:]}", "url": url, "worker_type": now, "is_healthy": True, "bootstrap_port": 9000,
                }  # fmt: skip

    def file(self, path: Path, drain_s: int = 1) -> str:
        rows = "".join(
            f'[[worker]]\nurl = "{url}"\nrole = "{role}"\nbootstrap_port = 9000\n'
            for url, (role, _) in self.workers.items()
        )
        path.write_text(f'kind = "sglang"\nrouter = "{self.url}"\ndrain_s = {drain_s}\n{rows}')
        return str(path)

    def close(self) -> None:
        for one in self.servers:
            one.shutdown()
            one.server_close()


@pytest.fixture
def routers() -> Iterator[list[Router]]:
    made: list[Router] = []
    yield made
    for one in made:
        one.close()


def test_sglang_adds_before_it_takes_out_and_waits_for_the_drain(
    routers: list[Router], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode"), ("decode", "")])
    routers.append(router)
    control = control_of(router.file(tmp_path / "sglang.toml", drain_s=20), CONNECT)
    assert control is not None
    assert control.get().fleet == Fleet(2, 1)
    look, router.deaf = control.get, True

    def get() -> Standing:
        standing = look()
        router.deaf = router.deaf and not has_grown(standing.fleet, Fleet(1, 2))  # it drains once that was seen
        return standing

    monkeypatch.setattr(control, "get", get)
    with Keeper(control, "sweep") as keeper:
        cost = keeper.put(Fleet(1, 2))
        assert control.get().settled(Fleet(1, 2))
    assert cost.joined_s < cost.ready_s
    assert cost.ready_s >= 0.2
    new, old = list(router.workers)[3], list(router.workers)[1]
    # Two changes: there and back again; the decode worker never gets a bootstrap port.
    assert router.log == [f"add {new} decode None", f"remove {old}", f"add {old} prefill 9000", f"remove {new}"]


def test_sglang_flips_an_engine_in_place(routers: list[Router], tmp_path: Path) -> None:
    router = Router([("any", "prefill"), ("any", "prefill"), ("any", "decode")])
    routers.append(router)
    control = control_of(router.file(tmp_path / "sglang.toml"), CONNECT)
    assert control is not None
    put(control, Fleet(1, 2))
    flipped = list(router.workers)[1]
    assert router.log == [f"remove {flipped}", f"switch {flipped[7:]} decode", f"add {flipped} decode None"]


def test_sglang_counts_a_worker_that_is_ill_and_keeps_those_that_are_not(
    routers: list[Router], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is one of the fleet that was asked for, not one less for ever: a rule that moves meanwhile takes no second one away."""
    router = Router([("any", "prefill"), ("any", "prefill"), ("any", "decode"), ("any", "decode")])
    routers.append(router)
    a, b, c, d = router.workers
    control = control_of(router.file(tmp_path / "sglang.toml"), CONNECT)
    assert isinstance(control, SGLang)
    router.registered[a]["is_healthy"] = False
    standing = control.get()
    assert (standing.fleet, standing.aimed) == (Fleet(1, 2), Fleet(2, 2))
    assert control.steps(Fleet(2, 2)) == []
    assert main(["control", "get", "--control", str(tmp_path / "sglang.toml")]) == 0
    assert "1:2 of 2:2" in capsys.readouterr().out
    put(control, Fleet(2, 1))
    assert {u: w["worker_type"] for u, w in router.registered.items()} == {b: "prefill", c: "decode", d: "prefill"}

    spare = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode"), ("prefill", "")])
    routers.append(spare)
    control = control_of(spare.file(tmp_path / "spare.toml"), CONNECT)
    assert isinstance(control, SGLang)
    ill, _, _, free = spare.workers
    spare.registered[ill]["is_healthy"] = False
    spare.hangs_up = 1_000_000  # nobody waits for what it may hold
    put(control, Fleet(2, 1))
    assert spare.log == [f"add {free} prefill 9000", f"remove {ill}"]


@pytest.mark.parametrize(
    ("recovers", "change"), [(False, Fleet(1, 1)), (True, Fleet(1, 1)), (False, Fleet(2, 1))], ids=str
)
def test_a_fleet_with_an_ill_sglang_worker_is_left_as_it_was_found(
    routers: list[Router], monkeypatch: pytest.MonkeyPatch, recovers: bool, change: Fleet
) -> None:
    """One that is ill for good keeps no other from coming back, and nobody owes more, or waits for more, than there was. If it
    is well again: all."""
    monkeypatch.setattr("loadgen.control.sglang.START_S", 0.3)
    router = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode"), ("decode", "decode")])
    routers.append(router)
    ill = next(iter(router.workers))
    router.registered[ill]["is_healthy"] = False
    router.ill = set() if recovers else {ill}
    control = control_of(f"sglang:{router.url}", CONNECT)
    assert isinstance(control, SGLang)
    control.patience_s = 30.0
    assert (control.get().fleet, control.get().aimed) == (Fleet(1, 2), Fleet(2, 2))
    said: list[str] = []
    with Keeper(control, "sweep", say=said.append) as keeper:
        keeper.ask(change)
        while keeper.get().changing:
            time.sleep(0.02)
        assert set(router.registered) == set(list(router.workers)[2 - change.prefill : 3])
        left = time.monotonic()
    assert time.monotonic() - left < 20
    assert set(router.registered) == set(router.workers)
    assert control.get().fleet == (Fleet(2, 2) if recovers else Fleet(1, 2))
    assert said == ([] if recovers else [f"{control.name}: 1:2 of 2:2 serves again, as before the first change"])
    assert not keeper.stranded
    assert Journal.of(control).entries() == []


def test_sglang_ranks_of_an_engine_come_and_go_together(routers: list[Router], tmp_path: Path) -> None:
    """A router that lists each data-parallel rank (URL@RANK) has as many workers as engines."""
    router = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode")])
    routers.append(router)
    router.registered = {
        f"{url}@{rank}": held | {"url": f"{url}@{rank}", "id": f"{held['id']}-{rank}"}
        for url, held in router.registered.items()
        for rank in (0, 1)
    }
    control = control_of(f"sglang:{router.url}", CONNECT)
    assert control is not None
    assert control.get().fleet == Fleet(2, 1)
    assert control.get().workers["prefill"] == tuple(router.workers)[:2]
    gone = list(router.workers)[1]
    with Keeper(control, "set", keep_note=True, put_back=False) as keeper:
        keeper.put(Fleet(1, 1))
    assert router.log == [f"remove {gone}@0", f"remove {gone}@1"]
    later = control_of(f"sglang:{router.url}", CONNECT)  # another command brings the engine back
    assert later is not None
    put(later, Fleet(2, 1))
    assert router.log[2:] == [f"add {gone} prefill 9000"]


def test_sglang_knows_what_it_cannot_reach(routers: list[Router]) -> None:
    router = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode")])
    routers.append(router)
    control = control_of(f"sglang:{router.url}", CONNECT)
    assert control is not None
    control.get()
    with pytest.raises(
        InputError, match="1:2 cannot be reached: there are 2 prefill and 1 decode workers and 0 that change"
    ):
        control.steps(Fleet(1, 2))
    put(control, Fleet(1, 1))
    put(control, Fleet(2, 1))  # what was taken out is known, and comes back
    assert control.get().fleet == Fleet(2, 1)


def test_what_was_taken_out_of_a_router_comes_back_by_another_command(routers: list[Router], tmp_path: Path) -> None:
    """Nobody else knows of it: the router lists it no longer, and no file names the pool."""
    router = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode")])
    routers.append(router)
    control = control_of(f"sglang:{router.url}", CONNECT)
    assert control is not None
    with Keeper(control, "set", keep_note=True, put_back=False) as keeper:
        keeper.put(Fleet(1, 1))
    assert main(["control", "restore", "--db", f"sqlite:///{tmp_path / 'a.db'}"]) == 0
    gone = list(router.workers)[1]
    assert router.log == [f"remove {gone}", f"add {gone} prefill 9000"]
    assert list(Journal(control.spec, control.name).path.parent.glob("*.pool")) == []
    with Keeper(control, "set", keep_note=True, put_back=False) as keeper:
        keeper.put(Fleet(1, 1))
    Journal(control.spec, control.name).path.unlink()  # as one is told to do where it cannot be read
    later = control_of(f"sglang:{router.url}", CONNECT)
    assert later is not None
    with pytest.raises(InputError, match="2:1 cannot be reached"):
        later.steps(Fleet(2, 1))


@pytest.mark.parametrize("hangs_up", [0, 1])
def test_a_worker_that_keeps_its_requests_is_named(routers: list[Router], tmp_path: Path, hangs_up: int) -> None:
    """Also one whose metrics once do not answer: that is no idle worker. (In one of 18 suites it was taken for one.)"""
    router = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode")], deaf=True)
    router.hangs_up = hangs_up
    routers.append(router)
    control = control_of(router.file(tmp_path / "sglang.toml", drain_s=3), CONNECT)
    assert control is not None
    with pytest.raises(LostError, match=r"does not drain: it still holds 2 requests 3 s after"):
        put(control, Fleet(1, 1))


def test_a_step_that_fails_while_the_fleet_is_looked_at_is_not_done(routers: list[Router], tmp_path: Path) -> None:
    """The router lists what was wanted, and by then nothing is left to do. (In one of 19 suites the change counted as made.)"""
    router = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode")], deaf=True)
    routers.append(router)
    control = control_of(router.file(tmp_path / "sglang.toml"), CONNECT)
    assert isinstance(control, SGLang)
    router.may["metrics"].clear()
    control.ask(Fleet(1, 1))
    assert router.asked["metrics"].wait(10)
    time.sleep(1.1)  # the drain is too long now, and the step learns of it with the next metrics
    router.may["list"].clear()
    with ThreadPoolExecutor(1) as pool:
        looked = pool.submit(control.get)
        assert router.asked["list"].wait(10)
        router.may["metrics"].set()
        assert control._steps._thread is not None
        control._steps._thread.join(10)
        router.may["list"].set()
        assert not looked.result().settled(Fleet(1, 1))
    with pytest.raises(LostError, match="does not drain"):
        control.get()


def test_the_way_back_does_not_wait_for_a_drain_that_is_given_up(routers: list[Router], tmp_path: Path) -> None:
    """Ctrl-C while a worker keeps its requests: the old fleet is in force again long before the drain would have ended."""
    router = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode")], deaf=True)
    routers.append(router)
    file = Path(router.file(tmp_path / "sglang.toml"))
    file.write_text(file.read_text().replace("drain_s = 1\n", "drain_s = 300\n"))
    control = control_of(str(file), CONNECT)
    assert control is not None
    control.ask(Fleet(1, 1))
    until = time.monotonic() + 20
    while not any(line.startswith("remove") for line in router.log) and time.monotonic() < until:
        time.sleep(0.02)
    put(control, Fleet(2, 1), 30.0)
    assert time.monotonic() < until + 10
    assert control.get().settled(Fleet(2, 1))


@pytest.mark.parametrize(
    ("router", "engine", "sent"), [("https", "https", True), ("https", "http", False), ("http", "http", True)]
)
def test_what_was_given_for_https_goes_to_no_engine_in_the_clear(
    router: str, engine: str, sent: bool, tmp_path: Path
) -> None:
    file = tmp_path / "sglang.toml"
    file.write_text(f'kind = "sglang"\nrouter = "{router}://r"\n[[worker]]\nurl = "{engine}://e:1"\nrole = "prefill"\n')
    connect = Connect(lambda url: Endpoint(target(url, api_key="PLANTED")), endpoint)
    control = control_of(str(file), connect)
    assert isinstance(control, SGLang)
    assert ("PLANTED" in str(dict(control._engine(control._pool[0].url).where.headers))) is sent


def test_what_is_secret_in_a_controls_urls_is_nowhere(
    routers: list[Router], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in a dry run, nor in what is in force, nor in what a step that failed says (a controller stores that), nor on disk."""
    monkeypatch.setattr("loadgen.control.sglang.START_S", 0.1)
    monkeypatch.setenv("STEELYARD_DB", f"sqlite:///{tmp_path / 'a.db'}")
    router = Router([("prefill", "prefill"), ("decode", "decode"), ("any", "")])
    routers.append(router)
    sglang = Path(router.file(tmp_path / "sglang.toml"))
    sglang.write_text(sglang.read_text().replace('url = "http://', 'url = "http://me:PL@NTED@'))
    router.registered = {u: w | {"url": w["url"].replace("//", "//me:PL@NTED@")} for u, w in router.registered.items()}
    router.ill = {url.replace("//", "//me:PL@NTED@") for url in router.workers}
    vllm = tmp_path / "vllm.toml"
    rows = "".join(f'[[worker]]\nhttp = "me:PL@NTED@10.0.0.{n}:8000"\n' for n in (1, 2, 3))
    vllm.write_text(f'kind = "vllm-router"\ndiscovery = "127.0.0.1:1"\n{rows}')
    made = control_of(str(vllm), CONNECT)
    assert isinstance(made, vllm_router.VllmRouter)
    made.file.parent.mkdir(parents=True)
    vllm_router._write(made.file, {"target": "1:1"})
    vllm_router._write(made.file.with_suffix(".alive"), {"taken": "1:1", "since_unix_s": 0, "moved": False})
    later = time.time() + 3600
    os.utime(made.file.with_suffix(".alive"), (later, later))
    command = "command:" + json.dumps(["put", "http://me:PL@NTED@h/{prefill}", "{decode}", "--token=PLNTED"])
    prefill, _, free = router.workers

    def said(code: int, *arguments: str) -> str:
        assert main(["control", *arguments]) == code
        told = capsys.readouterr()
        assert "NTED" not in told.out + told.err
        return told.out + told.err

    assert f"prefill: {prefill}\n" in said(0, "get", "--control", str(sglang))
    assert json.loads(said(0, "get", "--control", str(sglang), "--json"))["workers"]["prefill"] == [prefill]
    assert "prefill: http://10.0.0.1:8000\n" in said(0, "get", "--control", str(vllm))
    for control, step in (
        (str(sglang), f"POST {free}/pd_role_switch to prefill, then POST {router.url}/workers: add {free} as prefill"),
        (str(vllm), "register 10.0.0.2:8000 as prefill at 127.0.0.1:1 (now nothing)"),
        (command, "run put http://h/2 1 --token=***"),
    ):
        assert step in json.loads(said(0, "set", "2:1", "--control", control, "--dry-run", "--json"))["steps"]
    assert f"{free}: not healthy as prefill at the router" in said(1, "set", "2:1", "--control", str(sglang))
    assert not any("NTED" in path.read_text() for path in made.file.parent.iterdir())
    refused = loadgen.control.refused(Reply(400, "", b"http://me:PL@NTED@e:1 is there"), "http://r", "add http://e:1")
    assert str(refused) == "http://r: refused to add http://e:1 (HTTP 400: http://e:1 is there)."
    cookie = Reply(
        400, "", b"bad s%3AJ8kd0QwX9zz", {}, target("http://r", headers={"Cookie": "a=s%3AJ8kd0QwX9zz"}).secrets()
    )
    assert cookie.words == "bad ***"
    for quoted in (b"no http%3A%2F%2Fme%3APL%40NTED%40e", b"x" * 180 + b" http://me:PL@NTED@e:1"):  # cut within it, too
        assert "PL" not in str(loadgen.control.refused(Reply(500, "", quoted), "http://r", "x"))
    plain = Router([("prefill", "prefill"), ("prefill", "prefill"), ("decode", "decode")])  # it lists no ids
    routers.append(plain)
    plain.registered = {
        u: {k: v for k, v in w.items() if k != "id"} | {"url": u}
        for u, w in ((u.replace("//", "//me:PL@NTED@"), w) for u, w in plain.registered.items())
    }
    plain.keeps = 1
    failed = said(1, "set", "1:1", "--control", f"sglang:{plain.url}")
    assert re.search(rf"{plain.url}/workers/http://127\.0\.0\.1:\d+: no HTTP answer", failed)
    said(0, "set", "1:1", "--control", f"sglang:{plain.url}")
    assert [entry.partition(" ")[0] for entry in plain.log] == ["remove"]
    with Pages() as pages:
        known = pages.url.replace("//", "//me:PL@NTED@")
        assert f"{pages.url}: its fleet cannot be read" in said(1, "get", known)
        assert f"{pages.url}: its fleet cannot be set" in said(1, "set", "2:1", known)


def test_a_router_that_refuses_and_an_expired_token_are_one_line_each(routers: list[Router]) -> None:
    router = Router([("prefill", "prefill"), ("decode", "decode")])
    routers.append(router)
    control = control_of(f"sglang:{router.url}", CONNECT)
    assert control is not None
    router.status = 401
    with pytest.raises(LostError, match="the token is missing, expired or not allowed"):
        control.get()
    router.status = 503
    with pytest.raises(LostError, match=r"refused to list its workers .HTTP 503"):
        control.get()


# --- vllm-router


class Registry:
    """What vllm-router does with registrations: a ROUTER socket hears them, and forgets a worker's role that is not repeated."""

    def __init__(self, forget_s: float) -> None:
        self.heard: list[dict[str, str]] = []
        self._last: dict[tuple[str, str], float] = {}
        self._forget_s, self._stop = forget_s, threading.Event()
        self._context = zmq.Context()
        self.port = 0
        self.begin()

    def begin(self) -> None:
        """Listen, at the same port as before."""
        self._stop = threading.Event()
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        until = time.monotonic() + 15
        while not socket.getsockopt(zmq.LAST_ENDPOINT):
            try:
                if self.port:
                    socket.bind(f"tcp://127.0.0.1:{self.port}")
                else:
                    self.port = socket.bind_to_random_port("tcp://127.0.0.1")
            except zmq.ZMQError:  # a closed socket lets go of its port a moment later
                if time.monotonic() > until:
                    socket.close()
                    raise
                time.sleep(0.05)
        self._thread = threading.Thread(target=self._main, args=(socket, self._stop), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop listening and forget all."""
        self._stop.set()
        self._thread.join()
        self._last.clear()

    def close(self) -> None:
        self.end()
        self._context.destroy(linger=0)  # term would wait for ever for a socket that a failure left open

    def _main(self, socket: Any, stop: threading.Event) -> None:
        while not stop.is_set():
            if socket.poll(20):
                _, message = socket.recv_multipart()
                held = msgpack.unpackb(message)
                self.heard.append(held)
                self._last[held["type"], held["http_address"]] = time.monotonic()
        socket.close()

    def roles(self) -> set[tuple[str, str]]:
        """(type, address) that it would send requests to."""
        now = time.monotonic()
        return {key for key, at in list(self._last.items()) if now - at < self._forget_s}


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry(forget_s=1.5)
    yield made
    made.close()


def soon(true: Any, limit_s: float = 15.0) -> None:
    """An error of the endpoint is not yet true."""
    until = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(EndpointError):
            if true():
                return
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_folder_that_cannot_be_written_ends_keep_as_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    workers = [vllm_router.Worker(f"10.0.0.{n}:8000", "") for n in (1, 2)]
    control = vllm_router.VllmRouter("127.0.0.1:1", workers, "vllm.toml")
    with pytest.raises(InputError, match="XDG_STATE_HOME name a folder that can be written"):
        vllm_router.beat(control, Fleet(1, 1), lambda: True)


def test_workers_of_a_vllm_router_are_registered_in_the_roles_asked_for(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, in the words that the router was seen to understand; in force is when the old role is forgotten."""
    for name, value in (("BEAT_S", 0.3), ("JOIN_S", 0.2), ("LINGER_S", 4.0)):  # the router's 5 s are 1.5 s here
        monkeypatch.setattr(vllm_router, name, value)
    file = tmp_path / "vllm.toml"
    file.write_text(
        f'kind = "vllm-router"\ndiscovery = "tcp://127.0.0.1:{registry.port}"\n'
        + "".join(f'[[worker]]\nhttp = "10.0.0.{n}:8000"\nzmq = "10.0.0.{n}:9000"\n' for n in (1, 2, 3))
    )
    control = control_of(str(file), CONNECT)
    assert isinstance(control, vllm_router.VllmRouter)
    with pytest.raises(LostError, match=r"nobody registers its workers\. Start: steelyard control keep"):
        control.get()
    end = threading.Event()
    beating = threading.Thread(target=vllm_router.beat, args=(control, Fleet(2, 1), end.is_set), daemon=True)
    beating.start()
    try:
        first = {("P", "10.0.0.1:8000"), ("P", "10.0.0.2:8000"), ("D", "10.0.0.3:8000")}
        soon(lambda: registry.roles() == first)
        soon(lambda: control.get().settled(Fleet(2, 1)))
        assert {"type": "P", "http_address": "10.0.0.1:8000", "zmq_address": "10.0.0.1:9000"} in registry.heard
        with pytest.raises(
            EndpointError, match=r"its workers are registered by steelyard control keep, process \d+\. Wait"
        ):
            vllm_router.beat(control, Fleet(1, 2), lambda: True)  # it would take the first one's files along
        with Keeper(control, "sweep") as keeper:
            with pytest.raises(InputError, match="cannot be reached: there are 3 workers"):
                keeper.put(Fleet(2, 2))
            cost = keeper.put(Fleet(1, 2))
            assert ("P", "10.0.0.2:8000") not in registry.roles()
            then = {("P", "10.0.0.1:8000"), ("D", "10.0.0.2:8000"), ("D", "10.0.0.3:8000")}
            soon(lambda: registry.roles() == then)
            assert cost.joined_s < cost.ready_s
            assert control.get().workers["decode"] == ("http://10.0.0.2:8000", "http://10.0.0.3:8000")
            registry.end()  # the router is started anew
            registry.begin()
            soon(lambda: registry.roles() == then)
        soon(lambda: registry.roles() == first)
        write, failed = vllm_router._write, [0]

        def full(path: Path, held: dict[str, Any]) -> None:
            if path.suffix == ".alive" and failed[0] < 2:
                failed[0] += 1
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, held)

        monkeypatch.setattr(vllm_router, "_write", full)
        soon(lambda: failed[0] == 2)
        soon(lambda: control.get().settled(Fleet(2, 1)))  # it goes on
        soon(lambda: registry.roles() == first)
    finally:
        end.set()
        beating.join(5)
    with pytest.raises(LostError, match="nobody registers"):
        control.get()


def test_keep_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    """By SIGTERM, also as process 1 of a container: whoever registers in its place must not find the old roles beside its own."""
    file = tmp_path / "vllm.toml"
    workers = "".join(f'[[worker]]\nhttp = "10.0.0.{n}:8000"\nzmq = "10.0.0.{n}:9000"\n' for n in (1, 2))
    file.write_text(f'kind = "vllm-router"\ndiscovery = "127.0.0.1:1"\n{workers}')
    with subprocess.Popen(
        [sys.executable, "-m", "advisor", "control", "keep", "--control", str(file), "--fleet", "1:1"],
        stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    ) as child:  # fmt: skip
        try:
            assert child.stderr is not None
            assert "fleet 1:1" in child.stderr.readline()
            child.terminate()
            assert child.wait(60) == 130  # interrupted, not ended by the signal
        finally:
            child.kill()


# --- the online controller


class Fake:
    """A control whose fleet is in force at once; what it was asked is kept."""

    kind, name, spec = "fake", "fake", "fake"

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.asked: list[Fleet] = []

    def get(self) -> Standing:
        return Standing(self.fleet)

    def steps(self, fleet: Fleet) -> list[str]:
        return [str(fleet)]

    def ask(self, fleet: Fleet) -> None:
        self.asked.append(fleet)
        self.fleet = fleet


def queues(prefill: float, decode: float) -> list[Sample]:
    return [
        Sample(0.0, "p", "prefill", waiting_requests=prefill, waiting_tokens=prefill * 100),
        Sample(0.0, "d", "decode", waiting_requests=decode),
    ]


def steer(
    control: Fake, read: Any, ticks: int = 0, until: Any = lambda: True, **options: Any
) -> tuple[list[Decision], list[FleetChange]]:
    """What a controller did in so many ticks with a reading, or in more, until something was so."""
    decisions: list[Decision] = []
    changes: list[FleetChange] = []
    steering = options.pop("steering", None) or Steering(CountRule())
    reads = [0]

    def counted() -> list[Sample]:
        reads[0] += 1
        found: list[Sample] = read()
        return found

    with Controller(
        control, counted, steering, time.monotonic(), changes.append, on_decision=decisions.append, tick_s=0.05, **options
    ):  # fmt: skip
        end = time.monotonic() + 30
        while (reads[0] <= ticks or not until()) and time.monotonic() < end:
            time.sleep(0.01)
    return decisions, changes


def test_a_tick_that_fails_is_told_and_the_next_one_decides() -> None:
    """What nobody foresaw, such as a reading that is no reading, would end the controller's thread without a word."""
    control = Fake(Fleet(1, 3))
    readings = iter([[None], [None]])
    decisions, _ = steer(control, lambda: next(readings, queues(9, 0)), 3)
    assert [d.action for d in decisions[:2]] == ["hold", "move"]
    assert decisions[0].reason.startswith("this tick failed (AttributeError: ")
    assert decisions[0].repeats == 2


def test_every_decision_has_its_reason_and_repeats_are_counted() -> None:
    control = Fake(Fleet(1, 3))
    decisions, changes = steer(control, lambda: queues(9, 0) if control.fleet.prefill < 3 else queues(0, 0), 5)
    assert [(d.action, d.after) for d in decisions] == [("move", Fleet(2, 2)), ("move", Fleet(3, 1)), ("hold", None)]
    assert decisions[0].reason == "9 prompts and 0 answers wait"
    assert decisions[2].reason == "the queues are within the ratio"
    assert decisions[2].repeats >= 3
    assert decisions[2].until_s > decisions[2].at_s
    assert [c.after for c in changes] == control.asked == [Fleet(2, 2), Fleet(3, 1)]
    assert all(c.asked_s < c.joined_s <= c.ready_s for c in changes)


def test_a_change_is_seen_before_the_next_tick(server: str) -> None:
    """What a move took is not rounded up to whole ticks; the rule is asked at ticks alone."""
    control, seen = Reference(endpoint(server)), threading.Event()
    before = control.get().fleet
    changes: list[FleetChange] = []

    def on_change(change: FleetChange) -> None:
        changes.append(change)
        seen.set()

    reads = []

    def read() -> list[Sample]:
        reads.append(1)
        return queues(0, 0)

    with Keeper(control, "run") as keeper:
        zero = time.monotonic() - 59.9  # a tick is near, the next one a minute later
        with Controller(keeper, read, Planned([(0.0, Fleet(2, 4))]), zero, on_change, tick_s=60.0):
            assert seen.wait(40)
    assert control.get().fleet == before == Fleet(3, 3)
    assert len(reads) == 1
    assert changes[0].asked_s < changes[0].joined_s <= changes[0].ready_s


def test_a_control_that_runs_a_process_is_not_looked_at_all_the_time() -> None:
    """Between ticks a command's get would be one process after another, on the machine that sends."""
    change = ["scale", "{prefill}", "{decode}"]
    for read, least_s in ((["look"], 0.5), ([], 0.0)):
        assert Keeper(Command(change, read), "run").look_s == least_s

    class Slow(Fake):
        look_s = 30.0
        looks = 0

        def get(self) -> Standing:
            self.looks += 1
            return Standing(self.fleet, changing=len(self.asked))

    control = Slow(Fleet(3, 3))
    zero = time.monotonic() - 59.9  # a tick is near, the next one a minute later
    planned = Planned([(0.0, Fleet(2, 4))])
    with Controller(control, lambda: queues(0, 0), planned, zero, lambda change: None, tick_s=60.0):
        end = time.monotonic() + 20
        while not control.asked and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.4)
        assert (control.asked, control.looks) == ([Fleet(2, 4)], 1)


def test_no_more_moves_an_hour_than_allowed() -> None:
    control = Fake(Fleet(1, 5))
    decisions, _ = steer(control, lambda: queues(9, 0), 3, most_per_hour=2)
    assert [d.action for d in decisions] == ["move", "move", "cap"]
    assert control.asked == [Fleet(2, 4), Fleet(3, 3)]
    assert decisions[2].reason == "2 moves an hour are made, this one is not: 9 prompts and 0 answers wait"


def test_nothing_moves_on_stale_readings_and_it_is_said() -> None:
    control = Fake(Fleet(1, 5))
    said: list[Decision] = []

    def read() -> list[Sample]:
        if len(said) == 1:  # from the first decision until another is said
            raise EndpointError("http://x/metrics: connection refused.")
        return queues(0, 0)

    decisions, _ = steer(control, read, until=lambda: len(said) == 3, on_said=said.append, stale_s=0.2)
    assert [d.action for d in decisions] == ["hold", "stale", "hold"]
    assert "nothing is moved (http://x/metrics: connection refused.)" in decisions[1].reason


def test_a_role_that_tells_nothing_is_not_taken_for_idle() -> None:
    """The pages of an overloaded stage are the first that do not come: its workers stay."""
    control = Fake(Fleet(2, 2))
    page = "vllm:num_requests_waiting 9\n"
    said: list[Decision] = []
    gone: list[int] = []
    with Pages() as pages:
        pages["/p/metrics"] = pages["/d/metrics"] = page
        workers = [Worker(role[0], role, metrics=f"{pages.url}/{role[0]}/metrics") for role in ("prefill", "decode")]
        with Scraper(endpoint(pages.url), time.monotonic(), lambda _: None, 0.1, workers=workers) as scraper:

            def read() -> list[Sample]:
                found = scraper.read()
                if len(found) == 2 and said and not gone:
                    gone.append(len(said))
                    del pages["/p/metrics"]
                return found

            def told() -> bool:
                return bool(gone) and len(said) > gone[0]

            decisions, _ = steer(
                control, read, until=lambda: told() and said[-1].reason.startswith("no prefill"), on_said=said.append
            )
    assert control.asked == []
    assert told()
    assert [d.reason for d in decisions][-1] == "no prefill worker tells what it holds, nothing is moved"


def test_a_policy_that_wants_what_is_out_of_bounds_is_refused_and_goes_on() -> None:
    control = Fake(Fleet(2, 2))
    keeper = Keeper(control, "run", bounds=Bounds.parse("1-2:1-4"))
    with keeper:
        decisions, _ = steer(keeper, lambda: queues(9, 0), 1)  # type: ignore[arg-type]
    assert {d.action for d in decisions} == {"refused"}
    assert "prefill workers must be 1 to 2" in decisions[0].reason
    assert control.asked == []


def test_a_move_that_the_endpoint_refuses_is_told_with_the_fleet_that_was_wanted() -> None:
    class Refuses(Fake):
        def ask(self, fleet: Fleet) -> None:
            super().ask(self.fleet)
            raise EndpointError("x: may not be scaled.")

    control = Refuses(Fleet(2, 2))
    decisions, changes = steer(control, lambda: queues(9, 0), 3, most_per_hour=2)
    assert [(d.action, d.after) for d in decisions] == [("refused", Fleet(3, 1))] * 2 + [("cap", Fleet(3, 1))]
    assert len(control.asked) == 2  # what was asked may have been made in part: it counts as a move
    assert decisions[0].reason == "x: may not be scaled. Wanted because: 9 prompts and 0 answers wait"
    assert changes == []


def test_the_way_back_is_awaited_as_long_as_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C or an error a minute at most, at a good end as long as --settle says: pods with weights take longer."""
    monkeypatch.setattr(loadgen.control, "BACK_S", 0.05)

    class Late(Fake):
        back_s, since_s = 0.0, -math.inf

        def ask(self, fleet: Fleet) -> None:
            super().ask(fleet)
            self.since_s = time.monotonic()

        def get(self) -> Standing:
            return Standing(self.fleet, self.fleet, int(time.monotonic() - self.since_s < self.back_s))

    for error, back_s in ((False, 0.4), (True, math.inf)):
        control = Late(Fleet(2, 2))
        keeper = Keeper(control, "sweep", timeout_s=30.0)
        with contextlib.suppress(ZeroDivisionError), keeper:
            keeper.put(Fleet(1, 3))
            control.back_s = back_s
            print(1 / int(not error))
        assert keeper.stranded is error
        keeper.journal.forget()


def test_ctrl_c_on_the_way_back_says_that_it_may_not_be_back() -> None:
    """And with which command it comes back: the note stays."""

    class Halted(Fake):
        def ask(self, fleet: Fleet) -> None:
            if fleet == Fleet(2, 2):
                raise KeyboardInterrupt
            super().ask(fleet)

    said: list[str] = []
    keeper = Keeper(Halted(Fleet(2, 2)), "sweep", say=said.append)
    with pytest.raises(KeyboardInterrupt), keeper:
        keeper.put(Fleet(1, 3))
    assert keeper.stranded
    assert said == ["interrupted: the fleet 2:2 may not be back. To put it back, run: steelyard control restore"]
    assert keeper.journal.entries()[0].before == "2:2"
    keeper.journal.forget()


def test_planned_changes_come_at_their_time() -> None:
    """Each at the first tick from then on."""
    control = Fake(Fleet(1, 3))
    ticks: list[float] = []

    class Noted(Planned):
        def __call__(self, now_s: float, samples: Any, fleet: Fleet, changing: int) -> Fleet | None:
            ticks.append(now_s)
            return super().__call__(now_s, samples, fleet, changing)

    planned = Noted([(0.8, Fleet(3, 1)), (0.1, Fleet(2, 2))])
    _, changes = steer(control, lambda: queues(0, 0), until=lambda: len(control.asked) == 2, steering=planned)
    assert [c.after for c in changes] == [Fleet(2, 2), Fleet(3, 1)]
    first = min(at for at in ticks if at >= 0.1)
    assert [c.asked_s for c in changes] == [first, min(at for at in ticks if at >= 0.8 and at > first)]


class Troubled(Fake):
    """Asked for a fleet, it says once what is wrong."""

    def __init__(self, fleet: Fleet, error: LostError) -> None:
        super().__init__(fleet)
        self.error: LostError | None = error

    def get(self) -> Standing:
        if self.asked and self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().get()


def test_a_change_that_fails_was_never_in_force() -> None:
    """What went wrong is said once; the tick after it sees a fleet with nothing on its way, and that is the old one."""

    class Fails(Troubled):
        def ask(self, fleet: Fleet) -> None:
            self.asked.append(fleet)

    control = Fails(Fleet(1, 3), FailedError("exit code 1"))
    decisions, changes = steer(control, lambda: queues(0, 0), 2, steering=Planned([(0.0, Fleet(2, 2))]))
    assert control.error is None  # it was told
    assert [d.action for d in decisions if d.action != "hold"] == ["move", "refused"]
    assert decisions[-1].action == "hold"
    assert [(c.after, math.isnan(c.joined_s), math.isnan(c.ready_s)) for c in changes] == [(Fleet(2, 2), True, True)]


def test_a_trouble_that_passes_is_not_a_change_that_failed() -> None:
    """A router that answers 503 once while a change is on its way; of a step whatever error ends it is a failure."""

    control = Troubled(Fleet(1, 3), LostError("503"))
    _, changes = steer(control, lambda: queues(0, 0), 3, steering=Planned([(0.0, Fleet(2, 2))]))
    assert control.error is None  # it was told
    assert [(c.after, math.isnan(c.ready_s)) for c in changes] == [(Fleet(2, 2), False)]

    def fails() -> None:
        raise EndpointError("no HTTP answer")

    steps = Steps()
    steps.start([fails])
    assert steps._thread is not None
    steps._thread.join(10)
    with pytest.raises(FailedError, match="no HTTP answer"):
        steps.check()


def test_a_change_that_was_overtaken_was_never_in_force_though_a_later_one_asks_for_the_same() -> None:
    """To, back, and to again before anything has moved: the last alone joined and is in force."""

    class Slow(Fake):
        def get(self) -> Standing:
            done = len(self.asked) == 3
            return Standing(self.asked[-1] if done else Fleet(2, 2), changing=0 if done or not self.asked else 1)

        def ask(self, fleet: Fleet) -> None:
            self.asked.append(fleet)

    class Restless:
        why = "x"
        left: ClassVar[list[Fleet]] = [Fleet(3, 1), Fleet(2, 2), Fleet(3, 1)]

        def __call__(self, now_s: float, samples: Any, fleet: Fleet, changing: int) -> Fleet | None:
            return self.left.pop(0) if self.left else None

    _, changes = steer(Slow(Fleet(2, 2)), lambda: queues(0, 0), 4, steering=Restless())
    assert [c.after for c in changes] == [Fleet(3, 1), Fleet(2, 2), Fleet(3, 1)]
    assert [math.isnan(c.ready_s) for c in changes] == [math.isnan(c.joined_s) for c in changes] == [True, True, False]


def test_what_a_change_cost_is_read_off_rows_and_readings() -> None:
    change = FleetChange(10.0, 14.0, Fleet(2, 1), Fleet(1, 2), "x")
    rows = Observations.empty(6)
    rows.due_s[:] = rows.sent_s[:] = [1, 2, 9.5, 11, 13, 20]
    rows.first_token_s[:] = [1.5, 2.5, 12, 11.1, float("nan"), 20.1]  # waits 0.5, 0.5, 2.5, 0.1, -, 0.1
    rows.last_token_s[:] = [3, 9.9, 13, 12, float("nan"), 21]
    rows.status[:] = ["ok", "ok", "ok", "ok", "failed", "ok"]
    readings = [
        Sample(9.0, "a", "prefill", steps_total=50),
        Sample(9.0, "b", "prefill", steps_total=50),
        Sample(9.0, "c", "decode", steps_total=90),
        Sample(12.0, "c", "decode", steps_total=99),  # works, but had the role
        Sample(12.0, "b", "decode", steps_total=50),  # has the role, has not worked in it
        Sample(13.0, "b", "decode", steps_total=51),
    ]
    (found,) = measured([change], [rows.take(slice(0, 2)), rows.take(slice(2, None))], readings)
    assert (found.in_flight, found.failed, found.slowed) == (3, 1, 1)
    assert found.first_served_s == 13.0


def test_decisions_and_costs_are_rows(made_db_url: str) -> None:
    with open_store(made_db_url) as store:
        decision = Decision(1.0, 5.0, "hold", Fleet(1, 2), None, "nothing to do", 5)
        move = Decision(6.0, 6.0, "move", Fleet(1, 2), Fleet(2, 1), "9 wait", 1)
        store.add_decision(None, decision, "fake", 1000.0)
        store.add_decision(None, move, "fake", 1000.0)
        assert store.decisions(None) == [decision, move]
        change = FleetChange(6.0, 9.0, Fleet(1, 2), Fleet(2, 1), "9 wait", 7.0, 8.0, 12, 0, 3)
        store.add_fleet_change(None, change, "fake", 1000.0)
        assert store.fleet_changes(None) == [change]


def test_a_controller_alone_steers_a_live_endpoint_and_writes_rows(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By thresholds, at the tick that is typed instead of theirs, and without a forecast by a clock that live traffic has not."""
    db, file = f"sqlite:///{tmp_path / 'a.db'}", tmp_path / "t.json"
    rule = DemandRule(Profile.load("constant"), 100.0, 10.0, forecast=Forecast((9.0,) * 12, (9.0,) * 12, 60.0))
    file.write_text(json.dumps(table_of(rule) | {"tick_s": 3600.0}))
    how = ["--policy", "online", "--thresholds", str(file), "--for", "5", "--tick", "0.05"]
    assert main(["control", "run", server, *how, "--json", "--db", db]) == 0
    told = capsys.readouterr()
    assert f"{file}: the rule moves without its forecast" in told.err
    said = json.loads(told.out)
    assert said["moves"] == 0
    assert {d["action"] for d in said["decisions"]} == {"hold"}
    with open_store(db) as store:
        assert sum(d.repeats for d in store.decisions(None)) >= 4


def test_a_forecast_with_a_clock_is_kept_for_the_traffic_it_was_learned_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its phase is that of the schedule: at another rate, or on live traffic, it would move for turns that do not come."""
    n = np.arange(4)
    schedule = Schedule("s", n, n * 1.0, n + 1, n + 1)
    rule = DemandRule(Profile.load("constant"), 100.0, 10.0, forecast=Forecast((9.0,) * 12, (9.0,) * 12, 60.0))
    known = table_of(rule) | {"where": "recommendation 1", "schedule_digest": schedule.digest()}
    assert rule_of({}, known, None, None, None, schedule) == rule
    plain = replace(rule, forecast=Forecast((9.0,) * 6, (9.0,) * 6))
    assert rule_of({}, known | table_of(plain), None, None, None) == plain
    assert capsys.readouterr().err == ""
    for other in (None, scale_rate(schedule, 2.0)):
        assert rule_of({}, known, None, None, None, other) == replace(rule, forecast=None)
        assert "recommendation 1: the rule moves without its forecast" in capsys.readouterr().err


def test_a_controller_reads_the_workers_of_a_targets_file(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queues that only the workers' own pages tell move the fleet; at the end it is put back. The database does not take the
    first decision, which ends no controller: it is stored when that is back."""
    store_one, back = Ledger._done, threading.Event()

    def done(ledger: Ledger, write: Any, said: bool) -> bool:
        stored = store_one(ledger, write, said)
        if not stored and not back.is_set():
            back.set()
            rename(tmp_path / "a.db", "hidden", "decisions")
        return stored

    monkeypatch.setattr(Ledger, "_done", done)
    page = "vllm:num_requests_waiting {}\n"
    with Pages() as pages:
        pages["/p/metrics"], pages["/d/metrics"] = page.format(9), page.format(0)
        file = tmp_path / "targets.json"
        workers = [{"role": role, "metrics": f"{pages.url}/{role[0]}/metrics"} for role in ("prefill", "decode")]
        file.write_text(json.dumps({"workers": workers}))
        arguments = ["--policy", "online-report", "--for", "5", "--tick", "0.2", "--max-switches-per-hour", "1"]
        db = f"sqlite:///{tmp_path / 'a.db'}"
        open_store(db).close()
        rename(tmp_path / "a.db", "decisions", "hidden")
        assert main(["control", "run", server, "--targets", str(file), *arguments, "--json", "--db", db]) == 0
    told = capsys.readouterr()
    said = json.loads(told.out)
    assert told.err.count("The controller goes on") == 1
    with open_store(db) as store:
        stored = store.decisions(None)
    assert [(d.action, d.repeats) for d in stored] == [(d["action"], d["repeats"]) for d in said["decisions"]]
    assert [d.action for d in stored][-2:] == ["move", "cap"]
    assert stored[-1].repeats > 3
    moved = [d for d in said["decisions"] if d["action"] == "move"]
    assert [(d["before"], d["after"], d["reason"]) for d in moved] == [("3:3", "4:2", "9 prompts and 0 answers wait")]
    assert endpoint(server).fleet() == Fleet(3, 3)


def test_a_controller_whose_fleet_does_not_come_back_has_not_done_its_work(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, and the note stays."""
    _, control = fleet_script(tmp_path)
    (tmp_path / "fleet").write_text("9:1")  # its program has no way back to nine
    with Pages() as pages:
        pages["/p/metrics"], pages["/d/metrics"] = "vllm:num_requests_waiting 0\n", "vllm:num_requests_waiting 9\n"
        file = tmp_path / "targets.json"
        workers = [{"role": role, "metrics": f"{pages.url}/{role[0]}/metrics"} for role in ("prefill", "decode")]
        file.write_text(json.dumps({"workers": workers}))
        rule = ["--policy", "online-report", "--targets", str(file), "--tick", "0.1", "--max-switches-per-hour", "1"]
        db = ["--db", f"sqlite:///{tmp_path / 'a.db'}"]
        assert main(["control", "run", server, "--control", str(control), *rule, "--for", "5", *db]) == 1
    assert "could not be put back" in capsys.readouterr().err
    assert (tmp_path / "fleet").read_text() == "8:2"
    assert len(Journal.all()) == 1


def test_a_dry_run_of_a_controller_stores_no_move(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was not made; who reads the rows later could not tell."""
    with Pages() as pages:
        pages["/p/metrics"], pages["/d/metrics"] = "vllm:num_requests_waiting 9\n", "vllm:num_requests_waiting 0\n"
        file = tmp_path / "targets.json"
        workers = [{"role": role, "metrics": f"{pages.url}/{role[0]}/metrics"} for role in ("prefill", "decode")]
        file.write_text(json.dumps({"workers": workers}))
        db = f"sqlite:///{tmp_path / 'a.db'}"
        rule = ["--policy", "online-report", "--targets", str(file), "--tick", "0.1"]
        assert main(["control", "run", server, *rule, "--for", "5", "--dry-run", "--json", "--db", db]) == 0
    told = capsys.readouterr()
    assert any(d["action"] == "move" for d in json.loads(told.out)["decisions"])
    assert f"dry run: PUT {server}/fleet: 3:3 -> 4:2" in told.err
    with open_store(db) as store:
        assert (store.fleet_changes(None), store.decisions(None)) == ([], [])


def test_what_no_database_took_is_counted() -> None:
    """The end waits for a database that is away as long as it is told to, and says how many rows are left."""
    taken: list[int] = []
    back = threading.Event()

    def fails() -> None:
        if not back.is_set():
            raise StoreError("sqlite:///x: is locked.")

    said: list[str] = []
    ledger = Ledger(said.append)
    ledger.put(lambda: taken.append(1))
    ledger.put(fails)
    ledger.put(lambda: taken.append(2))
    soon(lambda: said)
    assert ledger.close(0.2) == 2
    assert taken == [1]
    assert said == ["sqlite:///x: is locked. The controller goes on; its decisions are stored when it is back."]
    back.set()
    assert ledger.close(10) == 0  # and leaves no thread to another test
    assert taken == [1, 2]


def test_nothing_moves_after_the_end() -> None:
    """A reading that comes while the controller is ended asks for nothing: the old fleet may be back already."""
    control, asked = Fake(Fleet(1, 3)), threading.Event()

    def read() -> list[Sample]:
        asked.set()
        controller._stop.wait(30)
        return queues(9, 0)

    controller = Controller(control, read, Steering(CountRule()), time.monotonic(), lambda change: None, tick_s=0.05)
    with controller:
        assert asked.wait(10)
    assert control.asked == []


def test_a_move_that_is_being_asked_for_lands_before_the_way_back() -> None:
    """And no other comes after it, from a controller whose end nobody waited for: a second Ctrl-C."""
    asking, free = threading.Event(), threading.Event()

    class Slow(Fake):
        def ask(self, fleet: Fleet) -> None:
            if fleet == Fleet(3, 1):
                asking.set()
                free.wait(30)
            super().ask(fleet)

    control = Slow(Fleet(2, 2))
    keeper = Keeper(control, "run")
    controller = Controller(
        keeper, lambda: queues(0, 0), Planned([(0.0, Fleet(3, 1))]), time.monotonic(), lambda change: None, tick_s=0.05
    )
    with contextlib.suppress(KeyboardInterrupt), keeper:
        controller.__enter__()
        assert asking.wait(30)
        threading.Timer(0.2, free.set).start()
        raise KeyboardInterrupt
    controller.__exit__()
    assert control.asked == [Fleet(3, 1), Fleet(2, 2)]
    assert Journal.all() == []
    with pytest.raises(InputError, match="not asked for 1:3, for the command is ending"):
        keeper.ask(Fleet(1, 3))


def test_a_change_that_was_given_up_says_nothing_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that would not end in time, and fails later, is no failure of the change that came after it, nor a step of it."""
    monkeypatch.setattr(loadgen.control, "STEP_S", 0.05)
    steps, hold, last = Steps(), threading.Event(), threading.Event()

    def slow() -> None:
        hold.wait(10)
        raise LostError("it does not drain")

    def ends() -> None:
        hold.wait(10)

    def waits() -> None:
        last.wait(10)

    for late in (slow, ends):
        steps.start([late])
        before = steps._thread
        assert before is not None
        steps.start([waits])
        hold.set()
        before.join(10)
        assert steps.check() == 1
        hold.clear()
    last.set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_controller_and_puts_the_fleet_back(server: str, tmp_path: Path, number: int) -> None:
    control = Reference(endpoint(server))
    before = control.get().fleet or Fleet(9, 9)
    child = subprocess.Popen(
        [sys.executable, "-m", "advisor", "control", "run", server, "--policy", "online-report", "--tick", "0.1"],
        stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert "hold" in child.stdout.readline()
        child.send_signal(number)
        said, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        assert "stopping" in said
    finally:
        child.kill()
    assert control.get().settled(before)


@pytest.mark.parametrize("started", [True, False])
def test_ctrl_c_while_a_controller_begins_is_a_stop_like_any_other(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    """Its thread may say its first line before the main one is further."""
    enter = Controller.__enter__

    def interrupted(controller: Controller) -> Controller:
        if started:
            enter(controller)
        raise KeyboardInterrupt

    monkeypatch.setattr(Controller, "__enter__", interrupted)
    how = ["--policy", "online-report", "--tick", "0.1", "--db", f"sqlite:///{tmp_path / 'a.db'}"]
    assert main(["control", "run", server, *how]) == 0
    assert "stopping" in capsys.readouterr().out
    assert Journal.all() == []
