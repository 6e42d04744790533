"""A command: whatever goes wrong in it is one line on standard error and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from dcp.checks import meant
from dcp.errors import DCPError
from dcp.launch.failures import keep_traceback

MOST_SAID = 1000  # characters of an error's line


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and say what may have been meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; an unknown option is the error of the command that does not know it."""
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            asked = self._asked(args)
            word = unknown[0].split("=")[0]
            asked.error(f"unknown option {word}{meant(word, asked._option_string_actions)}")
        return args

    def _asked(self, args: argparse.Namespace) -> CommandParser:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = action.choices[getattr(args, action.dest)]
                assert isinstance(chosen, CommandParser)
                return chosen._asked(args)
        return self

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            said = f"{value!r} is not one of {', '.join(known)}{meant(value, known)}"
            raise argparse.ArgumentError(action, said)


def run_command(
    prog: str, build: Callable[[], argparse.ArgumentParser], words: Sequence[str]
) -> int:
    """Build the parser, parse the words and call the command's ``run``; see :func:`run_guarded`."""

    def run() -> int:
        args = build().parse_args(words)
        return int(args.run(args) or 0)

    return run_guarded(" ".join([prog, *words[:1]]), run)


def run_guarded(name: str, run: Callable[[], int]) -> int:
    """Run a command; the exit status.

    Whatever goes wrong is one line: 2 for a mistake of the user, 1 for what failed. A reader of the
    output that has gone (``| head -1``) has seen enough, and nothing is said.
    """
    try:
        status = run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except (ValueError, OSError) as error:
        return _say(name, error, 2)
    except (DCPError, MemoryError, OverflowError, RecursionError) as error:
        return _say(name, error, 1)
    except KeyboardInterrupt:
        return _say(name, "interrupted", 130)
    except Exception as error:  # a defect of ours
        if any(
            kind.__name__ == "DistError" for kind in type(error).__mro__
        ):  # torch's, of networks
            return _say(name, str(error).splitlines()[0], 1)
        log = keep_traceback("".join(traceback.format_exception(error)))
        said = f"{type(error).__name__}: {error}"
        return _say(name, f"{said} (a defect of dcp, please report it with {log})", 1)


def _say(name: str, error: BaseException | str, status: int) -> int:
    """One line on standard error; the status."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | OverflowError | RecursionError):
        text = f"{type(error).__name__}: {text}: more than this machine can hold"
    if len(text) > MOST_SAID:  # the value is long; the remedy is behind it
        text = f"{text[: MOST_SAID // 2]} … {text[-MOST_SAID // 2 :]}"
    print(f"{name}: {text}", file=sys.stderr)
    return status


def _drop_stdout() -> None:
    """Nobody reads standard output any more: Python must not try again when it ends."""
    with suppress(OSError, ValueError):  # where it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
