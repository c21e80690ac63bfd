"""Runs whose data workers are killed or do not answer: one line says so, and no finished update is lost."""

import sys

import pytest

import processes
from processes import ROOT, assert_same, here, last, log_lines, ranks, start
from util.data.datasets import build_dataset
from util.data.loading.samplers import EpochSampler

pytestmark = pytest.mark.slow

RUN = ["--epochs", 1, "--batch_size", 20, "--num_workers", 2, "--lr", 1e-3]


@pytest.fixture(scope="module", autouse=True)
def program():
    """Start tests/troubled_reader.py instead of tests/tiny.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "TINY", [sys.executable, "-u", str(ROOT / "tests" / "troubled_reader.py")])
        yield


def image_of(place: int) -> str:
    """The name of the training image at a place of the fifth batch of all ranks."""
    index = build_dataset(None, "train", None, labels=False).index
    return index.name(list(EpochSampler(len(index), batch_size=20))[4 * 20 + place][1])


@pytest.fixture(scope="module")
def image() -> str:
    """One of the only rank, or of the first of two."""
    return image_of(3)


@pytest.fixture(scope="module")
def image_of_rank_1() -> str:
    return image_of(13)


def untroubled(folder) -> str:
    """Start or continue a run without workers and trouble -> its output."""
    code, text = here(folder, *RUN, "--num_workers", 0)
    assert code == 0, text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run without trouble."""
    folder = tmp_path_factory.mktemp("whole")
    untroubled(folder)
    return folder


def assert_one_line(text: str, *parts: str) -> None:
    """The output has no traceback, and one line of an error, with these parts."""
    assert "Traceback" not in text, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in parts), line


def assert_continues(folder, whole) -> None:
    """A run that is started again ends with the bits and the log of one without trouble."""
    assert "continuing" in untroubled(folder)
    assert_same(last(whole), last(folder))
    assert log_lines(whole) == log_lines(folder)


def test_a_worker_that_was_killed_costs_no_update(tmp_path, whole, image):
    code, text = start(tmp_path, *RUN, TEST_READ=f"SIGKILL:{image}")
    assert code == 2, text
    assert_one_line(text, f"killed by SIGKILL while it read {image} in ", "no memory", "lower --num_workers")
    step = last(tmp_path)["step"]
    # A batch that a dead worker has sent cannot always be fetched.
    assert 1 <= step <= 4 and f"state saved after step {step}\n" in text
    assert_continues(tmp_path, whole)


def test_a_worker_that_does_not_answer_ends_the_run(tmp_path, image):
    code, text = start(tmp_path, *RUN, "--data_timeout", 0.05, TEST_READ=f"hang:{image}")
    assert code == 2, text
    assert_one_line(text, "not answered for 0.05 minutes", f"reading {image} in ", "raise --data_timeout")
    assert last(tmp_path)["step"] == 4 and "state saved after step 4\n" in text


def test_a_run_stops_while_a_worker_does_not_answer(tmp_path, whole, image):
    code, text = start(tmp_path, *RUN, "--num_workers", 1, TEST_READ=f"SIGTERM:{image}", TEST_PATIENCE=2)
    assert code == 75 and "stopped by SIGTERM while waiting for data" in text, text
    assert last(tmp_path)["step"] == 4, text
    assert_continues(tmp_path, whole)


def test_all_ranks_stop_at_one_step_after_one_has_lost_a_worker(tmp_path, whole, image_of_rank_1):
    """The rank reads its next images itself, so that its updates end and all can agree."""
    troubled = f"SIGKILL:{image_of_rank_1}"
    for code, text in ranks(2, tmp_path, *RUN, "--batch_size", 10, TEST_READ=troubled):
        assert code == 2, text
        assert_one_line(text, "rank 1 on ", f"killed by SIGKILL while it read {image_of_rank_1} in ")
    assert 2 <= last(tmp_path)["step"] <= 6
    # Two ranks add gradients in another order.
    assert "continuing" in untroubled(tmp_path)
    assert_same(last(whole), last(tmp_path), exact=False)


def test_rank_0_leaves_alone_while_it_waits(tmp_path, image):
    """The other rank is inside of the update that rank 0 has no data for."""
    flags = [*RUN, "--batch_size", 10, "--num_workers", 1]
    (code, text), _ = ranks(2, tmp_path, *flags, TEST_READ=f"SIGTERM:{image}", TEST_PATIENCE=2)
    assert code == 75 and "stopped by SIGTERM while waiting for data" in text, text
    assert last(tmp_path)["step"] == 4 and "state saved after step 4\n" in text
