"""Types: none of the gated rooms may have an error, and the number of errors elsewhere may only fall.

    python tests/house/type_errors.py            exit code 1 where there are more errors than allowed
    python tests/house/type_errors.py --show     all errors

Run by `make lint`. mypy's settings are in pyproject.toml.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Room -> the number of errors that it has today. Rooms that are not named here are gated: they have none.
ALLOWED: dict[str, int] = {}
PATHS = ["engine.py", "main_*.py", "models_*.py", "submitit_*.py", "checkpoints.py", "visualize.py"]
PATHS += ["backbones", "benchmarks", "evidence", "layers", "tools", "util"]


def room_of(path: str) -> str:
    """The folder of a file, or its name for a file at the top."""
    parts = Path(path).parts
    if parts[0] == "util" and len(parts) > 2:
        return "/".join(parts[:2])
    return parts[0]


def errors() -> list[str]:
    files = [str(path.relative_to(ROOT)) for pattern in PATHS for path in sorted(ROOT.glob(pattern))]
    # evidence.py, the old name of the package, would be a second module of that name.
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *files]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if output.returncode not in (0, 1):
        raise SystemExit(output.stdout + output.stderr)
    return [line for line in output.stdout.splitlines() if re.search(r": error: ", line)]


def main() -> int:
    lines = errors()
    if "--show" in sys.argv:
        print(*lines, sep="\n")
    counts = Counter(room_of(line.partition(":")[0]) for line in lines)
    bad = {room: count for room, count in counts.items() if count > ALLOWED.get(room, 0)}
    for room, count in bad.items():
        print(f"{room}: {count} type errors, {ALLOWED.get(room, 0)} allowed")
        print(*(line for line in lines if room_of(line.partition(":")[0]) == room), sep="\n")
    for room, allowed in ALLOWED.items():
        if counts[room] < allowed:
            print(f"{room}: {counts[room]} type errors instead of {allowed}: lower its number in {__file__}")
    print(f"{len(lines)} type errors, {sum(ALLOWED.values())} allowed")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
