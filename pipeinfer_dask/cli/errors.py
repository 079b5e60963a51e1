"""How commands fail: in one line, and with an exit status that says whose mistake it was."""

from __future__ import annotations

import signal
from typing import IO, Any

import click


class Failure(click.ClickException):
    """An error as one line on stderr, and exit status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {self.format_message()}", file=file, err=file is None)


class Mistake(Failure):
    """A user's mistake: exit status 2."""

    exit_code = 2


class Interrupted(Failure):
    """Ctrl-C: the exit status that shells give to what a signal has ended."""

    exit_code = 128 + signal.SIGINT


class Commands(click.Group):
    """A group whose errors are one line each, also where another program mounts it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            raise Mistake(error.format_message()) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        # click's own ways to end are RuntimeErrors, too.
        except (click.exceptions.NoArgsIsHelpError, click.exceptions.Exit, click.Abort):
            raise
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx is not None else "pipeinfer"
            raise Mistake(f"{error.format_message()} (see `{where} --help`)") from error
        except (ValueError, FileNotFoundError, MemoryError) as error:
            raise Mistake(str(error) or type(error).__name__) from error
        except KeyboardInterrupt as interrupt:
            raise Interrupted("interrupted") from interrupt
        except (RuntimeError, OSError) as error:
            raise Failure(str(error) or type(error).__name__) from error
