"""The attack on pictures, checkpoints and runs finds no harm, and its harness would notice any."""

import os
import re
import subprocess
import sys

import pytest

from processes import ROOT

pytestmark = pytest.mark.slow

# Inputs that do the harm that the attack looks for, one of each kind, and two that do none.
HARM = """
import os, subprocess, sys, time
sys.path.insert(0, "tests")
from attacks.children import Limits, Outcome, Started, judge, measured, watched

LIMITS = Limits(cpu=1, wall=3, memory_mb=100, address_mb=400)

def harm(number):
    if number == 1:
        os.abort()
    if number == 2:
        while True:
            pass
    if number == 3:
        time.sleep(60)
    if number == 4:
        return len(bytearray(b"x") * 150_000_000)
    if number == 5:
        subprocess.run(["true"])
    if number == 6:
        return bytearray(10**12)
    if number == 7:
        raise SystemExit("left")

def work(numbers, begin):
    for number in numbers:
        begin(number, str(number))
        outcome = Outcome(number)
        try:
            with measured(outcome, LIMITS), watched():
                harm(number)
        except (Started, MemoryError) as error:
            outcome.fail(type(error).__name__)
        yield outcome

for outcome in judge([[0, 1, 2, 3], [4, 5, 6, 7, 8]], work, LIMITS):
    print(outcome.number, *(kind for kind, _ in outcome.failures))
"""


def test_harm_is_noticed_and_the_other_inputs_are_judged():
    found = subprocess.run(
        [sys.executable, "-c", HARM], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    kinds = ["0", "1 SIGABRT", "2 hang", "3 hang", "4 memory", "5 Started", "6 MemoryError", "7 harness", "8"]
    assert found.stdout.splitlines() == kinds, found.stdout + found.stderr


@pytest.fixture(scope="module")
def attack():
    """What the attack prints: 2,000 pictures, 250 other files, 500 checkpoints, and 20 kills of each kind."""
    command = [sys.executable, str(ROOT / "tests" / "attack.py"), "all", "--all_failures"]
    found = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return found.returncode, found.stdout + found.stderr


def counts(text: str, part: str) -> dict[str, int]:
    """The counts in the line of a part: verdict -> number."""
    line = next(line for line in text.splitlines() if line.startswith(f"{part}: "))
    return {verdict: int(number) for number, verdict in re.findall(r"(?<![\w.])(\d+) ([a-z][a-z ]*)", line)}


def test_damaged_pictures_do_no_harm(attack):
    _, text = attack
    found = counts(text, "images")
    assert (found["inputs"], found["failed"]) == (2000, 0), text[-5000:]
    # An attack that everything refuses, or nothing, would look at little.
    assert found["accepted"] > 400 and found["refused"] > 800, text


def test_damaged_files_of_further_formats_do_no_harm(attack):
    _, text = attack
    found = counts(text, "formats")
    assert (found["inputs"], found["failed"]) == (250, 0), text[-5000:]
    assert found["accepted"] > 80 and found["refused"] > 80, text


def test_damaged_checkpoints_do_no_harm(attack):
    _, text = attack
    found = counts(text, "checkpoints")
    assert (found["inputs"], found["failed"]) == (500, 0), text[-5000:]
    assert found["accepted"] > 40 and found["refused"] > 300, text


def test_kills_lose_nothing(attack):
    code, text = attack
    found = counts(text, "kills")
    assert (found["inputs"], found["the same end"], found["failed"]) == (10, 10, 0), text[-5000:]
    assert found["kills"] == 40, text
    assert code == 0, text[-5000:]
