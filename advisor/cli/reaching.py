"""How an endpoint is reached: the options of every verb that speaks to one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from advisor.cli.common import SECRET_FILE

ENGINE = click.option("--engine", default="auto", show_default=True, help="auto, or a name of docs/engines.md.")
MODEL = click.option("--model", help="Model to ask for [default: the server's first].")
CHAT = click.option("--chat", is_flag=True, help="Ask /v1/chat/completions instead of /v1/completions.")
TARGETS = click.option(
    "--targets",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML or JSON that names the workers, their roles and metrics pages; or kubectl get pods -o json.",
)
CREDENTIALS = (
    click.option(
        "--api-key-file",
        type=SECRET_FILE,
        metavar="FILE",
        help="File with the bearer token, or keyring:SERVICE/USER [default: env STEELYARD_API_KEY].",
    ),
    click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="A header more (repeatable)."),
    click.option("--ca-file", default="", help="PEM file of the certificate authority to trust."),
    click.option("--cert", default="", metavar="FILE", help="PEM certificate that the client shows (mutual TLS)."),
    click.option("--key", default="", metavar="FILE", help="PEM key of --cert, if it is not in the same file."),
    click.option("--proxy", default="", metavar="URL", help="HTTP proxy, for example http://127.0.0.1:3128."),
    click.option("--insecure", is_flag=True, help="Do not check the server's certificate."),
)


def _with(*options: Any) -> Any:
    def decorated(f: Any) -> Any:
        for option in reversed(options):
            f = option(f)
        return f

    return decorated


reaching = _with(ENGINE, MODEL, CHAT, TARGETS, *CREDENTIALS)
"""Engine, model, targets, credentials, TLS and proxy."""

asking = _with(ENGINE, MODEL, CHAT, *CREDENTIALS)
"""The same without its workers."""

watching = _with(ENGINE, TARGETS, *CREDENTIALS)
"""Engine, targets, credentials, TLS and proxy: what only requests need is not among them."""

credentials = _with(*CREDENTIALS)
"""Credentials, TLS and proxy."""


def reached(endpoints: Sequence[str], options: dict[str, Any]) -> list[Any]:
    """Targets of URLs, from the options."""
    from loadgen.client import target
    from loadgen.replay import read_api_key

    headers = {}
    for header in options.get("headers", ()):
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise click.UsageError("--header takes NAME:VALUE.")
        headers[name.strip()] = value.strip()
    key = read_api_key(options.get("api_key_file"))
    return [
        target(
            endpoint,
            api_key=key,
            headers=headers,
            ca_file=options.get("ca_file", ""),
            insecure=bool(options.get("insecure")),
            cert_file=options.get("cert", ""),
            key_file=options.get("key", ""),
            proxy=options.get("proxy", ""),
        )
        for endpoint in endpoints
    ]


def connect_of(options: dict[str, Any]) -> Any:
    """A :class:`loadgen.control.Connect` from the same options. TLS is for https alone: a router may be asked by both."""
    import sys

    from loadgen.control import Connect, Endpoint

    plain = dict(options) | dict.fromkeys(("ca_file", "cert", "key"), "") | {"insecure": False}

    def endpoint(url: str) -> Endpoint:
        return Endpoint(reached([url], options if url.startswith("https:") else plain)[0])

    def bare(url: str) -> Endpoint:
        # Workers that only a router names get no credentials.
        from loadgen.client import target

        tls = url.startswith("https:")
        return Endpoint(
            target(
                url, ca_file=options.get("ca_file", "") if tls else "", insecure=tls and bool(options.get("insecure"))
            )
        )

    def ask_operator(question: str) -> str:
        click.echo(question, err=True, nl=False)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()

    return Connect(endpoint, bare, ask_operator)
