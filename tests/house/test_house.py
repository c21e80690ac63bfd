"""The structure of the house: imports point down, flags stay in the mains, and start-up imports little."""

import ast
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
    "engine": "util.cluster util.data util.dist util.run util.train",
    "tools": "backbones layers models util.data util.flags util.report util.weights",
    "doors": "tools util.flags util.report",
    "mains": "engine backbones layers models util.flags util.data util.dist util.evaluate util.report "
    "util.run util.train util.weights",
    "submitit": "mains util.cluster",
    "evidence": "util.flags util.cluster util.report",
    "benchmarks": "backbones engine layers mains models util.flags util.data util.dist util.evaluate "
    "util.report util.run util.train",
    "util.flags": "layers",
    "util.dist": "",
    "util.data": "util.flags util.dist",
    "util.weights": "layers util.dist",
    "util.train": "layers util.data util.dist util.weights",
    "util.run": "util.flags util.dist util.train util.weights",
    "util.evaluate": "layers util.data util.dist util.train util.run",
    "util.report": "util.weights",
    "util.cluster": "mains util.flags util.dist util.data util.report",
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
    # A package's name alone is no import of what it holds.
    ours = found & MODULES
    return {name for name in ours if not any(other.startswith(f"{name}.") for other in ours)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_stay_within_the_rooms_below(path):
    room = room_of(name_of(path))
    if room == "util" and path.name != "__init__.py":
        assert len(path.read_text().splitlines()) < 20, (
            f"{path.name}: util has rooms; what lies beside them only forwards"
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
        (m for m in ("main_finetune", "main_linprobe", "main_sere") if f"{m}.py" in text), "main_pretrain"
    )
    args = parse(importlib.import_module(main).get_args_parser(), [f"@{recipe}"])
    assert args.model in text
