"""The commands of the pages in docs/ run as they are printed."""

import json
import os
import re
import subprocess
import sys

import pytest

from processes import ROOT

pytestmark = pytest.mark.slow
EXAMPLES = ("12-bit CT", "13 bands", "photos from phones")


def commands(page: str, example: str) -> str:
    """The sh blocks of one section."""
    section = (
        (ROOT / "docs" / page).read_text().partition(f"## Example: {example}\n")[2].partition("\n## ")[0]
    )
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    assert blocks, example
    return "\n".join(blocks)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with links to the toolkit, so that runs/ is written elsewhere."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("util", "layers", "backbones", "tools", "recipes", "data"):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_as_it_is_printed(checkout, example):
    # `python` is this one, and no GPU is used, so that figures are the same everywhere.
    (checkout / "bin").mkdir(exist_ok=True)
    python = checkout / "bin" / "python"
    # A link would leave the environment.
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", commands("data.md", example)],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    EXPECTED[example](checkout / "runs", said)


def last_line(run) -> dict:
    return json.loads((run / "log.txt").read_text().splitlines()[-1])


def check_ct(runs, said):
    assert "32 uint16" in said and "written to runs/ct/ct.args" in said
    assert last_line(runs / "ct" / "finetune")["test_acc1"] >= 75
    assert (runs / "ct" / "reconstruct.png").stat().st_size > 5000


def check_bands(runs, said):
    assert "constant in 32 images: band 10, left out by --channels\n" in said
    assert "--in_chans 13 --channels 0 1 2 3 4 5 6 7 8 9 11 12 --range" in said
    assert "taken from runs/bands/pretrain" in said and "knn" in said.lower()


def check_photos(runs, said):
    assert "with an EXIF orientation (applied)" in said and "with transparency (on white)" in said
    assert last_line(runs / "photos" / "finetune")["test_acc1"] == 100


EXPECTED = dict(zip(EXAMPLES, (check_ct, check_bands, check_photos), strict=True))
