"""The structure that README.md promises: imports point down, nothing heavy is imported where it must not be."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = sorted(
    p for folder in (".", "layers", "util", "benchmarks") for p in (ROOT / folder).glob("*.py") if p.name != "__init__.py")
# Level of each module; an import must go to a lower level. util has its own order: everything may use util.dist.
LEVELS = [
    ("benchmarks.timing", 2), ("benchmarks.gpu_table", 3), ("benchmarks.step", 6), ("benchmarks.", 8),
    ("submitit_", 7), ("main_", 6), ("visualize", 6), ("checkpoints", 6), ("evidence", 6), ("claims", 5),
    ("engine", 5), ("conversions", 5),
    ("models_", 3), ("models", 4), ("layers.", 2), ("util.dist", 0), ("util.pos_embed", 0), ("util.", 1),
]
# Within util: who may import whom beside util.dist.
UTIL_EDGES = {"util.dist": {"util.allocator"}, "util.image_index": {"util.listing"},
              "util.loader": {"util.allocator", "util.samplers", "util.transforms"},
              "util.evaluation": {"util.amp", "util.loader"},
              "util.supervised": {"util.accuracy", "util.evaluation", "util.log"},
              "util.datasets": {"util.args", "util.image_index", "util.loader", "util.native", "util.repack", "util.samplers",
                                "util.transforms"},
              "util.cache": {"util.datasets", "util.image_index", "util.loader", "util.transforms"},
              "util.repack": {"util.image_index", "util.transforms", "util.native"},
              "util.transforms": {"util.native"}, "util.checkpoint": {"util.fsdp", "util.pos_embed", "util.weights"},
              "util.runs": {"util.weights"}, "util.charts": {"util.runs"}, "util.results": {"util.job", "util.runs"},
              "util.report": {"util.charts", "util.runs"}, "util.keeper": {"util.checkpoint"}, "util.plan": {"util.flops"},
              "util.state": {"util.checkpoint", "util.fsdp"},
              "util.slurm": {"util.args", "util.datasets", "util.loader", "util.transforms"},
              "util.job": {"util.args"}, "util.status": {"util.job", "util.slurm"}, "util.sweep": {"util.args", "util.job"},
              "util.launch": {"util.args", "util.job", "util.slurm", "util.status", "util.sweep"},
              "util.log": {"util.board"}}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def level(name: str) -> int:
    return next(n for prefix, n in LEVELS if name.startswith(prefix))


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_imports_point_down(path):
    name, modules = name_of(path), {name_of(p) for p in OURS}
    for other in imports(path) & modules:
        if name.startswith("util.") and other.startswith("util."):
            assert other == "util.dist" or other in UTIL_EDGES.get(name, ()), f"{name} imports {other}"
        elif not (name.startswith("layers.") and other.startswith("layers.")):
            assert level(other) < level(name), f"{name} imports {other}, which is not below it"
        if name.startswith(("models_", "layers.")):
            assert not other.startswith("util.") or other == "util.pos_embed", f"{name} imports {other}"


def test_layers_have_no_cycle():
    graph = {name_of(p): imports(p) & {name_of(q) for q in OURS} for p in OURS if name_of(p).startswith("layers.")}
    done = set()
    while graph:
        free = [n for n, deps in graph.items() if {d for d in deps if d.startswith("layers.")} <= done]
        assert free, f"cycle among {sorted(graph)}"
        done |= set(free)
        for n in free:
            del graph[n]


def test_only_mains_read_args():
    for path in OURS:
        may = ("util.args", "util.slurm", "util.launch", "util.sweep", "visualize", "checkpoints", "evidence")
        if path.name.startswith(("main_", "submitit_")) or name_of(path) in may:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "args" in [a.arg for a in node.args.args]:
                annotation = next(a.annotation for a in node.args.args if a.arg == "args")
                assert not isinstance(annotation, ast.Attribute) or path.name == "checkpoint.py", f"{path.name}:{node.lineno}"


def test_pretraining_does_not_import_timm_or_submitit():
    """Start-up counts in every job, and a cluster is not needed to train."""
    code = ("import sys; import main_pretrain; "
            "print([m for m in ('timm', 'submitit', 'matplotlib', 'transformers') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout


@pytest.mark.parametrize("main", sorted(p.name for p in ROOT.glob("main_*.py")))
def test_help_answers_without_torch(main):
    out = subprocess.run([sys.executable, "-X", "importtime", main, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and "--data_path" in out.stdout and "default: " in out.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in out.stderr.splitlines())
    mistyped = subprocess.run([sys.executable, main, "--batch_sise", "3"], cwd=ROOT, capture_output=True, text=True)
    assert mistyped.returncode == 2 and "did you mean --batch_size?" in mistyped.stderr


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.args")), ids=lambda p: p.name)
def test_recipes_parse(recipe):
    import importlib

    from util.args import parse

    text = recipe.read_text()
    main = next((m for m in ("main_finetune", "main_linprobe", "main_sere") if f"{m}.py" in text), "main_pretrain")
    args = parse(importlib.import_module(main).get_args_parser(), [f"@{recipe}"])
    assert args.model in text
