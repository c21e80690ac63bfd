"""Simulated scaling: images/s, data cores, network bytes and hours on many GPUs, from the figures of one.

    python benchmarks/run.py scaling --step_json step.json     a record of `run.py step --json step.json`
    python benchmarks/run.py scaling --images_per_s 6000 --batch_size 256 --optimizer_ms 1

Backward is simulated layer by layer. The all-reduce of a bucket (DDP) or the reduce-scatter of a block (FSDP)
starts when its gradients are ready and the network is free; FSDP also gathers one block ahead. Nodes have 8
GPUs. A collective uses the links within the node, then one network card per GPU. README.md lists what the
simulation leaves out.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.step import MASK_RATIO, OURS, block_macs
from benchmarks.timing import Record, table
from models_mae_pl import MODELS, num_visible

# Training images of ImageNet-1K.
IMAGENET = 1_281_167
GPUS_PER_NODE = 8
# DDP's own sizes in bytes; its first bucket is small, so that communication starts early.
BUCKET = 25 * 2**20
FIRST_BUCKET = 2**20


@dataclass(frozen=True)
class Network:
    """Rates of one GPU in bytes per second and direction, and the latency of a hop in seconds.

    Attributes:
        node: rate within the node.
        card: rate through the GPU's network card.
        latency: seconds of a hop.
    """

    node: float
    card: float
    latency: float

    def half(self, size: float, gpus: int) -> float:
        """Seconds of a reduce-scatter or an all-gather of `size` bytes over all GPUs.

        An all-reduce takes twice as long.
        """
        if gpus == 1:
            return 0.0
        local = min(gpus, GPUS_PER_NODE)
        nodes = gpus / local
        # Each GPU of a node then exchanges its share with the same GPU of the other nodes.
        seconds = (local - 1) / local * size / self.node + (nodes - 1) / nodes * size / local / self.card
        return seconds + self.latency * math.ceil(math.log2(gpus))


@dataclass(frozen=True)
class Unit:
    """A layer: bytes of its parameters (and of their gradients), and its share of the model's FLOPs."""

    size: float
    share: float


@dataclass(frozen=True)
class Micro:
    """A micro-step on one GPU: seconds of forward and backward, and how many an update has."""

    forward: float
    backward: float
    steps: int = 1


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a layer's parameters in float32, which DDP and FSDP exchange here."""
    return 4 * sum(p.numel() for p in module.parameters())


def units(name: str) -> list[Unit]:
    """Layers of an MAE in the order of the forward pass: embedding, encoder blocks, the decoder."""
    # On the meta device a model costs neither memory nor time.
    with torch.device("meta"):
        model = MODELS[name](pos_embed="sincos", pos_label="none")
    L = model.patch_embed.num_patches
    n = num_visible(L, MASK_RATIO)
    width = model.decoder_embed.out_features
    values = model.decoder_pred.out_features
    # (bytes, multiply-adds) of each layer, as in `step.training_flops`.
    pairs = [(parameter_bytes(model.patch_embed), n * values * model.dim)]
    pairs += [(parameter_bytes(block), block_macs(1 + n, model.dim)) for block in model.blocks]
    pairs += [(parameter_bytes(model.decoder_embed), (1 + n) * model.dim * width)]
    pairs += [(parameter_bytes(block), block_macs(1 + L, width)) for block in model.decoder_blocks]
    pairs += [(parameter_bytes(model.decoder_pred), (L - n) * width * values)]
    total = sum(macs for _, macs in pairs)
    return [Unit(size, macs / total) for size, macs in pairs]


def ddp_seconds(layers: list[Unit], micro: Micro, optimizer: float, network: Network, gpus: int) -> float:
    """Seconds of an update with DDP.

    All-reduces overlap with the backward pass of the last micro-step. The optimizer follows them.
    """
    # When computing has finished so far, and when the network is free.
    now = micro.steps * micro.forward + (micro.steps - 1) * micro.backward
    free = now
    pending = 0.0
    cap = FIRST_BUCKET
    # Gradients become ready from the last layer to the first, and fill buckets in this order.
    for i, layer in reversed(list(enumerate(layers))):
        now += micro.backward * layer.share
        pending += layer.size
        # A full bucket is sent, and at the end the rest.
        if pending >= cap or i == 0:
            free = max(now, free) + 2 * network.half(pending, gpus)
            pending = 0.0
            cap = BUCKET
    return max(now, free) + optimizer


def fsdp_seconds(layers: list[Unit], micro: Micro, optimizer: float, network: Network, gpus: int) -> float:
    """Seconds of an update with FSDP.

    Each micro-step gathers all blocks twice. The last one also scatters gradients. The GPUs share the
    optimizer's work.
    """
    # When computing has finished so far, and when the network is free.
    now = 0.0
    free = 0.0
    for step in range(micro.steps):
        # The gather of a layer is issued when the layer before it starts to compute.
        issued = now
        for layer in layers:
            free = max(free, issued) + network.half(layer.size, gpus)
            issued = max(now, free)
            now = issued + micro.forward * layer.share
        # Backward, in the opposite order.
        issued = now
        scatter = 0.0
        for layer in reversed(layers):
            free = max(free, issued) + network.half(layer.size, gpus)
            issued = max(now, free)
            if scatter:
                # Of the previous layer; the gather of this one was issued before.
                free = max(free, now) + scatter
            now = issued + micro.backward * layer.share
            if step == micro.steps - 1:
                scatter = network.half(layer.size, gpus)
        free = max(free, now) + scatter
    return max(now, free) + optimizer / gpus


SECONDS = {"ddp": ddp_seconds, "fsdp": fsdp_seconds}


def sent_bytes(size: float, gpus: int, strategy: str, micro_steps: int = 1) -> float:
    """Bytes that each GPU sends per update, for `size` bytes of parameters."""
    # An all-reduce of the gradients is two halves. FSDP gathers twice per micro-step and scatters once.
    halves = 2
    if strategy == "fsdp":
        halves = 2 * micro_steps + 1
    return (gpus - 1) / gpus * size * halves


def plan(batch: int, global_batch: int, gpus: int) -> tuple[int, float]:
    """(micro-steps, images of one on a GPU) that make up the global batch without exceeding `batch`."""
    micro_steps = math.ceil(global_batch / (gpus * batch))
    return micro_steps, global_batch / (gpus * micro_steps)


@dataclass(frozen=True)
class Measured:
    """Figures of one GPU.

    Attributes:
        per_image: seconds of forward and backward for one image.
        batch: images at which this was measured, and the most of a micro-step.
        optimizer: seconds of the optimizer in an update.
        forward_share: share of the forward pass in `per_image`.
    """

    per_image: float
    batch: int
    optimizer: float
    forward_share: float


@dataclass(frozen=True)
class Cluster:
    """The network, the images of an update, and the images per second that a CPU core decodes."""

    network: Network
    global_batch: int
    images_per_core: float


def simulate(name: str, measured: Measured, cluster: Cluster, gpus: int, strategy: str) -> dict:
    """One row of the table: a model on so many GPUs with DDP or FSDP."""
    layers = units(name)
    micro_steps, images = plan(measured.batch, cluster.global_batch, gpus)
    compute = images * measured.per_image
    forward = compute * measured.forward_share
    micro = Micro(forward, compute * (1 - measured.forward_share), micro_steps)
    # Seconds of an update.
    seconds = SECONDS[strategy](layers, micro, measured.optimizer, cluster.network, gpus)
    rate = cluster.global_batch / seconds
    # Of one epoch.
    hours = IMAGENET / rate / 3600
    # The same update on one GPU.
    alone_steps, alone_images = plan(measured.batch, cluster.global_batch, 1)
    alone = alone_steps * alone_images * measured.per_image + measured.optimizer
    return dict(
        gpus=gpus,
        strategy=strategy,
        images_per_gpu=images,
        micro_steps=micro_steps,
        images_per_s=rate,
        efficiency=alone / gpus / seconds,
        data_cores=rate / cluster.images_per_core,
        sent_gb=sent_bytes(sum(layer.size for layer in layers), gpus, strategy, micro_steps) / 1e9,
        hours_400=400 * hours,
        hours_1600=1600 * hours,
    )


def read_measured(path: str, name: str, amp: str) -> Measured:
    """Figures of a model from a record of `run.py step`. Exits if the file does not have them."""
    rows = json.loads(Path(path).read_text())["results"]["rows"]
    wanted = (name, OURS, amp)
    rows = [r for r in rows if (r["model"], r["variant"], r["amp"]) == wanted and "error" not in r]
    if not rows:
        raise SystemExit(f"{path} has no {OURS!r} of {name} in {amp}: choose --model and --amp")
    row = rows[0]
    forward = row["forward"]["median"]
    backward = row["backward"]["median"]
    optimizer = row["optimizer"]["median"]
    # The parts were timed with waits between them, and add up to more than the step. Only their
    # proportion is used.
    compute = row["seconds"]["median"] - optimizer
    return Measured(
        per_image=compute / row["batch_size"],
        batch=row["batch_size"],
        optimizer=optimizer,
        forward_share=forward / (forward + backward),
    )


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = argparse.ArgumentParser(prog="run.py scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mae_vit_base_patch16", choices=MODELS, metavar="MODEL")
    parser.add_argument("--step_json", help="record of `run.py step`; or:")
    parser.add_argument("--amp", default="bf16", help="of the row in --step_json")
    parser.add_argument("--images_per_s", type=float, help="of one GPU, forward and backward")
    parser.add_argument(
        "--batch_size", type=int, default=256, help="of that rate, and the most of a micro-step"
    )
    parser.add_argument("--optimizer_ms", type=float, default=1.0)
    parser.add_argument("--global_batch", type=int, default=4096, help="of an update, on any number of GPUs")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument(
        "--node_gb_s", type=float, default=360, help="GB/s of a GPU within its node (NVLink 4: 80%% of 450)"
    )
    parser.add_argument(
        "--card_gb_s", type=float, default=40, help="GB/s of its network card (400 Gbit/s: 80%% of 50)"
    )
    parser.add_argument("--latency_us", type=float, default=10, help="per hop of a collective's tree")
    parser.add_argument(
        "--images_per_core", type=float, default=900, help="that a CPU core decodes: `run.py data`"
    )
    return parser


def shown_row(row: dict) -> dict[str, object]:
    """A row of the printed table."""
    return {
        "GPUs": row["gpus"],
        "strategy": row["strategy"],
        "micro-steps x images": f"{row['micro_steps']} x {row['images_per_gpu']:g}",
        "img/s": round(row["images_per_s"]),
        "efficiency": f"{row['efficiency']:.0%}",
        "data cores": round(row["data_cores"]),
        "GB sent per GPU and update": f"{row['sent_gb']:.2f}",
        "hours, 400 epochs": f"{row['hours_400']:.1f}",
        "hours, 1600 epochs": f"{row['hours_1600']:.1f}",
    }


def main(argv: list[str], record: Record | None = None) -> dict:
    """Simulate and print a model on all numbers of GPUs with DDP and FSDP. Returns the figures."""
    parser = get_parser()
    args = parser.parse_args(argv)
    record = record or Record()
    if args.step_json:
        measured = read_measured(args.step_json, args.model, args.amp)
    elif args.images_per_s:
        # Backward has twice the FLOPs of forward.
        measured = Measured(1 / args.images_per_s, args.batch_size, args.optimizer_ms / 1e3, 1 / 3)
    else:
        parser.error("give --step_json, or --images_per_s of one GPU")
    wrong = [n for n in args.gpus if n > GPUS_PER_NODE and n % GPUS_PER_NODE]
    if wrong:
        parser.error(f"nodes have {GPUS_PER_NODE} GPUs: --gpus {wrong[0]} does not fill them")
    network = Network(args.node_gb_s * 1e9, args.card_gb_s * 1e9, args.latency_us * 1e-6)
    cluster = Cluster(network, args.global_batch, args.images_per_core)
    rows = [simulate(args.model, measured, cluster, n, strategy) for n in args.gpus for strategy in SECONDS]
    print(
        f"{args.model}: {1 / measured.per_image:.0f} img/s on one GPU, "
        f"optimizer {1e3 * measured.optimizer:.2f} ms, batch {args.global_batch}"
    )
    print(table([shown_row(row) for row in rows]))
    record.results |= dict(
        rows=rows, per_image=measured.per_image, optimizer=measured.optimizer, network=vars(network)
    )
    record.write()
    return record.results
