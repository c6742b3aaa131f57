"""Entry point: runs a command and turns what goes wrong into one line and an exit code."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from mhc_lightning.cli.arguments import Arguments, parse_arguments
from mhc_lightning.cli.help_text import command_help, overall_help
from mhc_lightning.errors import NonFiniteLossError, RunFaultError, UserError, last_words, no_room
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
        _drop_output()  # the reader has had enough, as `head` has
        return ExitCode.OK
    except OSError as error:
        if (text := no_room(error)) is not None:
            _drop_output()  # that may be what found no room
            return _fail(RunFaultError(text), ExitCode.RUN_FAULT)
        if error.errno == errno.ENAMETOOLONG:
            return _fail(UserError(f"{error.strerror}: {error.filename}"), ExitCode.USER_ERROR)
        raise


def _run(arguments: Arguments) -> int:
    if arguments.version:
        from mhc_lightning import __version__

        print(f"mhc-lightning {__version__}")
        return ExitCode.OK
    if arguments.help or arguments.command is None:
        command = arguments.command
        print(overall_help() if command is None else command_help(command))
        return ExitCode.OK if arguments.help else ExitCode.USER_ERROR
    if arguments.command == "report":  # of runs, whose folders hold their settings
        from mhc_lightning.cli.report import report

        report(arguments)
        return ExitCode.OK
    if arguments.command == "inspect":
        from mhc_lightning.cli.inspect import inspect

        signal.signal(signal.SIGTERM, _leave)
        inspect(arguments)
        return ExitCode.OK
    if arguments.config is None:
        raise UserError(
            f"{arguments.command} needs --config PATH_OR_NAME; `--help` lists the experiments"
        )
    from mhc_lightning.cli.composition import compose_experiment

    experiment = compose_experiment(arguments)
    if arguments.print_config:
        from mhc_lightning.cli.print_config import show_config

        print(show_config(experiment), end="")
        return ExitCode.OK
    signal.signal(signal.SIGTERM, _leave)  # until a run has something to save
    _command(arguments.command)(experiment, arguments)
    return ExitCode.OK


def _command(name: str) -> Callable[..., None]:
    if name == "plan":
        from mhc_lightning.cli.plan import plan as command
    elif name == "fit":
        from mhc_lightning.cli.fit import fit as command
    elif name == "validate":
        from mhc_lightning.cli.validate import validate as command
    elif name == "generate":
        from mhc_lightning.cli.generate import generate as command
    elif name == "evaluate":
        from mhc_lightning.cli.evaluate import evaluate as command
    elif name == "export":
        from mhc_lightning.cli.export import export as command
    elif name == "import":
        from mhc_lightning.cli.import_model import import_model as command
    elif name == "tune":
        from mhc_lightning.cli.tune import tune as command
    else:
        from mhc_lightning.cli.prepare import prepare as command
    return command


def _open_closed_streams() -> None:
    """Give streams that the caller has closed (``>&-``) a place to go to, and their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _drop_output() -> None:
    """Have Python not complain once more, at its exit, of output that cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception, code: int) -> int:
    sys.stdout.flush()
    print(f"error: {last_words(error)}", file=sys.stderr, flush=True)
    return code


def _leave(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)
