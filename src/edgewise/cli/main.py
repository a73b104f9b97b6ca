"""`edgewise`: the dispatcher. A verb imports what is heavy inside its own function, so that `--help` stays quick."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from edgewise import __version__
from edgewise.cli import (
    ask,
    bench,
    bench_import,
    bench_split,
    calibrate,
    cloud,
    config,
    devices,
    distill,
    doctor,
    evaluate,
    export,
    list,
    optimize,
    plan,
    profile,
    pull,
    quantize,
    record,
    replay,
    rm,
    serve,
    show,
    split_plan,
    split_profile,
    split_serve,
)
from edgewise.cli.options import Run
from edgewise.cli.output import note
from edgewise.errors import (
    Diverged,
    EdgewiseError,
    GapError,
    LicenceError,
    OverBudget,
    RequestError,
    UnknownModel,
    UsageError,
)

DONE, NO, WRONG_USE, OUTSIDE, OWN_BUG, INTERRUPTED = 0, 1, 2, 3, 70, 130

# The first class that fits decides.
EXIT_CODES: tuple[tuple[type[EdgewiseError], int], ...] = (
    (LicenceError, NO),
    (OverBudget, NO),
    (Diverged, NO),
    (UnknownModel, OUTSIDE),
    (UsageError, WRONG_USE),
    (RequestError, WRONG_USE),
    (GapError, OWN_BUG),
    (EdgewiseError, OUTSIDE),
)

app = typer.Typer(
    name="edgewise",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
bench_verbs = typer.Typer(help="Measure, and read what other tools measured.", rich_markup_mode=None)
split_verbs = typer.Typer(help="One model on two machines.", rich_markup_mode=None)
settings_verbs = typer.Typer(help="The settings.", rich_markup_mode=None)

app.command("pull")(pull.pull)
app.command("list")(list.list_)
app.command("show")(show.show)
app.command("rm")(rm.rm)
app.command("ask")(ask.ask)
app.command("serve")(serve.serve)
app.command("cloud")(cloud.cloud)
app.command("profile")(profile.profile)
app.command("distill")(distill.distill)
app.command("quantize")(quantize.quantize)
app.command("export")(export.export)
app.command("optimize")(optimize.optimize)
app.command("evaluate")(evaluate.evaluate)
app.command("record")(record.record)
app.command("calibrate")(calibrate.calibrate)
app.command("replay")(replay.replay)
app.command("plan")(plan.plan)
app.command("devices")(devices.devices)
app.command("doctor")(doctor.doctor)
settings_verbs.command("show")(config.show)
settings_verbs.callback()(config.config)
bench_verbs.command("engines")(bench.engines)
bench_verbs.command("split")(bench_split.split)
bench_verbs.command("import")(bench_import.import_)
split_verbs.command("plan")(split_plan.plan)
split_verbs.command("profile")(split_profile.profile)
split_verbs.command("serve")(split_serve.serve)
app.add_typer(bench_verbs, name="bench")
app.add_typer(split_verbs, name="split")
app.add_typer(settings_verbs, name="config")


def _version(value: bool) -> None:
    if value:
        print(f"edgewise {__version__}")
        raise typer.Exit


@app.callback()
def edgewise(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Run a model on the device, ask the cloud when it pays, go on when the cloud is gone."""


def main() -> None:
    for name in ("stdin", "stdout", "stderr"):  # closed by the caller: there is nothing to read, and nobody reads
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - for the process's life
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """One call of the command line; returns its exit code and lets no exception out."""
    state = Run()
    try:
        _invoke(arguments or ["--help"], state)
        sys.stdout.flush()
        return DONE
    except typer.Exit as e:
        return e.exit_code
    except BrokenPipeError:
        return _reader_left()
    except (KeyboardInterrupt, typer.Abort):
        note("interrupted")
        return INTERRUPTED
    except typer.TyperException as e:
        return _refuse(e.format_message(), e.exit_code)
    except EdgewiseError as e:
        return _refuse(str(e), next(code for kind, code in EXIT_CODES if isinstance(e, kind)), state)
    except OSError as e:
        return _refuse(f"{e.strerror or e}: {e.filename}" if e.filename else str(e), OUTSIDE, state)
    except Exception as e:  # whatever is left is ours
        return _refuse(
            f"internal error, please report it: {type(e).__name__}: {e} (--debug shows where)", OWN_BUG, state
        )


def _invoke(arguments: Sequence[str], state: Run) -> None:
    command = get_command(app)
    with command.make_context("edgewise", [*arguments], obj=state) as context:
        command.invoke(context)


def _refuse(message: str, code: int, state: Run | None = None) -> int:
    """One line on stderr, whatever the message holds."""
    if state is not None and state.debug:
        traceback.print_exc()
    note(" ".join(message.split()))
    return code


def _reader_left() -> int:
    """The reader of our stdout has what it wanted (`| head`). Python must not flush into the closed pipe once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return DONE


if __name__ == "__main__":
    main()
