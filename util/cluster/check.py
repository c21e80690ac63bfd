"""Check a cluster before a long run.

srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 \\
    python -m util.cluster.check --output_dir DIR --data_path DIR
"""

import argparse
import os
import socket
import statistics
import sys
import time

from util.files.names import printable
from util.flags.groups import device_name, is_remote_path
from util.flags.numbers import MINUTES
from util.flags.parser import Parser, answer_at_once, parse, run


def get_args_parser() -> Parser:
    """Make the parser of the check's flags."""
    p = Parser(
        description="Check that the ranks of a cluster reach each other, the output folder and the data",
        add_help=False,
    )
    p.add_argument("--output_dir", default=".", help="a folder that all nodes must share")
    p.add_argument(
        "--data_path", default="", help="images that all nodes must read; the demo set if not given"
    )
    p.add_argument("--device", default="auto", type=device_name, help="auto, cuda or cpu")
    p.add_argument(
        "--dist_backend", default=None, help="backend of torch.distributed; nccl on GPUs, gloo elsewhere"
    )
    # Shorter than in training: a check should fail soon.
    p.add_argument("--dist_timeout", default=2, type=MINUTES, help="minutes that a rank waits for the others")
    return p


answer_at_once(__name__, get_args_parser())

import torch

from util import dist

LARGE = 2**24  # float32 numbers: 64 MiB, more than a gradient bucket of DDP (25 MiB)


def main(flags: argparse.Namespace) -> int:
    """Print the speed of an all-reduce and a line per rank.

    Returns exit code 2 if a rank cannot read the data, else 0.
    """
    device = dist.init(flags.device, flags.dist_backend, flags.dist_timeout)
    dist.check_folder(flags.output_dir)
    n = dist.world_size()
    dist.print_rank0(f"{printable(os.path.abspath(flags.output_dir))} is shared by all {n} ranks")
    latency = time_all_reduce(1, device)
    seconds = time_all_reduce(LARGE, device)
    # In a ring each rank sends and receives 2 (n - 1) / n of the data.
    bandwidth = 2 * (n - 1) / n * 4 * LARGE / seconds
    dist.print_rank0(
        f"all-reduce over {n} ranks: {1e6 * latency:.0f} us for 4 bytes, {1e3 * seconds:.1f} ms for 64 MiB "
        f"({bandwidth / 1e9:.2f} GB/s of bus bandwidth)"
    )
    # Gathered, because lines that all ranks print at once get mixed up.
    reading = printable(time_reading(flags.data_path))
    line = f"rank {dist.rank()}: {socket.gethostname()}, {device}, {reading}"
    lines = dist.gather_objects(line)
    dist.print_rank0("\n".join(lines))
    dist.shutdown()
    if any("ERROR" in line for line in lines):
        return 2
    return 0


def time_all_reduce(numbers: int, device: torch.device, repeats: int = 5) -> float:
    """Return the median number of seconds that an all-reduce of that many float32 numbers takes."""
    x = torch.zeros(numbers, device=device)
    seconds = []
    for _ in range(1 + repeats):
        dist.barrier()
        start = time.perf_counter()
        # Reading a number waits for the device.
        dist.sum_over_ranks(x).sum().item()
        seconds.append(time.perf_counter() - start)
    # The first one sets up the connections.
    return statistics.median(seconds[1:])


def time_reading(data_path: str, images: int = 16) -> str:
    """Describe how fast this rank reads images. The text starts with ERROR if it cannot."""
    from util.data.datasets import build_dataset
    from util.data.loading.loader import some_samples
    from util.data.transforms import eval_transform

    # The run downloads them once, and not this check.
    if is_remote_path(data_path):
        return f"{data_path}: not read before the run"
    try:
        data = build_dataset(data_path, "train", eval_transform((224, 224)), labels=False)
        start = time.perf_counter()
        read = len(some_samples(data, images))
        milliseconds = 1e3 * (time.perf_counter() - start) / read
    except (ValueError, OSError) as error:
        # The other ranks must not wait for this one in vain.
        return f"ERROR {error}"
    return f"{data.summary()}: {milliseconds:.1f} ms an image"


if __name__ == "__main__":
    sys.exit(run(main, parse(get_args_parser())))
