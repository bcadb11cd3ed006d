"""What the benchmarks compare with, where it is installed."""

import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from dqjax.models.config import ModelConfig, to_huggingface


def transformers_generate(
    config: ModelConfig,
    prompts: Int[np.ndarray, "B T"],
    *,
    new_tokens: int,
    dtype: str,
    top_k: int,
    top_p: float,
    device: str,
) -> Callable[[], float]:
    """A function that samples `new_tokens` behind each prompt with transformers' `generate` and returns the seconds.

    The weights are random, and nothing ends a sample early.

    Raises:
      ImportError: torch or transformers is not installed.
      RuntimeError: torch has no such device.
    """
    import torch
    import transformers

    values = to_huggingface(config, dtype=dtype)
    hf_config = transformers.AutoConfig.for_model(**values)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor(prompts, dtype=torch.long, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    filters = {"do_sample": True, "temperature": 1.0, "top_k": top_k, "top_p": top_p}
    ends = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}

    def run() -> float:
        wait()
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **filters, **ends)
        wait()
        seconds = time.perf_counter() - start
        if out.shape[1] != prompts.shape[1] + new_tokens:
            raise RuntimeError(f"transformers made {out.shape[1] - prompts.shape[1]} tokens, not {new_tokens}")
        return seconds

    return run
