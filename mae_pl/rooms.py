"""The toolkit's modules as modules of this package.

The mains are run from the checkout, where `util` and `layers` are top-level names. In other programs these
names belong to somebody else. So the same files are loaded once more as `mae_pl.util`, `mae_pl.layers` and
so on, and their imports of each other are rewritten. That holds for imports within functions, too, which run
later, and pickled models and transforms find their classes again.
"""

import ast
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

PACKAGE = "mae_pl"
HOME = os.path.dirname(os.path.abspath(__file__))
# The checkout.
ROOT = os.path.dirname(HOME)
ROOMS = ("backbones", "engine", "evidence", "layers", "tools", "util")
# The first letters of further modules at the top of the checkout.
FILES = ("main_", "models_", "submitit_", "checkpoints", "visualize")


def is_ours(name: str) -> bool:
    """Whether a top-level name is a module of the toolkit."""
    return name in ROOMS or name.startswith(FILES)


class Rewritten(ast.NodeTransformer):
    """Imports of the toolkit's modules become imports from the package."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if not node.level and node.module and is_ours(node.module.partition(".")[0]):
            node.module = f"{PACKAGE}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> Any:
        others = [alias for alias in node.names if not is_ours(alias.name.partition(".")[0])]
        statements: list[ast.stmt] = [ast.Import(names=others)] if others else []
        for alias in node.names:
            if alias in others:
                continue
            name = f"{PACKAGE}.{alias.name}"
            top = alias.name.partition(".")[0]
            if alias.asname:
                statements.append(ast.Import(names=[ast.alias(name, alias.asname)]))
                continue
            # `import util.files` binds `util`.
            statements.append(ast.Import(names=[ast.alias(name)]))
            statements.append(ast.ImportFrom(module=PACKAGE, names=[ast.alias(top)], level=0))
        return [ast.copy_location(statement, node) for statement in statements]


class Loader(SourceFileLoader):
    """Loads a file of the toolkit with rewritten imports. The file's bytecode is not touched."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = Rewritten().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class Finder(MetaPathFinder):
    """Finds `mae_pl.X` for the modules X of the checkout."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != PACKAGE or not is_ours(name.partition(".")[0]):
            return None
        if "." not in name:
            path = [ROOT]
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Make the toolkit's modules importable as those of this package."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
