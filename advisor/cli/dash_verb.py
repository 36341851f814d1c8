"""The verb dash: the database as a local web page."""

from __future__ import annotations

import os
from pathlib import Path

import click

from advisor.cli.common import db_option, emit_json, example, json_option


@click.command(**example("steelyard dash --port 8124"))
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to bind; others than loopback need a token."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8124, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--token-file", type=click.Path(path_type=Path), help="Token to ask for [or STEELYARD_DASH_TOKEN].")
@json_option
@db_option
def dash(host: str, port: int, token_file: Path | None, db: str, as_json: bool) -> None:
    """Show runs, traces and recommendations as a web page on this machine: read only, live while a run is going.

    Prints one line when it listens, ends on Ctrl-C or SIGTERM. Every page is data too: add ?format=json.
    """
    import asyncio

    from advisor.dash import serve
    from loadgen.cluster.server import read_token
    from traces.store import open_store

    token = read_token(token_file) if token_file else os.environ.get("STEELYARD_DASH_TOKEN") or None

    def ready(url: str) -> None:
        if as_json:
            emit_json({"url": url})
        else:
            click.echo(f"listening on {url}")

    with open_store(db, create=False) as store:
        asyncio.run(serve(store, host=host, port=port, token=token, ready=ready))
