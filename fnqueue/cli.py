"""The command line. What a server needs is plugged in by the entry point group `fnqueue.commands`, and loaded
only when it is called for: the client alone stays small.

Every failure is one line on standard error: status 2 for what was typed or set wrong, 3 for a request that ended
without a result or a deployment that cannot run, 4 for one that goes on because its caller would not wait any longer,
130 for an interrupt, 1 for all else.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

import click
from click.shell_completion import CompletionItem

from fnqueue import __version__

GROUP = "fnqueue.commands"
# What needs an HTTP client, which a sidecar that starts must not wait for.
CLIENT_COMMANDS = {
    "assets": "fnqueue.assets",
    "cancel": "fnqueue.requests",
    "completion": "fnqueue.completion",
    "dead-letters": "fnqueue.dead_letters",
    "deploy": "fnqueue.deployments",
    "functions": "fnqueue.functions",
    "invoke": "fnqueue.invoke",
    "logs": "fnqueue.logs",
    "queue": "fnqueue.queues",
    "status": "fnqueue.requests",
    "top": "fnqueue.top",
    "undeploy": "fnqueue.deployments",
    "webhooks": "fnqueue.webhooks",
    "welcome": "fnqueue.visits",
}
INTERRUPTED = 130
_SENTENCE = 300
# As the help shows them. What is plugged in by others comes last.
SECTIONS = {
    "Begin": ("dev", "welcome", "completion"),
    "Call functions": ("invoke", "status", "cancel", "assets"),
    "Make functions run": ("functions", "deploy", "undeploy", "logs"),
    "See what goes on": ("queue", "top", "dead-letters", "webhooks"),
    "Run servers": ("api", "controller", "sidecar", "doctor", "keys", "secrets"),
}


class Commands(click.Group):
    """Our own commands and the plugged-in ones."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        plugged = (plug.name for plug in entry_points(group=GROUP))
        return sorted({*CLIENT_COMMANDS, *plugged})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in CLIENT_COMMANDS:
            return _command(getattr(import_module(CLIENT_COMMANDS[cmd_name]), cmd_name.replace("-", "_")))
        plugs = entry_points(group=GROUP, name=cmd_name)
        return _loaded(next(iter(plugs))) if plugs else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        there = self.list_commands(ctx)
        longest = max(map(len, there))
        placed = {name for names in SECTIONS.values() for name in names}
        others = tuple(name for name in there if name not in placed)
        for title, names in {**SECTIONS, "Others": others}.items():
            known = ((name, self.get_command(ctx, name)) for name in names if name in there)
            # Their first sentences as a whole.
            rows = [(name.ljust(longest), each.get_short_help_str(_SENTENCE)) for name, each in known if each]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

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

    Start with: fnqueue dev. `fnqueue COMMAND --help` says more of each; docs/cli.md has all of them, and what exit
    statuses mean.
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        code = cli.main(arguments, prog_name="fnqueue", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return exc.exit_code
    except click.ClickException as exc:
        click.echo(f"fnqueue: {_line(exc)}", err=True)
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has seen enough, and no flush at the end shall complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def _line(exc: click.ClickException) -> str:
    """Of what was typed wrong, with where to read on."""
    told = " ".join(exc.format_message().split())
    if not isinstance(exc, click.UsageError) or exc.ctx is None:
        return told
    return f"{told.removesuffix('.')}; see {exc.ctx.command_path} --help"


if __name__ == "__main__":
    sys.exit(main())
