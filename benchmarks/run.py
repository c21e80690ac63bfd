"""Run one benchmark by its name.

    python benchmarks/run.py --list
    python benchmarks/run.py data --json data.json [its own flags; `data --help` lists them]

A benchmark is a module `benchmarks/NAME.py` with `main(argv, record) -> dict`: it prints a table and returns what it
measured, as plain values. `--json FILE` writes that together with the machine, the versions and the commit. The file is
written anew after every row: a run that is killed leaves all rows that it had measured.
"""

import argparse
import ast
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(
    HERE
):  # run as a script: the modules here (data, step, ...) must not hide installed packages
    sys.path[0] = str(HERE.parent)

from benchmarks.timing import Record, machine


def available() -> dict[str, str]:
    """Name -> first line of the docstring, without importing anything."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        tree = ast.parse(path.read_text())
        if (
            any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
            and path.stem != "run"
        ):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "name", nargs="?", help="one of the names that --list shows; `NAME --help` shows its flags"
    )
    parser.add_argument("--json", metavar="FILE", help="write figures, machine, versions and commit")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    args, rest = parser.parse_known_args(argv)
    names = available()
    if args.name is None:
        if args.list:
            for name, line in names.items():
                print(f"{name:16} {line}")
            return 0
        parser.print_help()
        return 0 if {"-h", "--help"} & set(rest) else 2
    if args.name not in names:
        parser.exit(2, f"no benchmark {args.name!r}: there are {', '.join(names)}\n")
    benchmark = importlib.import_module(f"benchmarks.{args.name}")
    record = Record(args.json, dict(benchmark=args.name, arguments=rest, **machine()))
    benchmark.main(rest, record)
    record.write()
    if args.json:
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
