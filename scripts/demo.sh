#!/usr/bin/env bash
# The whole method on a CPU: makes .venv, gets Fashion-MNIST and selects a long-tailed subset, trains stages I, II and
# III, runs stage II once more on stage III's soft classifier, and prints one table of all four.
#   bash scripts/demo.sh            four to five minutes on 2 cores, after the installation
#   bash scripts/demo.sh --smoke    one epoch per stage, in one or two minutes
# The network, the queue and the momentum are small, since each training has only a few hundred steps. --freeze-bn keeps the
# BatchNorm of the frozen networks in eval mode, because batches this small would distort its statistics.
# If the demo was stopped, the same command continues it. runs/ holds everything that it makes, and can be deleted.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh

out=runs/demo
epochs_i=30 epochs_ii=5 epochs_iii=40
case "${1:-}" in
  "") ;;
  --smoke) out=runs/demo-smoke epochs_i=1 epochs_ii=1 epochs_iii=1 ;;
  *) echo "demo.sh: $1: unknown; --smoke is the only option" >&2; exit 2 ;;
esac

need_venv requirements.txt
data=runs/fashion-mnist-lt
prepare() { "$python" -m datasets.prepare fashion-mnist-lt --out "$data" --imbalance 100 --max-per-class 500; }
prepare || { as_root_install dataset-fashion-mnist && prepare; }

common=(--arch resnet20 --image-size 28 --cos --seed 0 --batch-size 64 --eval-batch-size 250 --print-freq 1000
  --channels-last --resume auto "$data")
set -x
"$python" ssd_stage_i.py --epochs $epochs_i --moco-k 1216 --moco-m 0.99 --output_dir $out/stage_i "${common[@]}"
"$python" ssd_stage_ii.py --epochs $epochs_ii --last_stage_ckpt $out/stage_i/last_checkpoint.pth.tar \
  --freeze-bn --output_dir $out/stage_ii "${common[@]}"
"$python" ssd_stage_iii.py --epochs $epochs_iii --teacher_ckpt $out/stage_ii/last_checkpoint.pth.tar \
  --freeze-bn --output_dir $out/stage_iii "${common[@]}"
"$python" ssd_stage_ii.py --epochs $epochs_ii --last_stage_ckpt $out/stage_iii/last_checkpoint.pth.tar \
  --classifier soft --freeze-bn --output_dir $out/stage_iii_tuned "${common[@]}"
{ set +x; } 2>/dev/null
echo
"$python" -m utils.report $out/stage_i $out/stage_ii $out/stage_iii $out/stage_iii_tuned
