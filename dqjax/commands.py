"""What every command does with its errors: one message, the right exit code, logs on stderr."""

import logging
import os
import re
import sys
from collections.abc import Callable

import jax

from dqjax.config import ConfigError

USAGE = 2  # bad input: a config, a file, an argument


def run_command(main: Callable[[], int]) -> int:
    """Runs a command's `main` and returns its exit code: 2 for bad input, 1 for a failure, 130 for an interrupt."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("jax", "orbax", "httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs there what it also raises
    try:
        return main()
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(f"error: {out_of_memory(str(e))}", file=sys.stderr)
        return 1
    except (ValueError, FloatingPointError, NotImplementedError) as e:
        if os.environ.get("DQJAX_TRACEBACK"):
            raise
        print(f"error: {e} (DQJAX_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def out_of_memory(text: str) -> str:
    """One line for XLA's report of a full device: what it wanted, and the keys that make it want less."""
    wanted = re.search(r"(?:allocate|allocating) ([\d.]+ ?\w+)", text)
    return (
        f"the device is out of memory{f' (it wanted {wanted[1]} more)' if wanted else ''}. Less memory, from cheapest: "
        "train.accumulate up, model.remat: full, data.row_length down, mesh.fsdp or mesh.tensor over more devices, "
        "optimizer.mu_dtype: bfloat16"
    )
