#!/usr/bin/env bash
# Reinforcement in miniature, on two CPU cores, from the student of launch/quickstart.sh. Three times, with three seeds each:
#
#   grpo             taught by three teachers, of whom one is hasty and wrong, it learns from its own samples which end right
#   grpo_length      taught chains with and without a remark, it learns to leave that out, at the same accuracy
#   grpo_verbosity   the same, but for an RV reward: a trained scorer says how verbose a chain is
#
# The table at the end is of the 200 held-out problems, greedy and sampled at temperature 1.
set -euo pipefail
source "$(dirname "$0")/env.sh"
ensure_env tasks
export JAX_PLATFORMS=cpu TOKENIZERS_PARALLELISM=false

base=runs/chain_sum
[ -s $base/data/train_hasty.jsonl ] ||
    python -m dqjax.data collect --config configs/data/chain_sum.yaml "chain_styles=[checked, hasty]"

[ -s $base/data/labels.jsonl ] || {
    { head -n 4000 $base/data/train_columns.jsonl; tail -n 4000 $base/data/train_checked.jsonl; } >$base/data/both.jsonl
    python -m dqjax.data annotate --input $base/data/both.jsonl --output $base/data/labels.jsonl \
        "length_rule={shortest: 5, longest: 60, few: 1, many: 6}" "labels=[verbosity, difficulty]"
}
python -m dqjax.train --config configs/miniature/scorer.yaml

evaluate() { # NAME
    for temperature in 0 1; do
        [ -s "$base/eval/$1-$temperature/report.json" ] || python -m dqjax.eval --checkpoint "$base/$1" \
            --benchmark $base/data/test.jsonl --out "$base/eval/$1-$temperature" --temperature $temperature --top-p 1 \
            --top-k 0 --max-new-tokens 200 --rows 200 --dtype float32 >/dev/null
    done
}

for pair in styles:grpo wordy:grpo_length wordy:grpo_verbosity; do
    student=${pair%:*} policy=${pair#*:}
    python -m dqjax.train --config configs/miniature/$student.yaml
    evaluate $student
    for seed in 0 1 2; do
        python -m dqjax.train --config configs/miniature/$policy.yaml data.seed=$seed train.seed=$seed \
            train.run_dir=$base/$policy-$seed
        evaluate $policy-$seed
    done
done

python - $base <<'PY'
import json, pathlib, sys

base = pathlib.Path(sys.argv[1])
print(f"\n{'':18}{'greedy: accuracy, tokens':>34}{'sampled: accuracy, tokens':>34}")
seeds = lambda name: [f"{name}-{seed}" for seed in range(3)]
for name in ["styles", *seeds("grpo"), "wordy", *seeds("grpo_length"), *seeds("grpo_verbosity")]:
    cells = ""
    for temperature in (0, 1):
        (mode,) = json.loads((base / f"eval/{name}-{temperature}/report.json").read_text())["modes"].values()
        a = mode["accuracy"]
        cells += f"{a['value']:12.1%} [{a['low']:.1%}, {a['high']:.1%}]{mode['tokens']['mean']:6.0f}"
    print(f"{name:18}{cells}")
PY
