"""What a pretraining run says about its method, and which flags fit a file that it should continue."""

import pytest
import torch

import main_pretrain
from backbones.registry import build_classifier
from backbones.swin import NormedPatchEmbed
from commands import call
from util.flags.parser import parse
from util.train.lr_sched import warmup_cosine
from util.weights.types import Checkpoint

PLAIN = "--pos_embed sincos --pos_label none"


def flags(*given):
    return parse(main_pretrain.get_args_parser(), ["--model", "mae_test", "--input_size", "32", *given])


def saved(*given, optimizer=True, **args) -> Checkpoint:
    """A file of a run with these flags; only `args` are stored."""
    model = main_pretrain.build_model(flags(*given), torch.device("cpu"))
    return Checkpoint("f.pth", model.state_dict(), args, entries={"optimizer": {}} if optimizer else {})


@pytest.mark.parametrize(
    "given, facts",
    [
        ("", ["no positional embedding", "labels apl of weight 0.5", f"plain MAE is {PLAIN}"]),
        ("--pos_embed sincos --pos_label rpl --pos_weight 0.2", ["fixed", "labels rpl of weight 0.2", PLAIN]),
        ("--pos_embed learned --pos_label none", ["a learned positional embedding", "no positional labels"]),
        (f"{PLAIN} --sr_spatial 0.5", ["sr_spatial 0.5", f"{PLAIN} --sr_spatial 0 --sr_channel 0"]),
    ],
)
def test_a_run_names_its_method_first_and_how_plain_mae_is_asked_for(capsys, given, facts):
    words = ["--model", "mae_test", "--data_path", "/none", "--output_dir", "", *given.split()]
    first = call(main_pretrain, capsys, *words)[1].splitlines()[0]
    assert first.startswith("method: ") and all(fact in first for fact in facts), first
    plain = flags(*first.partition("plain MAE is ")[2].split())
    assert main_pretrain.describe_method(plain) == "", "the advice leads to plain MAE"


def test_maes_own_file_names_the_flags_that_fit():
    maes = saved(*PLAIN.split(), model="mae_vit_base_patch16")
    with pytest.raises(ValueError, match=rf"with {PLAIN}, not with --pos_embed none .*: give these flags"):
        main_pretrain.check_method(flags(), maes)
    main_pretrain.check_method(flags(*PLAIN.split()), maes)
    # Published files hold weights alone, which --resume cannot continue whatever the flags.
    weights = saved(*PLAIN.split(), optimizer=False)
    with pytest.raises(ValueError, match=rf"--init_from f.pth in place of --resume, and with {PLAIN}"):
        main_pretrain.check_method(flags(), weights)


def test_files_of_other_methods_name_their_flags():
    file = saved("--pos_label", "rpl", pos_label="rpl", pos_embed="none")
    main_pretrain.check_method(flags("--pos_label", "rpl"), file)
    with pytest.raises(
        ValueError, match=r"with --pos_embed none --pos_label rpl, not with .*--pos_label apl"
    ):
        main_pretrain.check_method(flags(), file)
    learned = saved("--pos_embed", "learned", pos_label="apl", pos_embed="learned")
    with pytest.raises(
        ValueError, match="with --pos_embed learned --pos_label apl, not with --pos_embed sin"
    ):
        main_pretrain.check_method(flags("--pos_embed", "sincos"), learned)
    # What a file does not tell is left to the check of its weights.
    main_pretrain.check_method(flags("--pos_label", "rpl"), saved())
    main_pretrain.check_method(flags(), saved(pos_label=["apl"], pos_embed=["none"]))
    encoder = {k: v for k, v in saved(*PLAIN.split()).model.items() if not k.startswith(("dec", "mask"))}
    main_pretrain.check_method(flags(), Checkpoint("e.pth", encoder))


def test_the_advice_for_maes_weights_works(tmp_path, capsys):
    torch.save({"model": saved(*PLAIN.split()).model}, tmp_path / "m")
    words = ["--model", "mae_test", "--output_dir", tmp_path / "o", "--picture_epochs", 0]
    code, text = call(main_pretrain, capsys, *words, "--resume", tmp_path / "m")
    advice = text.partition("start from its weights with ")[2].partition("\n")[0]
    assert code == 2 and f"--init_from {tmp_path / 'm'}" in advice and PLAIN in advice
    for method in ("", PLAIN):
        given = [*words, "--dry_run", "--init_from", tmp_path / "m", *method.split()]
        assert call(main_pretrain, capsys, *given)[0] == 0


def test_the_differences_that_recipes_name_are_those_of_our_models():
    """The comments of recipes/supervised_*.args and recipes/so_vit_*.args."""
    weight = NormedPatchEmbed((32, 32), (4, 4), 3, 96).proj.weight
    assert 0.2 < weight.abs().max() < 0.2042, "Swin-T's patch embedding starts Xavier-uniform"
    assert 0.14 < torch.nn.Conv2d(3, 96, 4).weight.abs().max() < 0.1444, "not as PyTorch's convolutions"
    with torch.device("meta"):
        swins = [build_classifier("swin_tiny", num_classes=5, merge_last=merge) for merge in (False, True)]
        vit, so_vit = (build_classifier(name, num_classes=5) for name in ("vit_base_patch16", "so_vit_7"))
    assert [swin.grid for swin in swins] == [(14, 14), (7, 7)]
    assert vit.grid == (14, 14) and vit.num_prefix == 1 and vit.pool == "avg" and vit.fc_norm is not None
    assert "pos_embed" in vit.no_weight_decay() and "cls_token" in so_vit.no_weight_decay()
    # The cosine begins where the warm-up ends; theirs would have dropped to 0.989 there.
    assert warmup_cosine(20, lr=1.0, min_lr=0.0, warmup=20, total=300) == 1
