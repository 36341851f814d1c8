"""The verb dash: the database as a local web page."""

from __future__ import annotations

import click

from advisor.cli.common import SECRET_FILE, db_option, emit_json, example, json_option, tls_options, token_of, warn


@click.command(**example("steelyard dash --port 8124"))
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to bind; others than loopback need a token."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8124, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--token-file", type=SECRET_FILE, metavar="FILE", help="Token to ask for [or STEELYARD_DASH_TOKEN].")
@tls_options
@json_option
@db_option
def dash(host: str, port: int, token_file: str | None, tls_cert: str, tls_key: str, db: str, as_json: bool) -> None:
    """Show runs, traces and recommendations as a web page on this machine: read only, live while a run is going.

    Prints one line when it listens, ends on Ctrl-C or SIGTERM. Every page is data too: add ?format=json.
    """
    import asyncio
    import os
    import sys
    import threading

    from advisor.dash import PAGE, serve
    from loadgen.ports import Door
    from traces.store import open_store

    door = Door(host, port, token_of(token_file, "--token-file", "STEELYARD_DASH_TOKEN"), tls_cert, tls_key)

    def ready(url: str) -> None:
        warn(door.warning)
        if as_json:
            emit_json({"url": url})
        else:
            click.echo(f"listening on {url}")

    with open_store(db, create=False) as store:
        asyncio.run(serve(store, door=door, ready=ready))
        if any(thread.name == PAGE for thread in threading.enumerate()):
            # What it has started to count by would be joined, however long its database says nothing.
            sys.stdout.flush()
            os._exit(0)
