"""One HTML page of a run or a sweep that needs no server, no network and no other file: everything is inside it."""

import base64
import html
import json
import os

from util.report import charts
from util.report.runs import RunRecord, aggregate, is_sweep, metrics_of, read_run, read_sweep, sweep_table

MAX_PICTURES = 12
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#202020;background:#fff}
h1,h2{line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid #ddd}img{max-width:100%;height:auto}
table{border-collapse:collapse;margin:1rem 0;font-size:14px}td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem .2rem 0;
text-align:left;vertical-align:top}.row{display:flex;align-items:flex-start;flex-wrap:wrap;gap:1rem}
.row figure{max-width:34rem}figure{margin:0}
figcaption{font-size:13px;color:#555}code{font-size:13px}details{margin:1rem 0}
"""


def page(folder: str, metrics: list[str] | None = None) -> str:
    """The page of a run's or a sweep's folder; ValueError where there is neither."""
    name = os.path.basename(os.path.abspath(folder))
    if is_sweep(folder):
        runs, swept, missing = read_sweep(folder)
        parts = [
            f"<h1>Sweep {html.escape(name)}</h1>",
            summary(runs, missing),
            *_sweep_parts(runs, swept, metrics),
        ]
    else:
        runs, swept = [read_run(folder, name)], []
        parts = [f"<h1>Run {html.escape(name)}</h1>", summary(runs, [])]
    parts += [
        "<h2>Curves</h2>",
        _image(charts.data_uri(charts.curves(runs)), "losses and accuracies over epochs"),
        "<h2>Last epoch</h2>",
        last_epochs(runs, swept),
        *_pictures(runs),
        *_facts(folder, runs),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(name)}</title>'
        f"<style>{STYLE}</style>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def summary(runs: list[RunRecord], missing: list[str]) -> str:
    epochs = sorted({len(run.log) for run in runs})
    text = f"{len(runs)} run{'s' * (len(runs) > 1)}, {' or '.join(map(str, epochs))} epochs done"
    if missing:
        text += f"; without figures so far: {', '.join(missing)}"
    return f"<p>{html.escape(text)}.</p>"


def _sweep_parts(runs, swept, metrics):
    """Every metric against every flag that was swept, as a chart and a table."""
    for flag in [f for f in swept if f != "seed"] or swept:
        for metric in metrics_of(runs, metrics):
            chance = chance_of(runs, metric)
            groups = aggregate(runs, flag, metric)
            yield f"<h2>{html.escape(metric)} against {html.escape(flag)}</h2>"
            yield (
                "<div class=row>"
                + _image(
                    charts.data_uri(charts.sweep(groups, flag, metric, chance)), f"{metric} in the last epoch"
                )
                + table(sweep_table(groups, flag, metric, chance))
            )
            yield "</div>"


def chance_of(runs: list[RunRecord], metric: str) -> float | None:
    """The level of guessing of a metric, where all runs agree on it."""
    key = "chance_" + metric.removeprefix("train_").removeprefix("test_")
    levels = {run.last(key) for run in runs}
    return levels.pop() if len(levels) == 1 else None


def table(markdown: str) -> str:
    """A Markdown table as an HTML one."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows[2:])
    return f"<table><tr>{head}</tr>{body}</table>"


def last_epochs(runs: list[RunRecord], swept: list[str]) -> str:
    """A row per run: what was swept, and the figures of its last epoch."""
    names = [
        m
        for m in dict.fromkeys(k for run in runs for k in run.log[-1])
        if m.startswith(("train_", "test_")) or m in ("img_per_s", "mfu")
    ]
    swept = [k for k in swept if k != "run"]  # the names, which are there in any case
    lines = ["| run | " + " | ".join([*swept, "epochs", *names]) + " |", "|"]
    for run in runs:
        values = [f"{run.log[-1][m]:.4g}" if m in run.log[-1] else "" for m in names]
        flags = [str(run.flags.get(k, "")) for k in swept]
        lines.append(f"| {' | '.join([run.name, *flags, str(len(run.log)), *values])} |")
    return f"<div style='overflow-x:auto'>{table(chr(10).join(lines))}</div>"


def _pictures(runs):
    """The newest picture of each run."""
    found = []
    for run in runs:
        folder = os.path.join(run.folder, "pictures")
        names = sorted(n for n in os.listdir(folder) if n.endswith(".png")) if os.path.isdir(folder) else []
        if names:
            found.append((os.path.join(folder, names[-1]), f"{run.name}: {names[-1]}"))
    if found:
        more = f" (the first {MAX_PICTURES} of {len(found)} runs)" if len(found) > MAX_PICTURES else ""
        yield f"<h2>Pictures{more}</h2><div class=row>"
        for path, caption in found[:MAX_PICTURES]:
            with open(path, "rb") as f:
                yield _image("data:image/png;base64," + base64.b64encode(f.read()).decode(), caption)
        yield "</div>"


def _image(uri, caption):
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="{uri}"><figcaption>{text}</figcaption></figure>'


def _facts(folder, runs):
    """What was asked for and where it ran: sweep.json, run.json and flags, folded away."""
    yield "<h2>Flags</h2>"
    paths = [os.path.join(folder, "sweep.json"), *(os.path.join(run.folder, "run.json") for run in runs)]
    for path in filter(os.path.isfile, paths):
        with open(path) as f:
            text = json.dumps(json.load(f), indent=1)
        name = os.path.relpath(path, folder)
        yield f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"
    for run in runs:
        if run.flags and not os.path.isfile(os.path.join(run.folder, "run.json")):
            flags = ", ".join(f"{k} {v}" for k, v in sorted(run.flags.items()))
            yield f"<p><b>{html.escape(run.name)}</b> <code>{html.escape(flags)}</code></p>"
