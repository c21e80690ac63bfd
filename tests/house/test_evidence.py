"""Verdicts follow from the runs: pairs by seed, intervals, results files, and the page made of them."""

import json
import re
import shutil

import numpy as np
import pytest
from scipy import stats

import evidence.__main__ as evidence
import main_finetune
from evidence import claims, page, records
from evidence.experiments import EXPERIMENTS, Column, recipe
from evidence.statistics import Contrast, combined_verdict, setting
from processes import ROOT
from util.cluster.sweep import plan
from util.flags.parser import run
from util.report.runs import read_sweep

rng = np.random.default_rng(0)


def experiment(figures: dict[tuple, float], metric: str = "test_acc1") -> dict:
    """{(label, seed): figure} -> the results that `collect` returns."""
    return {
        "runs": [
            {"name": str(k), "flags": {"pos_label": k[0], "seed": k[1]}, "figures": {metric: v}}
            for k, v in figures.items()
        ]
    }


def label_contrast(**options) -> Contrast:
    return Contrast(
        "apl - none", (setting("vit", pos_label="apl"),), (setting("vit", pos_label="none"),), **options
    )


def test_differences_are_paired_by_seed_and_intervals_are_students():
    apl = rng.normal(40, 1, 5)
    none = rng.normal(38, 1, 5)
    results = {
        "vit": experiment(
            {("apl", s): v for s, v in enumerate(apl)}
            | {("none", s): none[s] for s in (4, 2, 0, 1, 3)}
            | {("apl", 9): 99.0}
        )
    }
    difference = label_contrast().differences(results)
    np.testing.assert_allclose(difference.values, apl - none)  # seed 9 has no partner
    interval = stats.ttest_1samp(apl - none, 0).confidence_interval(0.95)
    assert difference.mean - difference.interval == pytest.approx(interval.low)
    assert difference.mean + difference.interval == pytest.approx(interval.high)


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
    results = {
        "vit": experiment(
            {("apl", s): 50 + d for s, d in enumerate(differences)} | {("none", s): 50.0 for s in range(5)}
        )
    }
    assert label_contrast(margin=margin).verdict(results) == verdict
    assert label_contrast(margin=margin).verdict({}) == "not run"


def test_lower_losses_are_better_and_gains_are_compared():
    figures = {("none", s): 2.0 + s for s in range(3)} | {("apl", s): 1.5 + s for s in range(3)}
    results = {"vit": experiment(figures, "train_class")}
    loss = Contrast(
        "vit: apl - none",
        (setting("vit", pos_label="apl"),),
        (setting("vit", pos_label="none"),),
        "train_class",
    )
    assert loss.verdict(results) == "contradicted" and loss.reversed().verdict(results) == "supported"
    assert loss.reversed().name == "vit: train_class, none - apl"
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


def test_flags_that_select_several_settings_are_refused():
    results = {"vit": experiment({("apl", 0): 1.0, ("none", 0): 2.0})}
    with pytest.raises(ValueError, match="several runs of seed 0"):
        setting("vit").per_seed(results, "test_acc1")


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
def test_a_claim_with_several_parts(verdicts, word):
    assert combined_verdict(verdicts) == word


@pytest.fixture
def collected_sweep(tmp_path):
    """Fine-tuned runs of seeds 0 to 2; seed 2 and one probe are unfinished, seed 3 has not started."""
    for seed in (0, 1, 2):
        folder = tmp_path / f"seed={seed}" / "finetune"
        folder.mkdir(parents=True)
        lines = [{"epoch": e, "test_pixel": 1.123456789 - e - seed, "train_lr": 0.1} for e in (0, 1)]
        (folder.parent / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder.parent / "flags.json").write_text(json.dumps({"seed": seed}))
        (folder / "log.txt").write_text(json.dumps({"epoch": 0, "test_acc1": 40.0 + seed}) + "\n")
    (tmp_path / "seed=1" / "linprobe").mkdir()
    (tmp_path / "seed=1" / "linprobe" / "log.txt").write_text('{"epoch": 0, "test_acc1": 1.0}\n')
    for unfinished in ("seed=1/linprobe", "seed=2"):
        (tmp_path / unfinished / "job.json").write_text('{"state": "running"}')
    (tmp_path / "sweep.json").write_text(
        json.dumps(
            {
                "sweep": {"seed": ["0", "1", "2", "3"]},
                "points": [{"name": f"seed={s}", "flags": {"seed": s}} for s in (0, 1, 2, 3)],
            }
        )
    )
    return tmp_path


def test_last_epochs_of_finished_runs_are_collected(collected_sweep, tmp_path):
    results = records.collect(str(collected_sweep))
    assert [r["figures"] for r in results["runs"]] == [
        {"test_pixel": pytest.approx(0.123457 - s, abs=1e-6), "finetune/test_acc1": 40.0 + s} for s in (0, 1)
    ]
    assert results["missing"] == ["seed=3", "seed=2"]
    columns = (Column("top-1 %", "finetune/test_acc1"), Column("no", "none"))
    header, _, row = page.table(page.rows_of(results), columns).markdown().splitlines()
    assert header == "| setting | seeds | top-1 % |"
    assert row == "| all | 2 | 40.50 ± 6.35 |"


def test_results_and_logs_are_copied(collected_sweep, tmp_path):
    results = records.collect(str(collected_sweep))
    records.write_json(str(tmp_path / "x.json"), results)
    assert json.loads((tmp_path / "x.json").read_text()) == results
    records.copy_logs(str(tmp_path), str(tmp_path / "out"))
    copied = read_sweep(str(tmp_path / "out"))[0]
    assert [records.figures_of(r) for r in copied] == [
        {"test_pixel": pytest.approx(0.123457 - s, abs=1e-6)} for s in (0, 1)
    ]


def test_results_of_the_same_flags_are_merged():
    def result(names, hours, machine, missing=(), torch="2.11"):
        return {
            "runs": [{"name": n, "figures": {"x": hours}} for n in names],
            "missing": list(missing),
            "hours": hours,
            "machines": [machine],
            "versions": {"torch": torch},
        }

    both = records.merged(result("ab", 2.0, "M"), result("bc", 1.0, "N", missing="ad", torch="2.12"))
    assert both["versions"] == {"torch": "2.11, 2.12"}
    assert records.merged(both, result("b", 1.0, "N", torch="2.12"))["versions"] == both["versions"]
    assert records.merged(result("b", 1.0, "M"), result("b", 1.0, "M", torch="2.12"))["versions"] == {
        "torch": "2.12"
    }
    assert [(r["name"], r["figures"]["x"]) for r in both["runs"]] == [("a", 2.0), ("b", 1.0), ("c", 1.0)]
    assert both["missing"] == ["d"] and both["machines"] == ["M", "N"] and both["hours"] == 3.0
    assert records.merged(result("b", 2.0, "M"), result("b", 1.0, "M"))["hours"] == 1.0
    # The same run, collected again.
    before = result("ab", 2.0, "M")
    before["runs"][1]["hours"] = 1.0
    results = result("b", 1.0, "M")
    results["runs"][0]["hours"] = 1.0
    assert records.merged(before, results)["hours"] == 2.0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_recipes_are_valid_and_have_the_settings_of_the_claims(name):
    """The main's parser accepts every flag of a recipe, and a claim finds one run for each seed."""
    words = recipe(name)
    swept = words.index("--sweep")
    end = [*words, "--then"].index("--then")
    points = plan(EXPERIMENTS[name].main, words[:swept], words[swept + 1 : end], words[end:], "/runs")
    seeds = {p.flags["seed"] for p in points}
    assert len(seeds) >= 3
    for _, contrasts in claims.CLAIMS.values():
        for side in {a for c in contrasts for a in c.plus + c.minus if a.experiment == name}:
            matching = [p.flags["seed"] for p in points if all(p.flags.get(k) == v for k, v in side.flags)]
            assert sorted(matching) == sorted(seeds), f"{side}: {matching}"


@pytest.mark.parametrize("name", [name for name, e in EXPERIMENTS.items() if e.shared])
def test_shared_settings_have_the_same_training(name):
    """Two recipes differ only in the flags that the setting names."""

    def flags(experiment):
        words = recipe(experiment)
        return vars(main_finetune.get_args_parser().parse_args(words[: words.index("--sweep")]))

    here = flags(name)
    for row, other in EXPERIMENTS[name].shared.items():
        named = dict(part.split() for part in row.split(", ")) | dict(other.flags)
        there = flags(other.experiment)
        assert {k for k in here if here[k] != there[k]} <= set(named)
        default = {k: v for k, v in named.items() if k not in dict(other.flags)}
        # A weight of 0 stands for a training without a label.
        default = {k: v for k, v in default.items() if (k, v) != ("pos_weight", "0.0")}
        assert {k: str(there[k]) for k in default} == default


@pytest.mark.parametrize("pretrained, scratch", [("mae", "mae_scratch"), ("cifar10_mae", "cifar10_vit")])
def test_training_from_scratch_is_the_fine_tuning_without_an_encoder(pretrained, scratch):
    words = recipe(pretrained)
    parser = main_finetune.get_args_parser()
    then = words[words.index("--then") + 2 :]
    given = then[: then.index("--then")]
    tuned = vars(parser.parse_args(given))
    from_scratch = recipe(scratch)
    from_scratch = vars(parser.parse_args(from_scratch[: from_scratch.index("--sweep")]))
    names = {word.removeprefix("--") for word in given if word.startswith("--")} - {"pos_label"}
    assert {"lr", "epochs", "warmup_epochs", "batch_size", "crop_scale"} <= names
    assert {k: tuned[k] for k in names} == {k: from_scratch[k] for k in names}


def test_shared_settings_are_rows_of_the_table():
    results = {
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
    rows = page.section("label_weight", results).splitlines()[-2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| pos_weight 0.25", "1"],
        ["| pos_weight 0.5 (runs of supervised_vit)", "2"],
    ]


def test_the_page_agrees_with_the_results():
    """RESULTS.md is the output of `python -m evidence write`."""
    text = (ROOT / "RESULTS.md").read_text()
    folder = str(ROOT / "evidence" / "results")
    assert page.filled(text, page.blocks(records.load(folder), folder)) == text
    lines = [line for line in text.splitlines() if line.startswith("### ")]
    headings = {page.anchor(line.removeprefix("### ")) for line in lines}
    assert page.anchor("Crops, flips (Table 3's)") == "crops-flips-table-3s"
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert len(linked) >= 15 and linked <= headings
    with pytest.raises(ValueError, match="one place <!-- nothing -->"):
        page.filled(text, {"nothing": ""})


def test_results_of_other_flags_are_refused_before_anything_runs(tmp_path, monkeypatch, capfd):
    launched = []
    collected = []
    monkeypatch.setattr("util.cluster.launch.launch", lambda main, words: launched.append(words) or 0)
    monkeypatch.setattr(evidence, "collect_experiment", lambda name, *folders: collected.append(name))
    for name in ("mae", "mae_tokens"):
        shutil.copy(ROOT / "evidence" / "results" / f"{name}.json", tmp_path)

    def call(*argv, more):
        argv = ["run", *argv, "--data", "D", "--results", str(tmp_path)]
        args = evidence.get_args_parser().parse_args(argv)
        return run(lambda args: evidence.main(args, more), args)

    assert call("mask_ratio", "mae", more=["--ngpus", "0", "--epochs", "9"]) == 2
    error = capfd.readouterr().err
    assert (
        "mae.json has 12 runs of other flags (only in the file: --device cpu; only in this run: --epochs 9)"
        in error
    )
    assert "another folder as --results" in error
    # Not even the first experiment has started.
    assert not launched and not collected
    # A dry run writes nothing, so that it is allowed.
    assert call("mae", more=["--epochs", "9", "--dry_run"]) == 0 and len(launched) == 1
    more = ["--ngpus", "0", "--device", "cpu"]
    assert call("mask_ratio", "mae", more=more) == 0
    assert len(launched) == 3 and collected == ["mask_ratio", "mae"]
    # No run of mae_tokens is missing.
    assert call("mae_tokens", "mask_ratio", "--missing", more=more) == 0
    assert len(launched) == 4 and collected[2:] == ["mask_ratio"]


POINT = "seed=0,mask_ratio=0.5"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder with one run of mask_ratio, at a small size, and its results; and the demo set as its data."""
    folder = tmp_path_factory.mktemp("evidence")
    data = folder / "data" / "mini_imagenet20"
    data.mkdir(parents=True)
    for part in ("train", "val"):
        shutil.copy(ROOT / "data" / "demo" / f"{part}.tar", data)
    flags = "--epochs 1 --warmup_epochs 0 --input_size 16 --ngpus 0 --device cpu"
    extra = ["--only", POINT, *flags.split()]
    assert call(folder, "run", "mask_ratio", "--data", str(data.parent), extra=extra) == 0
    return folder


@pytest.fixture
def ran(run_folder, tmp_path):
    """A copy of the folder, which a test may change."""
    return shutil.copytree(run_folder, tmp_path / "evidence")


def call(folder, *argv, extra=()) -> int:
    argv = [*argv, "--runs", str(folder / "runs"), "--results", str(folder / "results")]
    args = evidence.get_args_parser().parse_args(argv)
    return run(lambda args: evidence.main(args, list(extra)), args)


def results_of(folder, name="mask_ratio") -> dict:
    return json.loads((folder / "results" / f"{name}.json").read_text())


def test_an_experiment_runs_and_its_results_are_written(ran):
    result = results_of(ran)
    log = json.loads((ran / "runs" / "mask_ratio" / POINT / "log.txt").read_text())
    assert [(r["name"], r["flags"]) for r in result["runs"]] == [(POINT, {"seed": 0, "mask_ratio": 0.5})]
    assert result["runs"][0]["figures"]["test_position"] == pytest.approx(log["test_position"], rel=1e-5)
    assert result["recipe"].startswith("--model mae_vit_pico_patch8")
    assert result["hours"] >= 0 and result["machines"]
    # The flags in which the run differs from the recipe.
    assert "--epochs 1 --warmup_epochs 0 --input_size 16" in result["flags"]
    assert str(ran) not in result["flags"] and "mini_imagenet20" not in result["flags"]


def test_only_missing_runs_are_planned(ran, capfd):
    assert call(ran, "run", "mask_ratio", "--data", "D", "--missing", extra=["--dry_run"]) == 0
    planned = capfd.readouterr().out
    assert planned.count("python main_pretrain.py") == 14 and POINT not in planned


def test_earlier_runs_of_the_same_flags_are_kept(ran, capfd):
    result = results_of(ran)
    other = [result["runs"][0] | {"name": "seed=7,mask_ratio=0.5"}]
    recipe = result["recipe"].replace("seed=0,1,2", "seed=7")
    path = ran / "results" / "mask_ratio.json"
    path.write_text(json.dumps(result | {"recipe": recipe, "runs": other}))
    # mae_tokens has no runs, and mask_ratio is collected all the same.
    assert call(ran, "collect", "mae_tokens", "mask_ratio") == 2
    assert "mae_tokens: " in capfd.readouterr().err
    assert [r["name"] for r in results_of(ran)["runs"]] == [POINT, "seed=7,mask_ratio=0.5"]


@pytest.mark.parametrize("key", ["recipe", "flags"])
def test_results_of_other_flags_are_not_overwritten(ran, capfd, key):
    result = results_of(ran)
    changed = {
        "recipe": result["recipe"].replace("--lr 1e-3", "--lr 1e-4"),
        "flags": result["flags"] + " --epochs 9",
    }
    other = [result["runs"][0] | {"name": "seed=7,mask_ratio=0.5"}]
    path = ran / "results" / "mask_ratio.json"
    text = json.dumps(result | {key: changed[key], "runs": other})
    path.write_text(text)
    assert call(ran, "collect", "mask_ratio") == 2
    assert "has 1 runs of other flags" in capfd.readouterr().err
    assert path.read_text() == text


def test_experiments_are_listed(ran, capfd):
    assert call(ran, "list") == 0
    line = "mask_ratio         Position loss against mask ratio (Figure 8): 1 runs"
    assert line in capfd.readouterr().out


def test_nothing_runs_if_nothing_is_missing(tmp_path):
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "evidence" / "results" / "mae_tokens.json", tmp_path / "results")
    before = results_of(tmp_path, "mae_tokens")
    assert call(tmp_path, "run", "mae_tokens", "--data", "D", "--missing") == 0
    assert results_of(tmp_path, "mae_tokens") == before


def test_wrong_names_and_missing_data_are_refused(tmp_path, capfd):
    assert call(tmp_path, "run", "nothing") == 2 and "no such experiment" in capfd.readouterr().err
    assert call(tmp_path, "run", "mae") == 2 and "--data DIR" in capfd.readouterr().err
