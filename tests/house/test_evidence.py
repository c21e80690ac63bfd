"""Experiments say what their runs say: pairs by seed, intervals, verdicts, and a page that follows from the files."""

import json
import re
import shutil

import numpy as np
import pytest
from scipy import stats

import main_finetune
from evidence import claims
from evidence import cli as evidence
from evidence import statistics as results
from evidence.statistics import Contrast, at
from processes import ROOT
from util.cluster.sweep import plan
from util.flags.parser import run

rng = np.random.default_rng(0)


def experiment(figures: dict[tuple, float], metric: str = "test_acc1") -> dict:
    """{(label, seed): figure} -> what `collect` makes."""
    return {
        "runs": [
            {"name": str(k), "flags": {"pos_label": k[0], "seed": k[1]}, "figures": {metric: v}}
            for k, v in figures.items()
        ]
    }


def label_contrast(**options) -> Contrast:
    return Contrast("apl - none", (at("vit", pos_label="apl"),), (at("vit", pos_label="none"),), **options)


def test_differences_are_paired_by_seed_and_intervals_are_students():
    apl, none = rng.normal(40, 1, 5), rng.normal(38, 1, 5)
    found = {
        "vit": experiment(
            {("apl", s): v for s, v in enumerate(apl)}
            | {("none", s): none[s] for s in (4, 2, 0, 1, 3)}
            | {("apl", 9): 99.0}
        )
    }
    difference = label_contrast().differences(found)
    np.testing.assert_allclose(difference.values, apl - none)  # seed 9 has no partner
    interval = stats.ttest_1samp(apl - none, 0).confidence_interval(0.95)
    assert difference.mean - difference.interval == pytest.approx(interval.low, rel=1e-3)
    assert difference.mean + difference.interval == pytest.approx(interval.high, rel=1e-3)


@pytest.mark.parametrize(
    "differences, margin, verdict",
    [
        ((2.0, 2.1, 1.9), None, "supported"),
        ((-2.0, -2.1, -1.9), None, "contradicted"),
        ((2.0, -2.1, 1.9), None, "undecided"),
        ((0.1, -0.1, 0.0), 1.0, "supported"),
        ((2.0, 2.1, 1.9), 1.0, "contradicted"),
        ((0.1, 1.5, 0.0), 1.0, "undecided"),
        ((-2.0, -2.1, -1.9), 1.0, "contradicted"),
        ((2.0,), None, "one seed"),
        ((), None, "not run"),
    ],
)
def test_verdicts_follow_from_the_interval(differences, margin, verdict):
    found = {
        "vit": experiment(
            {("apl", s): 50 + d for s, d in enumerate(differences)} | {("none", s): 50.0 for s in range(5)}
        )
    }
    assert label_contrast(margin=margin).verdict(found) == verdict
    assert label_contrast(margin=margin).verdict({}) == "not run"


def test_a_loss_counts_downwards_and_gains_are_compared():
    figures = {("none", s): 2.0 + s for s in range(3)} | {("apl", s): 1.5 + s for s in range(3)}
    found = {"vit": experiment(figures, "train_class")}
    loss = Contrast(
        "vit: apl - none", (at("vit", pos_label="apl"),), (at("vit", pos_label="none"),), "train_class"
    )
    assert loss.verdict(found) == "contradicted" and loss.turned().verdict(found) == "supported"
    assert loss.turned().what == "vit: train_class, none - apl"
    two = {
        e: {
            "runs": [
                {
                    "flags": {"pos_embed": "learned", "pos_label": k, "seed": s},
                    "figures": {"test_acc1": v + s},
                }
                for s in range(3)
                for k, v in (("none", base), ("apl", base + gain))
            ]
        }
        for e, base, gain in (("supervised_vit", 30.0, 5.0), ("supervised_swin", 60.0, 2.0))
    }
    assert claims.gain_over_gain("supervised_vit", "supervised_swin", "apl").differences(two).values == (
        3.0,
        3.0,
        3.0,
    )


def test_a_setting_that_is_several_is_refused():
    found = {"vit": experiment({("apl", 0): 1.0, ("none", 0): 2.0})}
    with pytest.raises(ValueError, match="several runs of seed 0"):
        at("vit").per_seed(found, "test_acc1")


@pytest.mark.parametrize(
    "verdicts, word",
    [
        (["supported", "supported"], "supported"),
        (["contradicted", "contradicted"], "contradicted"),
        (["supported", "undecided"], "mixed: supported 1, undecided 1"),
        (["not run", "not run"], "not run"),
        (["contradicted", "supported", "supported"], "mixed: contradicted 1, supported 2"),
    ],
)
def test_a_claim_of_several_parts(verdicts, word):
    assert results.together(verdicts) == word


def test_collecting_takes_last_epochs_and_what_follows(tmp_path):
    for seed in (0, 1, 2):
        folder = tmp_path / f"seed={seed}" / "finetune"
        folder.mkdir(parents=True)
        lines = [{"epoch": e, "test_pixel": 1.123456789 - e - seed, "train_lr": 0.1} for e in (0, 1)]
        (folder.parent / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder.parent / "flags.json").write_text(json.dumps({"seed": seed}))
        (folder / "log.txt").write_text(json.dumps({"epoch": 0, "test_acc1": 40.0 + seed}) + "\n")
    (tmp_path / "seed=1" / "linprobe").mkdir()
    (tmp_path / "seed=1" / "linprobe" / "log.txt").write_text('{"epoch": 0, "test_acc1": 1.0}\n')
    for unfinished in ("seed=1/linprobe", "seed=2"):  # figures of half a run are none
        (tmp_path / unfinished / "job.json").write_text('{"state": "running"}')
    (tmp_path / "sweep.json").write_text(
        json.dumps(
            {
                "sweep": {"seed": ["0", "1", "2", "3"]},
                "points": [{"name": f"seed={s}", "flags": {"seed": s}} for s in (0, 1, 2, 3)],
            }
        )
    )
    found = results.collect(str(tmp_path))
    assert [r["figures"] for r in found["runs"]] == [
        {"test_pixel": pytest.approx(0.123457 - s, abs=1e-6), "finetune/test_acc1": 40.0 + s} for s in (0, 1)
    ]
    assert found["missing"] == ["seed=3", "seed=2"]
    columns = results.Column("top-1 %", "finetune/test_acc1"), results.Column("no", "none")
    text = results.table(results.rows_of(found), columns)
    assert (
        text.splitlines()[0] == "| setting | seeds | top-1 % |"
        and text.splitlines()[2] == "| all | 2 | 40.50 ± 6.35 |"
    )
    results.write_json(str(tmp_path / "x.json"), found)
    assert json.loads((tmp_path / "x.json").read_text()) == found
    results.copy_logs(str(tmp_path), str(tmp_path / "out"))
    copied = results.read_sweep(str(tmp_path / "out"))[0]
    assert [results.figures_of(r) for r in copied] == [
        {"test_pixel": pytest.approx(0.123457 - s, abs=1e-6)} for s in (0, 1)
    ]


def test_results_of_the_same_flags_are_put_together():
    def result(names, hours, machine, missing=(), torch="2.11"):
        return {
            "runs": [{"name": n, "figures": {"x": hours}} for n in names],
            "missing": list(missing),
            "hours": hours,
            "machines": [machine],
            "versions": {"torch": torch},
        }

    both = results.merged(result("ab", 2.0, "M"), result("bc", 1.0, "N", missing="ad", torch="2.12"))
    assert both["versions"] == {"torch": "2.11, 2.12"}
    assert results.merged(both, result("b", 1.0, "N", torch="2.12"))["versions"] == both["versions"]
    assert results.merged(result("b", 1.0, "M"), result("b", 1.0, "M", torch="2.12"))["versions"] == {
        "torch": "2.12"
    }
    assert [(r["name"], r["figures"]["x"]) for r in both["runs"]] == [("a", 2.0), ("b", 1.0), ("c", 1.0)]
    assert both["missing"] == ["d"] and both["machines"] == ["M", "N"] and both["hours"] == 3.0
    assert results.merged(result("b", 2.0, "M"), result("b", 1.0, "M"))["hours"] == 1.0
    before, found = result("ab", 2.0, "M"), result("b", 1.0, "M")
    before["runs"][1]["hours"] = found["runs"][0]["hours"] = 1.0
    assert results.merged(before, found)["hours"] == 2.0, "the same run collected again"


@pytest.mark.parametrize("name", claims.EXPERIMENTS)
def test_recipes_are_valid_and_hold_what_the_claims_compare(name):
    """Every flag of every recipe is checked by its main's parser, and a claim finds one run per seed."""
    words = evidence.recipe(name)
    swept = words.index("--sweep")
    end = words.index("--then") if "--then" in words else len(words)
    points = plan(claims.EXPERIMENTS[name].main, words[:swept], words[swept + 1 : end], words[end:], "/runs")
    seeds = {p.flags["seed"] for p in points}
    assert len(seeds) >= 3
    for _, contrasts in claims.CHECKLIST.values():
        for side in {a for c in contrasts for a in c.plus + c.minus if a.experiment == name}:
            matching = [p.flags["seed"] for p in points if all(p.flags.get(k) == v for k, v in side.flags)]
            assert sorted(matching) == sorted(seeds), f"{side}: {matching}"


@pytest.mark.parametrize("name", [name for name, e in claims.EXPERIMENTS.items() if e.shared])
def test_what_is_shared_was_trained_alike(name):
    """Two recipes differ in nothing but the flags that the setting names."""

    def flags(experiment):
        words = evidence.recipe(experiment)
        return vars(main_finetune.get_args_parser().parse_args(words[: words.index("--sweep")]))

    own = flags(name)
    for setting, other in claims.EXPERIMENTS[name].shared.items():
        named = dict(part.split() for part in setting.split(", ")) | dict(other.flags)
        theirs = flags(other.experiment)
        assert {k for k in own if own[k] != theirs[k]} <= set(named), "not the same training"
        default = {k: v for k, v in named.items() if k not in dict(other.flags)}
        assert all(str(theirs[k]) == v for k, v in default.items() if (k, v) != ("pos_weight", "0.0")), (
            "0 is no label"
        )


@pytest.mark.parametrize("pretrained, scratch", [("mae", "mae_scratch"), ("cifar10_mae", "cifar10_vit")])
def test_training_from_scratch_is_the_fine_tuning_without_an_encoder(pretrained, scratch):
    words, parser = evidence.recipe(pretrained), main_finetune.get_args_parser()
    then = words[words.index("--then") + 2 :]
    given = then[: then.index("--then")]
    tuned = vars(parser.parse_args(given))
    from_scratch = evidence.recipe(scratch)
    from_scratch = vars(parser.parse_args(from_scratch[: from_scratch.index("--sweep")]))
    names = {word.removeprefix("--") for word in given if word.startswith("--")} - {"pos_label"}
    assert {"lr", "epochs", "warmup_epochs", "batch_size", "crop_scale"} <= names
    assert {k: tuned[k] for k in names} == {k: from_scratch[k] for k in names}


def test_shared_settings_stand_in_the_table():
    found = {
        "supervised_vit": {
            "runs": [
                {
                    "flags": {"pos_embed": "learned", "pos_label": "apl", "seed": s},
                    "figures": {"test_acc1": 40.0 + s},
                }
                for s in (0, 1)
            ]
        },
        "label_weight": {
            "runs": [{"flags": {"pos_weight": 0.25, "seed": 0}, "figures": {"test_acc1": 39.0}}],
            "machines": [],
            "versions": {},
            "hours": 1.0,
            "missing": [],
        },
    }
    rows = evidence.section("label_weight", found).splitlines()[-2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| pos_weight 0.25", "1"],
        ["| pos_weight 0.5 (runs of supervised_vit)", "2"],
    ]


def test_the_page_says_what_the_files_say():
    """RESULTS.md is what `python -m evidence write` makes of evidence/results/."""
    page = (ROOT / "RESULTS.md").read_text()
    assert evidence.filled(page, evidence.blocks(evidence.load(str(ROOT / "evidence" / "results")))) == page
    headings = {
        evidence.anchor(line.removeprefix("### ")) for line in page.splitlines() if line.startswith("### ")
    }
    assert evidence.anchor("DeiT (Table 5's shape)") == "deit-table-5s-shape"
    linked = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert len(linked) >= 15 and linked <= headings
    with pytest.raises(ValueError, match="one place <!-- nothing -->"):
        evidence.filled(page, {"nothing": ""})


def test_results_of_other_flags_are_refused_before_anything_runs(tmp_path, monkeypatch, capfd):
    launched, collected = [], []
    monkeypatch.setattr("util.cluster.launch.launch", lambda main, words: launched.append(words) or 0)
    monkeypatch.setattr(evidence, "collect_experiment", lambda name, *folders: collected.append(name))
    for name in ("mae", "mae_tokens"):
        shutil.copy(ROOT / "evidence" / "results" / f"{name}.json", tmp_path)

    def call(*argv, more):
        argv = ["run", *argv, "--data", "D", "--results", str(tmp_path)]
        return run(lambda args: evidence.main(args, more), evidence.get_args_parser().parse_args(argv))

    assert call("mask_ratio", "mae", more=["--ngpus", "0", "--epochs", "9"]) == 2
    said = capfd.readouterr().err
    assert "mae.json has 12 runs of other flags (there alone: --device cpu; here alone: --epochs 9)" in said
    assert not launched and not collected, "not even what comes first"
    assert call("mae", more=["--epochs", "9", "--dry_run"]) == 0 and len(launched) == 1, (
        "which writes nothing"
    )
    more = ["--ngpus", "0", "--device", "cpu"]
    assert (
        call("mask_ratio", "mae", more=more) == 0
        and len(launched) == 3
        and collected == ["mask_ratio", "mae"]
    )
    assert call("mae_tokens", "mask_ratio", "--missing", more=more) == 0
    assert len(launched) == 4 and collected[2:] == ["mask_ratio"], (
        "nothing of mae_tokens is missing: it has no runs to collect"
    )


def test_an_experiment_runs_and_is_written_down(tmp_path, capfd):
    data = tmp_path / "data" / "mini_imagenet20"
    data.mkdir(parents=True)
    for part in ("train", "val"):
        shutil.copy(ROOT / "data" / "demo" / f"{part}.tar", data)
    point = "seed=0,mask_ratio=0.5"
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]

    def call(*argv, more=()):
        return run(
            lambda args: evidence.main(args, list(more)),
            evidence.get_args_parser().parse_args([*argv, *places]),
        )

    assert (
        call(
            "run",
            "mask_ratio",
            "--data",
            str(data.parent),
            more=[
                "--only",
                point,
                "--epochs",
                "1",
                "--warmup_epochs",
                "0",
                "--input_size",
                "16",
                "--ngpus",
                "0",
                "--device",
                "cpu",
            ],
        )
        == 0
    )
    said = json.loads((tmp_path / "results" / "mask_ratio.json").read_text())
    log = json.loads((tmp_path / "runs" / "mask_ratio" / point / "log.txt").read_text())
    assert [(r["name"], r["flags"]) for r in said["runs"]] == [(point, {"seed": 0, "mask_ratio": 0.5})]
    assert said["runs"][0]["figures"]["test_position"] == pytest.approx(log["test_position"], rel=1e-5)
    assert (
        said["recipe"].startswith("--model mae_vit_pico_patch8") and said["hours"] >= 0 and said["machines"]
    )
    capfd.readouterr()
    assert "--epochs 1 --warmup_epochs 0 --input_size 16" in said["flags"], (
        "what differs from the recipe is written down"
    )
    assert str(data) not in said["flags"]
    assert call("run", "mask_ratio", "--data", "D", "--missing", more=["--dry_run"]) == 0
    planned = capfd.readouterr().out
    assert planned.count("python main_pretrain.py") == 14 and point not in planned
    path, recipe = tmp_path / "results" / "mask_ratio.json", said["recipe"]
    other = [said["runs"][0] | {"name": "seed=7,mask_ratio=0.5"}]
    path.write_text(json.dumps(said | {"recipe": recipe.replace("seed=0,1,2", "seed=7"), "runs": other}))
    assert call("collect", "mae_tokens", "mask_ratio") == 2 and "mae_tokens: " in capfd.readouterr().err, (
        "it has no runs"
    )
    assert [r["name"] for r in json.loads(path.read_text())["runs"]] == [point, "seed=7,mask_ratio=0.5"]
    for another in (
        {"recipe": recipe.replace("--lr 1e-3", "--lr 1e-4")},
        {"flags": said["flags"] + " --epochs 9"},
    ):
        text = json.dumps(said | another | {"runs": other})
        path.write_text(text)
        assert call("collect", "mask_ratio") == 2 and "has 1 runs of other flags" in capfd.readouterr().err
        assert path.read_text() == text, "another training is not lost"
    assert call("list") == 0
    assert "mask_ratio         Position loss against mask ratio (Figure 8): 1 runs" in capfd.readouterr().out
    whole = json.loads((ROOT / "evidence" / "results" / "mae_tokens.json").read_text())
    (tmp_path / "results" / "mae_tokens.json").write_text(json.dumps(whole))
    assert call("run", "mae_tokens", "--data", "D", "--missing") == 0, "nothing is missing, nothing was run"
    assert json.loads((tmp_path / "results" / "mae_tokens.json").read_text()) == whole
    assert call("run", "nothing") == 2 and "no such experiment" in capfd.readouterr().err
    assert call("run", "mae") == 2 and "--data DIR" in capfd.readouterr().err
