"""Scaling on paper: img/s, data cores, network bytes and hours on many GPUs, simulated from figures of one.

    python benchmarks/run.py scaling --step_json step.json       what `run.py step --json step.json` measured on one GPU
    python benchmarks/run.py scaling --images_per_s 6000 --batch_size 256 --optimizer_ms 1

Backward is walked layer by layer: a bucket's all-reduce (DDP) or a block's reduce-scatter (FSDP) starts when its
gradients are there and the network is free; FSDP also gathers one block ahead. Nodes have 8 GPUs; a collective goes
through the node's links, then through one network card per GPU. What it leaves out is said in README.md.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.step import OURS, block_macs
from benchmarks.timing import Record, table
from models_mae_pl import MODELS, num_visible

IMAGENET, GPUS_PER_NODE = 1_281_167, 8
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # DDP's own


@dataclass(frozen=True)
class Network:
    """Bytes per second and direction that one GPU gets, within its node and through its network card; seconds per hop."""

    node: float
    card: float
    latency: float

    def half(self, size: float, gpus: int) -> float:
        """Seconds of a reduce-scatter or an all-gather of `size` bytes over all GPUs; an all-reduce is two of them."""
        if gpus == 1:
            return 0.0
        local = min(gpus, GPUS_PER_NODE)
        nodes = gpus / local
        seconds = (local - 1) / local * size / self.node + (nodes - 1) / nodes * size / local / self.card
        return seconds + self.latency * math.ceil(math.log2(gpus))


@dataclass(frozen=True)
class Unit:
    """A layer: bytes of its parameters (and of their gradients), and its share of the model's FLOPs."""

    size: float
    share: float


def units(name: str) -> list[Unit]:
    """Embedding, encoder blocks, then the decoder's; float32 parameters, as DDP and FSDP move them here."""
    with torch.device("meta"):
        model = MODELS[name](pos_embed="sincos", pos_label="none")
    L, width = model.patch_embed.num_patches, model.decoder_embed.out_features
    n, pixels = num_visible(L, 0.75), model.decoder_pred.out_features

    def size(module):
        return 4 * sum(p.numel() for p in module.parameters())

    pairs = [(size(model.patch_embed), n * pixels * model.dim)]
    pairs += [(size(b), block_macs(1 + n, model.dim)) for b in model.blocks]
    pairs += [(size(model.decoder_embed), (1 + n) * model.dim * width)]
    pairs += [(size(b), block_macs(1 + L, width)) for b in model.decoder_blocks]
    pairs += [(size(model.decoder_pred), (L - n) * width * pixels)]
    total = sum(macs for _, macs in pairs)
    return [Unit(s, macs / total) for s, macs in pairs]


def ddp_seconds(layers, forward, backward, optimizer, network, gpus, micro_steps=1) -> float:
    """An update: all micro-steps, the all-reduces of the last one's buckets behind its backward, then the optimizer."""
    now = micro_steps * forward + (micro_steps - 1) * backward
    free, pending, cap = now, 0.0, FIRST_BUCKET
    for i, layer in reversed(list(enumerate(layers))):
        now += backward * layer.share
        pending += layer.size
        if pending >= cap or i == 0:
            free = max(now, free) + 2 * network.half(pending, gpus)
            pending, cap = 0.0, BUCKET
    return max(now, free) + optimizer


def fsdp_seconds(layers, forward, backward, optimizer, network, gpus, micro_steps=1) -> float:
    """An update: in each micro-step blocks are gathered twice, in the last one gradients scattered; the optimizer is split."""
    now = free = 0.0  # when computing is done so far, and when the network is free
    for micro in range(micro_steps):
        issued = now  # the gather of a layer is issued when the one before it starts to compute
        for layer in layers:
            free = max(free, issued) + network.half(layer.size, gpus)
            issued = max(now, free)
            now = issued + forward * layer.share
        issued, scatter = now, 0.0
        for layer in reversed(layers):
            free = max(free, issued) + network.half(layer.size, gpus)
            issued = max(now, free)
            if scatter:  # of the layer before, behind the gather that was already issued
                free = max(free, now) + scatter
            now = issued + backward * layer.share
            scatter = network.half(layer.size, gpus) if micro == micro_steps - 1 else 0.0
        free = max(free, now) + scatter
    return max(now, free) + optimizer / gpus


def sent_bytes(size: float, gpus: int, strategy: str, micro_steps: int = 1) -> float:
    """Bytes that each GPU sends per update: an all-reduce of the gradients, or two gathers per micro-step and a scatter."""
    return (gpus - 1) / gpus * size * (2 if strategy == "ddp" else 2 * micro_steps + 1)


def plan(batch: int, global_batch: int, gpus: int) -> tuple[int, float]:
    """(micro-steps, images of one on a GPU) that make up the global batch without exceeding `batch`."""
    micro_steps = math.ceil(global_batch / (gpus * batch))
    return micro_steps, global_batch / (gpus * micro_steps)


def simulate(
    name, per_image, forward_share, batch, optimizer, network, gpus, strategy, global_batch, per_core
) -> dict:
    """One row of the table; `per_image` seconds of forward and backward, `optimizer` seconds of a whole update."""
    layers = units(name)
    micro_steps, images = plan(batch, global_batch, gpus)
    compute = images * per_image
    run = ddp_seconds if strategy == "ddp" else fsdp_seconds
    seconds = run(
        layers, compute * forward_share, compute * (1 - forward_share), optimizer, network, gpus, micro_steps
    )
    rate = global_batch / seconds
    hours = IMAGENET / rate / 3600
    alone = plan(batch, global_batch, 1)[0] * plan(batch, global_batch, 1)[1] * per_image + optimizer
    return dict(
        gpus=gpus,
        strategy=strategy,
        images_per_gpu=images,
        micro_steps=micro_steps,
        images_per_s=rate,
        efficiency=alone / gpus / seconds,
        data_cores=rate / per_core,
        sent_gb=sent_bytes(sum(u.size for u in layers), gpus, strategy, micro_steps) / 1e9,
        hours_400=400 * hours,
        hours_1600=1600 * hours,
    )


def measured(path: str, name: str, amp: str) -> tuple[float, int, float, float]:
    """(seconds of forward and backward per image, batch, optimizer seconds, forward's share) from step.py's JSON."""
    rows = json.loads(Path(path).read_text())["results"]["rows"]
    rows = [r for r in rows if (r["model"], r["variant"], r["amp"]) == (name, OURS, amp) and "error" not in r]
    if not rows:
        raise SystemExit(f"{path} has no {OURS!r} of {name} in {amp}: choose --model and --amp")
    row = rows[0]
    forward, backward, optimizer = (row[k]["median"] for k in ("forward", "backward", "optimizer"))
    whole = row["seconds"]["median"] - optimizer
    return whole / row["batch_size"], row["batch_size"], optimizer, forward / (forward + backward)


def main(argv, record: Record | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="run.py scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mae_vit_base_patch16", choices=MODELS, metavar="MODEL")
    parser.add_argument("--step_json", help="what step.py measured; or:")
    parser.add_argument("--amp", default="bf16", help="of the row in --step_json")
    parser.add_argument("--images_per_s", type=float, help="of one GPU, forward and backward")
    parser.add_argument(
        "--batch_size", type=int, default=256, help="at which that holds, and the most of a micro-step"
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
    args = parser.parse_args(argv)
    if args.step_json:
        per_image, batch, optimizer, share = measured(args.step_json, args.model, args.amp)
    elif args.images_per_s:
        per_image, batch, optimizer, share = (
            1 / args.images_per_s,
            args.batch_size,
            args.optimizer_ms / 1e3,
            1 / 3,
        )
    else:
        parser.error("give --step_json, or --images_per_s of one GPU")
    wrong = [n for n in args.gpus if n > GPUS_PER_NODE and n % GPUS_PER_NODE]
    if wrong:
        parser.error(f"nodes have {GPUS_PER_NODE} GPUs: --gpus {wrong[0]} does not fill them")
    network = Network(args.node_gb_s * 1e9, args.card_gb_s * 1e9, args.latency_us * 1e-6)
    rows = [
        simulate(
            args.model,
            per_image,
            share,
            batch,
            optimizer,
            network,
            n,
            strategy,
            args.global_batch,
            args.images_per_core,
        )
        for n in args.gpus
        for strategy in ("ddp", "fsdp")
    ]
    print(
        f"{args.model}: {1 / per_image:.0f} img/s on one GPU, optimizer {1e3 * optimizer:.2f} ms, batch {args.global_batch}"
    )
    print(
        table(
            [
                {
                    "GPUs": r["gpus"],
                    "strategy": r["strategy"],
                    "micro-steps x images": f"{r['micro_steps']} x {r['images_per_gpu']:g}",
                    "img/s": round(r["images_per_s"]),
                    "efficiency": f"{r['efficiency']:.0%}",
                    "data cores": round(r["data_cores"]),
                    "GB sent per GPU and update": f"{r['sent_gb']:.2f}",
                    "hours, 400 epochs": f"{r['hours_400']:.1f}",
                    "hours, 1600 epochs": f"{r['hours_1600']:.1f}",
                }
                for r in rows
            ]
        )
    )
    record = record or Record()
    record.results |= dict(rows=rows, per_image=per_image, optimizer=optimizer, network=vars(network))
    record.write()
    return record.results
