"""python -m dqjax.bench kernels|rollout|train: measured rates, beside peers and the machine's ceilings."""

import os
import sys
from collections.abc import Sequence

from dqjax.commands import run_command

USAGE = """usage: python -m dqjax.bench {kernels,rollout,train} [options]

  kernels   attention, decode attention and vocabulary losses, forward and backward
  rollout   tokens a second of the rollout engine, beside transformers
  train     a supervised training step: checked, then timed, beside transformers

`python -m dqjax.bench train --help` has the options and examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark; returns its exit code, 2 for an unknown one."""
    what, *rest = (list(sys.argv[1:]) if argv is None else list(argv)) or [""]
    # Peers share the device: jax would otherwise keep three quarters of a GPU's memory from them.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if what == "kernels":
        from dqjax.kernels.bench import main as run
    elif what == "rollout":
        from dqjax.bench.rollout import main as run
    elif what == "train":
        from dqjax.bench.train import main as run
    else:
        print(USAGE, file=sys.stdout if what in ("-h", "--help") else sys.stderr)
        return 0 if what in ("-h", "--help") else 2
    return run(rest)


if __name__ == "__main__":
    sys.exit(run_command(main))
