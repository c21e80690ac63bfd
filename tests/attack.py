"""Attack the toolkit with damaged pictures, files of further formats, damaged checkpoints, and kills.

    python tests/attack.py [images|formats|checkpoints|kills|all] [--images 2000] [--formats 250]
                           [--checkpoints 500] [--kills 20] [--seed 0] [--only NUMBER] [--keep DIR]

Every input follows from the seed and its number. The script prints what became of the inputs and exits with
code 1 if any did harm. `--only NUMBER` repeats one of them, and `--keep DIR` keeps the files of failures.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

# One thread: there are no others at the forks, and every worker has a core.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PARTS = ("images", "formats", "checkpoints", "kills")
SHOWN = 12  # failures of a part that are printed in full


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("part", nargs="?", default="all", choices=(*PARTS, "all"))
    p.add_argument("--images", type=int, default=2000)
    p.add_argument("--formats", type=int, default=250)
    p.add_argument("--checkpoints", type=int, default=500)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", type=int, help="the number of one input")
    p.add_argument("--keep", type=Path, help="folder for the files of failures")
    p.add_argument("--all_failures", action="store_true", help="print every failure, not the first few")
    return p


def report(part: str, outcomes: list, seconds: float, args: argparse.Namespace) -> bool:
    """Print the counts of a part, and its failures; return whether there are none."""
    failed = [outcome for outcome in outcomes if outcome.failures]
    print(f"{part}: {counts(outcomes)}; {len(failed)} failed; {seconds:.0f} s")
    for kind, count in Counter(kind for outcome in failed for kind, _ in outcome.failures).most_common():
        print(f"  {count:5} x {kind}")
    shown = failed
    if not args.all_failures:
        shown = failed[:SHOWN]
    for outcome in shown:
        for kind, detail in outcome.failures[:3]:
            print(f"  {part} {outcome.number} ({ascii(outcome.what)[1:-1]}): {kind}: {ascii(detail)[1:-1]}")
        print(f"    python tests/attack.py {part} --seed {args.seed} --only {outcome.number} --keep DIR")
    if len(shown) < len(failed):
        print(f"  and {len(failed) - len(shown)} more: see --all_failures")
    return not failed


def counts(outcomes: list) -> str:
    """Return what became of the inputs, and what they cost at most."""
    verdicts = Counter(outcome.verdict for outcome in outcomes if not outcome.failures)
    parts = [
        f"{len(outcomes)} inputs",
        *(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())),
    ]
    if kills := sum(outcome.kills for outcome in outcomes):
        parts.append(f"{kills} kills")
        return ", ".join(parts)
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.peak_mb)
    parts.append(f"at most {slowest.seconds:.1f} s of the processor ({slowest.what})")
    parts.append(f"at most {largest.peak_mb:.0f} MB ({largest.what})")
    return ", ".join(parts)


def main() -> int:
    args = get_args_parser().parse_args()
    import importlib

    import torch

    torch.set_num_threads(1)
    parts = [args.part]
    if args.part == "all":
        parts = list(PARTS)
    harmless = True
    for part in parts:
        begin = time.monotonic()
        module = importlib.import_module(f"attacks.{part}")
        outcomes = module.attack(getattr(args, part), args.seed, args.keep, args.only)
        harmless &= report(part, outcomes, time.monotonic() - begin, args)
        sys.stdout.flush()
    return int(not harmless)


if __name__ == "__main__":
    sys.exit(main())
