"""The command line: ``grokcurv train``, ``sweep``, ``reproduce``, ``report``, ``replay``, ``bench`` and ``doctor``.

Exit status: 0 done; 1 the training or a run of a sweep failed, or a bench found a wrong answer; 2 input or a folder
that cannot be used, with the reason on standard error; 129, 130 and 143 stopped by a closed terminal, Ctrl-C
and SIGTERM; 141 nobody reads the output any more.
"""

# No postponed annotations in this file: tyro could not resolve those of the classes that live inside functions.

import argparse
import contextlib
import difflib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from os.path import lexists
from pathlib import Path
from typing import Annotated, Any, Literal

from grokcurv import sweep, training
from grokcurv.commutator import RENAMED
from grokcurv.measures import named_measures
from grokcurv.progress import BenchProgress, RunProgress, SweepProgress
from grokcurv.replays import replay
from grokcurv.runs import TABLES, Run, open_run
from grokcurv.storage import News, RunError, holder, make_folder, write_atomically
from grokcurv.training import PRESETS, TrainConfig
from grokcurv.training import config as settings
from grokcurv.training.process import Stopped

WATCH_SECONDS = 1.0
"""Between two looks at a run that is watched, which tells how far it is as often."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: the process's own) name; returns the exit status."""
    os.environ["MPLBACKEND"] = "agg"  # pages need no window, nor the name of one that matplotlib does not know
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a folder's name may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            _flush()  # here, where what goes wrong can be reported: Python's own flush at the end could only fail
    except KeyboardInterrupt as stopped:
        return 128 + (stopped.number if isinstance(stopped, Stopped) else signal.SIGINT)
    except BrokenPipeError:
        return 141  # what a shell reports of a program that the signal of a closed pipe ended
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (RunError, ImportError) as error:
        return _complain(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        return _complain(f"there is not enough memory for this: {error}", status=1)


def _run(arguments: list[str]) -> int:
    if not arguments:
        print(USAGE, end="", file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name == "--version":
        print(f"grokcurv {version('grokcurv')}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        return _complain(f"no command {name!r}: {hint}")
    command, _ = COMMANDS[name]
    return command(rest)


def _train(arguments: list[str]) -> int:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Train a network on modular arithmetic, measure it on the way, and keep the run in a folder.

        --preset sets the defaults of the other settings. Ctrl-C stops the run after writing a checkpoint.
        """

        task: tyro.conf.OmitArgPrefixes[settings.TaskSettings]
        network: tyro.conf.OmitArgPrefixes[settings.NetworkSettings]
        optimizer: tyro.conf.OmitArgPrefixes[settings.OptimizerSettings]
        length: tyro.conf.OmitArgPrefixes[settings.LengthSettings]
        measurement: tyro.conf.OmitArgPrefixes[settings.MeasurementSettings]
        intervention: tyro.conf.OmitArgPrefixes[settings.InterventionSettings]
        storage: tyro.conf.OmitArgPrefixes[settings.StorageSettings]
        preset: settings.Preset = "paper"
        """Settings to start from."""
        out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
        """Folder of the run; runs/OP-seedSEED if not given."""
        resume: tyro.conf.FlagCreatePairsOff[bool] = False
        """Go on with the run in the folder, whose settings are then the defaults. Where there is none, begin the run
        that the other settings describe; without any it is an error."""

    arguments = _renamed(arguments)
    defaults, described = _defaults(arguments)
    sections = (kind(**{one.name: getattr(defaults, one.name) for one in fields(kind)}) for kind in settings.SECTIONS)
    given = *sections, defaults.preset  # as the options begin
    options = tyro.cli(Options, prog="grokcurv train", args=arguments, default=Options(*given))
    said = {name: value for part in vars(options).values() if is_dataclass(part) for name, value in vars(part).items()}
    with _asked_for():
        config = TrainConfig(preset=options.preset, **said)
    out = options.out or Path("runs") / f"{config.op}-seed{config.seed}"
    if options.resume and not described and not lexists(out / "config.json"):
        return _complain(f"{out} holds no run to go on with, and no settings say which to begin")
    if options.resume and not lexists(out):
        return _complain(f"{out} does not exist: to begin a run there, leave --resume out")
    try:
        with (
            _asked_for(f"grokcurv train --resume --out {out}"),
            RunProgress(f"{config.op} mod {config.p}, seed {config.seed}") as progress,
        ):
            run = training.train(config, out=out, resume=options.resume, on_progress=progress)
    except training.TrainingError as error:
        return _complain(f"{out}: {error}", status=1)
    last = run.metrics.iloc[-1]
    print(f"{out}: {last['step']:,.0f} steps, test accuracy {last['test_acc']:.1%}")
    print(f"to see it: grokcurv report {out}")
    return 0


def _renamed(arguments: list[str]) -> list[str]:
    """With the values that settings had in older versions by the names that they have now."""
    said = list(arguments)
    for index, (before, argument) in enumerate(pairwise(["", *arguments])):
        name, equals, value = argument.rpartition("=")
        if value in RENAMED and "--method" in (name, before):
            said[index] = name + equals + RENAMED[value]
    if said != arguments:
        print("--method reference is called --method published now", file=sys.stderr)
    return said


def _defaults(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """The settings that the flags change: the preset's; those of the run to go on with; the paper's.

    And whether there are any flags but those of the folder.
    """
    # Every value is optional here, so that the full parser alone reports what is wrong.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--out", nargs="?", type=Path)
    parser.add_argument("--resume", action="store_true")
    known, others = parser.parse_known_args(arguments)
    if known.preset is None and known.resume and known.out is not None and lexists(known.out / "config.json"):
        try:
            return TrainConfig(**open_run(known.out).config), True
        except (TypeError, ValueError) as error:
            file = known.out / "config.json"
            raise RunError(f"{file} holds other settings than this grokcurv has: {error}") from error
    return PRESETS.get(known.preset, PRESETS["paper"]), bool(others) or known.preset is not None


def _sweep(arguments: list[str]) -> int:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Do the runs that a sweep file describes, or those that are left of them.

        The same command goes on after anything that stopped it. Ctrl-C stops the runs after they wrote checkpoints. A
        file that has gained seeds or values, or steps, does what is new in it.
        """

        file: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE")]]
        """The sweep: a TOML file with the tables [run], [grid], [[runs]] and [random]."""
        out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
        """Folder of the sweep; runs/NAME for the file NAME.toml if not given."""
        engine: Literal["local", "ray"] = "local"
        """Worker processes on this machine, or a Ray cluster."""
        workers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Runs at a time; as many as there is room for if not given."""
        address: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS")] = None
        """Address of the Ray cluster to join; one is started on this machine if not given."""
        gpus_per_run: float = 0.0
        """With Ray, the share of a GPU that a run has."""
        together: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """With local workers, runs that each trains as one program; 1 on the CPU and 64 on a GPU if not given."""
        retry_failed: tyro.conf.FlagCreatePairsOff[bool] = False
        """Try again also the runs that would fail again: loss not finite, workers that kept dying."""
        dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
        """Say which runs these are, and how long they may take, and do none."""

    options = tyro.cli(Options, prog="grokcurv sweep", args=arguments)
    how = {name: value for name, value in vars(options).items() if name not in ("file", "out", "dry_run")}
    out = options.out or Path("runs") / options.file.stem
    with _asked_for("the same command"):
        config = sweep.SweepConfig.from_toml(options.file)
        if options.dry_run:
            return _foresee(config, options.workers or len(os.sched_getaffinity(0)))
        with SweepProgress(options.file.stem) as progress:
            runs = sweep.run_sweep(config, out, **how, grow=True, on_progress=progress).runs
    failed = runs[runs["status"] == "failed"]
    print(f"{out}: {len(runs):,} runs, {(runs['status'] == 'finished').sum():,} finished, {len(failed):,} failed")
    for run, reason in failed["reason"].items():
        print(f"  {run}: {reason}")
    print(f"to see it: grokcurv report {out}")
    return 1 if len(failed) else 0


def _foresee(config: sweep.SweepConfig, workers: int) -> int:
    from grokcurv.report.format import count, duration
    from grokcurv.sweep.estimate import STEPS, expected_seconds

    for run in config.plan:
        print(run)
    took = duration(expected_seconds(config, workers))
    print(f"{count(len(config.plan), 'run')}, at most {took} on {count(workers, 'worker')} by {STEPS} steps taken now;")
    print("runs that grok end sooner")
    return 0


def _reproduce(arguments: list[str]) -> int:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Judge the paper's claims by runs of your own, and write a page about it.

        The same command goes on after anything that stopped it, and writes the page anew when nothing is left to train.
        The claims: pc1, rho, exec-random, control-ratio, onset, lr-law, alignment, update-gram, suppression,
        random-basis, kicks, slow-regime.
        """

        claims: tuple[str, ...] = ()
        """Those to judge; all if not given, the slow regime without its run of many hours."""
        profile: Literal["quick", "add", "paper"] = "quick"
        """Under an hour on two cores; three seeds of addition; or the runs of the paper."""
        out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
        """Folder of the reproduction; runs/reproduce-PROFILE if not given."""
        operations: tuple[str, ...] = ()
        """Leaves out the runs of others."""
        seeds: tuple[int, ...] = ()
        """In place of the profile's, for every operation."""
        engine: Literal["local", "ray"] = "local"
        """Worker processes on this machine, or a Ray cluster."""
        workers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Runs at a time; as many as there is room for if not given."""
        train: tyro.conf.FlagCreatePairsOff[bool] = True
        """Whether to train what is missing; if not, claims are judged by what there is, also while others train it."""

    options = tyro.cli(Options, prog="grokcurv reproduce", args=arguments)

    from rich.console import Console

    from grokcurv.reproduce import reproduce

    given = {name: value for name, value in vars(options).items() if value != ()}
    with _asked_for("the same command"), SweepProgress(f"reproduce {options.profile}") as progress:
        reproduction = reproduce(**given, on_progress=progress)
    Console().print(reproduction.verdicts())
    for run, reason in reproduction.failed.items():
        print(f"{run} failed: {reason}")
    print(reproduction.page)
    return 1 if reproduction.failed else 0


def _report(arguments: list[str]) -> int:
    import tyro

    def report(
        folders: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR [DIR ...]")]],
        out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    ) -> int:
        """Write report.html and figures/*.png into the folder of a run or a sweep, and print the page's path.

        A sweep's page has its phase diagram, the records of all runs, and links to the runs that have a page. Several
        runs are set beside each other on one page, for which --out names a folder.

        Args:
            folders: Of the run or the sweep; or of several runs.
            out: Another folder to write into, so that the run's is only read.
        """
        from grokcurv.report import write_report

        if not folders:
            return _complain("report needs the folder of a run or a sweep")
        with _asked_for():
            print(write_report(folders[0] if len(folders) == 1 else folders, out))
        return 0

    return tyro.cli(report, prog="grokcurv report", args=arguments)


def _watch(arguments: list[str]) -> int:
    import tyro

    def watch(folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]) -> int:
        """Follow a run or a sweep that another process is doing, until that ends.

        Args:
            folder: Of the run or the sweep.
        """
        followed = sweep.open_sweep(folder) if lexists(folder / "sweep.json") else open_run(folder)
        shown = RunProgress if isinstance(followed, Run) else SweepProgress
        news = News(folder)
        try:
            with shown(folder.resolve().name) as progress:
                while holder(folder) is not None:
                    if latest := news.read():
                        progress(latest)
                    time.sleep(WATCH_SECONDS)  # another process is at work, which wakes nobody
        except (LookupError, TypeError, ValueError) as error:
            raise RunError(f"{news.path} is damaged: {error!r}") from error
        if isinstance(followed, Run):
            print(f"{folder}: {followed.status}")
        else:
            states = followed.runs["status"].value_counts()
            print(f"{folder}: {', '.join(f'{number:,} {state}' for state, number in states.items())}")
        return 0

    return tyro.cli(watch, prog="grokcurv watch", args=arguments)


def _export(arguments: list[str]) -> int:
    import tyro

    def export(
        folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]],
        csv: tyro.conf.FlagCreatePairsOff[bool] = False,
        out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    ) -> int:
        """Write the tables of a run, or of all runs of a sweep together, for other programs, and print their paths.

        Of a sweep there is also the table runs: the settings in which runs differ, and what each run came to.

        Args:
            folder: Of the run or the sweep.
            csv: As CSV instead of Parquet.
            out: Where to; FOLDER/tables if not given.
        """
        if lexists(folder / "sweep.json"):
            from grokcurv.analysis import sweep_results

            whole = sweep.open_sweep(folder)
            tables = {name: whole.table(name) for name in TABLES}
            runs = sweep_results(whole.runs, tables["metrics"], tables["curvature"])
            tables["runs"] = runs[[*whole.varied, *runs.loc[:, "status":]]].reset_index()
        else:
            tables = {name: open_run(folder).table(name) for name in TABLES}
        target = make_folder(folder / "tables" if out is None else out, parents=out is not None)
        for name, frame in tables.items():
            path = target / f"{name}.{'csv' if csv else 'parquet'}"
            if not frame.empty:
                write_atomically(path, frame.to_csv(index=False).encode() if csv else frame.to_parquet(index=False))
                print(path)
        return 0

    return tyro.cli(export, prog="grokcurv export", args=arguments)


def _replay(arguments: list[str]) -> int:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Measure a training run that is over, at each of its checkpoints, and write the rows into a Parquet file.

        The same command goes on after anything that stopped it: steps that are in the file are not measured again.
        Checkpoints that are damaged, or not of the model, are named and left out.
        """

        folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
        """Of checkpoints, files (.safetensors, .pt, .pth, .ckpt, .bin) or Hugging Face's folders; or of a run."""
        model: Annotated[str | None, tyro.conf.arg(metavar="MODULE:FUNCTION")] = None
        """A function of no arguments that returns (model, loss_fn, sampler); a run of grokcurv train needs none."""
        out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
        """The file; DIR/replay.parquet if not given."""
        pairs: int | None = None
        """Pairs of batches a row; the run's, or 1, if not given."""
        measures: str = ""
        """What to record besides, with commas between names, as for grokcurv train."""

    options = tyro.cli(Options, prog="grokcurv replay", args=arguments)
    out = options.out or options.folder / "replay.parquet"
    with _asked_for("the same command"):
        given: dict[str, Any] = {"out": out}
        if options.pairs is not None:
            given["pairs"] = options.pairs
        if options.model is None:
            if not lexists(options.folder / "config.json"):
                raise ValueError(
                    f"{options.folder} is no run of grokcurv train: --model MODULE:FUNCTION says what it is of"
                )
            frame = training.replay_run(open_run(options.folder), measures=options.measures, **given)
        else:
            measures = named_measures(options.measures)
            frame = replay(*_made_by(options.model, options.folder), measures=measures, **given)
    print(f"{out}: {len(frame):,} rows, {len(frame.attrs['skipped']):,} checkpoints left out")
    for reason in frame.attrs["skipped"].values():
        print(f"  {reason}")
    return 0


def _made_by(name: str, folder: Path) -> tuple[Any, Any, Any, Any]:
    """What :func:`grokcurv.replay` takes first, from a function that is named ``module:function``."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as python -m has it
    try:
        made = getattr(import_module(module), function)()
        model, loss_fn, sampler = made
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model {name}: {error}; it must name a function that returns (model, loss_fn, sampler)"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    return model, folder, loss_fn, sampler


def _bench(arguments: list[str]) -> int:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Time grokcurv beside naive code, curvlinops, scikit-learn, TorchDR and torch, and write a page about it.

        Every answer is compared with float64 before anything is timed. Peers that are not installed are named: pip
        install "grokcurv[bench]" brings them. Wants an otherwise idle machine.
        """

        quick: tyro.conf.FlagCreatePairsOff[bool] = False
        """Smaller sizes: ten minutes at most. Without it P goes up to 1e8, as memory allows."""
        out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
        """Folder of the bench, where an older one is replaced; runs/bench or runs/bench-quick if not given."""
        threads: int = 1
        """Of everyone."""
        cases: tuple[str, ...] = ()
        """Names of those to run; all if not given."""
        seed: int = 0
        """Of the inputs."""

    options = tyro.cli(Options, prog="grokcurv bench", args=arguments)

    from rich.console import Console

    from grokcurv.bench import run_bench

    given = vars(options) | {"cases": options.cases or None}
    with _asked_for(), BenchProgress("bench") as progress:
        bench = run_bench(**given, on_progress=progress)
    Console(width=None if sys.stdout.isatty() else 180).print(bench.table())  # a file has room for whole lines
    print(bench.load)
    for said in bench.left_out:
        print(f"left out: {said}")
    for said in bench.wrong:
        print(f"WRONG: {said}")
    print(bench.page)
    return 1 if bench.wrong else 0


def _doctor(arguments: list[str]) -> int:
    import tyro

    from grokcurv.doctor import main

    return tyro.cli(main, prog="grokcurv doctor", args=arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a network on modular arithmetic and measure it on the way"),
    "sweep": (_sweep, "do the many runs that a file describes"),
    "reproduce": (_reproduce, "judge the paper's claims by runs of your own"),
    "report": (_report, "write the page and the figures of a run or a sweep"),
    "replay": (_replay, "measure a training run that is over, from its checkpoints"),
    "watch": (_watch, "follow a run or a sweep that another process is doing"),
    "export": (_export, "write the tables of a run or a sweep as CSV"),
    "bench": (_bench, "time it beside what there is today, accuracy first"),
    "doctor": (_doctor, "say what was built and what works on this machine"),
}

_LISTED = "\n".join(f"  {name:<12}{does}" for name, (_, does) in COMMANDS.items())

USAGE = f"""\
usage: grokcurv COMMAND [OPTIONS]

Curvature and trajectory geometry of training, measured at every step.

commands:
{_LISTED}

grokcurv COMMAND --help lists the options of a command.
"""


@contextlib.contextmanager
def _asked_for(again: str = "") -> Iterator[None]:
    """What is wrong with what was asked for is no error of ours; what is stopped may go on by a command, ``again``."""
    try:
        yield
    except KeyboardInterrupt:
        if again:
            print(f"stopped; to go on: {again}", file=sys.stderr)
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise RunError(str(error)) from error


def _complain(message: str, status: int = 2) -> int:
    """Print a message to standard error; returns the exit status."""
    with contextlib.suppress(OSError):  # nobody reads standard error; the status still says it
        print(f"grokcurv: {message}", file=sys.stderr, flush=True)
    return status


def _flush() -> None:
    """Write what the streams still hold; one that cannot is turned away, or Python would try again at its end."""
    failed: OSError | None = None
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None:  # its descriptor was closed when the process began
                stream.flush()
        except OSError as error:
            failed = error
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
    if failed is not None:
        raise failed


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says so: it has a class for that on accelerators only."""
    return "allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"


if __name__ == "__main__":
    sys.exit(main())
