"""Mains called within the process of the test, and what they print."""

import re

import main_pretrain
import tiny  # noqa: F401 (registers mae_test and vit_test)
from util.flags.parser import parse, run


def call(main, capsys, *flags) -> tuple[int, str]:
    base = [
        "--input_size",
        "32",
        "--batch_size",
        "40",
        "--epochs",
        "1",
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--print_freq",
        "1",
    ]
    code = run(main.main, parse(main.get_args_parser(), base + [str(f) for f in flags]))
    out = capsys.readouterr()
    return code, out.out + out.err


def pretrained(tmp_path, capsys, *flags) -> str:
    code, text = call(
        main_pretrain,
        capsys,
        "--model",
        "mae_test",
        "--output_dir",
        tmp_path / "pt",
        "--picture_epochs",
        9,
        *flags,
    )
    assert code == 0, text
    return str(tmp_path / "pt" / "checkpoint-last.pth")


def accuracy(text: str) -> list[str]:
    return re.findall(r"\* Acc@1 ([\d.]+)", text)
