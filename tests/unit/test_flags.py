"""Command lines: what is answered before the heavy imports, and how errors name flags."""

import argparse
import ast
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

from processes import ROOT, environment
from util.flags import early
from util.flags.groups import device_name
from util.flags.numbers import number, side
from util.flags.parser import (
    Parser,
    answer_at_once,
    describe,
    flag_names,
    given_in,
    parser_of,
    run,
    with_flags,
)

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
        # A flag of another command: the advice names that command, or it is about the parameter.
        ("start from it by main_pretrain.py `init_from`", "start from it by main_pretrain.py --init_from"),
        ("main_finetune.py `auto_augment` ''", "main_finetune.py --aa ''"),
        ("give the `output_dir` of a run", "give the `output_dir` of a run"),
        ("the entry `model`, not `weights`", "the entry `model`, not `weights`"),
    ],
)
def test_errors_name_parameters_as_flags(message, expected):
    assert with_flags(message, {"epochs", "input_size"}) == expected


def test_flags_are_those_of_the_command_at_hand():
    """Neither of another command of the same script, nor words without a flag."""
    parser = Parser()
    parser.add_argument("--size", type=int)
    commands = parser.add_subparsers(dest="command")
    draw = commands.add_parser("draw")
    draw.add_argument("path")
    draw.add_argument("--global_pool", "--mean_pool", dest="pool", action="store_true")
    commands.add_parser("check").add_argument("--images")
    found = flag_names(parser.parse_args(["draw", "FILE"]))
    assert found == {"help", "size", "global_pool", "mean_pool"}
    text = with_flags("`path` `command` `images` `pool` `size` `global_pool`", found)
    assert text == "`path` `command` `images` `pool` --size --global_pool"
    assert with_flags("`cls_token`", vars(argparse.Namespace(pool=None))) == "--cls_token"


DOORS = (
    "main_pretrain",
    "main_finetune",
    "main_linprobe",
    "main_segment",
    "main_sere",
    "checkpoints",
    "visualize",
)
DOORS += ("util.data.__main__", "evidence.__main__")


def commands_of(parser: argparse.ArgumentParser, name: str) -> dict[str, set[str]]:
    """The flags of a door, without dashes, for each of its commands."""
    own = {word[2:] for word in parser._option_string_actions if word.startswith("--")}
    found = {name: own}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {
                f"{name} {command}": own | commands_of(inner, command)[command]
                for command, inner in action.choices.items()
            }
    return found


def quoting_strings() -> set[str]:
    """Messages of library code that name parameters; what a format fills in is left out."""
    found = set()
    for path in sorted(ROOT.rglob("*.py")):
        top = path.relative_to(ROOT).parts[0]
        if top in ("tests", "docs", "data", "runs") or top.startswith("."):
            continue
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inner = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = node.values
                inner |= set(map(id, parts))
                found.add("".join(getattr(part, "value", "") for part in parts if is_text(part)))
            elif is_text(node) and id(node) not in docstrings | inner:
                found.add(node.value)
    return {text for text in found if "`" in text}


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_errors_send_people_to_flags_that_their_command_has():
    parsers = {door: importlib.import_module(door).get_args_parser() for door in DOORS}
    commands = {k: v for door, parser in parsers.items() for k, v in commands_of(parser, door).items()}
    texts = quoting_strings()
    assert len(texts) > 100
    for command, flags in commands.items():
        for text in texts:
            named = re.findall(r"(?:(main_[a-z]+)\.py )?--([a-z_0-9]+)", with_flags(text, flags))
            for script, name in named:
                # Words with dashes in the message itself are checked where they are written.
                if f"--{name}" not in text:
                    assert name in commands.get(script, flags), f"{command}: {text}"


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
        (b"--size a \\\n--size b\n", "recipe R.args, line 1: a backslash at the end. Remove it"),
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


# --- numbers


@pytest.mark.parametrize(
    "kind, word, message",
    [
        (number(1), "0", "must be 1 or more, found 0"),
        (number(1), "2.0", "takes a whole number, found '2.0'"),
        (number(0, kind=float, above=True), "0", "must be greater than 0, found 0"),
        (number(0, 1, float), "1.01", "must lie between 0 and 1, found 1.01"),
        (number(0, 1, float, below=True), "1", "must be at least 0 and less than 1, found 1"),
        (number(0, 1, float, above=True), "0", "must be greater than 0 and at most 1, found 0"),
        (number(0, kind=float), "nan", "must be a finite number, found nan"),
        (number(0, kind=float), "Infinity", "must be a finite number, found Infinity"),
        (number(0, kind=float), "0,75", "takes a number, found '0,75'; write 0.75"),
        (number(0, kind=float), "", "takes a number, found ''"),
        (side, "0", "must lie between 1 and 65536, found 0"),
        (side, "224X224", "takes a whole number"),
        # What `type=float` and `type=int` mean without limits of their own.
        (float, "-inf", "must be a finite number, found -inf"),
        (int, "x", "takes a whole number, found 'x'"),
    ],
)
def test_a_number_out_of_its_limits_is_refused(capsys, kind, word, message):
    parser = Parser(add_help=False)
    parser.add_argument("--n", type=kind)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--n={word}"])
    assert f"error: argument --n: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, word, value",
    [
        (number(1), "1", 1),
        (number(0, 1, float), "1", 1.0),
        (number(0, 1, float, below=True), "0", 0.0),
        (number(0, 1, float, below=True), "0.99999", 0.99999),
        (number(0, 1, float, above=True), "1", 1.0),
        (number(-3), "-3", -3),
        (side, "65536", 65536),
        (float, "-1e300", -1e300),
    ],
)
def test_a_number_at_its_limits_is_taken(kind, word, value):
    parser = Parser(add_help=False)
    parser.add_argument("--n", type=kind)
    found = parser.parse_args([f"--n={word}"]).n
    assert found == value and type(found) is type(value)


MAINS = ["main_pretrain", "main_finetune", "main_linprobe", "main_segment", "main_sere"]


@pytest.mark.parametrize("main", MAINS)
def test_no_number_of_a_main_is_nan_or_infinite(main, capsys):
    """A flag that takes numbers refuses these, whatever its limits are."""
    numeric = [action for action in parser_of(main)._actions if action.type not in (None, str)]
    assert len(numeric) > 25
    for action in numeric:
        flag = action.option_strings[0]
        count = action.nargs if isinstance(action.nargs, int) else 1
        for word in ("nan", "inf"):
            with pytest.raises(SystemExit, match="2"):
                Parser(parents=[parser_of(main)]).parse_args([flag, *count * [word]])
            assert f"error: argument {flag}: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tpu", "npu:0", "", "cup", "auto:1"])
def test_a_device_of_another_kind_is_not_taken_for_one_of_torchs(name):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        device_name(name)
    assert "did you mean" not in str(error.value) and "auto is a GPU" in str(error.value)


# --- help


@pytest.mark.parametrize("main", MAINS)
def test_help_begins_with_what_most_runs_give_and_shows_every_default(main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    parser = Parser(parents=[parser_of(main)])
    text = parser.format_help()
    rare = text.index("\n  --dist_backend")
    places = [
        text.index(f"\n  {flag}") for flag in ("--data_path", "--output_dir", "--epochs", "--max_pixels")
    ]
    assert places == sorted(places) and places[-1] < rare
    assert len(text.partition("--model")[0].splitlines()) < 16
    for action in parser._actions:
        if action.help in (None, argparse.SUPPRESS) or action.default == argparse.SUPPRESS:
            continue
        (entry,) = re.findall(rf"^  {action.option_strings[0]}\b.*\n(?:   +.*\n)*", text, re.MULTILINE)
        shown = action.default
        if shown in (None, ""):
            assert re.search(r"default|not given|if other than", entry), entry
            continue
        if isinstance(shown, list):
            shown = " ".join(map(str, shown))
        assert f"(default: {shown})" in " ".join(entry.split()), entry
    # Every visible flag is listed once.
    for action in parser._actions:
        times = len(re.findall(rf"^  {action.option_strings[-1]}\b", text, re.MULTILINE))
        if action.help != argparse.SUPPRESS and len(action.option_strings) == 1:
            assert times == 1, action


@pytest.mark.parametrize("main", ["main_pretrain", "main_finetune", "main_linprobe"])
def test_help_has_examples_and_the_names_of_the_models(main):
    text = Parser(parents=[parser_of(main)], epilog=parser_of(main).epilog).format_help()
    assert f"examples:\n  python {main}.py" in text
    assert all(re.search(rf"[\s]{re.escape(name)}[,\s]", text) for name in early.MODELS[main]())


def test_an_error_is_not_hidden_by_a_long_usage(capsys):
    with pytest.raises(SystemExit):
        Parser(parents=[parser_of("main_pretrain")], prog="p").parse_args(["--epochz", "1"])
    assert capsys.readouterr().err == "p: error: unknown flag --epochz; did you mean --epochs?\n"
    # Nor is it by a short one, and commands know their flags.
    parser = Parser(prog="p")
    parser.add_subparsers().add_parser("draw").add_argument("--images")
    for words, answer in (
        (["draw", "--image", "1"], "did you mean --images?"),
        (["drow"], "did you mean draw?"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        text = capsys.readouterr().err
        assert text.startswith("p: error: ") and answer in text and text.count("\n") == 1


# --- what is given


def test_flags_remember_what_the_command_line_has_given(tmp_path):
    parser = Parser(add_help=False)
    parser.add_argument("--size", default=4, type=int)
    parser.add_argument("--name", default="a")
    parser.add_argument("--fast", action="store_true")
    (tmp_path / "r.args").write_text("--name b")
    flags = parser.parse_args(["--size=4", f"@{tmp_path / 'r.args'}"])
    assert given_in(flags) == {"size", "name"}
    assert vars(flags) == {"size": 4, "name": "b", "fast": False}
    # The second pass leaves the defaults as they were.
    assert vars(parser.parse_args([])) == {"size": 4, "name": "a", "fast": False}
    assert given_in(parser.parse_args(["--fast"])) == {"fast"} and given_in(parser.parse_args([])) == set()
    assert given_in(argparse.Namespace(size=4)) == {"size"}


# --- recipes of any folder


def test_a_recipe_lies_in_the_working_directory_or_beside_the_mains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parser = Parser(add_help=False)
    assert "--mask_ratio" in parser.with_recipes(["@recipes/mae_vit_base.args"])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mae_vit_base.args").write_text("--size 1")
    assert parser.with_recipes(["@recipes/mae_vit_base.args"]) == ["--size", "1"]
    assert "did you mean @recipes/mae_vit_large.args?" in parser_error(capsys, "@mae_vit_lagre.args")


# --- runs


def test_missing_data_are_told_first_and_on_one_rank(monkeypatch, capsys):
    def main(flags):
        print("the run")
        return 0

    flags = argparse.Namespace(data_path="")
    assert run(main, flags) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "no --data_path" in first and "demo" in first and second == "the run"
    for data_path, rank, lines in (("x", "0", 1), ("", "1", 1), ("", "0", 2)):
        monkeypatch.setenv("RANK", rank)
        run(main, argparse.Namespace(data_path=data_path))
        assert len(capsys.readouterr().out.splitlines()) == lines
    # Commands without data do not say anything.
    run(main, argparse.Namespace())
    assert capsys.readouterr().out == "the run\n"


def test_the_place_of_an_error_is_shown_on_request_only(monkeypatch, capsys):
    def main(flags):
        raise ValueError("`epochs` is wrong")

    monkeypatch.delenv("MAE_PL_TRACEBACK", raising=False)
    assert run(main, argparse.Namespace(epochs=1)) == 2
    assert capsys.readouterr().err == "error: --epochs is wrong\n"
    monkeypatch.setenv("MAE_PL_TRACEBACK", "1")
    with pytest.raises(ValueError):
        run(main, argparse.Namespace(epochs=1))


def test_a_lack_of_memory_is_one_line_with_what_helps(monkeypatch, capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    def main(flags):
        raise error

    flags = argparse.Namespace(batch_size=8, accum_iter=1)
    monkeypatch.delenv("MAE_PL_TRACEBACK", raising=False)
    assert run(main, flags) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "2.00 GiB" in text and "--batch_size" in text and "--accum_iter" in text
    assert "--grad_checkpointing" not in text
    # Other errors of torch are bugs.
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError):
        run(main, flags)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from util.flags import early
from util.flags.parser import parse, parser_of
for main in early.MODELS:
    words = ["--finetune", "https://host/a.pth"] if main == "main_linprobe" else []
    early.check(main + ".py", parse(parser_of(main), words))
from util.cluster import launch, slurm_jobs
slurm_jobs.shutil.which = lambda name: None
sys.exit(launch.launch("main_pretrain", ["--data_path", "x", "--sweep", "seed=0,1", "--then", "linprobe"]))
"""


@pytest.mark.slow  # starts a process
def test_command_lines_are_checked_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--cluster local" in done.stderr, (
        done.stderr
    )


# --- what is checked early


@pytest.mark.parametrize(
    "name, main, nearest",
    [
        ("ViT-L/16", "main_finetune", "vit_large_patch16"),
        ("vit_h_14", "main_finetune", "vit_huge_patch14"),
        ("vit_l_16", "main_pretrain", "mae_vit_large_patch16"),
        ("vit_base", "main_finetune", "vit_base_patch16"),
        ("mae_vit_huge", "main_pretrain", "mae_vit_huge_patch14"),
        ("vit_base_patch16_224", "main_finetune", "vit_base_patch16"),
        ("swin-tiny", "main_finetune", "swin_tiny"),
        ("resnet50", "main_finetune", ""),
    ],
)
def test_the_nearest_model_is_one_of_that_size(name, main, nearest):
    assert early.nearest(name, early.MODELS[main]()) == nearest


def test_a_start_is_not_needed_where_a_run_continues_from_its_own_checkpoint(tmp_path):
    """A requeued job repeats the flags of its first start, whose files may be gone."""
    parser = parser_of("main_finetune")
    flags = parser.parse_args(["--finetune", str(tmp_path / "gone.pth"), "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match=r"--finetune .*gone\.pth does not exist"):
        early.check("main_finetune.py", flags)
    (tmp_path / "checkpoint-last.pth").touch()
    early.check("main_finetune.py", flags)
    # An evaluation does not continue a run.
    flags = parser.parse_args(["--eval", "--resume", "gone.pth", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match=r"--resume gone\.pth does not exist"):
        early.check("main_finetune.py", flags)


def test_addresses_and_readers_are_no_paths(tmp_path, monkeypatch):
    parser = parser_of("main_pretrain")
    for words in (
        ["--resume", "https://host/x.pth"],
        ["--data_path", "hfds/uoft-cs/cifar10"],
        ["--data_path", "torch/cifar10=/data"],
        ["--data_path", "~"],
    ):
        early.check("main_pretrain.py", parser.parse_args([*words, "--output_dir", str(tmp_path)]))
