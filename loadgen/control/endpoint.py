"""Talks to an endpoint beside the load: is it what we take it for, which fleet is in force, ask it for another."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote

from loadgen.client import Target, tls_words, unsaid
from loadgen.engines import EXACT, Dialect, Measure, Prompts, trial_sizes
from loadgen.ports import shown
from loadgen.stream import Answer, masked, printable
from traces.errors import EndpointError
from traces.records import Fleet

PREFLIGHT_S = 15.0
"""How long the endpoint may take to answer a question before the run."""

MAX_BODY = 16 * 1024 * 1024

MOST_WORKERS = 10**6
"""An endpoint that speaks of as many is not believed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as a whole. content_type: in lower case, without secrets. headers: names in lower case. secrets: what it may
    quote of the request."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def words(self) -> str:
        """How the body begins, for messages. It may quote the path that it was asked, with a worker's URL in it."""
        return printable(_quoted(self.text, self.secrets), self.secrets)

    @property
    def text(self) -> str:
        """The body as text; what is not UTF-8 is replaced."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as JSON, None if it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class _Heard(io.RawIOBase):
    """What a socket says until a moment of the monotonic clock; TimeoutError from then on.

    A timeout of the socket begins anew with every byte, and http.client reads headers, 100 Continue and trailers by itself,
    for as long as they come.
    """

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._sock, self._raw, self._until = sock, sock.makefile("rb", buffering=0), until

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """See :class:`io.RawIOBase`."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Let go of the socket."""
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer that is whole by then, or a TimeoutError."""

    def __init__(self, sock: socket.socket, *args: Any, until: float, **more: Any) -> None:
        super().__init__(sock, *args, **more)
        self.fp.close()
        self.fp = io.BufferedReader(_Heard(sock, until))


class RefusedError(EndpointError):
    """Nobody listens there."""


class Endpoint:
    """A server under test, asked outside the load. Every failure is an EndpointError of one line."""

    def __init__(self, where: Target) -> None:
        self.where = where
        self.shown = where.shown
        self._secrets = where.secrets()

    def fetch(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        timeout_s: float | None = None,
        most_bytes: int = MAX_BODY,
    ) -> Reply:
        """One request on a connection of its own; the whole answer must come within ``timeout_s`` [PREFLIGHT_S]."""
        where = self.where
        asked = unsaid(_quoted(path.partition("?")[0], self._secrets))  # a worker's URL may be in it
        said = self.shown + printable(asked, self._secrets)
        timeout_s = PREFLIGHT_S if timeout_s is None else timeout_s
        until = time.monotonic() + timeout_s
        late = EndpointError(f"{said}: no answer within {timeout_s:g} s. Is the server loaded, and is this its port?")
        try:
            tls = where.tls()
            host, port = where.proxy or (where.host, where.port)
            connection = (
                http.client.HTTPSConnection(host, port, timeout=timeout_s, context=tls)
                if tls is not None
                else http.client.HTTPConnection(host, port, timeout=timeout_s)
            )
            connection.response_class = partial(_Answer, until=until)  # type: ignore[assignment]  # called, no more
            auth = {"Proxy-Authorization": where.proxy_auth} if where.proxy_auth else {}
            if where.proxy and tls is not None:
                connection.set_tunnel(where.host, where.port, auth)
        except OSError as error:
            raise EndpointError(f"{self.shown}: the TLS settings cannot be used ({error}).") from None
        try:
            headers = where.headers_with({"Content-Type": "application/json"} if body is not None else {})
            whole = where.prefix + path
            if where.proxy and tls is None:
                headers, whole = headers | auth, f"http://{where.netloc}{whole}"
            connection.request(method, whole, body=body, headers=headers)
            answer = connection.getresponse()
            held = bytearray()
            while piece := answer.read1(65536):
                held += piece
                if len(held) > most_bytes:
                    raise EndpointError(f"{said}: the answer is larger than {most_bytes} bytes.")
            told = {name.lower(): value for name, value in answer.getheaders()}
            kind = printable(told.get("content-type", ""), self._secrets).lower()
            return Reply(answer.status, kind, bytes(held), told, self._secrets)
        except ConnectionRefusedError:
            proxy = f"--proxy {shown(host)}:{port}", "proxy", "--proxy"
            asked, what, other = proxy if where.proxy else (self.shown, "server", "--endpoint")
            raise RefusedError(f"{asked}: connection refused. Start the {what}, or give another {other}.") from None
        except ssl.SSLError as error:
            raise EndpointError(
                f"{self.shown}: TLS failed ({tls_words(error)}). Give --ca-file FILE, --cert FILE if it asks for the client's, "
                "or another URL."
            ) from None
        except TimeoutError:
            raise late from None
        except socket.gaierror as error:
            raise EndpointError(
                f"{f'--proxy {host}' if where.proxy else self.shown}: the host name cannot be resolved ({error.strerror}). "
                "Check the URL and the name server."
            ) from None
        except (http.client.InvalidURL, UnicodeEncodeError):  # each shows what was asked
            raise EndpointError(
                f"{said}: the URL holds a character that HTTP does not allow. Write it as %20 and the like."
            ) from None
        except (OSError, http.client.HTTPException) as error:
            from traces.store import redact

            words = printable(redact(str(error) or type(error).__name__), self._secrets)
            # A server that asks for a client's certificate hangs up without a word after the handshake of TLS 1.3.
            why = (
                "does the port speak https?"
                if tls is None
                else "does it ask for the client's certificate (--cert FILE)?"
            )
            raise EndpointError(f"{said}: no HTTP answer ({words}). Check the URL: {why}") from None
        finally:
            connection.close()

    # --- is it what we take it for

    def models(self, *, named: bool = False) -> list[dict[str, Any]] | None:
        """What ``/v1/models`` lists; None if the server has no such list.

        named: the model is known, so a list that is not available (503) is none: vllm-router in its discovery mode answers so
        while it serves.
        """
        reply = self.fetch("GET", "/v1/models")
        if reply.status in (404, 405, 501) or (named and reply.status == 503):
            return None
        if reply.status == 503:
            raise EndpointError(
                f"{self.shown}/v1/models: HTTP 503: {reply.words} A server without workers does not serve; "
                "vllm-router with --vllm-discovery-address serves all the same: name the model with --model."
            )
        self._must_be_json(reply, "/v1/models")
        held = reply.json()
        data = held.get("data") if isinstance(held, dict) else None
        return [m for m in data if isinstance(m, dict)] if isinstance(data, list) else None

    def choose_model(self, model: str | None) -> tuple[str, str]:
        """(model, owner) to ask for: the one given, if the server has it, or the server's first."""
        listed = self.models(named=model is not None)
        names = [str(m.get("id")) for m in listed or () if m.get("id")]
        owners = {str(m.get("id")): str(m.get("owned_by") or "") for m in listed or ()}
        if model is None:
            if not names:
                raise EndpointError(
                    f"{self.shown}/v1/models lists no model. Has each role a worker (Dynamo lists none otherwise)? "
                    "If so, name one with --model."
                )
            return names[0], owners[names[0]]
        if names and model not in names:
            listing = masked(", ".join(names[:10]), self._secrets)
            raise EndpointError(
                f"{self.shown} does not serve the model {model!r}. It serves: {listing}. Pass one as --model."
            )
        return model, owners.get(model, "")

    def try_one(self, dialect: Dialect, model: str, tries: int = 3) -> None:
        """Ask for two tokens: does it stream? A server that fails now and then gets ``tries``."""
        body = Prompts(dialect, model, 8, time.time_ns()).body(0, 8, 2)
        problem = ""
        for _ in range(tries):
            reply = self.fetch("POST", dialect.path, body)
            problem = self._problem(reply, dialect)
            if not problem:
                return
            if reply.status < 500:
                break
        raise EndpointError(f"{self.shown}{dialect.path}: {problem}")

    def measure(self, dialect: Dialect, model: str, longest: int, words: Sequence[str] = ()) -> Measure:
        """How many tokens the server counts for prompts of ours: a few requests of one token, before the run.

        One token an id or word, nothing added, where it sends no usage or does not answer.
        """
        sizes = trial_sizes(longest, words)
        prompts = Prompts(
            dialect, model, sizes[-1], time.time_ns(), words=words
        )  # the same salt in each: it cancels out
        found: list[int] = []
        for size in sizes:
            body = prompts.body(0, size, 1)
            tokens = -1
            for _ in range(3):
                answer = Answer()
                with contextlib.suppress(EndpointError):
                    reply = self.fetch("POST", dialect.path, body)
                    if reply.status // 100 == 2:
                        answer.push(0.0, reply.body)
                        answer.finish(whole=True)
                tokens = answer.prompt_tokens
                if tokens > 0:
                    break
            if tokens <= 0:
                return EXACT
            found.append(tokens)
        return Measure.fit(sizes, found)

    def _problem(self, reply: Reply, dialect: Dialect) -> str:
        words = reply.words
        if reply.status in (401, 403):
            return f"HTTP {reply.status}, it wants credentials. Set STEELYARD_API_KEY or pass --api-key-file FILE."
        if reply.status // 100 == 3:
            return f"HTTP {reply.status}, a redirect, which is not followed. Give the final URL as --endpoint."
        if reply.status in (400, 422) and dialect.token_ids:
            return f"HTTP {reply.status} to a prompt of token ids: {words}. Try --prompts text."
        if reply.status // 100 != 2:
            return f"HTTP {reply.status}: {words or 'no text'}. Look at the server's log."
        if "html" in reply.content_type or reply.body[:512].lstrip()[:1] == b"<":
            return "it answers with a web page, not with an event stream. Check the URL and the port."
        answer = Answer(secrets=self._secrets)
        answer.push(0.0, reply.body)
        answer.finish(whole=True)
        if answer.error or not answer.chunks:
            seen = f"{answer.error}: {answer.detail}" if answer.error else f"{reply.content_type or 'no type'}: {words}"
            return f"no event stream of tokens came back ({seen}). Is this an OpenAI-shaped server?"
        return ""

    def _must_be_json(self, reply: Reply, path: str) -> None:
        if reply.status in (401, 403):
            raise EndpointError(
                f"{self.shown}{path}: HTTP {reply.status}, it wants credentials. "
                "Set STEELYARD_API_KEY or pass --api-key-file FILE."
            )
        if "html" in reply.content_type or reply.body[:512].lstrip()[:1] == b"<":
            raise EndpointError(
                f"{self.shown}{path}: HTTP {reply.status} with a web page, not JSON. Check the URL and the port."
            )
        if reply.status // 100 != 2:
            words = reply.words or "no text"
            raise EndpointError(f"{self.shown}{path}: HTTP {reply.status}: {words}. Look at the server's log.")
        if reply.json() is None:
            raise EndpointError(f"{self.shown}{path}: the answer is not JSON. Check the URL and the port.")

    # --- the fleet

    def fleet(self) -> Fleet | None:
        """The fleet in force; None if this endpoint cannot say."""
        state = self.fleet_state()
        return state[0] if state else None

    def fleet_state(self) -> tuple[Fleet | None, bool, Fleet, int] | None:
        """(fleet in force, settled: nothing drains and the target is reached, fleet asked for, workers that change).

        The fleet in force is None while a role is without a worker. None where the endpoint cannot say.
        """
        reply = self.fetch("GET", "/fleet")
        held = reply.json() if reply.status == 200 else None
        if not isinstance(held, dict):
            return None
        fleet = _fleet(held)
        target = held.get("target")
        aimed = _fleet(target) if isinstance(target, dict) else None
        if isinstance(target, str) and ":" in target:
            aimed = Fleet.parse(target)
        wanted = aimed or fleet
        if wanted is None:
            return None
        changing = held.get("draining")
        settled = not changing and aimed in (None, fleet)
        count = changing if isinstance(changing, (int, float)) and 0 <= changing < MOST_WORKERS else 0
        return fleet, settled, wanted, int(count)

    def ask_fleet(self, fleet: Fleet, timeout_s: float | None = None) -> None:
        """Ask for a fleet and do not wait for it. EndpointError when the server refuses."""
        reply = self.fetch("PUT", "/fleet", fleet_body(fleet), timeout_s)
        if reply.status // 100 != 2:
            held = reply.json()
            said = held.get("error") if isinstance(held, dict) else None
            if isinstance(said, dict):
                said = said.get("message")
            words = printable(_quoted(str(said), self._secrets), self._secrets) if said else reply.words
            raise EndpointError(f"{self.shown}/fleet: it refused the fleet {fleet} (HTTP {reply.status}: {words}).")


def _quoted(said: str, secrets: Sequence[str]) -> str:
    """What a server says, without these secrets and the passwords of URLs, also where those are percent-encoded: before it is
    cut, perhaps within one."""
    from traces.store import redact

    return redact(unquote(masked(said[:4000], secrets)))


def fleet_body(fleet: Fleet) -> bytes:
    """What ``PUT /fleet`` takes."""
    mixed = {"mixed": fleet.mixed} if fleet.mixed else {}
    return json.dumps({"prefill": fleet.prefill, "decode": fleet.decode} | mixed).encode()


def _fleet(held: dict[str, Any]) -> Fleet | None:
    counts = [held.get(role, 0) for role in ("prefill", "decode", "mixed")]
    if all(type(n) is int and 0 <= n < MOST_WORKERS for n in counts) and (min(counts[:2]) >= 1 or counts[2]):
        return Fleet(*counts)
    return None
