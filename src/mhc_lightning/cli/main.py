"""Entry point: runs a command and turns what goes wrong into one line and an exit code."""

import errno
import os
import signal
import sys
from collections.abc import Sequence

from mhc_lightning.cli.arguments import Arguments, parse_arguments
from mhc_lightning.errors import (
    NonFiniteLossError,
    RunFaultError,
    UserError,
    full_disk_message,
    one_line_message,
)
from mhc_lightning.exit_codes import ExitCode


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its `ExitCode`.

    SIGTERM raises SystemExit instead. Any other exception than those named here is a bug and keeps
    its traceback.
    """
    _open_closed_streams()
    try:
        code = _run(parse_arguments(list(sys.argv[1:] if argv is None else argv)))
        sys.stdout.flush()
        return code
    except (UserError, NonFiniteLossError) as error:
        return _fail(error, error.exit_code)
    except RunFaultError as error:
        return error.exit_code if error.printed else _fail(error, error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # the reader has left, as `head` does
        return ExitCode.OK
    except OSError as error:
        if (text := full_disk_message(error)) is not None:
            _drop_output()  # standard output may be the file without room
            return _fail(RunFaultError(text), ExitCode.RUN_FAULT)
        if error.errno == errno.ENAMETOOLONG:
            return _fail(UserError(f"{error.strerror}: {error.filename}"), ExitCode.USER_ERROR)
        raise


def _run(arguments: Arguments) -> int:
    command = arguments.command
    if arguments.version:
        from mhc_lightning import __version__

        print(f"mhc-lightning {__version__}")
        return ExitCode.OK
    if arguments.help or command is None:
        from mhc_lightning.cli.help import command_help, overall_help

        print(overall_help() if command is None else command_help(command))
        return ExitCode.OK if arguments.help else ExitCode.USER_ERROR
    if not command.takes_experiment:
        signal.signal(signal.SIGTERM, _leave)
        command.load()(arguments)
        return ExitCode.OK
    if arguments.config is None:
        raise UserError(
            f"{command.name} needs --config PATH_OR_NAME; `--help` lists the experiments"
        )
    from mhc_lightning.cli.composition import compose_experiment

    experiment = compose_experiment(arguments)
    if arguments.print_config:
        from mhc_lightning.cli.print_config import show_config

        print(show_config(experiment), end="")
        return ExitCode.OK
    signal.signal(signal.SIGTERM, _leave)  # until a run has something to save
    command.load()(experiment, arguments)
    return ExitCode.OK


def _open_closed_streams() -> None:
    """Open the null device for every standard stream that the caller has closed (`>&-`)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _drop_output() -> None:
    """Send standard output to the null device: Python reports no second error at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception, code: int) -> int:
    sys.stdout.flush()
    print(f"error: {one_line_message(error)}", file=sys.stderr, flush=True)
    return code


def _leave(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)
