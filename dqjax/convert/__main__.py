"""python -m dqjax.convert from-hf SRC DST, to-hf SRC DST, to-peft SRC DST, new SIZE DST."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax

from dqjax.commands import run_command
from dqjax.convert.export import from_huggingface, to_huggingface_folder, to_peft_folder
from dqjax.convert.licence import Licence
from dqjax.convert.new import new_student
from dqjax.models.config import SIZES

DESCRIPTION = """Checkpoints in and out.

  from-hf   a Hugging Face folder (safetensors) or hub name -> a checkpoint folder: model/ and checkpoints/.
            Training, generation and evaluation take Hugging Face folders directly, too.
  to-hf     a run folder or checkpoint folder -> a Hugging Face folder: weights, config.json,
            generation_config.json, tokenizer, LICENSE and a model card. Adapters are merged into the weights.
  to-peft   a run folder that trained adapters (lora: in its config) -> those alone, as PEFT loads them.
  new       a named size and a tokenizer -> a Hugging Face folder with random weights, to train from."""

EXAMPLES = """examples:
  python -m dqjax.convert from-hf Qwen/Qwen3-0.6B models/qwen3-0.6b
  python -m dqjax.convert to-hf runs/sft exports/my-student --teacher deepseek-ai/DeepSeek-R1
  python -m dqjax.convert to-peft runs/lora exports/my-adapter
  python -m dqjax.convert new miniature runs/chain_sum/student --tokenizer runs/chain_sum/tokenizer"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plain = argparse.RawDescriptionHelpFormatter
    into = commands.add_parser("from-hf", help="Hugging Face folder to checkpoint", epilog=EXAMPLES, formatter_class=plain)
    out = commands.add_parser("to-hf", help="checkpoint to Hugging Face folder", epilog=EXAMPLES, formatter_class=plain)
    peft = commands.add_parser("to-peft", help="adapters of a run, as PEFT stores them", epilog=EXAMPLES, formatter_class=plain)
    new = commands.add_parser("new", help="a new student of a named size", epilog=EXAMPLES, formatter_class=plain)
    new.add_argument("size", metavar="SIZE", help=", ".join(SIZES))
    new.add_argument("--tokenizer", required=True, type=pathlib.Path, metavar="DIR")
    new.add_argument("--seed", type=int, default=0, help="of the weights; default %(default)s")
    into.add_argument("source", metavar="SRC", help="a Hugging Face folder, or org/name on the hub")
    out.add_argument("source", metavar="SRC", help="a run folder or a converted checkpoint")
    peft.add_argument("source", metavar="SRC", help="a run folder with a lora section in its config")
    for command in (into, out, peft, new):
        command.add_argument("target", metavar="DST", type=pathlib.Path, help="a folder that does not exist yet, or is empty")
    for command in (out, peft):
        command.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest intact one)")
        command.add_argument("--base", help="name of the base model (default: from the run's config)")
    out.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights")
    out.add_argument("--teacher", action="append", default=[], metavar="NAME", help="a teacher, for the card; repeatable")
    out.add_argument("--data", action="append", default=[], metavar="NAME", help="a data set, for the card; repeatable")
    return run_command(lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    # Conversion needs host memory only: an accelerator stays free for whoever uses it.
    jax.config.update("jax_platforms", "cpu")
    if args.command == "new":
        config = new_student(args.size, args.tokenizer, args.target, seed=args.seed)
        print(f"{args.target}: {config.family}, {config.num_parameters:,} parameters, {config.vocab_size} table rows")
        return 0
    if args.command == "to-peft":
        step = to_peft_folder(args.source, args.target, step=args.step, base=args.base)
        print(f"{args.target}: adapters of step {step} of {args.source}")
        return 0
    if args.command == "from-hf":
        licence = from_huggingface(args.source, args.target)
        print(f"{args.target}: checkpoint of {args.source}")
    else:
        card = to_huggingface_folder(
            args.source,
            args.target,
            step=args.step,
            dtype=args.dtype,
            base=args.base,
            teachers=args.teacher,
            data=args.data,
        )
        licence = card.licence
        print(f"{args.target}: step {card.step} of {args.source}, {args.dtype}, {card.parameters:,} parameters")
    say_licence(licence)
    return 0


def say_licence(licence: Licence) -> None:
    """Tells on the console what the base's licence asks for."""
    if licence.research_only:
        print(
            f"NOTE: the base is under the {licence.name} (by {licence.evidence}): research and evaluation only; "
            "commercial use of it, or of what is trained from it, needs a licence from its owner",
            file=sys.stderr,
        )
    if licence.id == "unknown":
        print("NOTE: no licence came with the base: add its LICENSE before you publish this model", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
