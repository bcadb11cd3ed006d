#!/usr/bin/env bash
# Distillation against plain SFT at equal steps, on texts of which half are wrong: three students each, and the means of
# their held-out cross-entropy on right chains. launch/quickstart.sh makes the teacher first.
#
#   launch/distill.sh             about 20 minutes on two CPU cores; fails unless distillation is better in the mean
set -euo pipefail
source "$(dirname "$0")/env.sh"
ensure_env tasks
export JAX_PLATFORMS=cpu TOKENIZERS_PARALLELISM=false

base=runs/chain_sum
[ -d $base/columns ] || { echo "no teacher in $base/columns: run launch/quickstart.sh first" >&2; exit 2; }
[ -s $base/sloppy/train_mistaken.jsonl ] || python -m dqjax.data collect --config configs/data/chain_sum.yaml \
    out=$base/sloppy 'chain_styles=[mistaken, pairs]' more_mistakes=1

for seed in 0 1 2; do
    student=$base/students/$seed
    [ -d $student ] || python -m dqjax.convert new miniature $student --tokenizer $base/tokenizer --seed $seed
    for objective in sft distill; do
        choice=$([ $objective = sft ] && echo 'objective={kind: sft}' || echo objective.kind=distill)
        python -m dqjax.train --config configs/miniature/distill.yaml "$choice" model.init_from=$student \
            data.seed=$seed train.run_dir=$base/distill_$objective/$seed
    done
done

python - $base <<'PY'
import json, pathlib, statistics, sys

means = {}
for objective, key in (("sft", "eval/loss"), ("distill", "eval/cross_entropy")):
    found = []
    for seed in range(3):
        path = pathlib.Path(sys.argv[1]) / f"distill_{objective}" / str(seed) / "metrics.jsonl"
        found.append([row[key] for row in map(json.loads, path.read_text().splitlines()) if key in row][-1])
    means[objective] = statistics.mean(found)
    print(f"{objective:8} held-out cross-entropy, nats a token: {means[objective]:.3f}   ({', '.join(f'{x:.3f}' for x in found)})")
if means["distill"] >= means["sft"]:
    sys.exit("FAILED: distillation is not better than SFT")
PY
