"""`fnqueue assets`: files that requests can name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from fnqueue.inputs import File
from fnqueue.terminal import Line, calling, of_each, refuse, server_options, table


@click.group("assets")
def assets() -> None:
    """Files that were uploaded, to be named by any number of requests until they are deleted."""


@assets.command("list")
@server_options
def list_command(url: str | None, key: str | None, as_json: bool) -> None:
    """Show the account's assets."""
    with calling(url, key) as fnq:
        found = fnq.assets()
    if as_json:
        click.echo(
            json.dumps([each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in found], indent=2)
        )
        return
    rows = [(each.asset_id, each.content_type or "-", each.description or "-") for each in found]
    click.echo(table(("ASSET", "TYPE", "DESCRIPTION"), rows))


@assets.command("upload")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--content-type", default="", help="Its media type.  [default: by its name]")
@click.option("--idempotency-key", help="The same key with the same file leads to the same asset.")
@server_options
def upload_command(
    url: str | None, key: str | None, as_json: bool, path: Path, content_type: str, idempotency_key: str | None
) -> None:
    """Upload a file, and print the new asset's ID."""
    line = Line()
    with calling(url, key) as fnq:
        try:
            asset_id = fnq.upload(
                File(path, content_type=content_type), idempotency_key=idempotency_key, progress=line.uploading
            )
        finally:
            line.end()
    click.echo(json.dumps({"assetId": asset_id}) if as_json else asset_id)


@assets.command("delete")
@click.argument("asset_ids", nargs=-1, required=True)
@server_options
def delete_command(url: str | None, key: str | None, as_json: bool, asset_ids: Sequence[str]) -> None:
    """Delete assets. A request that names one and has not begun will fail.

    One that cannot be deleted keeps none of the others from it, and makes the exit status 1; 2 if only what is no ID
    was in the way.
    """
    with calling(url, key) as fnq:
        deleted, failed = of_each(asset_ids, fnq.delete_asset)
    if as_json:
        click.echo(json.dumps({"deleted": list(deleted)}))
    refuse(failed, "deleted")
