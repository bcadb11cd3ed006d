#!/usr/bin/env bash
# Slow-thinking distillation in miniature, on two CPU cores: environment, install, data, a fresh 0.6M student, training,
# held-out accuracy before and after, and an export that transformers and vLLM load. Everything lands in runs/chain_sum.
#
#   launch/quickstart.sh             about 6 minutes after the install; fails if accuracy stays under 60%
#   launch/quickstart.sh --compare   also trains the students of running sums and of bare answers, and prints the table
set -euo pipefail
source "$(dirname "$0")/env.sh"
ensure_env tasks
export JAX_PLATFORMS=cpu TOKENIZERS_PARALLELISM=false

base=runs/chain_sum
compare=false
case ${1:-} in
--compare) compare=true ;;
"") ;;
*) echo "usage: launch/quickstart.sh [--compare]" >&2; exit 2 ;;
esac

[ -s $base/data/test.jsonl ] || python -m dqjax.data collect --config configs/data/chain_sum.yaml
[ -d $base/tokenizer ] || python -m dqjax.data tokenizer --input $base/data/train_columns.jsonl --vocab-size 512 --out $base/tokenizer
[ -d $base/student ] || python -m dqjax.convert new miniature $base/student --tokenizer $base/tokenizer

evaluate() { # NAME CHECKPOINT [THINKING]: greedy, on the 200 held-out problems
    [ -s "$base/eval/$1/report.json" ] || python -m dqjax.eval --checkpoint "$2" --benchmark $base/data/test.jsonl \
        --out "$base/eval/$1" --thinking "${3:-on}" --temperature 0 --max-new-tokens 200 --rows 200 --dtype float32 \
        >/dev/null
}

evaluate before $base/student
python -m dqjax.train --config configs/miniature/slow.yaml
evaluate columns $base/columns
[ -d $base/export ] || python -m dqjax.convert to-hf $base/columns $base/export --dtype float32

if $compare; then # equal steps, equal problems, other chains; an answer without a chain is a no-think answer
    for chains in running answer; do
        python -m dqjax.train --config configs/miniature/slow.yaml train.run_dir=$base/$chains \
            data.sources=$base/data/train_$chains.jsonl data.validation=$base/data/validation_$chains.jsonl
    done
    evaluate running $base/running
    evaluate answer $base/answer off
fi

python - $base <<'PY'
import json, pathlib, sys

base = pathlib.Path(sys.argv[1])
rows = [
    ("before", "before training"),
    ("answer", "trained on answers alone"),
    ("running", "trained on running sums"),
    ("columns", "trained on digit columns"),
]
print()
for name, label in rows:
    path = base / "eval" / name / "report.json"
    if path.exists():
        (mode,) = json.loads(path.read_text())["modes"].values()
        a = mode["accuracy"]
        print(f"{label:26} {a['value']:6.1%}   95% interval {a['low']:.1%} to {a['high']:.1%}   tokens {mode['tokens']['mean']:5.0f}")
for line in (base / "eval/columns/records.jsonl").read_text().splitlines()[:3]:
    record = json.loads(line)
    print(f"\n{record['id']}, reference {record['reference']}, {'right' if record['correct'] else 'wrong'}:\n{record['text']}")
print(f"""
run folder        {base}/columns
TensorBoard       tensorboard --logdir {base}/columns/tensorboard
Hugging Face      {base}/export   (vllm serve {base}/export)""")
(mode,) = json.loads((base / "eval/columns/report.json").read_text())["modes"].values()
if mode["accuracy"]["value"] < 0.6:
    sys.exit(f"FAILED: accuracy {mode['accuracy']['value']:.1%} is under 60%")
PY
