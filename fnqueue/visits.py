"""`fnqueue welcome`: a first visit to a server."""

from __future__ import annotations

import json

import click

from fnqueue import config
from fnqueue import welcome as sample
from fnqueue.terminal import asking, server_options


@click.command("welcome")
@server_options
def welcome(url: str | None, key: str | None, as_json: bool) -> None:
    """Deploy the sample function on a running server, invoke it once, and show how. The key needs every scope.

    The function is named echo; one that is there already is used.
    """
    with asking(url, key):
        found = config.load(url, key)
        result = sample.welcome(found.url, found.key)
    click.echo(json.dumps(result.facts(), indent=2) if as_json else result.text())
