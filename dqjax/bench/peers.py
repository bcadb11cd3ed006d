"""What the benchmarks compare with, where it is installed."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from dqjax.bench.student_step import CHECKED_STEPS, Case, timed
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


@dataclasses.dataclass(frozen=True)
class TransformersStep:
    """How transformers makes the training step.

    Attributes:
      attention: its `attn_implementation`; all but "flex_attention" hold a mask of B × T × T for packed rows.
      checkpointing: recompute each layer in the backward pass.
      compiled: by torch.compile.
      autocast: float32 weights and moments, as ours; without, both are in the case's dtype.
      liger: Liger's kernels for norms, MLP, RoPE and the cross-entropy from hidden states.
    """

    attention: str = "sdpa"
    checkpointing: bool = False
    compiled: bool = False
    autocast: bool = False
    liger: bool = False

    @property
    def name(self) -> str:
        """Such as "transformers_sdpa_checkpointing"."""
        chosen = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is True]
        return "_".join(["transformers", self.attention, *chosen])


def time_transformers(case: Case, how: TransformersStep, folder: pathlib.Path) -> dict[str, Any]:
    """The same step by transformers and torch's AdamW, from the weights in `folder`.

    Packed rows are told apart by their position_ids, from which transformers makes a mask that is causal within each
    document; clipping, weight decay and the reduction are ours.

    Returns:
      As `time_student`, "holds" saying the precision of the state, and "versions"; "peak_bytes" is None on a CPU.

    Raises:
      ImportError: torch or transformers is not installed.
      RuntimeError: torch cannot do it.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case.dtype)
    held = torch.float32 if how.autocast else dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=held, attn_implementation=how.attention)
    model.to(device).train()
    if how.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)  # what transformers' own trainer calls
    if how.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward = torch.compile(model) if how.compiled else model
    parameters = list(model.parameters())
    adamw = case.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": adamw.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=adamw.learning_rate,
        betas=(adamw.b1, adamw.b2),
        eps=adamw.eps,
        fused=True,
    )
    inputs = _transformers_inputs(case)
    micro_batches = [
        {name: torch.tensor(x[i :: case.micro_batches], device=device) for name, x in inputs.items()}
        for i in range(case.micro_batches)
    ]
    trained = torch.tensor(int((case.batch.token_weight > 0).sum()), device=device)

    def step():
        total = torch.zeros((), device=device)
        for micro in micro_batches:
            with torch.autocast(device, dtype, enabled=held != dtype):
                loss = forward(**micro, use_cache=False, num_items_in_batch=trained).loss
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, adamw.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, norm

    def run(steps: int) -> None:
        for _ in range(steps):
            total, _ = step()
        total.item()  # waits

    first = [[float(x) for x in step()] for _ in range(CHECKED_STEPS)]
    return {
        "losses": [loss for loss, _ in first],
        "gradient_norms": [norm for _, norm in first],
        "holds": f"{str(held).removeprefix('torch.')} weights, gradients and moments",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **timed(run, case),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def _transformers_inputs(case: Case) -> dict[str, np.ndarray]:
    """Token ids and labels, which transformers shifts itself; positions only where rows hold several documents."""
    batch = case.batch
    labels = np.where(batch.positions > 0, batch.tokens, -100)  # nothing predicts the first token of a document
    inputs = {"input_ids": batch.tokens, "labels": labels}
    if batch.segment_ids.max() > 1:
        inputs["position_ids"] = batch.positions
    return {name: x.astype(np.int64) for name, x in inputs.items()}
