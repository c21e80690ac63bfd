"""Short runs whose bits a change of structure must not change.

    python tests/recorded_runs.py record RUNS.json [--tree DIR] [--only NAME ...]
    python tests/recorded_runs.py compare BEFORE.json AFTER.json

`record` runs the checkout DIR, by default this one. `compare` exits with code 1 if anything differs.

Each run is a real process on the demo set: a main with a very small model for one or two epochs. The record
has a hash of every tensor and the value of every number in the checkpoint and the log. Bits depend on the
machine and on the versions of the libraries, so both records must come from one machine.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CLOCK = ("img_per_s", "data_wait", "mfu", "max_mem_mb", "images_per_s")
PATHS = (
    "output_dir",
    "log_dir",
    "resume",
    "finetune",
    "init_from",
    "data_path",
    "distill_checkpoint",
    "predictions",
)
COMMON = (
    "--input_size 32 --warmup_epochs 1 --print_freq 1 --device cpu --amp fp32 --save_every_epochs 1 --keep 1 "
    "--num_workers 0 --lr 1e-2 --epochs 2 --batch_size 40 --max_bad_images 0"
)
PRETRAIN = f"main_pretrain --model mae_test --picture_epochs 1000 {COMMON}"
FINETUNE = f"main_finetune --model vit_test {COMMON}"
SERE_MODEL = "--model sere_test --local_size 16 --local_crops_number 2 --out_dim 32"
SERE = f"main_sere {SERE_MODEL} {COMMON} --batch_size 50"
AUGMENT = "--mixup 0.8 --cutmix 1.0 --ema 0.9 --layer_decay 0.75 --drop_path 0.1 --clip_grad 1"
LAST = "checkpoint-last.pth"

# Name -> commands, one after the other, into the same folder; {out} is the folder of all runs.
RUNS = {
    "mae_apl": [PRETRAIN],
    "mae_plain": [f"{PRETRAIN} --pos_embed sincos --pos_label none --norm_pix_loss"],
    "mae_rpl": [f"{PRETRAIN} --pos_label rpl --rpl_pairs 2 --pos_tokens full --grad_checkpointing"],
    "mae_both_learned": [
        f"{PRETRAIN} --pos_label apl+rpl --pos_embed learned --accum_iter 2 --clip_grad 0.5"
    ],
    "mae_relations": [f"{PRETRAIN} --sr_spatial 0.2 --sr_channel 0.5 --sr_views two"],
    "mae_stopped": [
        f"TEST_SIGNAL=0:6:SIGTERM {PRETRAIN} --sr_spatial 0.2 --sr_channel 0.5 --save_steps 2",
        f"{PRETRAIN} --sr_spatial 0.2 --sr_channel 0.5 --save_steps 2",
    ],
    "sere": [SERE],
    "sere_stopped": [
        f"TEST_SIGNAL=0:5:SIGTERM {SERE} --freeze_last_layer 1",
        f"{SERE} --freeze_last_layer 1",
    ],
    "finetune_scratch": [f"{FINETUNE} --pos_label apl --pos_embed learned"],
    "finetune_head": [
        f"{FINETUNE} --pos_label apl+rpl --head second_order --so_dims 16 8 --so_fusion concat"
    ],
    "finetune_swin": [f"{FINETUNE} --model swin_pico --input_size 64 --pos_label apl --epochs 1"],
    "finetune_so_vit": [f"{FINETUNE} --model so_vit_7 --input_size 64 --epochs 1 --batch_size 100"],
    # Batch norms in the frozen stem.
    "finetune_partial": [
        f"{FINETUNE} --model so_vit_7 --input_size 64 --epochs 1 --batch_size 100 --partial 3"
    ],
    "finetune_timm": [f"{FINETUNE} --model timm/vit_tiny_patch16_224 --pos_label rpl --epochs 1"],
    "finetune_cached": [f"{FINETUNE} --cache_data memory --aa rand-m9-mstd0.5-inc1 --epochs 1"],
    "finetune": [
        f"{FINETUNE} --finetune {{out}}/mae_apl/{LAST} --pos_label auto --pos_embed sincos {AUGMENT}"
    ],
    "finetune_stopped": [
        f"TEST_SIGNAL=0:6:SIGTERM {FINETUNE} --finetune {{out}}/mae_rpl/{LAST} {AUGMENT}",
        f"{FINETUNE} --finetune {{out}}/mae_rpl/{LAST} {AUGMENT}",
    ],
    "distill": [
        f"{FINETUNE} --model deit_pico_distilled_patch8 --distill vit_test "
        f"--distill_checkpoint {{out}}/finetune_scratch/{LAST}"
    ],
    "evaluate": [
        f"{FINETUNE} --eval --resume {{out}}/finetune_scratch/{LAST} "
        "--predictions {out}/evaluate/guesses.csv"
    ],
    "linprobe": [
        f"main_linprobe --model vit_test {COMMON} --finetune {{out}}/mae_apl/{LAST} --lr_grid 0.5 1"
    ],
    "linprobe_cached": [
        f"main_linprobe --model vit_test {COMMON} --finetune {{out}}/mae_plain/{LAST} --cached --global_pool"
    ],
    "knn": [
        f"main_linprobe --model vit_test {COMMON} --finetune {{out}}/sere/{LAST} --knn --pos_embed learned"
    ],
}


def flat(value, name: str = "") -> dict[str, object]:
    """Nested dictionaries and lists -> {path: number, text, or a tensor's type, shape and hash}."""
    if torch.is_tensor(value):
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {name: f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bits).hexdigest()[:16]}"}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: repr(value)}
    found = {}
    for key, item in items:
        found |= flat(item, f"{name}/{key}")
    return found


def digest(folder: Path, text: str) -> dict[str, object]:
    """A run's checkpoint, log, tables and printed figures, without figures that depend on the clock."""
    found = {}
    if (folder / LAST).exists():
        saved = torch.load(folder / LAST, weights_only=True)
        saved["args"] = {k: v for k, v in saved["args"].items() if k not in PATHS}
        found |= flat(saved, "checkpoint")
    if (folder / "log.txt").exists():
        lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        found |= flat([{k: v for k, v in line.items() if k not in CLOCK} for line in lines], "log")
    for table in sorted(folder.glob("*.csv")):
        found[table.name] = table.read_text()
    figures = (
        re.findall(r"\d+\.\d+", line) for line in text.splitlines() if "acc" in line and "img/s" not in line
    )
    found["printed accuracies"] = [numbers for numbers in figures if numbers]
    return found


def execute(tree: Path, out: Path, name: str) -> dict[str, object]:
    """Run the commands of one entry from `tree`; record the output of a run with an unexpected exit code."""
    folder, text = out / name, ""
    folder.mkdir(parents=True)
    commands = RUNS[name]
    for number, command in enumerate(commands):
        words = command.format(out=out).split()
        extra = dict(word.split("=", 1) for word in words if word.startswith("TEST_"))
        words = [word for word in words if not word.startswith("TEST_")]
        run = subprocess.run(
            [sys.executable, str(tree / "tests" / "tiny.py"), *words, "--output_dir", str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | extra,
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        expected = 75 if number + 1 < len(commands) else 0
        if run.returncode != expected:
            print(f"{name} ended with {run.returncode}, not {expected}:\n{run.stdout[-2000:]}", flush=True)
            return {"failed": run.stdout[-2000:]}
        text += run.stdout
    return digest(folder, text)


def waits_for(name: str) -> set[str]:
    """Names of the runs whose checkpoints a run reads."""
    return {other for other in RUNS for command in RUNS[name] if f"{{out}}/{other}/{LAST}" in command}


def record(tree: Path, only: list[str]) -> dict[str, dict]:
    names = set(only or RUNS)
    for name in list(names):
        names |= waits_for(name)
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(2) as pool:
        first = [name for name in RUNS if name in names and not waits_for(name)]
        then = [name for name in RUNS if name in names and waits_for(name)]
        for wave in (first, then):
            for name, result in zip(wave, pool.map(lambda n: execute(tree, Path(out), n), wave)):
                found[name] = result
    return found


def differences(before: dict, after: dict) -> list[str]:
    """A line for each value that two records do not share."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name, {}), after.get(name, {})
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                lines.append(f"{name} {key}: {one.get(key)} -> {other.get(key)}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("record")
    p.add_argument("file", type=Path)
    p.add_argument("--tree", type=Path, default=ROOT)
    p.add_argument("--only", nargs="+", default=[], choices=list(RUNS))
    p = commands.add_parser("compare")
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        found = record(args.tree.resolve(), args.only)
        args.file.write_text(json.dumps(found, indent=1))
        failed = [name for name in found if "failed" in found[name]]
        values = sum(map(len, found.values()))
        print(f"{args.file}: {len(found)} runs, {values} values; failed: {failed or 'none'}")
        return int(bool(failed))
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    if shared := before.keys() & after.keys():
        before, after = ({name: x[name] for name in shared} for x in (before, after))
    lines = differences(before, after)
    print(
        "\n".join(lines[:50]) or f"{len(before)} runs, {sum(map(len, before.values()))} values: no difference"
    )
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
