"""The program ``lowrank``: commands, exit codes, and errors of one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from ..errors import LowRankError, MissingExtraError
from . import apply, diff, extract_lora, inspect, merge_lora, plan, spectrum
from .arguments import Parser
from .display import check_rich

BAD_INPUT = 2
"""The exit code for everything that cannot be used; nothing is written then."""

COMMANDS: dict[str, ModuleType] = {
    "inspect": inspect,
    "spectrum": spectrum,
    "plan": plan,
    "apply": apply,
    "diff": diff,
    "extract-lora": extract_lora,
    "merge-lora": merge_lora,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or 2 with one line of error.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        if args.command is None:
            return _print_completion(parser, args)
        if not args.json:
            check_rich()
        args.run(args)
    except (LowRankError, OSError) as error:
        print(f"lowrank: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = Parser(prog="lowrank", description="Low-rank structure of checkpoints: read, compress, compare.")
    parser.add_argument("--print-completion", choices=("bash", "zsh", "tcsh"), help="print the completion for a shell")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = str(module.__doc__).partition(": ")[2].partition("\n")[0].removesuffix(".")
        each = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(each)
        each.add_argument("--json", action="store_true", help="print JSON in place of a table")
        each.set_defaults(run=module.run)
    return parser


def _print_completion(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.print_completion is None:
        parser.print_help()
        return 0
    try:
        import shtab
    except ImportError:
        raise MissingExtraError("completion needs shtab: pip install 'lowrank-layers[cli]'.") from None
    print(shtab.complete(parser, args.print_completion))
    return 0
