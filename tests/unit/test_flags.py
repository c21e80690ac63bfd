"""Command lines: what is answered before the heavy imports, and how errors name flags."""

import subprocess
import sys

import pytest

from processes import ROOT, environment
from util.flags.parser import Parser, answer_at_once, with_flags

SCRIPT = """
import sys
from util.flags.parser import Parser, answer_at_once, parse, run

def get_args_parser():
    p = Parser(description="A script", add_help={add_help})
    p.add_argument("--size", default=4, type=int, help="a size")
    return p

answer_at_once(__name__, get_args_parser())
print("the heavy imports")

def main(args):
    print("size", args.size)
    return 0

if __name__ == "__main__":
    sys.exit(run(main, parse(get_args_parser())))
"""


def run_script(folder, add_help: bool, *flags: str) -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(add_help=add_help))
    return subprocess.run(
        [sys.executable, script, *flags],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow  # starts six processes
@pytest.mark.parametrize("add_help", [False, True])
def test_a_script_answers_before_its_heavy_imports(tmp_path, add_help):
    done = run_script(tmp_path, add_help, "--help")
    assert done.returncode == 0 and "a size (default: 4)" in done.stdout and "heavy" not in done.stdout
    for flags, message in ((["--sise", "3"], "did you mean --size?"), (["--size", "x"], "invalid int value")):
        done = run_script(tmp_path, add_help, *flags)
        assert done.returncode == 2 and message in done.stderr and "heavy" not in done.stdout
    done = run_script(tmp_path, add_help, "--size", "3")
    assert done.returncode == 0 and done.stdout == "the heavy imports\nsize 3\n", done.stderr


def test_an_imported_script_does_not_read_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--unknown"])
    parser = Parser(add_help=False)
    answer_at_once("script", parser)
    with pytest.raises(SystemExit):
        answer_at_once("__main__", parser)


@pytest.mark.parametrize(
    "message, expected",
    [
        ("`epochs` 3, lower `batch_size`", "--epochs 3, lower `batch_size`"),
        ("`img_size` is not a multiple", "--input_size is not a multiple"),
        # A flag of another command, which the advice is about.
        ("start from it by `init_from`", "start from it by --init_from"),
        ("the entry `model`, not `weights`", "the entry `model`, not `weights`"),
    ],
)
def test_errors_name_parameters_as_flags(message, expected):
    assert with_flags(message, {"epochs", "input_size"}) == expected


def test_jobs_that_were_submitted_under_the_old_name_can_be_loaded():
    from util.cluster.job import Job
    from util.job import Job as stored

    assert stored is Job
