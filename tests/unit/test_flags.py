"""Command lines: what is answered before the heavy imports, and how errors name flags."""

import os
import subprocess
import sys

import pytest

from processes import ROOT, environment
from util.flags.parser import Parser, answer_at_once, describe, with_flags

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
    for flags, message in (
        (["--sise", "3"], "did you mean --size?"),
        (["--size", "x"], "takes a whole number"),
    ):
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


def parser_error(capsys, *words: str) -> str:
    """What the parser prints about a command line that it refuses."""
    parser = Parser(add_help=False, prog="prog")
    parser.add_argument("--size")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(list(words))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (b"--size 1\n@R.args\n", "recipe R.args includes itself: R.args -> R.args"),
        (b"@other.args", "recipe R.args includes itself: R.args -> other.args -> R.args"),
        (b"--size 1\n\0\1\2", "recipe R.args is not a text file: it holds zero bytes"),
        (b"--size 1\n# caf\xe9\n", "recipe R.args is not a text file in UTF-8: line 2 has the byte 0xe9"),
        (b'# a\n--size "a\n', "recipe R.args, line 2: an open quote. Close it, or put a backslash before it"),
        (b"--size a\\", "recipe R.args, line 1: a backslash at the end. Remove it"),
        (b"# " + b"x" * 2**20, "recipe R.args is too large: all recipes of a command line may have 1048576"),
        (b"@small.args\n" * 201, "recipe small.args is one too many: a command line may include 200"),
        (b"@missing.args", "there is no recipe missing.args; see recipes/*.args"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_line_with_its_name(
    tmp_path, monkeypatch, capsys, content, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "R.args").write_bytes(content)
    (tmp_path / "other.args").write_text("@R.args")
    (tmp_path / "small.args").write_text("--size 1")
    error = parser_error(capsys, "@R.args")
    assert error.startswith(f"prog: error: {message}") and error.count("\n") == 1


def test_only_regular_files_are_recipes(tmp_path, monkeypatch, capsys):
    """A pipe would hang, and a device would fill the memory."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("/dev/zero", "zero")
    os.symlink("loop", "loop")
    for name, kind in (("pipe", "a named pipe"), ("zero", "a device")):
        assert f"{name} is {kind}, not a regular file" in parser_error(capsys, f"@{name}")
    assert "recipe loop cannot be read: Too many levels" in parser_error(capsys, "@loop")
    assert f"recipe {tmp_path} is a folder" in parser_error(capsys, f"@{tmp_path}")


def test_a_recipe_includes_others_to_a_limited_depth(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(30):
        (tmp_path / f"{i}.args").write_text(f"@{i + 1}.args")
    (tmp_path / "30.args").write_bytes(b"\xef\xbb\xbf--size  'a b' # a byte order mark\r\n")
    parser = Parser(add_help=False)
    assert parser.with_recipes(["x", "@11.args", "@30.args"]) == ["x", *2 * ["--size", "a b"]]
    assert "include each other more than 20 deep: 0.args -> 1.args" in parser_error(capsys, "@0.args")


def test_control_characters_of_a_command_line_do_not_reach_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "unknown flag --y\\x1b[31m; " in parser_error(capsys, "--y\x1b[31m")
    assert parser_error(capsys, "@no\nrecipe\x1b").startswith(
        "prog: error: there is no recipe no\\nrecipe\\x1b;"
    )
    (tmp_path / "\x1b[2J.args").write_text("'")
    assert "recipe \\x1b[2J.args, line 1" in parser_error(capsys, "@\x1b[2J.args")
    assert "\x1b" not in parser_error(capsys, "word\x1b")


def test_control_characters_of_a_name_do_not_reach_the_terminal_in_errors():
    error = ValueError("\x1b[31mred\x9b\r.jpg\n\tis damaged, \u202egpj.exe, \udcff: lower `size`")
    described = describe(error, {"size"})
    assert described == "\\x1b[31mred\\x9b\\r.jpg\n\tis damaged, \\u202egpj.exe, \\xff: lower --size"
