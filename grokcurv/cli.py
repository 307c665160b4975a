"""The command line: ``grokcurv train``, ``grokcurv report`` and ``grokcurv doctor``.

Exit status: 0 done; 1 the training failed; 2 input or a run folder that cannot be used, with the reason on standard
error; 130 stopped by Ctrl-C.
"""

# No postponed annotations in this file: tyro could not resolve those of the classes that live inside functions.

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from grokcurv.modular import TrainConfig

USAGE = """\
usage: grokcurv COMMAND [OPTIONS]

Curvature and trajectory geometry of training, measured at every step.

commands:
  train    train a network on modular arithmetic and measure it on the way
  report   write the page and the figures of a run
  doctor   say what was built and what works on this machine

grokcurv COMMAND --help lists the options of a command.
"""

PLAIN_SECONDS = 10.0
"""Seconds between lines of progress where there is no terminal to draw a bar on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: the process's own) name; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands: dict[str, Callable[[list[str]], int]] = {"train": _train, "report": _report, "doctor": _doctor}
    if not arguments:
        print(USAGE, end="", file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name not in commands:
        return _complain(f"no command {name!r}: there are {', '.join(commands)}")
    try:
        return commands[name](rest)
    except KeyboardInterrupt:
        return 130


def _train(arguments: list[str]) -> int:
    import tyro
    from rich.console import Console

    from grokcurv.modular import TrainConfig, TrainingError, train
    from grokcurv.runs import RunError

    @dataclass(frozen=True)
    class Options:
        """Train a network on modular arithmetic, measure it on the way, and keep the run in a folder.

        --preset sets the defaults of the other settings. Ctrl-C stops the run after writing a checkpoint.
        """

        config: tyro.conf.OmitArgPrefixes[TrainConfig]
        out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
        """Folder of the run; runs/OP-seedSEED if not given."""
        resume: tyro.conf.FlagCreatePairsOff[bool] = False
        """Go on with the run in the folder, whose settings are then the defaults."""

    try:
        options = tyro.cli(Options, prog="grokcurv train", args=arguments, default=Options(_defaults(arguments)))
    except RunError as error:
        return _complain(str(error))
    config = options.config
    out = options.out or Path("runs") / f"{config.op}-seed{config.seed}"
    try:
        with _Progress(f"{config.op} mod {config.p}, seed {config.seed}", Console(stderr=True)) as progress:
            run = train(config, out=out, resume=options.resume, on_progress=progress)
    except KeyboardInterrupt:
        print(f"stopped; to go on: grokcurv train --resume --out {out}", file=sys.stderr)
        return 130
    except TrainingError as error:
        return _complain(f"{out}: {error}", status=1)
    except (RunError, ValueError) as error:
        return _complain(str(error))
    last = run.metrics.iloc[-1]
    print(f"{out}: {last['step']:,.0f} steps, test accuracy {last['test_acc']:.1%}")
    print(f"to see it: grokcurv report {out}")
    return 0


def _defaults(arguments: list[str]) -> "TrainConfig":
    """The settings that the flags change: the preset's; those of the run to go on with; the paper's."""
    from grokcurv.modular import PRESETS, TrainConfig
    from grokcurv.runs import open_run

    # Every value is optional here, so that the full parser alone reports what is wrong.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--out", nargs="?", type=Path)
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(arguments)
    if known.preset is None and known.resume and known.out is not None and (known.out / "config.json").exists():
        return TrainConfig(**open_run(known.out).config)
    return PRESETS.get(known.preset, PRESETS["paper"])


def _report(arguments: list[str]) -> int:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Write report.html and figures/*.png into the folder of a run or a sweep, and print the page's path.

        A sweep's page has its phase diagram, the records of all runs, and links to the runs that have a page.
        """

        run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
        """Folder of the run or the sweep."""

    options = tyro.cli(Options, prog="grokcurv report", args=arguments)

    from grokcurv.report import write_report
    from grokcurv.runs import RunError

    try:
        print(write_report(options.run))
    except RunError as error:
        return _complain(str(error))
    return 0


def _doctor(arguments: list[str]) -> int:
    import tyro

    from grokcurv.doctor import main

    return tyro.cli(main, prog="grokcurv doctor", args=arguments) or 0


def _complain(message: str, status: int = 2) -> int:
    print(f"grokcurv: {message}", file=sys.stderr)
    return status


class _Progress:
    """Shows what ``train`` reports: a live bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, title: str, console: "Console") -> None:
        from rich.live import Live

        self.title, self.console = title, console
        self.latest: dict[str, Any] = {}
        self.printed = time.monotonic()
        self.live = Live(console=console, get_renderable=self.bar, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()
        elif self.latest:
            self.print_line()

    def __call__(self, latest: dict[str, Any]) -> None:
        self.latest = latest
        if not self.console.is_terminal and time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.print_line()

    def bar(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.latest:
            return Text(f"{self.title}  starting", style="dim")
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        bar = ProgressBar(total=self.latest["steps"], completed=self.latest["step"])
        row.add_row(Text(self.title, style="bold"), bar, Text(self.pace()))
        return Group(row, Text(self.state(), style="dim"))

    def print_line(self) -> None:
        self.printed = time.monotonic()
        print(f"{self.pace()}  {self.state()}", file=self.console.file, flush=True)

    def pace(self) -> str:
        """Steps done, steps a second, time left."""
        step, steps, speed = (self.latest[name] for name in ("step", "steps", "steps_per_second"))
        left = f"  {timedelta(seconds=round((steps - step) / speed))} left" if speed else ""
        return f"{step:,}/{steps:,}  {speed:.0f} steps/s{left}"

    def state(self) -> str:
        """Loss, accuracies, defect, and the grok step once it is known."""
        latest = self.latest
        said = [
            f"loss {latest['train_loss']:.3g}",
            f"train {latest['train_acc']:.1%}",
            f"test {latest['test_acc']:.1%}",
        ]
        if latest["defect"] is not None:
            said.append(f"defect {latest['defect']:.3g}")
        if latest["grok_step"] is not None:
            said.append(f"grokked at {latest['grok_step']:,}")
        return "  ".join(said)


if __name__ == "__main__":
    sys.exit(main())
