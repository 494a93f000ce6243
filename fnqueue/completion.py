"""`fnqueue completion`: what a shell needs to complete commands, options and the names of functions."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

from fnqueue.calls import Failed, Server
from fnqueue.config import load
from fnqueue.errors import ConfigurationError

VARIABLE = "_FNQUEUE_COMPLETE"
# Whoever presses a key does not wait any longer.
_PATIENCE_S = 2.0


def function_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of the account's functions; IDs once one is begun that is no name. None where no server answers soon."""
    try:
        config = load(ctx.params.get("url"), ctx.params.get("key"))
        server = Server(config.url, config.key, timeout_s=_PATIENCE_S)
        found = server.get("/v2/nvcf/functions?visibility=private,authorized").json().get("functions", [])
    except (ConfigurationError, Failed):
        return []
    names = {str(one["name"]): one["id"] for one in found}
    matching = [CompletionItem(name, help=names[name]) for name in sorted(names) if name.startswith(incomplete)]
    if matching or not incomplete:
        return matching
    ids = {str(one["id"]): one["name"] for one in found}
    return [CompletionItem(each, help=ids[each]) for each in sorted(ids) if each.startswith(incomplete.lower())]


@click.command("completion")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    In ~/.bashrc or ~/.zshrc: eval "$(fnqueue completion bash)". For fish: fnqueue completion fish | source
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows the three"
    click.echo(kind(ctx.find_root().command, {}, "fnqueue", VARIABLE).source())
