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
        if not out_of_memory(e):
            raise
        print(f"error: the device is out of memory{wanted(e)}", file=sys.stderr)
        return 1
    except (ValueError, FloatingPointError, NotImplementedError) as e:
        if os.environ.get("DQJAX_TRACEBACK"):
            raise
        print(f"error: {e} (DQJAX_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether XLA failed for want of device memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def wanted(error: jax.errors.JaxRuntimeError) -> str:
    """What XLA asked for in vain, as " (it wanted 12.50GiB more)", or "" where its message does not say."""
    found = re.search(r"(?:allocate|allocating) ([\d.]+ ?\w+)", str(error))
    return f" (it wanted {found[1]} more)" if found else ""
