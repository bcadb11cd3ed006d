"""python -m dqjax.data COMMAND: the data commands, each a module with HELP, EXAMPLE, add_arguments and run."""

import argparse
import os
import sys

import dqjax.data.collect
import dqjax.data.inspect
import dqjax.data.train_tokenizer
from dqjax.commands import run_command

COMMANDS = {
    "inspect": dqjax.data.inspect,
    "collect": dqjax.data.collect,
    "tokenizer": dqjax.data.train_tokenizer,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 where the input or the configuration is at fault."""
    parser = argparse.ArgumentParser(prog="python -m dqjax.data", description="Commands for data files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.__doc__.splitlines()[0]}\n\nexample:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    args = parser.parse_args(argv)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        COMMANDS[args.command].run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed the pipe: no error of ours, and nothing left to write to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
