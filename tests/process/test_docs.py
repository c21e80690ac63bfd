"""The commands of the pages in docs/ run as they are printed."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from processes import ROOT

pytestmark = pytest.mark.slow
EXAMPLES = (
    ("data.md", "12-bit CT"),
    ("data.md", "13 bands"),
    ("data.md", "photos from phones"),
    ("segments.md", "the demo set"),
)


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


@pytest.mark.parametrize("page, example", EXAMPLES)
def test_an_example_runs_as_it_is_printed(checkout, page, example):
    # `python` is this one, and no GPU is used, so that figures are the same everywhere.
    (checkout / "bin").mkdir(exist_ok=True)
    python = checkout / "bin" / "python"
    # A link would leave the environment.
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", commands(page, example)],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    EXPECTED[page, example](checkout / "runs", said)


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


def check_segments(runs, said):
    folder = runs / "segments"
    assert said.count("protocol: image") == 3
    assert last_line(folder / "finetune")["test_miou"] > 20
    rows = ("encoder", "position", "pixels", "random", "without_position", "with_position")
    for name in ("linear", "knn"):
        figures = last_line(folder / name)
        found = {row: figures[f"test_miou_{row}"] for row in rows}
        # What holds for any encoder: pixels tell more than the place, and the place adds to tokens.
        assert found["pixels"] > found["position"] > 5, found
        assert found["with_position"] > found["without_position"], found
    # The page's Python reads the last of the files.
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "segments.md").read_text(), re.DOTALL)
    assert code
    names: dict = {}
    exec(code[1].replace('"runs/', f'"{runs}/'), names)
    low, high = np.percentile(names["counted"].miou("encoder/k30", names["draws"]), [2.5, 97.5])
    assert low < found["encoder"] < high and names["images"] == 50
    layers = json.loads((folder / "positions.json").read_text())
    assert layers and (folder / "positions.png").stat().st_size > 5000


EXPECTED = dict(zip(EXAMPLES, (check_ct, check_bands, check_photos, check_segments), strict=True))
