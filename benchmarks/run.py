"""Run one benchmark by its name.

    python benchmarks/run.py --list
    python benchmarks/run.py data --json data.json [flags of the benchmark; `data --help` lists them]

A benchmark is a module `benchmarks/NAME.py` with `main(argv, record) -> dict`. It prints a table and returns
its figures as plain values. `--json FILE` writes these together with the machine, the versions and the
commit. The file is rewritten after every row: a run that is killed leaves all rows that it had measured.
"""

import argparse
import ast
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first on the path, and its modules (data, step, ...) would
# hide installed packages.
if sys.path[0] == str(HERE):
    sys.path[0] = str(HERE.parent)

from benchmarks.timing import Record, machine


def available() -> dict[str, str]:
    """The benchmarks: name -> first line of the docstring."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        # Parsed, not imported: some take seconds to import.
        tree = ast.parse(path.read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if "main" in names and path.stem != "run":
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def get_parser() -> argparse.ArgumentParser:
    """Flags of this file. All others belong to the benchmark."""
    # Without its own --help: that flag is the benchmark's if one is named.
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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a benchmark, or list them. Returns the exit code, 2 without a name."""
    parser = get_parser()
    args, rest = parser.parse_known_args(argv)
    names = available()
    if args.name is None and args.list:
        for name, line in names.items():
            print(f"{name:16} {line}")
        return 0
    if args.name is None:
        parser.print_help()
        if {"-h", "--help"} & set(rest):
            return 0
        return 2
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
