"""The masked autoencoder against independent forms: Hugging Face's ViTMAE, and properties that must hold."""

import math

import pytest
import torch

from models_mae_pl import MAE_VIT, MODELS, MaskedAutoencoderViT, num_visible, random_masking, sample_noise


def small(**kwargs) -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return MAE_VIT(
        **(
            dict(
                img_size=(16, 24),
                patch_size=(4, 4),
                dim=32,
                depth=2,
                num_heads=2,
                decoder_dim=16,
                decoder_depth=2,
                decoder_heads=2,
            )
            | kwargs
        )
    )


def to_hugging_face(state: dict, depth: int, decoder_depth: int) -> dict:
    """Our (MAE's) names to ViTMAE's; the fused qkv is split."""
    out = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
        "decoder.mask_token": state["mask_token"],
        "decoder.decoder_pos_embed": state["decoder_pos_embed"],
    }
    for part in ("weight", "bias"):
        out |= {
            f"vit.embeddings.patch_embeddings.projection.{part}": state[f"patch_embed.proj.{part}"],
            f"vit.layernorm.{part}": state[f"norm.{part}"],
            f"decoder.decoder_embed.{part}": state[f"decoder_embed.{part}"],
            f"decoder.decoder_norm.{part}": state[f"decoder_norm.{part}"],
            f"decoder.decoder_pred.{part}": state[f"decoder_pred.{part}"],
        }
        for ours, theirs, n in (
            ("blocks", "vit.encoder.layer", depth),
            ("decoder_blocks", "decoder.decoder_layers", decoder_depth),
        ):
            for i in range(n):
                for q, name in zip(state[f"{ours}.{i}.attn.qkv.{part}"].chunk(3), ("query", "key", "value")):
                    out[f"{theirs}.{i}.attention.attention.{name}.{part}"] = q
                for a, b in (
                    ("attn.proj", "attention.output.dense"),
                    ("norm1", "layernorm_before"),
                    ("norm2", "layernorm_after"),
                    ("mlp.fc1", "intermediate.dense"),
                    ("mlp.fc2", "output.dense"),
                ):
                    out[f"{theirs}.{i}.{b}.{part}"] = state[f"{ours}.{i}.{a}.{part}"]
    return out


@pytest.mark.parametrize("norm_pix", [False, True])
def test_plain_mae_equals_hugging_face(norm_pix):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=96,
        mask_ratio=0.75,
        norm_pix_loss=norm_pix,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = transformers.ViTMAEForPreTraining(config)
    ours = small(
        img_size=(32, 32),
        patch_size=(8, 8),
        depth=3,
        num_heads=4,
        decoder_dim=24,
        norm_pix_loss=norm_pix,
        pos_embed="sincos",
        pos_label="none",
    )
    names = set(theirs.state_dict())
    weights = to_hugging_face(ours.state_dict(), 3, 2)
    if not names >= set(weights):  # newer releases name the layers differently
        weights = rename_to(weights, names)
    theirs.load_state_dict(weights)

    imgs, noise = torch.randn(5, 3, 32, 32), torch.rand(5, 16)
    reference = theirs(imgs, noise=noise)
    losses, pred, mask = ours(imgs, ids_keep=random_masking(noise, 0.75))
    assert abs(losses["pixel"] - reference.loss) < 1e-5
    assert torch.equal(mask, reference.mask)
    assert torch.allclose(pred, reference.logits, atol=1e-4)

    losses["pixel"].backward()
    reference.loss.backward()
    back = {id(p): n for n, p in theirs.named_parameters()}
    qkv = [
        p.grad
        for p in theirs.parameters()
        if back[id(p)].endswith("0.attention.attention.query.weight")
        or back[id(p)].endswith("layers.0.attention.q_proj.weight")
    ]
    assert qkv and torch.allclose(ours.blocks[0].attn.qkv.weight.grad[:32], qkv[0], atol=1e-5)


def rename_to(weights: dict, names: set[str]) -> dict:
    """Follow a renaming in the package by trying its known spellings for each of our keys."""
    spellings = [
        (".attention.attention.query.", ".attention.q_proj."),
        (".attention.attention.key.", ".attention.k_proj."),
        (".attention.attention.value.", ".attention.v_proj."),
        (".attention.output.dense.", ".attention.o_proj."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
        ("vit.encoder.layer.", "vit.layers."),
    ]
    out = {}
    for key, value in weights.items():
        candidates = {key}
        for old, new in spellings:
            candidates |= {c.replace(old, new) for c in candidates}
        fits = candidates & names
        assert len(fits) == 1, (key, sorted(names)[:40])
        out[fits.pop()] = value
    return out


def test_labels_change_no_bit_of_plain_mae():
    imgs, keep = torch.randn(3, 3, 16, 24), random_masking(torch.rand(3, 24), 0.5)
    plain, labelled = small(pos_label="none"), small(pos_label="apl+rpl")
    for name, p in plain.state_dict().items():
        assert torch.equal(p, labelled.state_dict()[name]), name
    a, b = plain(imgs, ids_keep=keep), labelled(imgs, ids_keep=keep)
    assert set(a[0]) == {"pixel"} and torch.equal(a[0]["pixel"], b[0]["pixel"]) and torch.equal(a[1], b[1])


def test_without_the_whole_prediction_the_loss_is_the_same():
    model, imgs, keep = small(), torch.randn(3, 3, 16, 24), random_masking(torch.rand(3, 24), 0.75)
    full, lean = model(imgs, ids_keep=keep), model(imgs, ids_keep=keep, want_pred=False)
    assert lean[1] is None and torch.equal(full[0]["pixel"], lean[0]["pixel"])
    pred, mask = model.predict(imgs, keep)
    assert torch.allclose(pred, full[1], atol=1e-6) and torch.equal(mask, full[2])
    error = (full[1] - model.target(model.patchify(imgs))).square().mean(-1)
    assert torch.allclose((error * full[2]).sum() / full[2].sum(), full[0]["pixel"])


def test_without_embedding_the_encoder_is_permutation_equivariant():
    model, imgs, keep = small().eval(), torch.randn(2, 3, 16, 24), random_masking(torch.rand(2, 24), 0.5)
    order = torch.randperm(keep.shape[1])
    tokens = model.forward_encoder(imgs, keep)
    shuffled = model.forward_encoder(imgs, keep[:, order])
    assert torch.allclose(tokens[:, 1:][:, order], shuffled[:, 1:], atol=1e-5)
    assert torch.allclose(tokens[:, 0], shuffled[:, 0], atol=1e-5)
    # and moving the patches themselves moves nothing but them
    patches = model.patchify(imgs)
    moved = model.unpatchify(patches[:, torch.randperm(24)])
    cells = torch.arange(24).expand(2, -1)
    a, b = model.forward_encoder(imgs, cells)[:, 1:], model.forward_encoder(moved, cells)[:, 1:]
    assert torch.allclose(a.sum(1), b.sum(1), atol=1e-4)
    with_embedding = small(pos_embed="sincos").eval()
    a, b = (
        with_embedding.forward_encoder(imgs, cells)[:, 1:],
        with_embedding.forward_encoder(moved, cells)[:, 1:],
    )
    assert not torch.allclose(a.sum(1), b.sum(1), atol=1e-2)


def test_a_constant_image_gives_chance_without_embedding():
    """All tokens are equal, so that no label but the prior can be told: the loss cannot go below ln L."""
    model = small()
    for p in model.pos_head.parameters():
        torch.nn.init.normal_(p)
    imgs = torch.full((4, 3, 16, 24), 0.3)
    cells = torch.arange(24).expand(4, -1)
    logits = model.pos_head.apl.logits(model.forward_encoder(imgs, cells)[:, 1:])
    assert torch.allclose(logits, logits[:, :1].expand_as(logits), atol=1e-4)
    losses, _, _ = model(imgs, ids_keep=cells)
    assert losses["position"] >= math.log(24) and losses["position_acc"] == pytest.approx(1 / 24)
    for p in model.pos_head.parameters():
        torch.nn.init.zeros_(p)
    assert model(imgs, ids_keep=cells)[0]["position"].item() == pytest.approx(math.log(24), abs=1e-6)


def test_labels_are_the_visible_cells():
    """A head that reads the answer from the tokens is right only if the labels are `ids_keep`."""
    model, imgs = small(pos_embed="sincos"), torch.randn(3, 3, 16, 24)
    keep = random_masking(torch.rand(3, 24), 0.75)
    seen = {}
    model.pos_head.register_forward_hook(lambda m, args, out: seen.update(tokens=args[0], ids=args[1]))
    model(imgs, ids_keep=keep)
    assert torch.equal(seen["ids"], keep)
    everything = model.forward_encoder(imgs, keep)
    assert torch.equal(seen["tokens"], everything[:, 1:])


def test_patches_are_where_they_belong():
    model = small()
    imgs = torch.randn(2, 3, 16, 24)
    patches = model.patchify(imgs)
    assert torch.equal(model.unpatchify(patches), imgs)
    assert torch.equal(
        patches[0, 7].reshape(4, 4, 3), imgs[0, :, 4:8, 4:8].permute(1, 2, 0)
    )  # cell (1, 1) of 4x6
    cells = torch.arange(24).expand(2, -1)
    embedded = model.patch_embed.embed_patches(patches)
    assert torch.allclose(embedded, model.patch_embed(imgs), atol=1e-5)
    assert torch.allclose(model.forward_encoder(imgs, cells), model.forward_features(imgs), atol=1e-5)


def test_masking_keeps_the_smallest_noise():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.4, 0.6]])
    assert random_masking(noise, 0.5).tolist() == [[1, 3], [0, 2]]
    assert num_visible(196, 0.75) == 49 and num_visible(64, 0.0) == 64
    for ratio in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            num_visible(196, ratio)
    with pytest.raises(ValueError, match="visible"):
        num_visible(16, 0.95)


def test_a_samples_mask_is_its_own_and_uniform():
    keys = torch.randint(2**62, (4000,), generator=torch.Generator().manual_seed(0))
    noise = sample_noise(keys, 16)
    assert torch.equal(noise[17:18], sample_noise(keys[17:18], 16)), "independent of the batch"
    assert noise.min() >= 0 and noise.max() < 1
    kept = torch.zeros(16).index_add_(0, random_masking(noise, 0.75).flatten(), torch.ones(16000))
    assert ((kept - 1000).abs() < 5 * math.sqrt(1000 * 0.75)).all(), "every cell is kept equally often"
    pairs = random_masking(noise, 0.75)
    together = ((pairs == 3).any(1) & (pairs == 4).any(1)).float().mean()
    assert abs(together - 4 / 16 * 3 / 15) < 0.015, "cells are kept independently"
    near = sample_noise(torch.arange(4000), 16)  # consecutive keys must not give related masks
    assert abs(torch.corrcoef(near.T) - torch.eye(16, dtype=torch.float64)).max() < 0.08


def splitmix64(x: int) -> int:
    """The published finaliser, in Python integers."""
    m = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & m
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & m
    return x ^ (x >> 31)


def test_sample_noise_is_splitmix64():
    for key in (0, 1, 2**62 + 12345):
        expected = [(splitmix64((key + i * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53 for i in range(1, 6)]
        assert sample_noise(torch.tensor([key]), 5)[0].tolist() == expected


# Encoder and decoder in millions, counted from the published widths and depths: 12 * depth * width^2 and the
# rest.
MILLIONS = {"mae_vit_base_patch16": 111.66, "mae_vit_large_patch16": 329.24, "mae_vit_huge_patch14": 656.61}


def sized(name: str):
    """A parameter of a test; the models from ViT-Base on, of 0.1 to 0.7 billion weights, are slow."""
    large = any(f"_{size}_" in name for size in ("base", "large", "huge"))
    return pytest.param(name, marks=[pytest.mark.slow] * large)


@pytest.mark.parametrize("name", [sized(n) for n in sorted(MODELS) if not n.endswith(("8b", "test"))])
def test_every_model_has_finite_gradients_everywhere(name):
    patch = int(name.rsplit("patch", 1)[1])
    torch.manual_seed(0)
    model = MODELS[name](img_size=(4 * patch, 2 * patch), pos_label="apl+rpl")
    if name in MILLIONS:  # MAE's sizes, without the label heads and tables, which depend on the image
        counted = sum(
            p.numel() for n, p in model.named_parameters() if not n.startswith(("pos_head", "decoder_pos"))
        )
        assert counted / 1e6 == pytest.approx(MILLIONS[name], rel=1e-3)
    losses, pred, mask = model(torch.randn(2, 3, 4 * patch, 2 * patch), mask_ratio=0.5)
    (losses["pixel"] + losses["position"]).backward()
    assert pred.shape == (2, 8, patch * patch * 3) and mask.sum() == 8
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), n
            assert p.grad.abs().max() > 0, n


def test_state_dict_keys_are_maes():
    keys = set(small(depth=1, decoder_depth=1, pos_embed="sincos", pos_label="apl+rpl").state_dict())
    block = {
        f"{n}.{p}"
        for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for p in ("weight", "bias")
    }
    linear = {
        f"{n}.{p}"
        for n in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")
        for p in ("weight", "bias")
    }
    heads = {
        f"pos_head.{k}.{n}.{p}"
        for k in ("apl", "rpl")
        for n in ("fc1", "fc2", "classifier")
        for p in ("weight", "bias")
    }
    assert keys == {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"} | linear | heads | {
        f"{where}.0.{k}" for where in ("blocks", "decoder_blocks") for k in block
    }
    assert "pos_embed" not in small().state_dict(), "no embedding means no parameter"


def test_channels_rectangles_and_patch_shapes():
    torch.manual_seed(0)
    model = small(img_size=(12, 40), patch_size=(4, 8), in_chans=5, pos_label="apl+rpl")
    assert model.grid == (3, 5)
    losses, pred, _ = model(torch.randn(2, 5, 12, 40), mask_ratio=0.6)
    assert losses["pixel"].isfinite() and pred.shape == (2, 15, 4 * 8 * 5)
    assert model.unpatchify(pred).shape == (2, 5, 12, 40)
    with pytest.raises(ValueError, match=r"found \(5, 40, 12\)"):
        model(torch.randn(2, 5, 40, 12))
    with pytest.raises(ValueError, match="not a multiple of the patch width 8"):
        small(img_size=(12, 42), patch_size=(4, 8))


def test_sincos_table_and_resizing():
    """Each number from the formula: columns in the first half of the channels, rows in the second."""
    from layers.pos_embed import resize_pos_embed, sincos_2d

    table = sincos_2d(32, (2, 3))[0]
    assert torch.equal(table[0], torch.zeros(32)), "the class token has no position"
    for row in range(2):
        for col in range(3):
            expected = []
            for position in (col, row):
                angles = [position / 10000 ** (i / 8) for i in range(8)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert torch.allclose(table[1 + row * 3 + col], torch.tensor(expected), atol=1e-6)
    resized = resize_pos_embed(sincos_2d(32, (6, 6)), (6, 6), (4, 9))
    assert resized.shape == (1, 37, 32) and torch.equal(resized[:, :1], sincos_2d(32, (6, 6))[:, :1])
    # Row channels vary along rows only, at every size: H and W are resized separately.
    assert torch.allclose(
        resized[0, 1:].reshape(4, 9, 32)[:, 0, 16:], resized[0, 1:].reshape(4, 9, 32)[:, 8, 16:], atol=1e-5
    )
