#!/usr/bin/env bash
# Measure and check everything on one GPU, in stages. Each stage has its own time limit and its own file, which is
# rewritten after every row. A stage that fails or takes too long does not affect the others.
#
#   make gpu                                              all stages but learn, with generous limits
#   bash benchmarks/gpu.sh [STAGE...]                     some of the functions run_STAGE below
#   LIMIT=385 bash benchmarks/gpu.sh env check ...        at most so many seconds in total; later stages are left out
#   TINY=1 PY=.venv/bin/python bash benchmarks/gpu.sh     a rehearsal on a CPU, with tiny models
#
# On an H200 with 16 cores all stages take about 14 minutes. learn takes 4 to 5 minutes for its question, and 9 for all.
# Measured there: large 47 s without its compiled model, small 60 s without CUDA graphs, rpl 34 s, e2e 18 s. base took
# more than 120 s. The rest is estimated: a process takes 12 s to start, and 35 s to compile a model of size S or B. Two
# calls fit into 13 minutes. The first one begins with the stages that have not been measured there yet:
#
#   LIMIT=385 QUICK= bash benchmarks/gpu.sh check huge launches data eval small base_apl e2e_compiled
#   LIMIT=345 QUICK= bash benchmarks/gpu.sh learn
#
# Variables:
#   OUT     folder of the results (runs/gpu; runs/gpu-rehearsal in a rehearsal)
#   PY      the Python (with the packages of `pip install -e .[test]`)
#   CAPS    factor of the stages' time limits (for a GPU slower than an H200)
#   LIMIT   seconds for all stages together
#   BATCH   batch size (256)
#   DATA    folder with photos.tar, JPEGs in an uncompressed tar (without it, the demo's images), and for learn
#           mini_imagenet20/{train,val}.tar (.gpu)
#   QUICK=  (empty) leaves out the compiled ViT-L, which takes a minute to compile, and the second half of learn
#   TINY    not empty: a rehearsal on a CPU
#
# Results: log.txt, table.md, {launches,small,base,base_apl,large,huge,rpl}.json; learn.tgz. The figures of data and eval
# are in the table, and as JSON in the log.
#
# On a machine without a compiler, copy the checkout, DATA, and the native library. Build the library on another machine
# with the same processor architecture, so that it finds a copy of libjpeg in its own folder:
#   LDFLAGS='-Wl,-rpath,$ORIGIN' python -m util.data.native build
#   cp -L /usr/lib/x86_64-linux-gnu/libjpeg.so.62 util/data/native/
# git ignores *.so, so util/data/native/libmaepl.so and util/data/native/libjpeg.so.62 must be copied by name. Without
# them images are decoded more slowly. torch.compile needs a C compiler; without one, rows of compiled models say so.
set -u
cd "$(dirname "$0")/.."
PY=${PY:-python3}; DATA=${DATA:-.gpu}; TINY=${TINY:-}; BATCH=${BATCH:-256}; CAPS=${CAPS:-1}; LIMIT=${LIMIT:-36000}
OUT=${OUT:-runs/gpu$(if [ -n "$TINY" ]; then echo -rehearsal; fi)}; mkdir -p "$OUT"; OUT=$(cd "$OUT" && pwd)
DEV=cuda; [ -n "$TINY" ] && DEV=cpu
if [ -z "$TINY" ] && ! $PY -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "error: $PY finds no GPU (torch.cuda.is_available() is false). A rehearsal on the CPU: TINY=1 PY=$PY bash $0" >&2
    exit 1
fi
PHOTOS=$DATA/photos.tar; [ -e "$PHOTOS" ] || PHOTOS=data/demo/train.tar
WORK=$(mktemp -d); GROUP=; trap 'end_group; rm -rf "$WORK"' EXIT
BEGIN=$(date +%s); LOG=$OUT/log.txt
CORES=$(env -u OMP_NUM_THREADS nproc)  # nproc prints OMP_NUM_THREADS where that is set
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
pick() { if [ -n "$TINY" ]; then echo "$2"; else echo "$1"; fi; }  # GPU'S REHEARSAL'S

# `timeout` leads its own process group, and ends with the command that it started. The command's children may run on: a
# main saves a checkpoint first, and workers of loaders block the signal. They would write to WORK while it is removed,
# and take time from the next stage. So the rest of the group is killed.
end_group() { [ -z "$GROUP" ] || kill -KILL -- "-$GROUP" 2> /dev/null; GROUP=; }

stage() {  # NAME SECONDS COMMAND...: write the output to the log, show its last lines, and rewrite the table
    local name=$1 cap rc at left
    cap=$(pick "$(($2 * CAPS))" 2400); shift 2; at=$(date +%s); left=$((LIMIT - at + BEGIN))
    [ "$left" -lt 10 ] && { echo "== $name: left out, $left s are left" | tee -a "$LOG"; return; }
    [ "$cap" -gt "$left" ] && cap=$left
    echo "== $name: begins at $((at - BEGIN)) s, cap $cap s: $*" | tee -a "$LOG"
    timeout -k 5 "$cap" "$@" > "$WORK/$name.log" 2>&1 & GROUP=$!
    wait "$GROUP"; rc=$?
    end_group
    cat "$WORK/$name.log" >> "$LOG"; tail -n 25 "$WORK/$name.log" | cut -c1-220
    echo "== $name: rc $rc after $(($(date +%s) - at)) s" | tee -a "$LOG"
    rm -f "$OUT"/*.partial
    $PY -m benchmarks.gpu_table "$OUT" "$WORK/data.json" "$WORK/eval.json" 2>&1 | tee -a "$LOG"
}

run_env() {
    stage env 30 bash -c "uname -m; ldd --version | head -1; gcc --version | head -1; echo $CORES cores; df -h /dev/shm | tail -1
        nvidia-smi | head -15; ls -l util/data/native/*.so*; $PY -m util.data.native status
        $PY -c \"import torch, torchvision, timm; print(torch.__version__, torchvision.__version__, timm.__version__)
from util.run.flops import matmul_rate
d = torch.device('$DEV')
print({str(t): round(matmul_rate(d, t) / 1e12, 2) for t in (torch.float32, torch.bfloat16)}, 'TFLOP/s')\""
}
run_check() { stage check 150 env $(pick "" MAE_PL_REHEARSE=1) $PY -m pytest -q -rP --show-capture=stdout -p no:cacheprovider \
    tests/process/test_gpu.py $(pick "-n 8" "--deselect tests/process/test_gpu.py::test_a_run_learns_and_continues[compiled]
    --deselect tests/process/test_gpu.py::test_a_run_learns_and_continues[graphs]"); }

measure() {  # STAGE SECONDS ROUNDS MODEL VARIANT...: measure a model in its own process
    local name=$1 cap=$2 rounds=$3 model=$4; shift 4
    stage "$name" "$cap" env OMP_NUM_THREADS="$(pick "$CORES" 1)" $PY benchmarks/run.py step --device $DEV --one_by_one \
        --amp "$(pick bf16 fp32)" --rounds "$(pick "$rounds" 1)" --steps "$(pick 5 1)" --json "$OUT/$name.json" \
        --batch_size "$(pick "$BATCH" 2)" --models "$(pick "$model" mae_vit_pico_patch8)" --variants "$@"
}
# Compiled variants come last: compiling takes longest. In a rehearsal only `small` compiles.
run_small() { measure small 130 5 mae_vit_small_patch16 mae apl transformers timm graphs $(pick compiled ""); }
run_base() {
    measure base 160 5 mae_vit_base_patch16 mae apl transformers timm rpl8 rpl $(pick "compiled compiled-apl" "")
}
run_base_apl() { measure base_apl 80 5 mae_vit_base_patch16 apl $(pick compiled-apl ""); }  # the last variants of run_base
run_large() { measure large 120 3 mae_vit_large_patch16 mae apl transformers timm rpl8 $(pick "${QUICK-compiled}" ""); }
run_huge() { measure huge 100 3 mae_vit_huge_patch14 mae transformers recomputed apl timm; }

run_launches() {
    stage launches 170 env OMP_NUM_THREADS="$(pick "$CORES" 1)" $PY benchmarks/run.py launches --device $DEV \
        --amp "$(pick bf16 fp32)" --repeats "$(pick 20 1)" --batch_size "$(pick "$BATCH" 2)" \
        --models $(pick "mae_vit_small_patch16 mae_vit_tiny_patch8" "mae_vit_nano_patch8 mae_vit_pico_patch8") \
        --variants mae transformers $(pick "compiled graphs" "") --variants mae $(pick graphs "") \
        --json "$OUT/launches.json"
}

run_rpl() {
    stage rpl 60 $PY benchmarks/run.py rpl --device $DEV --amp "$(pick bf16 fp32)" --rounds "$(pick 5 1)" \
        --json "$OUT/rpl.json" --naive_batch "$(pick 16 1)" --batch_sizes $(pick "128 256" 1) --step_batch "$(pick 128 1)"
}
to_log() {  # NAME: write the figures to the log as one line, so that no other file needs to be copied
    [ ! -e "$WORK/$1.json" ] || { tr -d '\n' < "$WORK/$1.json"; echo; } >> "$LOG"
}
run_data() {
    stage data 45 $PY benchmarks/run.py data --device $DEV --data_path "$PHOTOS" --rounds 1 --batches "$(pick 64 1)" \
        --images "$(pick 200 20)" --batch_size "$(pick 128 10)" --num_workers "$(pick "$CORES" 1)" --json "$WORK/data.json"
    to_log data
}
run_eval() {
    stage eval 30 $PY benchmarks/run.py evaluation --device $DEV --rounds "$(pick 3 1)" --json "$WORK/eval.json" \
        --model "$(pick vit_base_patch16 vit_tiny_patch16)" --batch_size "$(pick 256 4)" --batches "$(pick 8 1)" \
        --queries "$(pick 10000 100)" --bank "$(pick 1281167 1000)"
    to_log eval
}
e2e() {  # NAME SECONDS FLAGS...: from JPEGs on disk to the training step, as `--dry_run` measures it
    local name=$1 cap=$2; shift 2
    mkdir -p "$WORK/photos"; tar -xf "$PHOTOS" -C "$WORK/photos"
    # Each photo is listed 64 times, so that an epoch has enough batches.
    for _ in $(seq "$(pick 64 1)"); do find "$WORK/photos" -type f | sort; done > "$WORK/photos.txt"
    stage "$name" "$cap" $PY main_pretrain.py --device $DEV --dry_run --output_dir "$WORK/none" \
        --data_path "$WORK/photos.txt" --num_workers "$(pick $((CORES - 1)) 0)" --batch_size "$(pick "$BATCH" 4)" \
        --model "$(pick mae_vit_base_patch16 mae_vit_pico_patch8)" --norm_pix_loss $(pick "" "--input_size 64") "$@"
}
run_e2e() { e2e e2e 40; }
run_e2e_compiled() { e2e e2e_compiled 60 --compile; }

# The experiment of evidence/recipes/mae_wide.args, which states its question. Small models leave a GPU idle between
# kernels, so several runs share it: first those that answer the question, then, if time allows, those that explain it.
learn() {  # SEED PE+LABEL
    $PY submitit_pretrain.py --cluster debug --job_dir "$WORK/mae_wide" @"$WORK/learn.args" --device $DEV \
        --data_path "$DATA/mini_imagenet20" --sweep seed="$1" pos_embed+pos_label="$2" > "$WORK/learn-$1-$2.log" 2>&1
}
side_by_side() {  # PE+LABEL...: all seeds of these settings at the same time
    local seed setting
    for seed in $SEEDS; do for setting in "$@"; do learn "$seed" "$setting" & done; done
    wait
    tail -qn 1 "$WORK"/learn-*.log
}
run_learn() {
    export -f learn side_by_side
    export PY DATA DEV WORK SEEDS
    SEEDS=$(pick "0 1 2" 0)
    cp evidence/recipes/mae_wide.args "$WORK/learn.args"
    [ -z "$TINY" ] || sed -i 's/epochs [0-9]*/epochs 1/g; s/vit_tiny/vit_pico/; s/--batch_size 256/--batch_size 100/g' "$WORK/learn.args"
    stage learn 600 bash -c "side_by_side none+apl sincos+none; $(pick "${QUICK-side_by_side none+none none+rpl}" "")"
    (cd "$WORK" && find mae_wide learn-*.log -name '*.json' -o -name '*.txt' -o -name 'learn-*.log' |
        tar -czf "$OUT/learn.tgz" -T -)
}

[ $# -gt 0 ] || set -- env check huge launches data eval small base e2e_compiled large rpl e2e
GPU=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null) || GPU="no GPU"
echo "== machine: ${GPU%%$'\n'*}, $CORES cores" >> "$LOG"
for name in "$@"; do "run_$name"; done
[ -e "$OUT/table.md" ] && cat "$OUT/table.md"
echo "== all: $(($(date +%s) - BEGIN)) s; results are in $OUT" | tee -a "$LOG"
echo "To share them, open an issue or pull request of this repository that adds the folder to evidence/results/gpu/."
