import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# The folder of real images. Tests that need them are skipped if it does not exist.
REAL_DATA = Path(os.environ.get("MAE_PL_TEST_DATA", ROOT.parent / "shared" / "data"))
torch.set_num_threads(1)


@pytest.fixture
def real_data() -> Path:
    if not (REAL_DATA / "mini_imagenet20" / "train.tar").exists():
        pytest.skip(f"no real images in {REAL_DATA} (set MAE_PL_TEST_DATA)")
    return REAL_DATA


@functools.cache
def cluster_is_up() -> bool:
    return (
        shutil.which("sbatch") is not None
        and subprocess.run(["sinfo", "-h"], capture_output=True).returncode == 0
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The native library, built from the sources for these tests; what a user has built is left alone."""
    from util.data import native

    path = tmp_path_factory.mktemp("native") / "libmaepl.so"
    try:
        native.build(path, flags=("-Wall", "-Wextra", "-Werror"))
    except ValueError as error:
        if "headers are missing" in str(error) or "no C compiler" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise
    return path


@pytest.fixture
def library(built, monkeypatch):
    """Everything decodes by the native library; without this fixture it depends on what the checkout holds."""
    from util.data import native
    from util.data.native import bindings

    monkeypatch.setattr(bindings, "LIBRARY", built)
    assert native.library(), native.describe()


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: "slurm" not in item.keywords
    )  # the longest first, where workers share the files
    for item in items:
        if "gpu" in item.keywords and not (torch.cuda.is_available() or "MAE_PL_REHEARSE" in os.environ):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slurm" in item.keywords and not cluster_is_up():
            item.add_marker(pytest.mark.skip(reason="no SLURM cluster (sbatch, sinfo)"))
