"""The command line: ``ma-monitor COMMAND``, or ``python -m ma_monitor.cli COMMAND``.

Exit codes: 0 where there is a result (what had to be left out is named on stderr and in the JSON), 2 on bad input with
one line on stderr, 3 where a replay had to leave something out, 130 when interrupted. Anything else is a bug and shows
its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ma_monitor import __version__
from ma_monitor.cli import (
    ablate,
    backtest,
    compare,
    demo,
    export,
    fit,
    forecast,
    import_,
    learn,
    log,
    merge,
    predict,
    replay,
    report,
    watch,
    workspace,
)
from ma_monitor.cli.common import Parser, note, warnings_on_stderr
from ma_monitor.cli.completion import SHELLS, Completion
from ma_monitor.errors import MaMonitorError

BAD_INPUT = 2
INTERRUPTED = 130
COMMANDS = (
    demo,
    predict,
    replay,
    ablate,
    merge,
    import_,
    fit,
    forecast,
    backtest,
    learn,
    compare,
    report,
    export,
    log,
    watch,
    workspace,
)

EXAMPLES = """examples:
  ma-monitor demo --out runs/demo               see what it does, in seconds
  ma-monitor watch out/ma_monitor               follow a training
  ma-monitor forecast out/ma_monitor            where every layer is heading
  ma-monitor replay EleutherAI/pythia-14m --revisions paper --out runs/14m
  eval "$(ma-monitor --completion bash)"        complete commands and options in this shell
Each command says more: ma-monitor COMMAND --help"""


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="ma-monitor",
        description="Measures, fits and forecasts massive activations of transformers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ma_monitor {__version__}")
    parser.add_argument(
        "--completion", action=Completion, choices=SHELLS, help="print what this shell needs to complete ma-monitor"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; the process's own where None.

    Returns:
        The exit code.
    """
    try:
        args = build_parser().parse_args(argv)
        with warnings_on_stderr():
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except MaMonitorError as error:
        note(f"ma-monitor: {error}")
        return BAD_INPUT
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        note(f"ma-monitor: {error.filename}: {error.strerror}")
        return BAD_INPUT
    except KeyboardInterrupt:
        note("ma-monitor: interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
