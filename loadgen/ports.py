"""Who may come in by a port of ours: on loopback whoever is on this machine, elsewhere whoever has the token.

With a certificate the port speaks TLS. Without one a token that comes from elsewhere crosses the network in the clear, and
that is said. Locust's worker protocol is another matter: :mod:`loadgen.secret`.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from traces.errors import EndpointError, InputError

_PROCESS = secrets.token_bytes(32)
"""Goes into every cookie of this process: they end with it."""


def loopback(host: str) -> bool:
    """Is that an address that only this machine reaches?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def everywhere(host: str) -> bool:
    """Does that name every interface of this machine?"""
    try:
        return host in ("", "*") or ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def shown(host: str) -> str:
    """The host as a URL has it."""
    return f"[{host}]" if ":" in host else host


@lru_cache(64)
def _own(host: str, bound: str) -> bool:
    """Does that Host header name loopback or the address that was bound? One that is empty is no browser's."""
    name = re.sub(r":\d+$", "", host).strip("[]").lower()
    return not name or name == bound or loopback(name)


def _of(url: str) -> str:
    """Host and port of a URL, as a Host header has them; "" when it has none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def _bytes(said: str) -> bytes:
    """What was said, also what is no UTF-8: aiohttp hands that over as surrogates."""
    return said.encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class Door:
    """How a server of ours is reached. token: asked of everybody; cert, key: PEM files of the certificate that it shows (key:
    "" when it is in the same file)."""

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = field(default=None, repr=False)
    cert: str = ""
    key: str = ""

    def check(self, option: str, why: str, how: str) -> None:
        """InputError when others reach the port and there is no token. option: that names the address; how: to give one."""
        if self.token is None and not loopback(self.host):
            raise InputError(f"{option} {self.host}: {why}, so it needs a token. {how}, or stay on 127.0.0.1.")

    @property
    def scheme(self) -> str:
        """http or https."""
        return "https" if self.cert else "http"

    def url(self, port: int | None = None) -> str:
        """The base URL; port: the one that was taken."""
        return f"{self.scheme}://{shown(self.host)}:{self.port if port is None else port}"

    @property
    def warning(self) -> str:
        """What the user should know of it; "" when there is nothing."""
        if self.cert or loopback(self.host):
            return ""
        return (
            f"{self.url()}: the token crosses the network in the clear. Give --tls-cert and --tls-key, or use a tunnel."
        )

    def context(self, kind: type[ssl.SSLContext] = ssl.SSLContext) -> Any:
        """TLS 1.2 or later, of ssl's kind or gevent's; None without a certificate. InputError when that cannot be used."""
        if not self.cert:
            if self.key:
                raise InputError(f"--tls-key {self.key}: is of no use without --tls-cert.")
            return None
        made = kind(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            made.load_cert_chain(self.cert, self.key or None, password=lambda: "")  # else it would ask the terminal
        except OSError as error:  # SSLError is one
            words = (error.reason or "not PEM" if isinstance(error, ssl.SSLError) else error.strerror or "").replace(
                "_", " "
            )
            files = f"--tls-cert {self.cert}" + (f", --tls-key {self.key}" if self.key else "")
            raise InputError(
                f"{files}: cannot be used ({words}). Give PEM files, the certificate's own key, not encrypted."
            ) from None
        return made

    def bind(self) -> socket.socket:
        """A socket on the address. EndpointError when it cannot be had."""
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.host, self.port))
        except OSError as error:
            sock.close()
            at = f"{shown(self.host)}:{self.port}"
            raise EndpointError(f"cannot listen on {at} ({error.strerror}). Give another port, or 0.") from None
        return sock

    def knows(self, said: str) -> bool:
        """Is that the token? The time that the answer takes does not tell how much of it is right."""
        return self.token is None or hmac.compare_digest(_bytes(said), _bytes(self.token))

    def bearer(self, authorization: str) -> bool:
        """Does that header hold the token?"""
        return self.knows(authorization.removeprefix("Bearer "))

    def foreign(self, headers: Mapping[str, str], *, links: bool = False) -> tuple[int, str] | None:
        """(status, why) for what another page has a browser on this machine ask; None for all else. A name that was made to
        point here (DNS rebinding) is the page's own, not ours; programs send neither Sec-Fetch-Site nor Origin. links: those
        of other pages may be followed, since nothing is changed by that."""
        host = headers.get("Host", "")
        if self.token is None and not _own(host, self.host):
            return 421, "this server answers to its own name only: ask 127.0.0.1, or start it with a token"
        linked = links and headers.get("Sec-Fetch-Mode") == "navigate"
        if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and not linked:
            return 403, "not from another page"
        origin = headers.get("Origin")
        return None if origin is None or _of(origin) == host else (403, "not from another page")

    def own_page(self, headers: Mapping[str, str]) -> bool:
        """Does a request that is not :meth:`foreign` say that a page of ours, or the user, asked for it? Over plain HTTP browsers
        leave Sec-Fetch-Site out, and to them another port of this host is the same site: it gets the cookies, too."""
        said = headers.get("Origin") or headers.get("Referer", "")
        return "Sec-Fetch-Site" in headers or _of(said) == headers.get("Host", "-")

    def cookie(self, purpose: str) -> str:
        """What a browser shows instead of the token, once it has given that, until this process ends."""
        return hmac.digest(_PROCESS, _bytes(f"steelyard {purpose} {self.token}"), "sha256").hex()

    def stands(self, cookie: str, purpose: str) -> bool:
        """Is that the cookie?"""
        return hmac.compare_digest(_bytes(cookie), self.cookie(purpose).encode())


HERE = Door()
"""Loopback, a free port, no token, no TLS."""
