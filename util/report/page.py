"""One HTML page about a run or a sweep. It needs no server, no network and no other file."""

import base64
import html
import json
import os
from collections.abc import Iterator

from util.files.names import counted
from util.report import charts
from util.report.aggregate import aggregate, chance_of, sweep_table
from util.report.labels import page_text
from util.report.runs import (
    Report,
    RunRecord,
    is_sweep,
    known_json,
    metrics_of,
    print_damage,
    read_run,
    read_sweep,
)
from util.report.tables import Table

# Each picture is stored in the page, which a browser must still open quickly.
MAX_PICTURES = 12
MAX_PICTURE_BYTES = 20 * 2**20
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#202020;
background:#fff}
h1,h2{line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid #ddd}img{max-width:100%;height:auto}
.wide{overflow-x:auto;max-width:100%}pre{overflow-x:auto}
table{border-collapse:collapse;margin:1rem 0;font-size:14px}
td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
.row{display:flex;align-items:flex-start;flex-wrap:wrap;gap:1rem}
.row figure{max-width:34rem}figure{margin:0}
figcaption{font-size:13px;color:#555}code{font-size:13px}details{margin:1rem 0}
"""


def page(folder: str, metrics: list[str] | None = None) -> str:
    """The page of a run's or a sweep's folder. Raises ValueError if the folder is neither.

    `metrics` are the figures to draw against the swept flags; the usual ones if not given. Damaged files are
    named on the page and on stderr.
    """
    name = os.path.basename(os.path.abspath(folder))
    swept: list[str] = []
    damage: list[str] = []

    def report(message: str) -> None:
        if message not in damage:
            print_damage(message)
            damage.append(message)

    if is_sweep(folder):
        runs, swept, missing = read_sweep(folder, report)
        parts = [f"<h1>Sweep {page_text(name)}</h1>", summary(runs, missing)]
        parts += _sweep_parts(runs, swept, metrics)
    else:
        runs = [read_run(folder, name, report)]
        parts = [f"<h1>Run {page_text(name)}</h1>", summary(runs, [])]
    parts += [
        "<h2>Curves</h2>",
        _image(charts.data_uri(charts.curves(runs)), "losses and accuracies over epochs"),
        "<h2>Last epoch</h2>",
        last_epochs(runs, swept),
        *_pictures(runs),
        *_flags(folder, runs, report),
        *_damage(damage),
    ]
    return _document(name, "\n".join(parts))


def _damage(messages: list[str]) -> Iterator[str]:
    if messages:
        rows = "".join(f"<li>{page_text(message)}</li>" for message in messages)
        yield f"<h2>Files that could not be read</h2><ul>{rows}</ul>"


def _document(title: str, body: str) -> str:
    # The style is inside the page, which must not need another file.
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{page_text(title)}</title><style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def summary(runs: list[RunRecord], missing: list[str]) -> str:
    """A paragraph: the number of runs, of epochs done, and the planned runs that have no figures yet."""
    epochs = sorted({len(run.log) for run in runs})
    # Runs of a sweep may have been stopped at different epochs.
    done = f"{' or '.join(map(str, epochs))} {'epoch' if epochs == [1] else 'epochs'} done"
    text = f"{counted(len(runs), 'run')}, {done}"
    if missing:
        text += f"; no figures yet: {', '.join(missing)}"
    return f"<p>{page_text(text)}.</p>"


def _sweep_parts(runs: list[RunRecord], swept: list[str], metrics: list[str] | None) -> Iterator[str]:
    """Every metric against every swept flag, as a chart and a table."""
    # Seeds are repetitions, unless nothing else was swept.
    for flag in [flag for flag in swept if flag != "seed"] or swept:
        for metric in metrics_of(runs, metrics):
            chance = chance_of(runs, metric)
            groups = aggregate(runs, flag, metric)
            if not groups:
                # The flags of these runs are not known.
                continue
            chart = charts.data_uri(charts.sweep(groups, flag, metric, chance))
            yield f"<h2>{page_text(metric)} against {page_text(flag)}</h2>"
            yield f"<div class=row>{_image(chart, f'{metric} in the last epoch')}"
            yield f"{_scrolling(sweep_table(groups, flag, metric, chance))}</div>"


def last_epochs(runs: list[RunRecord], swept: list[str]) -> str:
    """A table with a row per run: the swept flags, and the figures of its last epoch."""
    # In the order of log.txt; a dictionary, because a set has no order.
    keys = dict.fromkeys(key for run in runs for key in run.log[-1])
    metrics = [key for key in keys if key.startswith(("train_", "test_")) or key in ("img_per_s", "mfu")]
    # The flag `run` is the name, which is in the first column anyway.
    swept = [flag for flag in swept if flag != "run"]
    rows = []
    for run in runs:
        flags = [str(run.flags.get(flag, "")) for flag in swept]
        figures = [_figure(run.log[-1], metric) for metric in metrics]
        rows.append([run.name, *flags, str(len(run.log)), *figures])
    table = Table(["run", *swept, "epochs", *metrics], rows)
    return _scrolling(table)


def _scrolling(table: Table) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    return f"<div class=wide>{table.html()}</div>"


def _figure(line: dict, metric: str) -> str:
    if metric not in line:
        return ""
    return f"{line[metric]:.4g}"


def _pictures(runs: list[RunRecord]) -> Iterator[str]:
    """The newest picture of each run."""
    newest = [(run.name, path) for run in runs if (path := _newest_picture(run.folder))]
    if not newest:
        return
    title = "Pictures"
    if len(newest) > MAX_PICTURES:
        title += f" (the first {MAX_PICTURES} of {len(newest)} runs)"
    yield f"<h2>{title}</h2><div class=row>"
    for name, path in newest[:MAX_PICTURES]:
        with open(path, "rb") as f:
            data = base64.b64encode(f.read()).decode()
        yield _image(f"data:image/png;base64,{data}", f"{name}: {os.path.basename(path)}")
    yield "</div>"


def _newest_picture(folder: str) -> str:
    """The path of a run's picture of the latest epoch, '' if there is no picture; the names sort by epoch."""
    folder = os.path.join(folder, "pictures")
    if not os.path.isdir(folder):
        return ""
    paths = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".png")]
    # A pipe would be read for ever.
    paths = [path for path in paths if os.path.isfile(path) and os.path.getsize(path) <= MAX_PICTURE_BYTES]
    # Epochs have leading zeros in the names.
    return max(paths, default="")


def _image(uri: str, caption: str) -> str:
    # Names of folders are in captions, and may hold any character.
    text = page_text(caption)
    return f'<figure><img alt="{text}" src="{uri}"><figcaption>{text}</figcaption></figure>'


def _flags(folder: str, runs: list[RunRecord], report: Report) -> Iterator[str]:
    """The flags and the machine of each run, as sweep.json and run.json have them, folded away."""
    # Dozens of lines for each run, so that they are closed at first.
    yield "<h2>Flags</h2>"
    paths = [os.path.join(folder, "sweep.json"), *(os.path.join(run.folder, "run.json") for run in runs)]
    for path in filter(os.path.isfile, paths):
        name = page_text(os.path.relpath(path, folder))
        # Control characters are escaped in JSON.
        text = html.escape(json.dumps(known_json(path, report), indent=1))
        yield f"<details><summary>{name}</summary><pre>{text}</pre></details>"
    for run in runs:
        # Without a run.json, what is known is the swept flags or the checkpoint's.
        if run.flags and not os.path.isfile(os.path.join(run.folder, "run.json")):
            flags = ", ".join(f"{flag} {value}" for flag, value in sorted(run.flags.items()))
            yield f"<p><b>{page_text(run.name)}</b> <code>{page_text(flags)}</code></p>"
