"""How an endpoint is reached: the options of every verb that speaks to one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def reaching(f: Any) -> Any:
    """Engine, model, targets, credentials, TLS and proxy."""
    options = [
        click.option("--engine", default="auto", show_default=True, help="auto, or a name of docs/engines.md."),
        click.option("--model", help="Model to ask for [default: the server's first]."),
        click.option("--chat", is_flag=True, help="Ask /v1/chat/completions instead of /v1/completions."),
        click.option(
            "--targets",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="TOML or JSON that names the workers, their roles and metrics pages; or kubectl get pods -o json.",
        ),
        click.option(
            "--api-key-file",
            type=click.Path(path_type=Path),
            help="File with the bearer token [default: env STEELYARD_API_KEY].",
        ),
        click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="A header more (repeatable)."),
        click.option("--ca-file", default="", help="PEM file of the certificate authority to trust."),
        click.option("--cert", default="", metavar="FILE", help="PEM certificate that the client shows (mutual TLS)."),
        click.option("--key", default="", metavar="FILE", help="PEM key of --cert, if it is not in the same file."),
        click.option("--proxy", default="", metavar="URL", help="HTTP proxy, for example http://127.0.0.1:3128."),
        click.option("--insecure", is_flag=True, help="Do not check the server's certificate."),
    ]
    for option in reversed(options):
        f = option(f)
    return f


def reached(endpoints: Sequence[str], options: dict[str, Any]) -> list[Any]:
    """Targets of URLs, from the options."""
    from loadgen.client import target
    from loadgen.replay import read_api_key

    headers = {}
    for header in options["headers"]:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise click.UsageError("--header takes NAME:VALUE.")
        headers[name.strip()] = value.strip()
    key = read_api_key(options["api_key_file"])
    return [
        target(
            endpoint,
            api_key=key,
            headers=headers,
            ca_file=options["ca_file"],
            insecure=options["insecure"],
            cert_file=options["cert"],
            key_file=options["key"],
            proxy=options["proxy"],
        )
        for endpoint in endpoints
    ]
