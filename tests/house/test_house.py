"""The structure of the house: imports point down, flags stay in the mains, and start-up imports little."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = ("tests", "data", "docs", "runs", "recipes")

# Room -> the rooms that it may import from, in addition to itself. See TOP for the rooms of files at the top.
ROOMS = {
    "layers": "",
    "models": "layers",
    "backbones": "layers models util.flags util.weights util.data",
    "engine": "util.cluster util.data util.dist util.flags util.run util.train",
    "tools": "backbones layers models util.data util.evaluate util.files util.flags util.report util.weights",
    "doors": "tools util.files util.flags util.report",
    "mae_pl": "tools backbones models util.flags",
    "hub": "mae_pl",
    "mains": "engine backbones layers models util.files util.flags util.data util.dist util.evaluate "
    "util.report util.run util.train util.weights",
    "submitit": "mains util.cluster",
    "evidence": "util.files util.flags util.cluster util.evaluate util.report",
    "benchmarks": "backbones engine layers mains models util.files util.flags util.data util.dist "
    "util.evaluate util.report util.run util.train",
    "util.files": "",
    "util.flags": "layers util.files",
    "util.dist": "util.files util.flags",
    "util.data": "util.files util.flags util.dist",
    "util.weights": "layers util.dist util.files",
    "util.train": "layers util.data util.dist util.weights",
    "util.run": "util.files util.flags util.dist util.train util.weights",
    "util.evaluate": "layers util.data util.dist util.files util.train util.run",
    "util.report": "util.files util.weights",
    "util.cluster": "mains util.files util.flags util.dist util.data util.report",
    "util": "layers util.train util.data util.cluster util.flags",
}
TOP = {
    "main_": "mains",
    "submitit_": "submitit",
    "models_": "models",
    "engine": "engine",
    "checkpoints": "doors",
    "visualize": "doors",
    "evidence": "evidence",
    "hubconf": "hub",
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not path.relative_to(ROOT).parts[0].startswith(".") and path.relative_to(ROOT).parts[0] not in SKIPPED
)
MODULES = {name_of(path) for path in FILES}


def room_of(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "util":
        return f"util.{parts[1]}" if len(parts) > 1 and (ROOT / "util" / parts[1]).is_dir() else "util"
    if (ROOT / parts[0]).is_dir():
        return parts[0]
    return next(room for prefix, room in TOP.items() if parts[0].startswith(prefix))


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    # mae_pl loads the same files under its own name.
    found |= {name.removeprefix("mae_pl.") for name in found if name not in MODULES}
    # The name of a package alone does not import its contents.
    ours = found & MODULES
    return {name for name in ours if not any(other.startswith(f"{name}.") for other in ours)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_stay_within_the_rooms_below(path):
    room = room_of(name_of(path))
    if room == "util" and path.name != "__init__.py":
        assert len(path.read_text().splitlines()) < 20, (
            f"{path.name}: files outside the rooms of util may only forward to them"
        )
    for other in imports(path):
        assert room_of(other) in (room, *ROOMS[room].split()), f"{name_of(path)} imports {other}"


def test_nothing_imports_in_a_circle():
    graph = {name_of(path): imports(path) - {name_of(path)} for path in FILES}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_a_room_holds_at_most_ten_files():
    for folder in {path.parent for path in FILES} - {ROOT, ROOT / "benchmarks"}:
        files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 10, f"{folder.name}: {sorted(files)}"


def test_pretraining_does_not_import_timm_or_submitit():
    """Start-up counts in every job, and a cluster is not needed to train."""
    code = (
        "import sys; import main_pretrain; "
        "print([m for m in ('timm', 'submitit', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout


@pytest.mark.parametrize("main", sorted(p.name for p in ROOT.glob("main_*.py")))
def test_help_answers_without_torch(main):
    out = subprocess.run(
        [sys.executable, "-X", "importtime", main, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0 and "--data_path" in out.stdout and "default: " in out.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in out.stderr.splitlines())
    mistyped = subprocess.run(
        [sys.executable, main, "--batch_sise", "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert mistyped.returncode == 2 and "did you mean --batch_size?" in mistyped.stderr


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.args")), ids=lambda p: p.name)
def test_recipes_parse(recipe):
    import importlib

    from util.flags.parser import parse

    text = recipe.read_text()
    main = next(
        (m for m in ("main_finetune", "main_linprobe", "main_segment", "main_sere") if f"{m}.py" in text),
        "main_pretrain",
    )
    args = parse(importlib.import_module(main).get_args_parser(), [f"@{recipe}"])
    assert args.model in text


# --- Flags stay in the mains.
# Rooms that a command line must not reach: their code takes values, and names its own parameters in errors.
LIBRARY = ("layers", "models", "backbones", "engine", "tools", "util")
# Where flags are defined, or read on behalf of all mains.
READERS = ("util/flags/*", "*/__main__.py")
READERS += ("util/run/session.py", "util/cluster/check.py", "util/cluster/launch.py")
NAMES_OF_FLAGS = ("args", "opts", "namespace")
# torch fixes the parameters of these.
FIXED = ("__torch_dispatch__", "__torch_function__")
# Files that may have "--flag" in a string, and why. Errors of all other files name parameters.
MAY_NAME_FLAGS = {
    "tools/convert.py": "prints the command that loads the written file",
    "tools/inspect.py": "prints the commands that take a file",
    "util/cluster/slurm_jobs.py": "flags of srun, and the command that shows a sweep's status",
    "util/cluster/status.py": "flags of squeue",
    "util/cluster/sweep.py": "splits and writes command lines",
    "util/run/plan.py": "flags of git",
    "util/weights/checkpoint.py": "prints which flags have no effect on a continued run",
    "util/weights/types.py": "says which commands take a file",
}
# Files that break a rule today. This list may only shrink.
BEHIND: dict[str, str] = {}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_reader(path: Path) -> bool:
    return any(path.relative_to(ROOT).match(pattern) for pattern in READERS)


LIBRARY_FILES = [
    path for path in FILES if room_of(name_of(path)).split(".")[0] in LIBRARY and not is_reader(path)
]


def parameters(node: ast.AST) -> list[ast.arg]:
    """The parameters of a function or lambda, without *args."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return []
    if getattr(node, "name", "") in FIXED:
        return []
    a = node.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]


def parsed_flags(tree: ast.AST) -> list[str]:
    """Lines that take or read the parsed flags of a command line."""
    found = []
    for node in ast.walk(tree):
        for parameter in parameters(node):
            annotation = ast.unparse(parameter.annotation) if parameter.annotation else ""
            if parameter.arg in NAMES_OF_FLAGS or "Namespace" in annotation:
                found.append(f"{parameter.lineno}: takes {parameter.arg}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
            found.append(f"{node.lineno}: reads args.{node.attr}")
    return found


def strings(tree: ast.AST) -> list[ast.Constant]:
    """All strings except docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node for node in constants if isinstance(node.value, str) and id(node) not in docstrings]


def formatted_flags(text: ast.JoinedStr) -> list[str]:
    """Names that follow "--" in an f-string."""
    return [
        ast.unparse(after.value)
        for part, after in zip(text.values, text.values[1:])
        if str(getattr(part, "value", "")).endswith("--") and isinstance(after, ast.FormattedValue)
    ]


def named_flags(tree: ast.AST) -> list[str]:
    """Strings, other than docstrings, that have "--" and a letter or a formatted name."""
    found = [node.value for node in strings(tree) if re.search("--[A-Za-z]", node.value)]
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found += formatted_flags(node)
    return found


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=name_of)
def test_library_code_takes_no_parsed_flags(path):
    found = parsed_flags(ast.parse(path.read_text()))
    assert bool(found) == (BEHIND.get(relative(path)) == "args"), found


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=name_of)
def test_library_code_names_no_flags(path):
    found = named_flags(ast.parse(path.read_text()))
    assert bool(found) == (relative(path) in MAY_NAME_FLAGS), found


def test_the_exceptions_are_files():
    for name in {*MAY_NAME_FLAGS, *BEHIND}:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "code",
    [
        "def leak(args): pass",
        "def leak(args: dict): pass",
        "def leak(x, *, opts=None): pass",
        "def leak(flags: argparse.Namespace): pass",
        "def leak(flags: 'Namespace | None' = None): pass",
        "class A:\n    async def leak(self, namespace, /): pass",
        "leak = lambda args: args",
        "def outer():\n    return args.batch_size",
    ],
)
def test_a_leak_of_flags_is_found(code):
    assert parsed_flags(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "raise ValueError('--epochs must be at least 1')",
        "message = f'{x}: give --{name} {y}'\nraise ValueError(message)",
        "def f():\n    'A docstring.'\n    print('see --help')",
    ],
)
def test_a_named_flag_is_found(code):
    assert named_flags(ast.parse(code))


def test_what_only_looks_like_flags_is_left_alone():
    tree = ast.parse(
        "def f(self, *args, flags: dict):\n    'Like --this.'\n    g('--', self.args, f'a -- {flags}', *args)"
    )
    assert not parsed_flags(tree) and not named_flags(tree)


# --- The mains.
def blocks_of_a_script(tree: ast.Module) -> int:
    """The number of `if __name__ == "__main__"` blocks."""
    return sum(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in ast.walk(tree))


@pytest.mark.parametrize("path", sorted(ROOT.glob("main_*.py")), ids=name_of)
def test_a_main_has_at_most_45_lines(path):
    tree = ast.parse(path.read_text())
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert main.end_lineno - main.lineno + 1 <= 45
    assert blocks_of_a_script(tree) == 1


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_has_one_block_for_running_it(path):
    assert (blocks_of_a_script(ast.parse(path.read_text())) > 1) == (BEHIND.get(relative(path)) == "blocks")


# --- A kind of label is one file.
NEW_KIND = """
from layers.positional.kinds.apl import AbsoluteLabel


class NewLabel(AbsoluteLabel):
    name = "brandnew"
"""
USE_IT = """
import torch, main_pretrain
from models_mae_pl import MODELS
from util.flags.parser import parse
flags = parse(main_pretrain.get_args_parser(), ["--pos_label", "apl+brandnew"])
model = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32), pos_label=flags.pos_label)
losses = model(torch.randn(2, 3, 32, 32), mask_ratio=0.5)[0]
print(sorted(name for name in losses if "brandnew" in name), model.pos_head.chance(2)["brandnew"] > 0)
"""


def test_a_kind_of_label_is_one_file(tmp_path):
    """Flags, model, losses and chance levels of a new kind come from one file in layers/positional/kinds."""
    shutil.copytree(ROOT / "layers", tmp_path / "layers", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "layers" / "positional" / "kinds" / "brandnew.py").write_text(NEW_KIND)
    # The copy comes before the checkout.
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n{USE_IT}"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == "['brandnew', 'brandnew_acc'] True", out.stdout + out.stderr


def test_flags_do_not_name_the_kinds_of_labels():
    from layers.positional import label_names

    for path in sorted((ROOT / "util" / "flags").glob("*.py")):
        texts = [node.value for node in strings(ast.parse(path.read_text()))]
        found = [text for text in texts if re.search(rf"\b({'|'.join(label_names())})\b", text)]
        assert bool(found) == (BEHIND.get(relative(path)) == "kinds"), found


# --- Quick tests.
def names_in(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def is_slow(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "pytest.mark.slow" for decorator in node.decorator_list)


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("tests/unit/*.py"), *ROOT.glob("tests/method/*.py")]), ids=lambda p: p.stem
)
def test_quick_tests_start_no_process(path):
    """Whoever starts one, by itself or through a function of its file, is marked slow."""
    body = ast.parse(path.read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    starters = {alias.name for node in imports for alias in node.names} & {"subprocess", "start", "ranks"}
    while more := {f.name for f in functions if names_in(f) & starters} - starters:
        starters |= more
    for function in functions:
        if function.name.startswith("test_") and function.name in starters:
            assert is_slow(function), f"{path.name}: {function.name}"
