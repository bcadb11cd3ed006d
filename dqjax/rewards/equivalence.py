"""Whether two mathematical answers are equal, by math-verify: the function that grading workers run.

math-verify's own timeouts need the main thread and signals; they are off here, since `workers.Workers` stops what takes
too long.
"""

import functools
import logging
from collections.abc import Mapping

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs a traceback for every odd sample

_TARGETS = (LatexExtractionConfig(), ExprExtractionConfig())


def equivalent(request: Mapping[str, object]) -> bool:
    """Whether `prediction` equals `reference`.

    Args:
      request: `reference`, `prediction` (texts), and `stated`: the prediction is an answer alone, not a text to search.
    """
    prediction = f"\\boxed{{{request['prediction']}}}" if request["stated"] else str(request["prediction"])
    parsed = parse(prediction, _TARGETS, parsing_timeout=None)
    return bool(parsed) and verify(list(_reference(str(request["reference"]))), parsed, timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def _reference(text: str) -> tuple:
    return tuple(parse(f"\\boxed{{{text}}}", _TARGETS, parsing_timeout=None))
