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
# A folder of real images. Tests that need it are skipped where it does not exist.
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
    """The native library, built from the sources for these tests; the one in the checkout stays as it is."""
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
    """Decode with the native library, whether or not the checkout has a built one."""
    from util.data import native
    from util.data.native import bindings

    monkeypatch.setattr(bindings, "LIBRARY", built)
    assert native.library(), native.describe()


# Folders whose tests start processes or train.
SLOW = ("process", "cluster")


# First, so that `-m "not slow"` sees the markers.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # The longest first, because workers share the files.
    items.sort(key=lambda item: "slurm" not in item.keywords)
    for item in items:
        if item.path.parent.name in SLOW:
            item.add_marker(pytest.mark.slow)
        if "gpu" in item.keywords and not (torch.cuda.is_available() or "MAE_PL_REHEARSE" in os.environ):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slurm" in item.keywords and not cluster_is_up():
            item.add_marker(pytest.mark.skip(reason="no SLURM cluster (sbatch, sinfo)"))
