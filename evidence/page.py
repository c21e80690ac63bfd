"""The generated parts of RESULTS.md: the table of claims, and a table for each experiment."""

import re

from evidence.claims import CLAIMS, labelled_mae, plain_mae
from evidence.experiments import EXPERIMENTS, Column
from evidence.images import difference_table
from evidence.statistics import Contrast, Results, combined_verdict, plus_minus
from util.report.aggregate import Aggregate
from util.report.tables import Table


def blocks(results: Results, folder: str) -> dict[str, str]:
    """{mark on the page: the generated text between its marks}; `folder` is that of the results."""
    texts = {"checklist": checklist(results)}
    for name, experiment in EXPERIMENTS.items():
        texts[name] = section(name, results)
        if experiment.dense and name in results:
            texts[name] += f"\n\n{differences(name, results, folder)}"
    return texts


def differences(name: str, results: Results, folder: str) -> str:
    """A table of the differences of labels from no label, all without PE, and from MAE with PE."""
    (none,) = labelled_mae(name, "none")
    sides = {f"{label} - none": (*labelled_mae(name, label), none) for label in ("apl", "rpl")}
    sides["MAE (PE) - none"] = (*plain_mae(name), none)
    sides["apl - MAE (PE)"] = (*labelled_mae(name, "apl"), *plain_mae(name))
    return difference_table(results, folder, sides, EXPERIMENTS[name].dense).markdown()


def filled(text: str, contents: dict[str, str]) -> str:
    """The page with new text between each <!-- NAME --> and <!-- end NAME -->.

    Raises ValueError if a pair of marks is missing or is not unique.
    """
    for name, content in contents.items():
        # HTML comments, which do not show on the page.
        begin = f"<!-- {name} -->\n"
        end = f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page needs one place {begin.strip()} ... {end}, each on a line of its own")
        text = text[: text.index(begin)] + begin + content + "\n" + text[text.index(end) :]
    return text


def checklist(results: Results) -> str:
    """A row for each claim: its verdict, and every part with its difference and 95 % interval."""
    # The first column has the letters by which the text refers to claims.
    header = [
        "",
        "claim",
        "verdict",
        "parts: mean paired difference ± half the width of its 95 % interval (number of seeds)",
    ]
    rows = []
    for letter, (claim, contrasts) in CLAIMS.items():
        verdicts = [contrast.verdict(results) for contrast in contrasts]
        parts = [_part(contrast, results) for contrast in contrasts if contrast.differences(results).values]
        missing = _not_run(contrasts, results)
        if missing:
            parts.append(f"not run: {', '.join(missing)}")
        rows.append(
            [
                letter,
                f"{claim}. Runs: {_links(contrasts)}",
                f"**{combined_verdict(verdicts)}**",
                "<br>".join(parts),
            ]
        )
    return Table(header, rows).markdown()


def _part(contrast: Contrast, results: Results) -> str:
    difference = contrast.differences(results)
    # Losses and shares are small numbers; the others are percent points.
    digits = 4
    if any(name in contrast.metric for name in ("acc1", "knn", "miou")):
        digits = 2
    figure = plus_minus(difference, digits)
    return f"{contrast.name}: **{figure}** ({len(difference.values)}), {contrast.verdict(results)}"


def _not_run(contrasts: list[Contrast], results: Results) -> list[str]:
    """The experiments without results, for the contrasts that lack a side."""
    # A contrast also lacks a side if an experiment was run for other settings only: that is not named here.
    missing = {
        setting.experiment
        for contrast in contrasts
        if contrast.verdict(results) == "not run"
        for setting in contrast.settings
    }
    return sorted(missing - set(results))


def _links(contrasts: list[Contrast]) -> str:
    # In the order of the claim's parts, each once.
    names = dict.fromkeys(setting.experiment for contrast in contrasts for setting in contrast.settings)
    return ", ".join(f"[{name}](#{anchor(EXPERIMENTS[name].title)})" for name in names)


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def section(name: str, results: Results) -> str:
    """An experiment: its command, machines and hours, and its table, with the settings shared with others."""
    link = f"[recipe](evidence/recipes/{name}.args)"
    if name not in results:
        return f"No finished runs yet: `python -m evidence run {name} --data DIR` ({link})."
    result = results[name]
    machines = "; ".join(result["machines"]) or "an unknown machine"
    text = (
        f"`python -m evidence run {name} --data DIR --results OWN` ({link}, "
        f"[logs](evidence/results/{name})). Trained on {machines}; "
        f"torch {result['versions'].get('torch', '?')}; {result['hours']:g} hours of runs. "
        "Means over seeds ± half the width of the 95 % interval."
    )
    if result["missing"]:
        text += f"\nNot finished: {', '.join(result['missing'])}."
    # Sorted below, so that shared settings stand in their place.
    rows = rows_of(result)
    for setting_in_table, shared in EXPERIMENTS[name].shared.items():
        runs = shared.runs(results)
        if runs:
            row = f"{setting_in_table} (runs of {shared.experiment})"
            rows[row] = [run["figures"] for run in runs]
    return f"{text}\n\n{table(dict(sorted(rows.items())), EXPERIMENTS[name].columns).markdown()}"


def rows_of(result: dict) -> dict[str, list[dict]]:
    """{setting: the figures of each seed}."""
    # Runs are sorted by seed first, so that the seeds of a setting are apart.
    rows: dict[str, list[dict]] = {}
    for run in result["runs"]:
        setting = ", ".join(f"{k} {v}" for k, v in run["flags"].items() if k != "seed")
        rows.setdefault(setting or "all", []).append(run["figures"])
    return rows


def table(rows: dict[str, list[dict]], columns: tuple[Column, ...]) -> Table:
    """A row per setting: the number of seeds, and each figure with its interval.

    Columns without a figure in any run are left out.
    """
    # Settings without a label have no position loss; an experiment of such settings needs no column for it.
    metrics = {metric for runs in rows.values() for figures in runs for metric in figures}
    columns = tuple(column for column in columns if column.metric in metrics)
    lines = []
    for setting, runs in rows.items():
        cells = [_cell(runs, column) for column in columns]
        lines.append([setting, str(len(runs)), *cells])
    return Table(["setting", "seeds", *(column.title for column in columns)], lines)


def _cell(runs: list[dict], column: Column) -> str:
    values = tuple(column.factor * figures[column.metric] for figures in runs if column.metric in figures)
    if not values:
        return ""
    return plus_minus(Aggregate(column.title, values), column.digits)
