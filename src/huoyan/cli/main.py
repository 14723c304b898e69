"""Entry point: which commands there are, and how they end."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from huoyan.cli import ask, batch, bench, env, models, plan, quantize, version
from huoyan.errors import CapacityError, HuoyanError, InputError

INTERRUPTED = 130
DEBUG = "HUOYAN_DEBUG"

app = typer.Typer(
    name="huoyan",
    help=(
        "Run the MiniCPM-V vision-language models on this machine: pictures and video in, text out.\n\n"
        'Start with [bold]huoyan ask photo.jpg "what is this?"[/bold]; add [bold]--model tiny[/bold] to see '
        "it work without a download."
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Environment: HUOYAN_MODEL (default model), HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HUOYAN_DEBUG=1 "
    "(tracebacks). Exit codes: 2 bad request, 3 bad or missing model, 4 machine too small, 130 interrupted.",
)


@app.callback()
def top(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=version.print_if
        ),
    ] = False,
) -> None: ...


app.command("ask")(ask.ask)
app.command("batch")(batch.batch)
app.command("quantize")(quantize.quantize)
app.add_typer(bench.app)
app.command("plan")(plan.plan)
app.command("models")(models.models)
app.command("env")(env.env)
app.command("version")(version.version)


def main() -> None:
    """What the installed script `huoyan` calls."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors are one line on standard error."""
    try:
        result = app(
            args=None if arguments is None else list(arguments), prog_name="huoyan", standalone_mode=False
        )
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return 128 + signal.SIGPIPE
    except SystemExit as leaving:
        # The parser's own way out when the reader of a pipe has gone.
        return leaving.code if isinstance(leaving.code, int) else 1
    except HuoyanError as error:
        _complain(str(error))
        if _debugging():
            raise
        return error.exit_code
    except Exception as error:
        return _other_error(error)
    return result if isinstance(result, int) else 0


def _other_error(error: Exception) -> int:
    """The parser's own errors have a message and a code; whatever else escapes is a bug."""
    code = getattr(error, "exit_code", None)
    message: Any = getattr(error, "format_message", None)
    if type(error).__name__ == "Abort":
        return INTERRUPTED
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 0
    if isinstance(code, int) and callable(message):
        context = getattr(error, "ctx", None)
        command = getattr(context, "command_path", None) or "huoyan"
        _complain(f"{str(message()).rstrip('.')}; see `{command} --help`")
        return code
    if _debugging():
        raise error
    if isinstance(error, PermissionError) and error.filename is not None:
        _complain(f"no permission for {os.fsdecode(error.filename)}: this user may not read or write there")
        return InputError.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = "" if error.filename is None else f" for {os.fsdecode(error.filename)}"
        _complain(f"no space left on the disk{where}: make room and run it again")
        return CapacityError.exit_code
    text = " ".join(str(error).split())
    _complain(
        f"this is a bug: {type(error).__name__}: {text}. Run again with {DEBUG}=1 and report what it prints"
    )
    return 1


def _complain(message: str) -> None:
    text = " ".join(message.split())
    print(f"huoyan: {text}", file=sys.stderr)


def _debugging() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")


def _forget_stdout() -> None:
    """The reader has gone: keep the interpreter from flushing into the closed pipe when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
