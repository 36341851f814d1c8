"""Who may come in by a port of ours: over TLS where a certificate is given, with the token where one is asked for."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from advisor.cli import main
from loadgen.client import target
from loadgen.cluster.embedded import embedded
from loadgen.control import Endpoint
from loadgen.exposition import exposed
from loadgen.ports import Door, loopback
from loadgen.swarm import Swarm
from tests.test_client import self_signed
from traces.errors import EndpointError, InputError
from traces.records import Fleet
from traces.store import open_store

TOKEN = "t0ken-of-these-tests"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(certificate, key) of localhost."""
    certificate, key = self_signed(tmp_path_factory.mktemp("tls"))
    return str(certificate), str(key)


def ask(url: str, files: tuple[str, str], token: str = "", cookie: str = "") -> tuple[int, str, str]:
    """(status, body, cookie that was set), over TLS that is checked."""
    asked = urllib.request.Request(url.replace("127.0.0.1", "localhost"))
    if token:
        asked.add_header("Authorization", f"Bearer {token}")
    if cookie:
        asked.add_header("Cookie", cookie)
    tls = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=files[0]))
    opener = urllib.request.build_opener(
        tls, type("Stay", (urllib.request.HTTPRedirectHandler,), {"redirect_request": lambda *_: None})
    )
    try:
        with opener.open(asked, timeout=60) as answer:
            return answer.status, answer.read().decode(), answer.headers.get("Set-Cookie", "")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers.get("Set-Cookie", "")


@contextmanager
def silent(url: str) -> Iterator[None]:
    """Somebody who connects and says nothing, meanwhile."""
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))):
        yield


@contextmanager
def dash(db: str, files: tuple[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The dash as a command on TLS; it prints one line when it listens. It ends with the block."""
    command = [
        sys.executable,
        "-m",
        "advisor",
        "dash",
        "--port",
        "0",
        "--db",
        db,
        "--tls-cert",
        files[0],
        "--tls-key",
        files[1],
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"STEELYARD_DASH_TOKEN": TOKEN}
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def test_every_port_speaks_tls_and_asks_for_the_token(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference endpoint, dash, Locust's page and the metrics: https, 401 without the token, 200 with it, held up by nobody who
    connects and says nothing; browsers get a cookie that only goes over TLS. ``doctor`` looks at such an endpoint as it is."""
    cert, key = files
    db = f"sqlite:///{tmp_path / 't.db'}"
    open_store(db).close()
    with (
        dash(db, files) as child,
        embedded("constant", Fleet(1, 1), token=TOKEN, cert=cert, key=key) as endpoint,
        exposed(Door(token=TOKEN, cert=cert, key=key)) as (metrics, _),
        Swarm(1, web=Door(token=TOKEN, cert=cert, key=key)) as swarm,
    ):
        assert child.stdout is not None
        page = child.stdout.readline().split()[-1]
        web = swarm.web.partition("/?")[0]  # port 0 was asked for: it says which it took
        for url, path in ((endpoint, "/v1/models"), (page, "/"), (web, "/stats/requests"), (metrics, "")):
            assert url.startswith("https://"), url
            with silent(url):
                assert ask(url + path, files)[0] == 401, url
                assert ask(url + path, files, token="wrong")[0] == 401, url
                assert ask(url + path, files, token=TOKEN)[0] == 200, url
            with pytest.raises(OSError):  # noqa: PT011 - refused, reset or not HTTP
                urllib.request.urlopen(url.replace("https", "http") + path, timeout=5)
        for url in (page, web):
            assert ask(f"{url}/?token=wrong", files)[0] == 401
            status, _, cookie = ask(f"{url}/?token={TOKEN}", files)
            assert (status in (302, 303), "Secure" in cookie, "HttpOnly" in cookie) == (True, True, True)
            assert TOKEN not in cookie
            assert ask(f"{url}/", files, cookie=cookie.split(";")[0])[0] == 200
        where = target(endpoint.replace("127.0.0.1", "localhost"), api_key=TOKEN, ca_file=cert)
        body = {
            "model": "constant",
            "prompt": [1, 2],
            "max_tokens": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        said = Endpoint(where).fetch("POST", "/v1/completions", json.dumps(body).encode())
        assert said.body.count(b'" tok"') == 5
        monkeypatch.setenv("STEELYARD_API_KEY", TOKEN)
        how = ["--endpoint", where.shown, "--ca-file", cert, "--engine", "openai", "--chat", "--header", "X-Team: a"]
        main(["doctor", *how, "--db", db, "--json"])
        checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
        assert {checks[name]["word"] for name in ("endpoint", "stream")} == {"ok"}
        assert "openai dialect" in checks["stream"]["found"]
        # Nobody reads a command line for the token.
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # another user's, or of a process that has just ended
                assert TOKEN.encode() not in line.read_bytes()
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0


def test_other_addresses_need_a_token_and_are_told_of_tls() -> None:
    """Beyond loopback: no token, no port, and the message says why; a token without TLS is warned of; both are quiet."""
    ours = ("127.0.0.1", "::1", "localhost", "127.9.8.7")
    others = ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "127.0.0.1.nip.io")
    for host, mine in [(h, True) for h in ours] + [(h, False) for h in others]:
        assert loopback(host) is mine, host
        door = Door(host)
        if mine:
            door.check("--host", "why", "How")
        else:
            with pytest.raises(
                InputError, match=r"--host .*: why, so it needs a token\. How, or stay on 127\.0\.0\.1\."
            ):
                door.check("--host", "why", "How")
        assert ("in the clear" in Door(host, token=TOKEN).warning) is not mine
        assert Door(host, token=TOKEN, cert="c.pem").warning == ""
    assert TOKEN not in repr(Door(token=TOKEN))
    with pytest.raises(InputError, match="needs a token"), exposed(Door("0.0.0.0")):
        pass


def test_another_page_in_the_browser_is_refused_and_programs_are_not() -> None:
    """By a rebound name, across sites or with another's Origin: by the reference endpoint, the metrics and, as their own tests
    say, dash and web UI. Programs, loopback's names and, with a token, every name go on working."""

    def asked(url: str, method: str = "GET", **headers: str) -> int:
        sent = {k.replace("_", "-"): v for k, v in headers.items()}
        data = b'{"prefill": 1, "decode": 1}' if method == "PUT" else None
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data, headers=sent, method=method), timeout=60
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    with embedded("constant", Fleet(1, 1)) as endpoint, exposed() as (metrics, _):
        for url, method in ((f"{endpoint}/fleet", "PUT"), (f"{endpoint}/health", "GET"), (metrics, "GET")):
            good = 202 if method == "PUT" else 200
            port = url.split(":")[2].split("/")[0]
            assert asked(url, method) == good
            for name in ("localhost", f"LOCALHOST:{port}", f"[::1]:{port}", f"127.0.0.1:{port}"):
                assert asked(url, method, Host=name) == good, name
            assert asked(url, method, Host=f"127.0.0.1:{port}", Sec_Fetch_Site="none") == good
            for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.nip.io"):
                assert asked(url, method, Host=name) == 421, name
            for site in ("cross-site", "same-site"):
                assert asked(url, method, Sec_Fetch_Site=site) == 403
            assert asked(url, method, Origin="http://127.0.0.1:1") == 403
            assert asked(url, method, Origin="null") == 403
    own, with_token = Door("127.0.0.2"), Door("0.0.0.0", token=TOKEN)
    assert own.foreign({"Host": "127.0.0.2:8089"}) is None
    assert own.foreign({}) is None
    for name in ("gpu-host:8089", "10.0.0.1"):
        assert with_token.foreign({"Host": name}) is None
        assert own.foreign({"Host": name}) is not None
    linked = {"Host": "localhost", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert own.foreign(linked, links=True) is None
    assert own.foreign(linked) is not None


def test_a_port_that_is_taken_is_named() -> None:
    """The web UI's, not the Locust master's beside it, with what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = rf"^cannot listen on 127\.0\.0\.1:{port} \(Address already in use\)\. Give another port, or 0\.$"
        with pytest.raises(EndpointError, match=words), Swarm(1, web=Door(port=port)):
            pass


def test_a_certificate_that_cannot_be_used_is_one_line(files: tuple[str, str], tmp_path: Path) -> None:
    """Not there, not PEM, another's key, an encrypted key, a key alone: which file, why, what to give; nobody is asked."""
    cert, key = files
    (tmp_path / "other").mkdir()
    other = self_signed(tmp_path / "other")[1]
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "rsa", "-aes128", "-passout", "pass:abcd", "-in", key, "-out", locked],
        capture_output=True,
        check=True,
    )
    for held, words in (
        ((str(tmp_path / "no.pem"), key), "no.pem.*No such file"),
        ((key, ""), "cannot be used"),
        ((cert, str(other)), "(?i)mismatch"),
        ((cert, str(locked)), "not encrypted"),
        (("", key), "of no use without --tls-cert"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            Door(cert=held[0], key=held[1]).context()
        assert "\n" not in str(caught.value)
