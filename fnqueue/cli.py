"""The command line. What a server needs is plugged in by the entry point group `fnqueue.commands`, and loaded
only when it is called for: the client alone stays small.

Every failure is one line on standard error: status 2 for what was typed or set wrong, 3 for a request that ended
without a result or a deployment that cannot run, 4 for one that goes on because its caller would not wait any longer,
130 for an interrupt, 1 for all else.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

import click
from click.shell_completion import CompletionItem

from fnqueue import __version__
from fnqueue.calls import Failed
from fnqueue.dead_letters import dead_letters
from fnqueue.welcome import Welcome, welcome

GROUP = "fnqueue.commands"
# What needs an HTTP client, which a sidecar that starts must not wait for.
CLIENT_COMMANDS = {
    "assets": "fnqueue.assets",
    "cancel": "fnqueue.requests",
    "completion": "fnqueue.completion",
    "deploy": "fnqueue.deployments",
    "functions": "fnqueue.functions",
    "invoke": "fnqueue.invoke",
    "logs": "fnqueue.deployments",
    "queue": "fnqueue.queues",
    "status": "fnqueue.requests",
    "top": "fnqueue.top",
    "undeploy": "fnqueue.deployments",
    "webhooks": "fnqueue.webhooks",
}
INTERRUPTED = 130


class Commands(click.Group):
    """Our own commands and the plugged-in ones."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        plugged = (plug.name for plug in entry_points(group=GROUP))
        return sorted({*super().list_commands(ctx), *CLIENT_COMMANDS, *plugged})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in CLIENT_COMMANDS:
            return _command(getattr(import_module(CLIENT_COMMANDS[cmd_name]), cmd_name))
        own = super().get_command(ctx, cmd_name)
        plugs = entry_points(group=GROUP, name=cmd_name)
        return own if own or not plugs else _loaded(next(iter(plugs)))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names alone: what a command does is not worth the second that loading all of them takes."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [CompletionItem(name) for name in self.list_commands(ctx) if name.startswith(incomplete)]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known:
            raise click.UsageError(f"no command {args[0]!r}; known are {', '.join(known)}")
        return super().resolve_command(ctx, args)


def _loaded(plug: EntryPoint) -> click.Command:
    return _command(plug.load())


def _command(found: object) -> click.Command:
    assert isinstance(found, click.Command), f"{found!r} is no command"
    return found


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fnqueue", message="%(prog)s %(version)s")
def cli() -> None:
    """The durable invocation queue for GPU functions that speaks the NVIDIA Cloud Functions (NVCF) API.

    Start with: fnqueue dev
    """


@cli.command("welcome")
@click.option(
    "--url", envvar="FNQUEUE_URL", default="http://127.0.0.1:8080", show_default=True, help="The server. [FNQUEUE_URL]"
)
@click.option(
    "--key",
    envvar=["FNQUEUE_API_KEY", "FNQUEUE_ADMIN_KEY", "FNQUEUE_KEY"],
    required=True,
    help="An API key with every scope. [FNQUEUE_API_KEY, FNQUEUE_ADMIN_KEY]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def welcome_command(url: str, key: str, as_json: bool) -> None:
    """Deploy the sample function on a running server, invoke it once, and show how.

    The function is named echo; one that is there already is used.
    """
    try:
        result = welcome(url.rstrip("/"), key)
    except Failed as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(to_json(result) if as_json else result.text())


cli.add_command(dead_letters)


def to_json(result: Welcome) -> str:
    return json.dumps(result.facts(), indent=2)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        code = cli.main(arguments, prog_name="fnqueue", standalone_mode=False)
    except click.ClickException as exc:
        click.echo(f"fnqueue: {' '.join(exc.format_message().split())}", err=True)
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
