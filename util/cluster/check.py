"""Check a cluster before a long run.

srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python -m util.cluster.check --output_dir DIR --data_path DIR
"""

import os
import socket
import statistics
import sys
import time

import torch

from util import dist
from util.flags.parser import Parser, parse, run


def get_args_parser() -> Parser:
    p = Parser(
        description="Do the ranks of this cluster reach each other, the run's folder and the data?",
        add_help=False,
    )
    p.add_argument("--output_dir", default=".", help="a folder that all nodes must share")
    p.add_argument("--data_path", default="", help="images that all nodes must read; the demo set if empty")
    p.add_argument("--device", default="cuda", help="cuda or cpu")
    p.add_argument("--dist_backend", default=None, help="nccl on GPUs, gloo elsewhere")
    p.add_argument("--dist_timeout", default=2, type=float, help="minutes that a rank waits for the others")
    return p


def main(args) -> int:
    """Print a line per rank and the speed of an all-reduce of 64 MiB; 2 if some rank cannot read the data."""
    device = dist.init(args.device, args.dist_backend, args.dist_timeout)
    dist.make_shared_folder(args.output_dir)
    dist.print_rank0(f"{os.path.abspath(args.output_dir)} is shared by all {dist.world_size()} ranks")
    small, large = time_all_reduce(1, device), time_all_reduce(2**24, device)
    n = dist.world_size()
    dist.print_rank0(
        f"all-reduce over {n} ranks: {1e6 * small:.0f} us for 4 bytes, {1e3 * large:.1f} ms for 64 MiB "
        f"({2 * (n - 1) / n * 2**26 / large / 1e9:.2f} GB/s of bus bandwidth)"
    )
    lines = dist.gather_objects(
        f"rank {dist.rank()}: {socket.gethostname()}, {device}, {read_some(args.data_path)}"
    )
    dist.print_rank0("\n".join(lines))
    dist.shutdown()
    return 2 if any("ERROR" in line for line in lines) else 0


def time_all_reduce(numbers: int, device: torch.device, repeats: int = 5) -> float:
    """Median seconds of an all-reduce of that many float32 numbers."""
    x, seconds = torch.zeros(numbers, device=device), []
    for _ in range(1 + repeats):
        dist.barrier()
        before = time.perf_counter()
        dist.sum_over_ranks(x).sum().item()  # reading a number waits for the device
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds[1:])


def read_some(data_path: str, images: int = 16) -> str:
    """How fast this rank reads images, in words; the words start with ERROR if it cannot."""
    from util.data.datasets import build_dataset
    from util.data.loading.loader import some_samples
    from util.data.transforms import eval_transform

    try:
        data = build_dataset(data_path, "train", eval_transform((224, 224)), labels=False)
        before = time.perf_counter()
        images = len(some_samples(data, images))
        return f"{data.summary()}: {1e3 * (time.perf_counter() - before) / images:.1f} ms an image"
    except (ValueError, OSError) as e:
        return f"ERROR {e}"


if __name__ == "__main__":
    sys.exit(run(main, parse(get_args_parser())))
