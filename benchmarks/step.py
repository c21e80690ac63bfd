"""Training step of the masked autoencoder: ours against transformers' ViTMAE and a MAE made of timm's blocks.

    python benchmarks/run.py step                                 ViT-B/16, batch 16 on a CPU, float32 and bf16
    python benchmarks/run.py step --device cuda --compile --grad_checkpointing \\
        --models mae_vit_base_patch16 mae_vit_large_patch16 mae_vit_huge_patch14     on a GPU, bf16
    python benchmarks/run.py step --variants mae rpl8 compiled timm                  only these

A step is forward, backward and fused AdamW, for all alike. FLOPs are the MAE's own (visible patches embedded, masked
ones predicted, no labels), so that work that another variant does beyond them lowers its MFU.

On a CPU variants are interleaved, round by round, as other work may run there; ratios are formed within a round. Our
runs keep freed memory (util/dist/allocator.py) and the peers' do what glibc does by default; --same_allocator lets them keep it
too. On a GPU (and with --one_by_one) a variant is built, measured and freed before the next one is built, so that large
models fit and peak memory is a variant's own; ratios are those of the medians. There a round is several steps without
a wait between them: the host runs ahead, as in training. Peers run with the TF32 setting of our training.
"""

import argparse
import itertools
import time
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.timing import (
    Record,
    choose_device,
    free_gpu_memory,
    freed_memory,
    interleaved,
    peak_memory,
    ratio,
    ratio_of_medians,
    shown,
    spread,
    table,
    unless_out_of_memory,
    wait_for,
)
from layers.transformer import patchify
from models_mae_pl import MODELS, MaskedAutoencoderViT, num_visible
from util.run.flops import matmul_rate
from util.train.amp import AMP, autocast
from util.train.optim import adamw, param_groups

MASK_RATIO = 0.75
OURS, COMPILED, HF, TIMM = (
    "ours, MAE",
    "ours, MAE, compiled",
    "transformers ViTMAE",
    "timm blocks, usual flow",
)
LABELS = {
    "mae": OURS,
    "apl": "ours, MAE + APL",
    "rpl8": "ours, MAE + RPL, 8 pairs",
    "rpl": "ours, MAE + RPL, all pairs",
    "compiled": COMPILED,
    "graphs": "ours, MAE, compiled, CUDA graphs",
    "compiled-apl": "ours, MAE + APL, compiled",
    "recomputed": "ours, MAE, --grad_checkpointing",
    "transformers": HF,
    "timm": TIMM,
}
MAE, APL = dict(pos_embed="sincos", pos_label="none"), dict(pos_embed="none", pos_label="apl")
RPL = dict(pos_embed="none", pos_label="rpl")
FLAGS = {
    "mae": MAE,
    "apl": APL,
    "rpl8": RPL | dict(rpl_pairs=8),
    "rpl": RPL,
    "compiled": MAE,
    "compiled-apl": APL,
    "graphs": MAE,
    "recomputed": MAE,
}
COMPILE_MODES = {
    "compiled": "default",
    "compiled-apl": "default",
    "graphs": "reduce-overhead",
}  # of torch.compile


def block_macs(tokens: int, width: int) -> int:
    """Multiply-adds of a transformer block with MLP ratio 4 for one image."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def training_flops(model: MaskedAutoencoderViT, mask_ratio: float = MASK_RATIO) -> int:
    """Matrix-product FLOPs of one image's training step: two per multiply-add, backward twice the forward."""
    L = model.patch_embed.num_patches
    n, width = num_visible(L, mask_ratio), model.decoder_embed.out_features
    pixels = model.decoder_pred.out_features
    macs = n * pixels * model.dim + len(model.blocks) * block_macs(1 + n, model.dim)
    macs += (
        (1 + n) * model.dim * width
        + len(model.decoder_blocks) * block_macs(1 + L, width)
        + (L - n) * width * pixels
    )
    return 6 * macs


class TimmMAE(nn.Module):
    """The usual flow on timm's blocks: embed all patches, drop some, decode in the grid's order, predict all.

    Parameters have our names, so that a test can give both the same weights.
    """

    def __init__(self, like: MaskedAutoencoderViT):
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block

        dim, heads = like.dim, like.blocks[0].attn.num_heads
        width, decoder_heads = like.decoder_embed.out_features, like.decoder_blocks[0].attn.num_heads
        self.patch_size = like.patch_size
        self.patch_embed = PatchEmbed(like.img_size, like.patch_size, like.in_chans, dim)
        self.cls_token = nn.Parameter(like.cls_token.detach().clone())
        self.pos_embed = nn.Parameter(like.pos_embed.detach().clone(), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in like.blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(like.mask_token.detach().clone())
        self.decoder_pos_embed = nn.Parameter(like.decoder_pos_embed.detach().clone(), requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(Block(width, decoder_heads, qkv_bias=True) for _ in like.decoder_blocks)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, like.decoder_pred.out_features)

    def forward(self, imgs):
        tokens = self.patch_embed(imgs) + self.pos_embed[:, 1:]  # (B, L, C), all of them
        B, L, C = tokens.shape
        n = num_visible(L, MASK_RATIO)
        shuffle = torch.rand(B, L, device=imgs.device).argsort(1)
        unshuffle = shuffle.argsort(1)
        tokens = tokens.gather(1, shuffle[:, :n, None].repeat(1, 1, C))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        latent = self.norm(self.blocks(torch.cat([cls, tokens], 1)))
        x = self.decoder_embed(latent)
        filled = torch.cat([x[:, 1:], self.mask_token.repeat(B, L - n, 1).to(x.dtype)], 1)
        filled = filled.gather(1, unshuffle[..., None].repeat(1, 1, x.shape[-1]))
        x = torch.cat([x[:, :1], filled], 1) + self.decoder_pos_embed
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]  # (B, L, P)
        target = patchify(imgs, self.patch_size)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        removed = (unshuffle >= n).float()
        return (((pred - target) ** 2).mean(-1) * removed).sum() / removed.sum()


def transformers_mae(like: MaskedAutoencoderViT):
    """transformers' model of the same sizes; its attention is what transformers chooses by default."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width = like.decoder_embed.out_features
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=like.img_size[0],
            patch_size=like.patch_size[0],
            hidden_size=like.dim,
            num_hidden_layers=len(like.blocks),
            num_attention_heads=like.blocks[0].attn.num_heads,
            intermediate_size=4 * like.dim,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=len(like.decoder_blocks),
            decoder_num_attention_heads=like.decoder_blocks[0].attn.num_heads,
            decoder_intermediate_size=4 * width,
            mask_ratio=MASK_RATIO,
            norm_pix_loss=True,
        )
    )
    return model.train()


class Step:
    """A round of training steps of a model. It remembers seconds of a step's parts, and the CPU time of all threads."""

    def __init__(self, model, loss_fn, images, amp, optimizer=None, steps=1):
        self.loss_fn, self.images, self.amp, self.steps = loss_fn, images, amp, steps
        self.optimizer = optimizer or adamw(param_groups(model, 0.05), 1e-4, betas=(0.9, 0.95))
        self.parts: list[tuple[float, float, float]] = []  # forward, backward, optimizer of each step
        self.cpu_seconds: list[float] = []  # per step, of each round

    def __call__(self):
        """A round: the host does not wait between its steps, and a GPU has finished them at its end."""
        used = time.process_time()
        for _ in range(self.steps):
            self.run()
        wait_for(self.images.device)
        self.cpu_seconds.append((time.process_time() - used) / self.steps)

    def run(self, wait=False):
        """One step. On a GPU its parts mean something only with `wait`, which lets the device finish each."""
        times = [time.perf_counter()]
        with autocast(self.images.device, self.amp):
            loss = self.loss_fn(self.images)
        times.append(self.now(wait))
        loss.backward()
        times.append(self.now(wait))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(self.now(wait))
        self.parts.append(tuple(b - a for a, b in itertools.pairwise(times)))

    def now(self, wait):
        if wait:
            wait_for(self.images.device)
        return time.perf_counter()

    def whole_seconds(self):
        """Of one step, all of it; of the first one of a compiled model that is compiling too."""
        begin = self.now(True)
        self.run(wait=True)
        return time.perf_counter() - begin


def our_loss(model):
    def loss(images):
        losses, _, _ = model(images, MASK_RATIO, want_pred=False)
        return losses["pixel"] + (0.5 * losses["position"] if "position" in losses else 0)

    return loss


def build(variant, name, images):
    """(model for such images, function of images that gives its loss). Weights are drawn on their device."""
    device = images.device
    with torch.device(device):
        ours = MODELS[name](img_size=tuple(images.shape[-2:]), norm_pix_loss=True, **FLAGS.get(variant, MAE))
        if variant == "transformers":
            hf = transformers_mae(ours).to(device)
            return hf, lambda images: hf(images).loss
        if variant == "timm":
            blocks = TimmMAE(ours).to(device)
            return blocks, blocks
    ours.to(device)
    if variant == "recomputed":
        ours.set_grad_checkpointing()
    if variant in COMPILE_MODES:
        return ours, our_loss(torch.compile(ours, mode=COMPILE_MODES[variant]))
    return ours, our_loss(ours)


def built(name, keys, images, steps):
    """{(variant, amp): Step}. Precisions of a variant share a model and its optimizer."""
    found, models = {}, {}
    for variant, amp in keys:
        if variant not in models:
            model, loss_fn = build(variant, name, images)
            models[variant] = model, loss_fn, adamw(param_groups(model, 0.05), 1e-4, betas=(0.9, 0.95))
        model, loss_fn, optimizer = models[variant]
        found[variant, amp] = Step(model, loss_fn, images, amp, optimizer, steps)
    return found


@dataclass(frozen=True)
class Plan:
    """How a model is measured: rounds of so many steps, `peaks` is the rate of products by precision."""

    rounds: int
    steps: int
    peaks: dict[str, float]
    same_allocator: bool


def measure(name, keys, images, flops, plan) -> dict:
    """{"rows": a row for each (variant, amp) in `keys`}: these are interleaved. See `unless_out_of_memory`."""
    cuda, batch = images.is_cuda, len(images)
    steps = built(name, keys, images, plan.steps)
    first = {key: step.whole_seconds() for key, step in steps.items() if key[0] in COMPILE_MODES}
    settle = freed_memory(
        lambda key: cuda or plan.same_allocator or key[0] in FLAGS,
        {key: step.run for key, step in steps.items()},
    )
    warmup = 3 if cuda and plan.steps < 3 else 1  # rounds
    seconds = interleaved(steps, plan.rounds, warmup=warmup, prepare=settle)
    rows = []
    for (variant, amp), step in steps.items():
        per_step = [t / plan.steps for t in seconds[variant, amp]]
        cpu_seconds = step.cpu_seconds[-plan.rounds :]
        if cuda:
            step.parts.clear()
            for _ in range(plan.rounds):
                step.run(wait=True)
        parts = zip(*step.parts[-plan.rounds * plan.steps :], strict=True)
        row = dict(
            model=name,
            variant=LABELS[variant],
            amp=amp,
            batch_size=batch,
            seconds=spread(per_step),
            round_seconds=per_step,
            cpu_seconds=spread(cpu_seconds),
            round_cpu_seconds=cpu_seconds,
            images_per_s=spread([batch / t for t in per_step]),
            mfu=spread([batch * flops / t / plan.peaks[amp] for t in per_step]),
            flops_per_image=flops,
        )
        row |= {k: spread(v) for k, v in zip(("forward", "backward", "optimizer"), parts, strict=True)}
        if (variant, amp) in first:
            row["compile_s"] = first[variant, amp]
        settle((variant, amp))
        if cuda:  # of all that this variant did, weights and moments included
            row["peak_allocated_mib"] = torch.cuda.max_memory_allocated() / 2**20
            row["peak_reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
        row["extra_mib"] = peak_memory(step.run, cuda)
        rows.append(row)
    return dict(rows=rows)


def does_not_compile(error: Exception) -> dict[str, str]:
    """What a row says instead of figures: the compiler's first line."""
    return dict(error=f"does not compile: {str(error).strip().splitlines()[0][:200]}")


def measured_or_error(name, keys, images, flops, plan) -> list[dict]:
    """The rows of `measure`; where that fails for memory or in the compiler, rows that say so."""
    if images.is_cuda:
        free_gpu_memory()
        torch.cuda.reset_peak_memory_stats()
    try:
        found = unless_out_of_memory(lambda: measure(name, keys, images, flops, plan))
    except torch._dynamo.exc.TorchDynamoException as e:  # no compiler on this machine, for example
        found = does_not_compile(e)
    if "rows" in found:
        return found["rows"]
    return [
        dict(model=name, variant=LABELS[variant], amp=amp, batch_size=len(images), **found)
        for variant, amp in keys
    ]


def add_ratios(rows: list[dict], within_rounds: bool) -> None:
    """Each row's speed against the peers' rows of the same model and precision, where these were measured."""
    form = ratio if within_rounds else ratio_of_medians
    good = {(r["model"], r["variant"], r["amp"]): r for r in rows if "error" not in r}
    for (model, _, amp), row in good.items():
        for peer, word in ((HF, "transformers"), (TIMM, "timm")):
            if other := good.get((model, peer, amp)):
                row[f"times_{word}"] = form(other["round_seconds"], row["round_seconds"])
                row[f"times_{word}_cpu"] = form(other["round_cpu_seconds"], row["round_cpu_seconds"])
        if other := good.get((model, HF, "fp32")):
            row["times_transformers_fp32"] = form(other["round_seconds"], row["round_seconds"])


def shown_row(row: dict) -> dict[str, object]:
    """A row of the printed table."""
    line = dict(model=row["model"], variant=row["variant"], amp=row["amp"])
    if "error" in row:
        line["s/step"] = row["error"]
        return line | dict.fromkeys(
            (
                "img/s",
                "MFU",
                "x transformers",
                "x timm",
                "x transformers (CPU)",
                "x timm (CPU)",
                "MiB beyond weights",
                "MiB allocated, reserved",
                "compile s",
            ),
            "",
        )
    line |= {
        "s/step": shown(row["seconds"], 4),
        "img/s": shown(row["images_per_s"], 1),
        "MFU": shown(row["mfu"]),
    }
    for word in ("transformers", "timm", "transformers_cpu", "timm_cpu"):
        line["x " + word.replace("_cpu", " (CPU)")] = shown(row.get(f"times_{word}"))
    memory, compiling = "", ""
    if "peak_allocated_mib" in row:
        memory = f"{row['peak_allocated_mib']:.0f}, {row['peak_reserved_mib']:.0f}"
    if "compile_s" in row:
        compiling = f"{row['compile_s']:.1f}"
    extra = f"{row['extra_mib']:.0f}"  # nan where the system does not tell
    return line | {"MiB beyond weights": extra, "MiB allocated, reserved": memory, "compile s": compiling}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py step", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["mae_vit_base_patch16"],
        choices=MODELS,
        metavar="MODEL",
        help="names in models_mae_pl.MODELS",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, help="16 on a CPU, 256 on a GPU")
    parser.add_argument(
        "--amp", nargs="+", choices=["fp32", "bf16", "fp16"], help="fp32 and bf16 on a CPU, bf16 on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of a round: 1 on a CPU, 5 on a GPU")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=LABELS,
        metavar="NAME",
        default=["mae", "apl", "transformers", "timm"],
        help=f"some of {', '.join(LABELS)}, measured in this order (default: %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="also `compiled`: ours under torch.compile")
    parser.add_argument(
        "--grad_checkpointing", action="store_true", help="also `recomputed`: blocks recomputed in backward"
    )
    parser.add_argument("--one_by_one", action="store_true", help="on a CPU too one variant after the other")
    parser.add_argument(
        "--same_allocator", action="store_true", help="on a CPU the peers keep freed memory too"
    )
    return parser


def main(argv, record: Record | None = None) -> dict:
    args, record = get_parser().parse_args(argv), record or Record()
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    one_by_one = cuda or args.one_by_one
    asked = {"compiled": args.compile, "recomputed": args.grad_checkpointing}
    variants = list(dict.fromkeys([*args.variants, *(name for name, wanted in asked.items() if wanted)]))
    torch.manual_seed(0)
    amps = args.amp or (["bf16"] if cuda else ["fp32", "bf16"])
    peaks = {amp: matmul_rate(device, AMP[amp] or torch.float32) for amp in amps}
    record.set("matmul_peak", peaks)
    print(
        "large F.linear: " + ", ".join(f"{amp} {p / 1e12:.3g} TFLOP/s" for amp, p in peaks.items()),
        flush=True,
    )
    plan = Plan(args.rounds, args.steps or (5 if cuda else 1), peaks, args.same_allocator)
    for name in args.models:
        with torch.device("meta"):
            like = MODELS[name](**MAE)
        images = torch.randn(args.batch_size or (256 if cuda else 16), 3, *like.img_size, device=device)
        keys = [(variant, amp) for variant in variants for amp in amps]
        for group in [[key] for key in keys] if one_by_one else [keys]:
            for row in measured_or_error(name, group, images, training_flops(like), plan):
                record.add("rows", row)
                if one_by_one:
                    print(" | ".join(str(v) for v in shown_row(row).values() if v != ""), flush=True)
    rows = record.results["rows"]
    add_ratios(rows, within_rounds=not one_by_one)
    record.write()
    print(
        f"{args.rounds} rounds of {plan.steps}, batch {rows[0]['batch_size']}, median [min..max]; CPU time is of all threads"
    )
    print(table([shown_row(r) for r in rows]))
    return record.results
