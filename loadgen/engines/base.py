"""What an engine can say of itself: how it is asked, known, listed and read. One file an engine, each part optional.

An engine is an instance of a subclass of :class:`Engine`. Those of other packages are found through the entry point group
``steelyard.engines``; docs/engines.md shows one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

from traces.errors import EndpointError
from traces.records import STAGES, Sample

GLANCE_S = 5.0
"""How long a server may take to answer one question of a probe."""

ELSEWHERE_S = 1.5
"""The same on a port where perhaps nobody is: a firewall may swallow the question."""

MOST_LISTED = 1024
"""Workers that a server may list: each has a page, which is asked for in a thread of its own."""

FACTS = ("prefill_worker", "decode_worker", *STAGES, "cached_tokens")
"""What :meth:`Engine.facts` may say under a name of ours; everything else is kept under the engine's own."""


class Reply(Protocol):
    """An answer as a whole, as :class:`loadgen.control.Reply`."""

    @property
    def status(self) -> int:
        """Of HTTP."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""
        ...

    @property
    def text(self) -> str:
        """The body."""
        ...

    def json(self) -> Any:
        """The body as JSON, None if it is none."""
        ...


class Server(Protocol):
    """A server that can be asked, as :class:`loadgen.control.Endpoint`."""

    shown: str

    def fetch(self, method: str, path: str, body: bytes | None = None, timeout_s: float | None = None) -> Reply:
        """One request; EndpointError when no answer comes."""
        ...


class Glance:
    """What a server answers to harmless questions, each asked once; a question that fails is answered by nothing.

    elsewhere: makes a Server of a URL, for questions to other ports of the same host; without it those are not asked.
    """

    def __init__(
        self,
        server: Server,
        timeout_s: float = GLANCE_S,
        elsewhere: Callable[[str], Server] | None = None,
    ) -> None:
        self.shown = server.shown
        self._server, self._timeout_s, self._elsewhere = server, timeout_s, elsewhere
        self._held: dict[str, Reply | None] = {}

    def get(self, path: str) -> Reply | None:
        """The reply to a GET, whatever its status; None where none came."""
        if path not in self._held:
            try:
                self._held[path] = self._server.fetch("GET", path, timeout_s=self._timeout_s)
            except EndpointError:
                self._held[path] = None
        return self._held[path]

    def json(self, path: str) -> Any:
        """The JSON of a good reply, else None."""
        reply = self.get(path)
        return reply.json() if reply is not None and reply.status == 200 else None

    def text(self, path: str) -> str:
        """The text of a good reply, else nothing."""
        reply = self.get(path)
        return reply.text if reply is not None and reply.status == 200 else ""

    def listed(self, path: str, name: str) -> list[Any]:
        """The list that the JSON of a good reply holds under a name; no members where that is no list."""
        held = member(self.json(path), name)
        return held if isinstance(held, list) else []

    def page(self, port: int) -> tuple[str, str]:
        """(URL, text) of /metrics on another port of the same host; ("", "") where nothing answers."""
        host = urlsplit(self.shown).hostname or ""
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if self._elsewhere is None or not host:
            return "", ""
        text = Glance(self._elsewhere(url), ELSEWHERE_S).text("/metrics")
        return (f"{url}/metrics", text) if text else ("", "")

    @property
    def models(self) -> list[dict[str, Any]]:
        """What ``/v1/models`` lists."""
        held = self.json("/v1/models")
        data = held.get("data") if isinstance(held, dict) else None
        return [m for m in data if isinstance(m, dict)] if isinstance(data, list) else []

    @property
    def owners(self) -> set[str]:
        """``owned_by`` of the models."""
        return {str(m.get("owned_by") or "") for m in self.models}


def member(held: Any, name: str) -> Any:
    """A member of a JSON object; None where it is no object."""
    return held.get(name) if isinstance(held, dict) else None


def believed(workers: list[Worker], shown: str) -> list[Worker]:
    """Workers as the server at ``shown`` told of them. EndpointError for more than MOST_LISTED."""
    if len(workers) > MOST_LISTED:
        raise EndpointError(
            f"{shown}: it lists {len(workers)} workers, and at most {MOST_LISTED} are believed. "
            "Correct its list, or leave that out with --engine openai."
        )
    return workers


def without_rank(url: str) -> str:
    """The URL of an engine of which a router names one data-parallel rank, ``http://HOST:PORT@RANK``; any other as it is."""
    base, at, rank = url.rpartition("@")
    return base if at and rank.isdecimal() and ":" in base.partition("://")[2] and "@" not in base else url


def address(url: str) -> str:
    """HOST:PORT of a URL (and its path, if it has one beside that of metrics): by that a worker is known, whoever names it. What
    stands behind a ? is no part of a name: it may be a token."""
    url = without_rank(url).partition("?")[0]
    bare = url.partition("://")[2].rpartition("@")[2] if "://" in url else url
    return bare.rstrip("/").removesuffix("/metrics").removesuffix("/prometheus")


@dataclass(frozen=True, slots=True)
class Worker:
    """One server behind the endpoint, or the router before them.

    name: as rows say it, unique on its endpoint; "" until its metrics have told it. role: one of
    :data:`traces.records.ROLES`, "" where it is not known. url: base URL of its own HTTP server. metrics: URL of its metrics
    page. weight: how many workers it stands for. id: the router's own name of it (for a DELETE, in an answer's facts).
    healthy: None where nobody says. details: what else its list tells, such as a bootstrap port.
    """

    name: str
    role: str = ""
    url: str = ""
    metrics: str = ""
    weight: int = 1
    id: str = ""
    healthy: bool | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Everything by which somebody may call it."""
        return {n for n in (self.name, self.id, address(self.url), address(self.metrics)) if n}


@dataclass(frozen=True, slots=True)
class Metric:
    """How one metric is read. name: the engine's. to: a field of :class:`traces.records.Sample`, or the name of a histogram.

    Of several metrics to one field the first that is there counts (old and new spellings); those with another part are added.
    scale: to our unit (0.001 for milliseconds). where: labels that a line must have, each with the values that count ("":
    it may lack it). of: the label that names another worker, of which the line speaks (a router's page); without it the
    line speaks of the page's own server. own: the label in which that says its own id, and how it is to be read. role: of
    whom the line speaks, where no label says it. times, per: what the page itself says to multiply with and divide by,
    metrics or a label's number (``name[label]``). histogram: it is one (``_bucket``, ``_sum``, ``_count``), or a summary;
    the difference over the run is kept, in the unit of ``to``.
    """

    name: str
    to: str
    part: str = ""
    scale: float = 1.0
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    of: str = ""
    own: tuple[str, Callable[[str], str]] | None = None
    role: str = ""
    times: Sequence[str] = ()
    per: str = ""
    histogram: bool = False


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to ask an engine. chat: chat completions instead of completions. token_ids: prompts as ids, exact to a token.

    members: JSON members of every body, without braces: ``"nvext":{...}``; or "".
    """

    name: str
    chat: bool = False
    token_ids: bool = True
    members: str = ""

    @property
    def path(self) -> str:
        """The request's path under the base URL."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"


class Engine:
    """Any OpenAI-shaped server; subclasses say what they know beyond that.

    name: unique, as ``--engine`` takes it. token_ids: a prompt may be a list of ids. members: of every request body. metrics:
    the engine's names, old and new spellings, and how each is read. page: where a server shows them. keep: members of stream
    events that facts are made of (of the first event, and of those without content: the finish and usage chunks). headers:
    response headers that are kept, in lower case.
    """

    name: ClassVar[str] = "openai"
    token_ids: ClassVar[bool] = True
    members: ClassVar[Mapping[str, Any]] = {}
    metrics: ClassVar[tuple[Metric, ...]] = ()
    page: ClassVar[str] = "/metrics"
    keep: ClassVar[tuple[str, ...]] = ("id", "usage")
    headers: ClassVar[tuple[str, ...]] = ()

    def dialect(self, *, chat: bool = False, text: bool = False) -> Dialect:
        """How requests are made. text: prompts as words even where ids would do."""
        members = json.dumps(dict(self.members), separators=(",", ":"))[1:-1]
        return Dialect(self.name, chat, self.token_ids and not (chat or text), members)

    def recognise(self, seen: Glance) -> str:
        """By what this engine is known at a server, in words; "" where it is not known there."""
        return ""

    def version(self, seen: Glance) -> str:
        """Of the engine, "" where it does not say."""
        return ""

    def workers(self, seen: Glance) -> list[Worker]:
        """The workers and routers that the server tells of, the router first; none where it does not tell."""
        return []

    def role(self, before: Sample | None, now: Sample) -> str:
        """The role that a worker's readings betray, "" if none: for engines that have no label for it.

        before: its reading before, None at the first.
        """
        return ""

    def facts(self, kept: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """What an answer said of how it was served: names of :data:`FACTS` (times in seconds), or the engine's own.

        kept: the members of ``keep`` as last seen. Called once an answer has ended; must not raise.
        """
        cached = member(member(kept.get("usage"), "prompt_tokens_details"), "cached_tokens")
        return {"cached_tokens": cached} if type(cached) is int and cached >= 0 else {}
