"""python -m dqjax.data COMMAND: the data commands, each a module with HELP, EXAMPLE, add_arguments and run."""

import argparse
import logging
import sys

import dqjax.data.collect
import dqjax.data.inspect
import dqjax.data.train_tokenizer
from dqjax.config import ConfigError

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
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        COMMANDS[args.command].run(args)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` closed the pipe: not an error of ours
        sys.stderr.close()
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
