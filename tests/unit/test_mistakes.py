"""Mistakes that people make on the command line: one line with the remedy answers each, and exit code 2.

A row names the mistake, the main, the words of the command line and the facts that the answer must hold: the
flag, what was found, and what to do. The wording is free. `EARLY` are answered before torch is imported,
`LATE` by the main, in a folder with the small data sets and checkpoints of `place`. `LAUNCHED` are those of
submitit_*.py. A row more is one line here.
"""

import importlib
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

import main_pretrain
import main_sere
from backbones.registry import find
from models_mae_pl import MODELS
from models_vit import MODELS as CLASSIFIERS
from util.cluster import slurm_jobs
from util.cluster.launch import launch
from util.flags import early
from util.flags.parser import answer_at_once, parse, parser_of, run

# Main, words, facts. {name} is a file or folder of `place`.
EARLY = [
    # Numbers
    ("main_pretrain", "--epochs -3", "--epochs 1 -3"),
    ("main_pretrain", "--epochs 0", "--epochs 1 --dry_run"),
    ("main_pretrain", "--epochs 1e3", "--epochs whole 1e3"),
    ("main_pretrain", "--epochs=", "--epochs whole"),
    ("main_pretrain", "--seed -1", "--seed -1"),
    ("main_pretrain", "--batch_size 0", "--batch_size 1"),
    ("main_pretrain", "--num_workers -1", "--num_workers 0"),
    ("main_pretrain", "--warmup_epochs -2", "--warmup_epochs 0 -2"),
    ("main_pretrain", "--weight_decay -1", "--weight_decay 0"),
    ("main_pretrain", "--min_lr -1", "--min_lr 0"),
    ("main_pretrain", "--lr inf", "--lr finite inf"),
    ("main_pretrain", "--blr nan", "--blr finite nan"),
    ("main_pretrain", "--lr 1,5", "--lr 1.5"),
    ("main_pretrain", "--pos_weight nan", "--pos_weight finite nan"),
    ("main_pretrain", "--clip_grad -1", "--clip_grad 0"),
    ("main_pretrain", "--mask_ratio 75", "--mask_ratio 75 percentage 0.75"),
    ("main_pretrain", "--mask_ratio 1", "--mask_ratio less 1"),
    ("main_pretrain", "--crop_scale 1 0.2", "--crop_scale smallest largest 1 0.2"),
    ("main_pretrain", "--crop_scale 20 100", "--crop_scale 20 percentage 0.2"),
    ("main_pretrain", "--mean 123.675 116.28 103.53", "--mean 123.675 255 0.485"),
    ("main_pretrain", "--std 58.395 57.12 57.375", "--std 58.395 255 0.229"),
    ("main_pretrain", "--mean 0.5 0.4", "--mean 3 --in_chans 2"),
    ("main_pretrain", "--in_chans 4", "--in_chans 4 --mean stats"),
    ("main_pretrain", "--in_chans 0", "--in_chans 1"),
    ("main_pretrain", "--input_size 224x192", "--input_size 224x192 '224 192'"),
    ("main_pretrain", "--input_size 0", "--input_size 1"),
    ("main_pretrain", "--input_size 3 224 224", "--input_size H W 3"),
    ("main_pretrain", "--sr_temp_channel 0", "--sr_temp_channel greater 0"),
    ("main_pretrain", "--ema_momentum 1.5", "--ema_momentum 0 1"),
    ("main_pretrain", "--save_minutes inf", "--save_minutes finite"),
    ("main_finetune", "--smoothing -0.1", "--smoothing 0 1"),
    ("main_finetune", "--drop_path 10", "--drop_path 0.1"),
    ("main_finetune", "--layer_decay 0", "--layer_decay '1 turns it off' 1e-9"),
    ("main_finetune", "--layer_decay 65", "--layer_decay 0.65"),
    ("main_finetune", "--ema 99.99", "--ema 0.9999"),
    ("main_finetune", "--so_alpha 2", "--so_alpha 1"),
    ("main_finetune", "--so_iters 0", "--so_iters 1"),
    ("main_finetune", "--nb_classes 0", "--nb_classes 1"),
    ("main_linprobe", "--finetune {file} --lr_grid 0", "--lr_grid greater 0"),
    ("main_segment", "--nb_classes 0", "--nb_classes 1"),
    ("main_segment", "--knn_temperature 0", "--knn_temperature greater 0"),
    ("main_segment", "--crop_scale 1 0.2", "--crop_scale smallest largest 1 0.2"),
    ("main_sere", "--cls_weight nan", "--cls_weight finite"),
    # Names
    ("main_pretrain", "--model vit_base_patch16", "--model main_finetune.py mae_vit_base_patch16"),
    ("main_finetune", "--model mae_vit_base_patch16", "--model main_pretrain.py vit_base_patch16"),
    ("main_sere", "--model vit_small_patch16", "--model sere_vit_small_patch16"),
    ("main_segment", "--model mae_vit_base_patch16", "--model main_pretrain.py vit_base_patch16"),
    ("main_segment", "--eval", "--eval --resume"),
    ("main_pretrain", "--model mae_vit_bose_patch16", "--model 'did you mean mae_vit_base_patch16'"),
    ("main_finetune", "--model ViT-B/16", "--model 'did you mean vit_base_patch16' timm/"),
    ("main_finetune", "--model vit_large", "--model 'did you mean vit_large_patch16'"),
    ("main_pretrain", "--model resnet", "--model mae_vit_large_patch16"),
    ("main_pretrain", "--device gpu", "--device cuda"),
    ("main_pretrain", "--device gpu:1", "--device cuda:1"),
    ("main_finetune", "--head second_order --so_alpha 0", "--so_alpha 0"),
    ("main_pretrain", f"--epochs {'9' * 400}x", "--epochs 'a whole number'"),
    ("main_pretrain", "--device 1", "--device cuda:1"),
    ("main_pretrain", "--amp f16", "--amp fp16"),
    ("main_pretrain", "--pos_label apI", "--pos_label apl"),
    # Flags
    ("main_pretrain", "--batch_sise 8", "--batch_sise --batch_size"),
    ("main_pretrain", "--batch 8", "--batch --batch_size"),
    ("main_pretrain", "--finetune {mae}", "'main_finetune.py, main_linprobe.py and main_segment.py have it'"),
    ("main_pretrain", "--job_dir D", "--job_dir submitit_*.py"),
    ("main_finetune", "--mask-ratio 0.5", "--mask-ratio 'main_pretrain.py has it'"),
    ("main_pretrain", "-epochs 3", "-epochs --epochs"),
    ("main_pretrain", "--data_path", "--data_path argument"),
    ("main_pretrain", "{data}", "{data} --data_path"),
    ("main_pretrain", "@recipes/mae_vit_basse.args", "recipes/mae_vit_basse.args mae_vit_base.args"),
    ("main_pretrain", "@recipes/mae_vit_base", "recipes/mae_vit_base.args"),
    ("main_finetune", "--eval", "--eval --resume"),
    ("main_linprobe", "", "--finetune"),
    (
        "main_pretrain",
        "--compile_mode reduce-overhead --accum_iter 2",
        "--compile_mode --accum_iter",
    ),
    # Paths
    ("main_pretrain", "--data_path {place}/dat", "--data_path {place}/dat 'did you mean data'"),
    ("main_pretrain", "--data_path {place}/no/such/folder", "--data_path 'exists is {place}'"),
    ("main_pretrain", "--resume {place}/mae.pht", "--resume 'did you mean mae.pth'"),
    ("main_pretrain", "--init_from {place}/none.pth", "--init_from none.pth {place}"),
    ("main_finetune", "--finetune {place}/mae.pht", "--finetune 'did you mean mae.pth'"),
    # Missing and extra values
    ("main_pretrain", "--lr --epochs 3", "--lr '--lr 1e-3'"),
    ("main_pretrain", "--epochs 3 --data_path", "'--data_path ~/imagenet'"),
    ("main_pretrain", "--epochs --lr 1", "'--epochs 400'"),
    ("main_pretrain", "--crop_scale 0.2", "--crop_scale 2 '0.2 1.0'"),
    ("main_pretrain", "--max_steps --dry_run", "'--max_steps N'"),
    ("main_pretrain", "--lr -1e-3", "--lr 0 -1e-3"),
    ("main_pretrain", "--norm_pix_loss False", "--norm_pix_loss False 'no value'"),
    ("main_linprobe", "--knn 500", "--knn 500 'no value'"),
    ("main_linprobe", "--knn --k 500", "--k --knn 10 20 100"),
    ("main_linprobe", "--nb_knn 10 20", "--nb_knn '; --knn' 10 20 100"),
    # Devices
    ("main_pretrain", "--device cuda1", "--device 'did you mean cuda:1?'"),
    ("main_pretrain", "--device 0,1", "--device 'torchrun --nproc_per_node'"),
    ("main_pretrain", "--data_path ''", "--data_path empty demo"),
    ("main_finetune", "--data_path=", "--data_path empty demo"),
    ("main_pretrain", "--data_path https://host/a.tar", "--data_path https://host/a.tar download"),
    (
        "main_pretrain",
        "--data_path {data}/{{000..009}}.tar",
        "'--data_path {data}/{{000..009}}.tar is a pattern' train-*.tar",
    ),
    ("main_pretrain", "--data_path {data} {flat}", "{flat} '--data_path takes one path' folder"),
    ("main_finetune", "--head --epochs 3", "--head 'linear or second_order'"),
    ("main_pretrain", "--norm_pix_loss=True", "'--norm_pix_loss takes no value, found True'"),
    ("main_pretrain", "--data_path /vall", "'--data_path /vall' 'a shell variable before it is empty'"),
    # Files that are no checkpoints
    ("main_pretrain", "--resume {file}", "--resume {file} text {mae}"),
    ("main_finetune", "--eval --finetune {classifier}", "--eval --resume {classifier}"),
    ("main_segment", "--eval --finetune {classifier}", "--eval --resume {classifier}"),
    ("main_linprobe", "--model timm/test_vit", "'--finetune FILE' '--pretrained takes the weights'"),
    ("main_finetune", "--finetune {cut}", "--finetune {cut} truncated {mae}"),
    ("main_finetune", "--finetune {hf}", "{hf} 'checkpoints.py import {hf} {hf}.pth'"),
    ("main_finetune", "--resume {place}/tf.ckpt", "tf.ckpt.index TensorFlow"),
    ("main_pretrain", "--model timm/vit_base_patch16_224", "--model 'did you mean mae_vit_base_patch16'"),
]
LATE = [
    ("main_pretrain", "--device cuda", "--device cuda CPU"),
    ("main_pretrain", "--input_size 20", "20 8 --input_size 16 24"),
    ("main_pretrain", "--batch_size 400", "--batch_size 400 8"),
    ("main_pretrain", "--accum_iter 9", "--accum_iter 9"),
    ("main_pretrain", "--mask_ratio 0.99", "--mask_ratio 0.99"),
    ("main_pretrain", "--resume {classifier}", "{classifier} classifier main_finetune.py --resume"),
    ("main_finetune", "--data_path {data} --aa foo", "--aa foo rand-m9-mstd0.5-inc1"),
    ("main_finetune", "--data_path {data} --aa rand-m9-incc1", "--aa rand-m9-incc1 rand-m9-mstd0.5-inc1"),
    ("main_pretrain", "--resume {mae} --pos_label rpl", "{mae} --pos_label apl --init_from"),
    ("main_pretrain", "--data_path {empty}", "{empty} 'found nothing' train.tar"),
    ("main_pretrain", "--data_path {data}/train/a/0.png", "0.png 'single image' 'Give {data},'"),
    ("main_pretrain", "--strategy fsdp --sr_spatial 1", "--strategy --sr_spatial"),
    ("main_finetune", "--finetune {mae} --data_path {flat}", "{flat} <class>"),
    ("main_finetune", "--finetune {mae} --data_path {data}/train", "{data}/train val"),
    ("main_finetune", "--finetune {mae} --data_path {data}/train/a", "'found 4 images' 'Give {data},'"),
    ("main_finetune", "--finetune {mae} --data_path {no_val}", "{no_val} val"),
    ("main_finetune", "--finetune {mae} --nb_classes 1000", "--nb_classes 1000 2"),
    ("main_finetune", "--finetune {mae} --pos_label apl --input_size 8", "--pos_label --input_size"),
    ("main_finetune", "--resume {mae}", "{mae} pretraining --finetune"),
    ("main_finetune", "--eval --resume {mae}", "{mae} pretraining --finetune"),
    ("main_finetune", "--finetune {mae} --head linear --so_heads 2", "--so_heads --head second_order"),
    ("main_finetune", "--finetune {mae} --predictions no/where.csv", "--predictions no/where.csv"),
    ("main_finetune", "--finetune {mae} --distill timm/vit_tiny_patch16_224", "--distill deit"),
    ("main_linprobe", "--finetune {mae} --so_dims 4 4", "--so_ --head second_order"),
    ("main_linprobe", "--finetune {mae} --knn --dry_run", "--dry_run --knn"),
    ("main_pretrain", "--mask_ratio 0.9", "--mask_ratio '0.9 leaves none of 4 patches' '0.75 or less'"),
    ("main_pretrain", "--patch_size 16", "--input_size larger"),
    ("main_linprobe", "--finetune {mae} --data_path {one}", "'--data_path {one}' '(a)' 'two class folders'"),
    ("main_finetune", "--data_path {data}/val", "{data}/val 'folders (a, b)' 'Give {data},'"),
    ("main_linprobe", "--finetune {mae} --data_path {data}/train/a/0.png", "0.png 'Give {data},'"),
    ("main_linprobe", "--finetune {mae} --nb_classes 1", "--nb_classes 1 {data} '2 class folders'"),
    ("main_segment", "--data_path {data}/train/a/0.png", "0.png 'one file' folder masks"),
    # Models of other sizes
    (
        "main_finetune",
        "--finetune {mae} --model vit_nano_patch8",
        "{mae} 'give --model vit_pico_patch8 (4 blocks of width 96, patches of 8x8)'",
    ),
    ("main_linprobe", "--finetune {mae} --model swin_pico", "'give --model vit_pico_patch8'"),
    (
        "main_pretrain",
        "--init_from {mae} --model mae_vit_pico_patch4",
        "'give --model mae_vit_pico_patch8' 8x8",
    ),
    ("main_pretrain", "--init_from {mae} --in_chans 1 --mean 0.5 --std 0.5", "'give --in_chans 3'"),
    ("main_finetune", "--finetune {classifier} --patch_size 4", "vit_pico_patch8 '--patch_size 8'"),
    (
        "main_finetune",
        "--eval --resume {classifier} --model deit_pico_patch8",
        "'--model vit_pico_patch8 without --cls_token'",
    ),
]
LAUNCHED = [
    ("--partition gpu", "SLURM sbatch '--cluster local'"),
    ("--cluster local --nodes 2", "--nodes 2 --cluster local"),
    ("--cluster local --sweep mask_rato=0.5,0.75", "--mask_rato --mask_ratio"),
    ("--cluster local --sweep mask_ratio", "--sweep FLAG=A,B"),
    ("--cluster local --model vit_base_patch16", "--model mae_vit_base_patch16"),
    ("--cluster slrum", "--cluster slurm"),
    ("--status {empty}", "{empty} jobs.json"),
    ("--job_dir A --output_dir B", "'--output_dir B and --job_dir A' 'leave --output_dir out'"),
    ("--output_dir B", "'give --job_dir B instead of --output_dir B'"),
    ("--timeout 3d", "--timeout 3d minutes 1440"),
    ("--timeout 3-00:00:00", "--timeout 3-00:00:00 minutes 1440"),
    ("--cluster local --nodes 2 --sweep seed=0,1 --dry_run", "'--nodes is 2' '--cluster local'"),
    ("--mem 64", "--mem --mem_gb"),
    ("--partition --nodes 2", "'--partition VALUE'"),
    ("--cluster local --model mae_vit_pico_patch8 --dry_run --data_path=", "--data_path empty demo"),
]
COMMON = "--input_size 16 --epochs 1 --batch_size 4 --num_workers 0 --device cpu --output_dir out"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict[str, Path]:
    """Small data sets and files by name."""
    folder = tmp_path_factory.mktemp("place")
    for name in (
        "data/train/a",
        "data/train/b",
        "data/val/a",
        "data/val/b",
        "no_val/train/a",
        "flat",
        "one/train/a",
        "one/val/a",
    ):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (9 * i, 40, 200)).save(folder / name / f"{i}.png")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("not a checkpoint")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    (folder / "tf.ckpt.index").write_bytes(b"\0")
    torch.manual_seed(0)
    options = {"img_size": (16, 16)}
    mae = MODELS["mae_vit_pico_patch8"](**options)
    torch.save({"model": mae.state_dict(), "args": {"pos_label": "apl"}}, folder / "mae.pth")
    classifier = CLASSIFIERS["vit_pico_patch8"](**options, num_classes=2)
    torch.save({"model": classifier.state_dict(), "args": {}}, folder / "classifier.pth")
    whole = (folder / "mae.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    names = {name: folder / name for name in ("data", "no_val", "flat", "empty", "one", "hf")}
    names |= {"cut": folder / "cut.pth"}
    names |= {"mae": folder / "mae.pth", "classifier": folder / "classifier.pth"}
    return names | {"file": folder / "notes.txt", "place": folder}


def words_of(text: str, place: dict[str, Path]) -> list[str]:
    return shlex.split(text.format(**place))


def check_answer(text: str, facts: str, place: dict[str, Path]) -> None:
    """One line, without a traceback, that holds all facts."""
    lines = [line for line in text.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in text and "raised in" not in text, text
    answer = text[text.index("error: ") :]
    assert answer.count("\n") == 1, answer
    missing = [fact for fact in words_of(facts, place) if fact.lower() not in answer.lower()]
    assert not missing, f"{missing} not in: {answer}"


@pytest.mark.parametrize("main, words, facts", EARLY, ids=[f"{row[0][5:]} {row[1]}" for row in EARLY])
def test_a_mistake_is_answered_at_once(place, monkeypatch, capsys, tmp_path, main, words, facts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{main}.py", *words_of(words, place)])
    with pytest.raises(SystemExit) as end:
        answer_at_once("__main__", parser_of(main))
    out = capsys.readouterr()
    assert end.value.code == 2 and not out.out
    check_answer(out.err, facts, place)
    # Nothing but the answer.
    assert out.err.count("\n") == 1, out.err


@pytest.mark.parametrize("main, words, facts", LATE, ids=[f"{row[0][5:]} {row[1]}" for row in LATE])
def test_a_mistake_is_answered_by_the_main(place, monkeypatch, capsys, tmp_path, main, words, facts):
    monkeypatch.chdir(tmp_path)
    model = {"main_pretrain": "mae_vit_pico_patch8"}.get(main, "vit_pico_patch8")
    base = f"--model {model} --data_path {{data}} {COMMON}"
    module = importlib.import_module(main)
    if "cuda" in words:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = parse(module.get_args_parser(), words_of(f"{base} {words}", place))
    early.check(f"{main}.py", flags)
    assert run(module.main, flags) == 2
    check_answer(capsys.readouterr().err, facts, place)
    assert not list(tmp_path.glob("out/*.pth"))


@pytest.mark.parametrize("words, facts", LAUNCHED, ids=[row[0] for row in LAUNCHED])
def test_a_mistake_is_answered_by_the_launcher(place, monkeypatch, capsys, tmp_path, words, facts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_jobs.shutil, "which", lambda name: None)
    try:
        code = launch("main_pretrain", ["--data_path", str(place["data"]), *words_of(words, place)])
    except SystemExit as end:
        code = end.code
    assert code == 2
    check_answer(capsys.readouterr().err, facts, place)
    # A refused submission leaves no folder.
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "build, name, near",
    [
        (find, "mae_vit_base_patch16", "vit_base_patch16"),
        (find, "ViT-B/16", "vit_base_patch16"),
        (
            lambda name: main_pretrain.build_model(Namespace(model=name), "cpu"),
            "vit_base_patch16",
            "mae_vit_base_",
        ),
        (lambda name: main_sere.build_model(Namespace(model=name)), "sere_vit_bas_patch16", "sere_vit_base_"),
    ],
)
def test_a_notebook_gets_the_nearest_model(build, name, near):
    with pytest.raises(ValueError, match=re.escape(name)) as refused:
        build(name)
    assert near in str(refused.value).partition(name)[2] and "`model`" in str(refused.value)


def test_a_path_of_the_home_folder_that_exists_is_no_pattern(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set{1}").mkdir()
    flags = parse(main_pretrain.get_args_parser(), ["--data_path", "~/set{1}"])
    early.check("main_pretrain.py", flags)
    (tmp_path / "set{1}").rmdir()
    with pytest.raises(ValueError, match="pattern"):
        early.check("main_pretrain.py", flags)


def test_finetuning_on_one_class_is_a_trial_with_a_warning(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("main_finetune")
    words = f"--model vit_pico_patch8 {COMMON} --finetune {{mae}} --data_path {{one}} --dry_run"
    assert run(module.main, parse(module.get_args_parser(), words_of(words, place))) == 0
    assert "warning: --data_path has one class only (a)" in capsys.readouterr().out


def test_there_are_many_mistakes_and_each_main_has_some():
    assert len(EARLY) + len(LATE) + len(LAUNCHED) >= 42
    assert {row[0] for row in EARLY} == set(early.MODELS)
