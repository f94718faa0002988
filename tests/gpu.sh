#!/usr/bin/env bash
# What one GPU shows, in at most nine minutes; docs/gpu.md says what each part measures.
#
#     [PHOTOS=...] [VOC=FOLDER] [OUT=FOLDER] tests/gpu.sh [--dry]
#
# PHOTOS: a folder of photographs in train/ and val/, by class, or a .tar.xz of one (default: a
# thousand of the built-in images). VOC: a folder in Pascal VOC's layout, for masks (default: the
# built-in images). OUT: where the results go (default: gpu_results). --dry: the same on a CPU with
# tiny sizes, in two minutes, as a test of this script. No network is needed, and nothing installed.

set -u
here=$(realpath "$(dirname "$0")/..")
OUT=$(realpath -m "${OUT:-$here/gpu_results}")
photos=${PHOTOS:+$(realpath -m "$PHOTOS")}
voc=${VOC:+$(realpath -m "$VOC")}
cd "$here"
mkdir -p "$OUT"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
date -u >"$OUT/summary.txt"
failed=0

if [[ ${1:-} == --dry ]]; then
    export DINO_TEST_DEVICE=cpu OMP_NUM_THREADS=1
    device=cpu slack=20 steps=20 workers=0
    recipe=(--arch vit_micro --patch 8 --local_crops_number 2 --workers 0)
else
    device=cuda slack=1 steps=300 workers=8
    recipe=(--arch vit_small --patch 8 --global_crops_size 64 --local_crops_size 32 --batch 128
        --blur_sigma 0.6 --out_dim 4096 --momentum_teacher 0.99 --lr 1e-3 --warmup_epochs 5
        --warmup_teacher_temp 0.02 --warmup_teacher_temp_epochs 5 --knn_every 20)
fi

# part NAME SECONDS COMMAND...: run a command, at most so long, and write what it says to NAME.log
part() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout --kill-after=20 $((limit * slack)) "$@" >"$OUT/$name.log" 2>&1
    status=$?
    # SIGTERM ends training as it should
    [[ $name == train && $status == 124 ]] && status=0
    ((status)) && failed=1
    echo "$name: status $status after $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
}

part tests 90 python3 -m pytest -q -rs --durations=10 tests/test_gpu.py
part bench 220 python3 -m tests.bench --quick --device $device

if [[ $photos == *.tar.xz ]]; then
    tar xf "$photos" -C "$scratch"
    photos=$(dirname "$(find "$scratch" -type d -name train | head -n 1)")
elif [[ ! $photos ]]; then
    photos=$scratch/shapes
    python3 -m util.shapes "$photos"
fi
recipe+=(--data "$photos" --device $device)

# Training has the time until the evaluations, which have 95 seconds. It makes as many epochs as fit
# by the rate of its first steps, so that its schedules come to their ends; checkpoints and tests
# have a third of the time. If that is too little, SIGTERM ends it with a checkpoint.
epochs=$(timeout $((60 * slack)) python3 - "${recipe[@]}" --steps $steps 2>"$OUT/rate.log" <<END
import sys
import train
from tests.bench import our_steps
from util.distributed import processes

args = train.parse_args(sys.argv[1:])
with processes(args.device) as (device, _, _):
    run = our_steps(args, device)
rate = run.last * run.global_batch / run.progress.seconds()
print(f"{rate:.0f} images/s, {len(run.images)} images", file=sys.stderr)
seconds = 2 if args.device == "cpu" else 2 / 3 * (540 - 95 - 60 - $SECONDS)
print(max(6, int(seconds * rate / len(run.images))))
END
) || failed=1
part train $((slack > 1 ? 60 : 540 - 95 - 20 - SECONDS)) python3 train.py "${recipe[@]}" \
    --epochs "${epochs:-20}" --overwrite --output "$OUT/run"

checkpoint=$OUT/run/last.pth
part knn 35 python3 evaluate.py knn "$checkpoint" --k 20 --pixels --workers $workers \
    --device $device
part masks 25 python3 evaluate.py masks "$checkpoint" --data "${voc:-shapes}" --device $device
mapfile -t six < <(find "$photos" -type f | sort | shuf -n 6 --random-source=<(yes))
part pictures 20 python3 visualize.py "$checkpoint" "${six[@]}" --output "$OUT" --device $device
part curves 15 python3 visualize.py "$OUT/run" --output "$OUT"

for name in tests bench rate train knn masks; do
    printf '\n== %s\n' $name
    tail -n 40 "$OUT/$name.log"
done >>"$OUT/summary.txt"
echo "in $OUT:" "$(ls "$OUT")"
exit $failed
