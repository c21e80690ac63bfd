"""Training step of the masked autoencoder: ours against transformers' ViTMAE and an MAE of timm's blocks.

    python benchmarks/run.py step                                ViT-B/16, batch 16 on a CPU, float32 and bf16
    python benchmarks/run.py step --device cuda --compile --grad_checkpointing \\
        --models mae_vit_base_patch16 mae_vit_large_patch16 mae_vit_huge_patch14    on a GPU, bf16
    python benchmarks/run.py step --variants mae rpl8 compiled timm                 only these

A step is forward, backward and fused AdamW, for all variants. FLOPs are those of the plain MAE: visible
patches are embedded, masked ones predicted, without labels. So work that another variant does beyond them
lowers its MFU.

On a CPU, which other processes may use too, variants are interleaved round by round, and ratios are formed
within a round. Our runs keep freed memory (util/dist/allocator.py); the peers have glibc's default, or with
--same_allocator the same as ours. On a GPU (and with --one_by_one) a variant is built, measured and freed
before the next one is built. So large models fit, peak memory is a variant's own, and ratios are those of the
medians. There a round is several steps without a wait between them: the host runs ahead, as in training.
Peers run with the TF32 setting of our training.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import (
    MIB,
    Record,
    choose_device,
    default_amps,
    default_device,
    free_gpu_memory,
    freed_memory,
    groups,
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
# Names of variants in tables and records.
OURS = "ours, MAE"
COMPILED = "ours, MAE, compiled"
HF = "transformers ViTMAE"
TIMM = "timm blocks, usual flow"
# Names of variants on the command line -> in tables and records.
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
# Keywords of our models.
MAE: dict[str, Any] = dict(pos_embed="sincos", pos_label="none")
APL: dict[str, Any] = dict(pos_embed="none", pos_label="apl")
RPL: dict[str, Any] = dict(pos_embed="none", pos_label="rpl")
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
# Modes of torch.compile. "reduce-overhead" uses CUDA graphs.
COMPILE_MODES = {
    "compiled": "default",
    "compiled-apl": "default",
    "graphs": "reduce-overhead",
}
# AdamW of MAE's pretraining. The learning rate does not change the cost of a step.
WEIGHT_DECAY = 0.05
LEARNING_RATE = 1e-4
BETAS = (0.9, 0.95)


def block_macs(tokens: int, width: int) -> int:
    """Multiply-adds of a transformer block with MLP ratio 4 for one image."""
    # Linear layers: 4 width^2 in attention and 8 in the MLP. Attention: tokens^2 x width for scores
    # and for values.
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def training_flops(model: MaskedAutoencoderViT, mask_ratio: float = MASK_RATIO) -> int:
    """Matrix-product FLOPs of one image's training step: two per multiply-add, backward twice the forward."""
    # Multiply-adds of the forward pass.
    L = model.patch_embed.num_patches
    n = num_visible(L, mask_ratio)
    width = model.decoder_embed.out_features
    values = model.decoder_pred.out_features
    # Encoder: the visible patches and the class token.
    macs = n * values * model.dim + len(model.blocks) * block_macs(1 + n, model.dim)
    # Decoder: all patches in the blocks, but the last layer predicts the masked ones only.
    macs += (1 + n) * model.dim * width
    macs += len(model.decoder_blocks) * block_macs(1 + L, width)
    macs += (L - n) * width * values
    return 6 * macs


class TimmMAE(nn.Module):
    """An MAE with the usual flow on timm's blocks: embed all patches, drop some, decode, predict all.

    It has the sizes of `like`, and our names of parameters, so that a test can give both the same weights.
    """

    def __init__(self, like: MaskedAutoencoderViT):
        super().__init__()
        if like.pos_embed is None:
            raise ValueError("`like` needs a positional embedding")
        # timm takes seconds to import, and most calls of this benchmark do not need it.
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block

        dim = like.dim
        heads = like.trunk.num_heads
        width = like.decoder_embed.out_features
        decoder_heads = like.decoder.num_heads
        self.patch_size = like.patch_size
        # timm annotates the patch size as a number, and takes a pair.
        patch_size: Any = like.patch_size
        self.patch_embed = PatchEmbed(like.img_size, patch_size, like.in_chans, dim)
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

    def forward(self, imgs: Tensor) -> Tensor:
        """Images (B, c, H, W) -> the pixel loss, a scalar."""
        tokens = self.patch_embed(imgs) + self.pos_embed[:, 1:]  # (B, L, C)
        B, L, C = tokens.shape
        n = num_visible(L, MASK_RATIO)
        shuffle = torch.rand(B, L, device=imgs.device).argsort(1)
        unshuffle = shuffle.argsort(1)
        tokens = tokens.gather(1, shuffle[:, :n, None].repeat(1, 1, C))  # (B, n, C)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        latent = self.norm(self.blocks(torch.cat([cls, tokens], 1)))  # (B, 1+n, C)
        x = self.decoder_embed(latent)
        # Mask tokens fill up the sequence, which is then put in the order of the grid.
        filled = torch.cat([x[:, 1:], self.mask_token.repeat(B, L - n, 1).to(x.dtype)], 1)
        filled = filled.gather(1, unshuffle[..., None].repeat(1, 1, x.shape[-1]))
        x = torch.cat([x[:, :1], filled], 1) + self.decoder_pos_embed  # (B, 1+L, width)
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]  # (B, L, P)
        target = patchify(imgs, self.patch_size)  # (B, L, P)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        removed = (unshuffle >= n).float()  # (B, L)
        return (((pred - target) ** 2).mean(-1) * removed).sum() / removed.sum()


def transformers_mae(like: MaskedAutoencoderViT) -> nn.Module:
    """transformers' model of the same sizes, with the attention that transformers chooses by default."""
    # Imported here, because most calls of this benchmark do not need it.
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width = like.decoder_embed.out_features
    config = ViTMAEConfig(
        image_size=like.img_size[0],
        patch_size=like.patch_size[0],
        hidden_size=like.dim,
        num_hidden_layers=len(like.blocks),
        num_attention_heads=like.trunk.num_heads,
        intermediate_size=4 * like.dim,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=len(like.decoder_blocks),
        decoder_num_attention_heads=like.decoder.num_heads,
        decoder_intermediate_size=4 * width,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
    )
    return ViTMAEForPreTraining(config).train()


LossFn = Callable[[Tensor], Tensor]


class Step:
    """A round of training steps of a model.

    It stores the seconds of the parts of each step, and the CPU time of all threads of each round.

    Args:
        loss_fn: images -> loss, a scalar.
        optimizer: of the model's parameters; AdamW as in pretraining if not given.
        steps: steps of a round.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        images: Tensor,
        amp: str,
        optimizer: torch.optim.Optimizer | None = None,
        steps: int = 1,
    ):
        self.loss_fn = loss_fn
        self.images = images
        self.amp = amp
        self.steps = steps
        self.optimizer = optimizer or optimizer_of(model)
        # Seconds of forward, backward and optimizer, of each step.
        self.parts: list[tuple[float, ...]] = []
        # CPU seconds per step, of each round.
        self.cpu_seconds: list[float] = []

    def __call__(self) -> None:
        """A round. The host does not wait between steps; at the end a GPU has finished them."""
        used = time.process_time()
        for _ in range(self.steps):
            self.run()
        wait_for(self.images.device)
        self.cpu_seconds.append((time.process_time() - used) / self.steps)

    def run(self, wait: bool = False) -> None:
        """One step. On a GPU the seconds of its parts are valid only with `wait`."""
        # Without it the host runs ahead, and times only how long it issues work.
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

    def now(self, wait: bool) -> float:
        """The time; with `wait`, after the device has finished its work."""
        if wait:
            wait_for(self.images.device)
        return time.perf_counter()

    def whole_seconds(self) -> float:
        """Seconds of one step. For the first step of a compiled model they include the compilation."""
        begin = self.now(True)
        self.run(wait=True)
        return time.perf_counter() - begin


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as in pretraining."""
    return adamw(param_groups(model, WEIGHT_DECAY), LEARNING_RATE, betas=BETAS)


def our_loss(model: Callable[..., Any]) -> LossFn:
    """The loss of pretraining as a function of images; `model` is ours, compiled or not."""

    def loss(images: Tensor) -> Tensor:
        losses, _, _ = model(images, MASK_RATIO, want_pred=False)
        if "position" in losses:
            return losses["pixel"] + 0.5 * losses["position"]
        return losses["pixel"]

    return loss


def build(variant: str, name: str, images: Tensor) -> tuple[nn.Module, LossFn]:
    """A model for such images, and the function of images that gives its loss."""
    device = images.device
    # Weights are drawn on their device, as the CPU is slow at it.
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


# A variant in a precision.
Key = tuple[str, str]


def built(name: str, keys: list[Key], images: Tensor, steps: int) -> dict[Key, Step]:
    """A `Step` for each key. Precisions of a variant share a model and its optimizer."""
    found = {}
    models: dict[str, tuple[nn.Module, LossFn, torch.optim.Optimizer]] = {}
    for variant, amp in keys:
        if variant not in models:
            model, loss_fn = build(variant, name, images)
            models[variant] = (model, loss_fn, optimizer_of(model))
        model, loss_fn, optimizer = models[variant]
        found[variant, amp] = Step(model, loss_fn, images, amp, optimizer, steps)
    return found


@dataclass(frozen=True)
class Plan:
    """How a model is measured.

    Attributes:
        rounds: measured rounds.
        steps: steps of a round.
        peaks: measured FLOP/s of large products, by precision.
        same_allocator: whether peers keep freed memory too.
        one_by_one: whether variants are measured one after the other.
    """

    rounds: int
    steps: int
    peaks: dict[str, float]
    same_allocator: bool
    one_by_one: bool = False

    def warmup(self, cuda: bool) -> int:
        """Number of unmeasured rounds: on a GPU at least three steps."""
        if cuda and self.steps < 3:
            return 3
        return 1


def measure(name: str, keys: list[Key], images: Tensor, flops: int, plan: Plan) -> dict:
    """{"rows": a row for each key}, with all keys interleaved; `flops` are those of one image."""
    cuda = images.is_cuda
    steps = built(name, keys, images, plan.steps)
    compiled = [key for key in keys if key[0] in COMPILE_MODES]
    first = {key: steps[key].whole_seconds() for key in compiled}
    # Ours are the variants with flags.
    settle = freed_memory(
        lambda key: cuda or plan.same_allocator or key[0] in FLAGS,
        {key: step.run for key, step in steps.items()},
    )
    seconds = interleaved(steps, plan.rounds, warmup=plan.warmup(cuda), prepare=settle)
    rows = []
    for key, step in steps.items():
        if cuda:
            # The rounds did not wait between the parts of a step.
            step.parts.clear()
            for _ in range(plan.rounds):
                step.run(wait=True)
        per_step = [t / plan.steps for t in seconds[key]]
        row = timing_row(name, key, step, per_step, plan)
        row["mfu"] = spread([len(images) * flops / t / plan.peaks[key[1]] for t in per_step])
        row["flops_per_image"] = flops
        if key in first:
            row["compile_s"] = first[key]
        # The measured step needs the variant's own treatment of freed memory.
        settle(key)
        rows.append(row | memory_figures(step))
    return dict(rows=rows)


def timing_row(name: str, key: Key, step: Step, per_step: list[float], plan: Plan) -> dict:
    """A row's name and times; `per_step` are the seconds of a step in each round."""
    variant, amp = key
    batch = len(step.images)
    cpu_seconds = step.cpu_seconds[-plan.rounds :]
    # The last ones: warm-up comes first.
    forward, backward, optimizer = zip(*step.parts[-plan.rounds * plan.steps :], strict=True)
    return dict(
        model=name,
        variant=LABELS[variant],
        amp=amp,
        batch_size=batch,
        seconds=spread(per_step),
        round_seconds=per_step,
        cpu_seconds=spread(cpu_seconds),
        round_cpu_seconds=cpu_seconds,
        images_per_s=spread([batch / t for t in per_step]),
        forward=spread(forward),
        backward=spread(backward),
        optimizer=spread(optimizer),
    )


def memory_figures(step: Step) -> dict[str, float]:
    """Peak memory in MiB: of a step beyond weights and moments, and on a GPU of all that the variant did."""
    cuda = step.images.is_cuda
    figures = {}
    if cuda:
        # Before the next line, which resets the statistics.
        figures["peak_allocated_mib"] = torch.cuda.max_memory_allocated() / MIB
        figures["peak_reserved_mib"] = torch.cuda.max_memory_reserved() / MIB
    figures["extra_mib"] = peak_memory(step.run, cuda)
    return figures


def does_not_compile(error: Exception) -> dict[str, str]:
    """The figures of a variant that does not compile: the first line of the compiler's message."""
    return dict(error=f"does not compile: {str(error).strip().splitlines()[0][:200]}")


def measured_or_error(name: str, keys: list[Key], images: Tensor, flops: int, plan: Plan) -> list[dict]:
    """The rows of `measure`. If the memory does not suffice or the compiler fails, the rows say so."""
    # Peak memory is then that of this variant alone.
    if images.is_cuda:
        free_gpu_memory()
        torch.cuda.reset_peak_memory_stats()
    try:
        found = unless_out_of_memory(lambda: measure(name, keys, images, flops, plan))
    except torch._dynamo.exc.TorchDynamoException as e:
        # For example on a machine without a C compiler.
        found = does_not_compile(e)
    if "rows" in found:
        return found["rows"]
    return [
        dict(model=name, variant=LABELS[variant], amp=amp, batch_size=len(images), **found)
        for variant, amp in keys
    ]


def add_ratios(rows: list[dict], within_rounds: bool) -> None:
    """Add each row's speed relative to the peers' rows of the same model and precision, if there are any."""
    form = ratio_of_medians
    if within_rounds:
        form = ratio
    good = {(row["model"], row["variant"], row["amp"]): row for row in rows if "error" not in row}
    for (model, _, amp), row in good.items():
        for peer, word in ((HF, "transformers"), (TIMM, "timm")):
            other = good.get((model, peer, amp))
            if other:
                row[f"times_{word}"] = form(other["round_seconds"], row["round_seconds"])
                row[f"times_{word}_cpu"] = form(other["round_cpu_seconds"], row["round_cpu_seconds"])
        # float32 is the default precision of transformers' model.
        other = good.get((model, HF, "fp32"))
        if other:
            row["times_transformers_fp32"] = form(other["round_seconds"], row["round_seconds"])


COLUMNS = (
    "model",
    "variant",
    "amp",
    "s/step",
    "img/s",
    "MFU",
    "x transformers",
    "x timm",
    "x transformers (CPU)",
    "x timm (CPU)",
    "MiB beyond weights",
    "MiB allocated, reserved",
    "compile s",
)


def shown_row(row: dict) -> dict[str, object]:
    """A row of the printed table. Figures that the row does not have are empty."""
    line: dict[str, object] = dict.fromkeys(COLUMNS, "")
    line |= dict(model=row["model"], variant=row["variant"], amp=row["amp"])
    if "error" in row:
        line["s/step"] = row["error"]
        return line
    line["s/step"] = shown(row["seconds"], 4)
    line["img/s"] = shown(row["images_per_s"], 1)
    line["MFU"] = shown(row["mfu"])
    line["x transformers"] = shown(row.get("times_transformers"))
    line["x timm"] = shown(row.get("times_timm"))
    line["x transformers (CPU)"] = shown(row.get("times_transformers_cpu"))
    line["x timm (CPU)"] = shown(row.get("times_timm_cpu"))
    # nan if the system does not report it.
    line["MiB beyond weights"] = f"{row['extra_mib']:.0f}"
    if "peak_allocated_mib" in row:
        peaks = (row["peak_allocated_mib"], row["peak_reserved_mib"])
        line["MiB allocated, reserved"] = ", ".join(f"{mib:.0f}" for mib in peaks)
    if "compile_s" in row:
        line["compile s"] = f"{row['compile_s']:.1f}"
    return line


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = argparse.ArgumentParser(prog="run.py step", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["mae_vit_base_patch16"],
        choices=MODELS,
        metavar="MODEL",
        help="names in models_mae_pl.MODELS",
    )
    parser.add_argument("--device", default=default_device())
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
    parser.add_argument("--one_by_one", action="store_true", help="one variant after the other on a CPU too")
    parser.add_argument(
        "--same_allocator", action="store_true", help="on a CPU the peers keep freed memory too"
    )
    return parser


def wanted_keys(args: argparse.Namespace, amps: list[str]) -> list[Key]:
    """All variants in all precisions, without repetition."""
    variants = list(args.variants)
    if args.compile:
        variants.append("compiled")
    if args.grad_checkpointing:
        variants.append("recomputed")
    return [(variant, amp) for variant in dict.fromkeys(variants) for amp in amps]


def image_size(name: str) -> tuple[int, int]:
    """Size (H, W) of a model's images."""
    # On the meta device a model costs neither memory nor time.
    with torch.device("meta"):
        return MODELS[name](**MAE).img_size


def measure_model(name: str, keys: list[Key], images: Tensor, plan: Plan, record: Record) -> None:
    """Record a row for each variant of a model, and print it at once if there is no group to wait for."""
    with torch.device("meta"):
        flops = training_flops(MODELS[name](**MAE))
    for group in groups(keys, plan.one_by_one):
        for row in measured_or_error(name, group, images, flops, plan):
            record.add("rows", row)
            if plan.one_by_one:
                print(" | ".join(str(v) for v in shown_row(row).values() if v != ""), flush=True)


def main(argv: list[str], record: Record | None = None) -> dict:
    """Measure and print training steps of all models and variants. Returns the figures."""
    args = get_parser().parse_args(argv)
    record = record or Record()
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    # On a GPU the host runs ahead of the device for several steps.
    batch_size = 16
    steps = 1
    if cuda:
        batch_size = 256
        steps = 5
    torch.manual_seed(0)
    amps = args.amp or default_amps(device)
    peaks = {amp: matmul_rate(device, AMP[amp] or torch.float32) for amp in amps}
    record.set("matmul_peak", peaks)
    rates = ", ".join(f"{amp} {peak / 1e12:.3g} TFLOP/s" for amp, peak in peaks.items())
    print(f"large F.linear: {rates}", flush=True)
    plan = Plan(args.rounds, args.steps or steps, peaks, args.same_allocator, cuda or args.one_by_one)
    for name in args.models:
        images = torch.randn(args.batch_size or batch_size, 3, *image_size(name), device=device)
        measure_model(name, wanted_keys(args, amps), images, plan, record)
    rows = record.results["rows"]
    add_ratios(rows, within_rounds=not plan.one_by_one)
    record.write()
    print(
        f"{args.rounds} rounds of {plan.steps}, batch {rows[0]['batch_size']}, median [min..max]; "
        "CPU time is that of all threads"
    )
    print(table([shown_row(row) for row in rows]))
    return record.results
