"""Starting the toolkit, mostly as real processes, and reading what it leaves."""

import contextlib
import importlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TINY = [sys.executable, "-u", str(ROOT / "tests" / "tiny.py")]
COMMON = [
    "--input_size",
    "32",
    "--warmup_epochs",
    "1",
    "--lr",
    "1e-2",
    "--print_freq",
    "1",
    "--device",
    "cpu",
    "--save_every_epochs",
    "1",
    "--keep",
    "1",
    "--num_workers",
    "0",
]
PRETRAIN = ["main_pretrain", "--model", "mae_test", "--picture_epochs", "1000", *COMMON]
SERE = [
    "main_sere",
    "--model",
    "sere_test",
    "--local_size",
    "16",
    "--local_crops_number",
    "2",
    "--out_dim",
    "32",
    *COMMON,
]
# The two commands of SERE's README, without the launcher and with folders.
SERE_SMALL = (
    "--arch vit_small --output_dir OUT --data_path TRAIN --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 "
    "--norm_last_layer false --epochs 100 --shared_head true --out_dim 8192 --local_crops_number 10 "
    "--global_crops_scale 0.40 1 --local_crops_scale 0.05 0.40 --pred_ratio 0 0.3 --pred_ratio_var 0 0.2 "
    "--batch_size_per_gpu 128 --num_workers 6 --saveckp_freq 10 --alpha 0.2 --beta 0.5 --clip_grad 0.3"
)
SERE_BASE = (
    "--arch vit_base --output_dir OUT --data_path TRAIN --teacher_temp 0.07 --teacher_patch_temp 0.07 "
    "--warmup_teacher_temp 0.04 --warmup_teacher_patch_temp 0.04 --warmup_teacher_temp_epochs 50 "
    "--norm_last_layer true --warmup_epochs 10 --epochs 100 --lr 0.00075 --min_lr 2e-6 --weight_decay 0.04 "
    "--weight_decay_end 0.4 --shared_head true --shared_head_teacher true --out_dim 8192 "
    "--patch_out_dim 8192 --local_crops_number 10 --global_crops_scale 0.32 1 --local_crops_scale 0.05 0.32 "
    "--pred_ratio 0 0.3 --pred_ratio_var 0 0.2 --pred_shape block --batch_size_per_gpu 128 --num_workers 6 "
    "--saveckp_freq 10 --freeze_last_layer 3 --clip_grad 0.3 --alpha 0.2 --beta 0.5 --use_fp16 true"
)
FINETUNE = ["main_finetune", "--model", "vit_test", *COMMON]


def environment(**extra) -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in extra.items()}


def start(output_dir, *flags, main=PRETRAIN, **env) -> tuple[int, str]:
    """Run a main in one process to its end -> exit code (negative: the signal that killed it), output."""
    out = subprocess.run(
        [*TINY, *main, "--output_dir", str(output_dir), *map(str, flags)],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return out.returncode, out.stdout


def here(output_dir, *flags, main=PRETRAIN, signal: str | None = None) -> tuple[int, str]:
    """The same within this process, which costs no imports; `signal` is tiny.py's TEST_SIGNAL."""
    # Tests that start processes alone need no torch of their own.
    import tiny
    from util.flags.parser import parse, run

    module = importlib.import_module(main[0])
    words = [*main[1:], "--output_dir", str(output_dir), *map(str, flags)]
    output = io.StringIO()
    fit = module.fit
    if signal is not None:
        tiny.disturb(module, None, signal)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = run(module.main, parse(module.get_args_parser(), words))
    finally:
        module.fit = fit
    return code, output.getvalue()


def ranks(n: int, output_dir, *flags, main=PRETRAIN, **env) -> list[tuple[int, str]]:
    """The same in n gloo processes on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [*TINY, *main, "--output_dir", str(output_dir), *map(str, flags)],
            env=environment(
                RANK=r, LOCAL_RANK=r, WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **env
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(n)
    ]
    try:
        outs = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, out) for p, out in zip(processes, outs)]


def last(output_dir) -> dict:
    return torch.load(Path(output_dir) / "checkpoint-last.pth", weights_only=True)


def log_lines(output_dir) -> list[dict]:
    """log.txt without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(output_dir) / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("img_per_s", "data_wait", "mfu")} for line in lines]


def assert_same(a: dict, b: dict, exact: bool = True) -> None:
    """Checkpoints agree in weights, optimizer state and step: bit for bit, or up to rounding."""
    assert a["step"] == b["step"] and a["epoch"] == b["epoch"]
    assert a["model"].keys() == b["model"].keys()
    for k in a["model"]:
        x, y = a["model"][k], b["model"][k]
        assert torch.equal(x, y) if exact else torch.allclose(x, y, atol=2e-5), (k, (x - y).abs().max())
    if exact:
        for i, s in a["optimizer"]["state"].items():
            for k, v in s.items():
                assert torch.equal(v, b["optimizer"]["state"][i][k]), (i, k)
