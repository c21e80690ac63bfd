"""Training step of the masked autoencoder: ours against transformers' ViTMAE and a MAE made of timm's blocks.

    python benchmarks/run.py step                                 ViT-B/16, batch 16 on a CPU, float32 and bf16
    python benchmarks/run.py step --device cuda --compile --grad_checkpointing \\
        --models mae_vit_base_patch16 mae_vit_large_patch16 mae_vit_huge_patch14     on a GPU, with MFU

A step is forward, backward and fused AdamW, for all alike. FLOPs are the model's own (visible patches embedded, masked
ones predicted), so that work that a peer does beyond them is its loss. On a CPU our runs keep freed memory (util/allocator.py)
and the peers' do what glibc does by default; --same_allocator lets them keep it too.
"""
import argparse
import itertools
import time

import torch
from torch import nn

from benchmarks.timing import freed_memory, interleaved, peak_memory, ratio, shown, spread, table
from layers.transformer import patchify
from models_mae_pl import MODELS, MaskedAutoencoderViT, num_visible
from util.amp import autocast
from util.optim import adamw, param_groups

MASK_RATIO = 0.75
OURS, OURS_APL, HF, TIMM = "ours, MAE", "ours, MAE + APL", "transformers ViTMAE", "timm blocks, usual flow"
COMPILED, RECOMPUTED = "ours, MAE, compiled", "ours, MAE, --grad_checkpointing"


def block_macs(tokens: int, width: int) -> int:
    """Multiply-adds of a transformer block with MLP ratio 4 for one image."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def training_flops(model: MaskedAutoencoderViT, mask_ratio: float = MASK_RATIO) -> int:
    """Matrix-product FLOPs of one image's training step: two per multiply-add, backward twice the forward."""
    L = model.patch_embed.num_patches
    n, width = num_visible(L, mask_ratio), model.decoder_embed.out_features
    pixels = model.decoder_pred.out_features
    macs = n * pixels * model.dim + len(model.blocks) * block_macs(1 + n, model.dim)
    macs += (1 + n) * model.dim * width + len(model.decoder_blocks) * block_macs(1 + L, width) + (L - n) * width * pixels
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
        self.decoder_blocks = nn.Sequential(*(Block(width, decoder_heads, qkv_bias=True) for _ in like.decoder_blocks))
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
    model = ViTMAEForPreTraining(ViTMAEConfig(
        image_size=like.img_size[0], patch_size=like.patch_size[0], hidden_size=like.dim, num_hidden_layers=len(like.blocks),
        num_attention_heads=like.blocks[0].attn.num_heads, intermediate_size=4 * like.dim, decoder_hidden_size=width,
        decoder_num_hidden_layers=len(like.decoder_blocks), decoder_num_attention_heads=like.decoder_blocks[0].attn.num_heads,
        decoder_intermediate_size=4 * width, mask_ratio=MASK_RATIO, norm_pix_loss=True))
    return model.train()


class Step:
    """One training step of a model; remembers the seconds of its three parts, and before them the CPU time of all threads.

    On a GPU the host runs ahead: there parts mean something only with `split`, which waits after each.
    """

    split = False

    def __init__(self, model, loss_fn, images, amp, optimizer=None, before=lambda: None):
        self.loss_fn, self.images, self.amp, self.before = loss_fn, images, amp, before
        self.optimizer = optimizer or adamw(param_groups(model, 0.05), 1e-4, betas=(0.9, 0.95))
        self.parts: list[tuple[float, ...]] = []

    def __call__(self):
        self.before()
        self.parts.append(self.run())

    def run(self):
        used, times = time.process_time(), [time.perf_counter()]
        with autocast(self.images.device, self.amp):
            loss = self.loss_fn(self.images)
        times.append(self.now(self.split))
        loss.backward()
        times.append(self.now(self.split))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(self.now(True))
        return time.process_time() - used, *(b - a for a, b in itertools.pairwise(times))

    def now(self, wait):
        if wait and self.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def our_loss(model, call=None):
    def loss(images):
        losses, _, _ = (call or model)(images, MASK_RATIO, want_pred=False)
        return losses["pixel"] + (0.5 * losses["position"] if "position" in losses else 0)
    return loss


def variants(name, images, amps, compiled, recomputed):
    """{(variant, amp): Step}, and the FLOPs of an image. Precisions share a model, and so do variants of the same one."""
    device = images.device
    ours = MODELS[name](norm_pix_loss=True, pos_embed="sincos", pos_label="none").to(device)
    models = {OURS: (ours, our_loss(ours))}
    labelled = MODELS[name](norm_pix_loss=True, pos_embed="none", pos_label="apl").to(device)
    models[OURS_APL] = (labelled, our_loss(labelled))
    hf, blocks = transformers_mae(ours).to(device), TimmMAE(ours).to(device)
    models[HF] = (hf, lambda x: hf(x).loss)
    models[TIMM] = (blocks, blocks)
    found = {}
    for label, (model, loss_fn) in models.items():
        optimizer = None
        for amp in amps:
            before = (lambda: ours.set_grad_checkpointing(False)) if model is ours else lambda: None
            found[label, amp] = Step(model, loss_fn, images, amp, optimizer, before)
            optimizer = found[label, amp].optimizer
    for amp in amps:
        shared = dict(images=images, amp=amp, optimizer=found[OURS, amp].optimizer)
        if compiled:
            found[COMPILED, amp] = Step(ours, our_loss(ours, torch.compile(ours)), **shared,
                                        before=lambda: ours.set_grad_checkpointing(False))
        if recomputed:
            found[RECOMPUTED, amp] = Step(ours, our_loss(ours), **shared, before=ours.set_grad_checkpointing)
    return found, training_flops(ours)


def matmul_peak(device: torch.device, amp: str, rounds: int = 5) -> float:
    """FLOP/s of the fastest of some large square products at this precision: what MFU is a share of."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    repeats = 10 if device.type == "cuda" else 1

    def product(size):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def call():
            for _ in range(repeats):
                a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
        return call
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
    return max(2 * n**3 * repeats / min(interleaved({n: product(n)}, rounds)[n]) for n in sizes)


def measure(name, images, amps, rounds, peaks, same_allocator, **which):
    steps, flops = variants(name, images, amps, **which)
    cuda, batch = images.device.type == "cuda", len(images)
    settle = freed_memory(lambda key: cuda or same_allocator or key[0] not in (HF, TIMM),
                          {key: step.run for key, step in steps.items()})
    seconds = interleaved(steps, rounds, warmup=3 if cuda else 1, prepare=settle)
    cpu_seconds = {key: [parts[0] for parts in step.parts[-rounds:]] for key, step in steps.items()}
    rows = []
    for (label, amp), s in seconds.items():
        step = steps[label, amp]
        if cuda:
            step.split = True
            for _ in range(rounds):
                step()
        row = dict(model=name, variant=label, amp=amp, batch_size=batch, seconds=spread(s),
                   cpu_seconds=spread(cpu_seconds[label, amp]),
                   images_per_s=spread([batch / t for t in s]),
                   mfu=spread([batch * flops / t / peaks[amp] for t in s]),
                   flops_per_image=flops)
        parts = zip(*(parts[1:] for parts in step.parts[-rounds:]))
        row |= {k: spread(v) for k, v in zip(("forward", "backward", "optimizer"), parts, strict=True)}
        settle((label, amp))
        row["extra_mib"] = peak_memory(step, cuda)
        for peer, word in ((HF, "transformers"), (TIMM, "timm")):
            row[f"times_{word}"] = ratio(seconds[peer, amp], s)
            row[f"times_{word}_cpu"] = ratio(cpu_seconds[peer, amp], cpu_seconds[label, amp])
        if "fp32" in amps:
            row["times_transformers_fp32"] = ratio(seconds[HF, "fp32"], s)
        rows.append(row)
    return rows


def main(argv) -> dict:
    parser = argparse.ArgumentParser(prog="run.py step", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["mae_vit_base_patch16"], choices=MODELS, metavar="MODEL",
                        help="names in models_mae_pl.MODELS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, help="16 on a CPU, 256 on a GPU")
    parser.add_argument("--amp", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also ours under torch.compile")
    parser.add_argument("--grad_checkpointing", action="store_true", help="also ours with blocks recomputed in backward")
    parser.add_argument("--same_allocator", action="store_true", help="on a CPU the peers keep freed memory too")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(0)
    peaks = {amp: matmul_peak(device, amp) for amp in args.amp}
    print("fastest matrix product: " + ", ".join(f"{amp} {p / 1e12:.3g} TFLOP/s" for amp, p in peaks.items()))
    rows = []
    for name in args.models:
        L = MODELS[name]().img_size
        images = torch.randn(args.batch_size or (256 if device.type == "cuda" else 16), 3, *L, device=device)
        rows += measure(name, images, args.amp, args.rounds, peaks, compiled=args.compile,
                        recomputed=args.grad_checkpointing, same_allocator=args.same_allocator)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"{args.rounds} rounds, batch {rows[0]['batch_size']}, median [min..max]; CPU time is of all threads")
    print(table([dict(model=r["model"], variant=r["variant"], amp=r["amp"], **{
        "s/step": shown(r["seconds"]), "img/s": shown(r["images_per_s"], 1), "MFU": shown(r["mfu"]),
        "x transformers": shown(r["times_transformers"]), "x timm": shown(r["times_timm"]),
        "x transformers (CPU)": shown(r["times_transformers_cpu"]), "x timm (CPU)": shown(r["times_timm_cpu"]),
        "MiB beyond weights": round(r["extra_mib"])}) for r in rows]))
    return dict(matmul_peak=peaks, rows=rows)
