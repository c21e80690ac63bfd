"""Write the Markdown table of a run of benchmarks/gpu.sh: `python -m benchmarks.gpu_table FOLDER [MORE.json
...]`.

It reads FOLDER/*.json and FOLDER/log.txt and writes FOLDER/table.md. Missing stages are left out.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.timing import shown, table

# As in benchmarks/step.py, which takes seconds to import; a test compares them.
HF = "transformers ViTMAE"
TIMM = "timm blocks, usual flow"
# Small models first in the table of training steps.
ORDER = ("mae_vit_small", "mae_vit_base", "mae_vit_large", "mae_vit_huge")


def load(paths: Iterable[str]) -> list[dict]:
    """Read the records that `benchmarks/run.py --json` wrote. Missing files are left out."""
    return [json.loads(Path(path).read_text()) for path in sorted(paths) if Path(path).exists()]


def results_of(records: list[dict], benchmark: str) -> list[dict]:
    """The results of all records of a benchmark."""
    return [record["results"] for record in records if record["benchmark"] == benchmark]


def figure(row: dict, name: str, digits: int = 2) -> str:
    """A figure of a row as text; empty if the row does not have it."""
    if name not in row:
        return ""
    return f"{row[name]:.{digits}f}"


def median(row: dict, name: str, factor: float = 1.0, digits: int = 2) -> str:
    """The median of a figure of a row as text, times a factor; empty if the row does not have it."""
    if name not in row:
        return ""
    return f"{factor * row[name]['median']:.{digits}f}"


def gib(row: dict, name: str) -> str:
    """A figure in MiB as text in GiB; empty if the row does not have it."""
    if name not in row:
        return ""
    return f"{row[name] / 1024:.2f}"


def titled(title: str, lines: list[str]) -> list[str]:
    """A section with its title; nothing if it has no lines."""
    if not lines:
        return []
    return [f"## {title}", *lines]


def heading(records: list[dict], log: str) -> list[str]:
    """The machine: from the records, preferably one of a GPU, or else from the log."""
    if not records:
        names = re.findall(r"^== machine: (.+)", log, re.MULTILINE)
        # The log grows with every call of gpu.sh; the last machine is this one.
        return [f"# {name}" for name in names[-1:]]
    record = max(records, key=lambda record: record["machine"]["gpu"] is not None)
    machine = record["machine"]
    listed = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        f"# {machine['gpu'] or machine['cpu']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores. {listed}. Commit {record['commit'] or 'unknown'}.",
    ]


def step_section(found: list[dict]) -> list[str]:
    """Training steps. Ratios are those of medians, as records that were cut off have no others."""
    lines = []
    for results in found:
        lines += step_lines(results.get("rows", []))
    if not lines:
        return []
    rank = {name: i for i, name in enumerate(ORDER)}
    # Sorting is stable: the variants of a model keep their order.
    lines.sort(key=lambda line: rank.get(line["model"].rpartition("_")[0], len(rank)))
    rates = "; ".join(rate for results in found for rate in rates_of(results))
    # A separate process measured the rate for each model, so there are several.
    text = (
        f"MFU is relative to a large F.linear, measured in the process of each model: {rates}. "
        "The parts of a step are timed separately, with a wait after each, and add up to more than the step."
    )
    return titled("Training step", ["", text, "", table(lines)])


def rates_of(results: dict) -> list[str]:
    """The measured rates of products in one process, as text for each precision."""
    models = ", ".join(dict.fromkeys(row["model"] for row in results.get("rows", [])))
    peaks = results.get("matmul_peak", {})
    return [f"{models} {amp} {peak / 1e12:.4g} TFLOP/s" for amp, peak in peaks.items()]


def step_lines(rows: list[dict]) -> list[dict[str, str]]:
    """Lines of the table of training steps."""
    rates = {}
    for row in rows:
        if "error" not in row:
            rates[row["model"], row["amp"], row["variant"]] = row["images_per_s"]["median"]
    return [step_line(row, rates) for row in rows]


def step_line(row: dict, rates: dict[tuple[str, str, str], float]) -> dict[str, str]:
    """A line of the table of training steps; `rates` are images/s by (model, precision, variant)."""
    line = dict(model=row["model"], variant=row["variant"], amp=row["amp"], batch=row["batch_size"])
    line["images/s"] = row.get("error") or median(row, "images_per_s", digits=0)
    line["ms/step"] = median(row, "seconds", 1e3, 1)
    parts = [median(row, part, 1e3, 1) for part in ("forward", "backward", "optimizer")]
    # A row with an error has no parts.
    line["forward, backward, optimizer"] = ", ".join(filter(None, parts))
    line["MFU"] = median(row, "mfu")
    for peer, word in ((HF, "transformers"), (TIMM, "timm")):
        other = rates.get((row["model"], row["amp"], peer))
        line[f"x {word}"] = ""
        if other and "error" not in row:
            line[f"x {word}"] = f"{row['images_per_s']['median'] / other:.2f}"
    line["peak GiB"] = gib(row, "peak_allocated_mib")
    line["reserved"] = gib(row, "peak_reserved_mib")
    line["beyond weights"] = gib(row, "extra_mib")
    line["compile s"] = figure(row, "compile_s", 1)
    return line


def launches_section(found: list[dict]) -> list[str]:
    """Launches of a step: time on the host and on the device, and the longest kernels."""
    # Kernels of all models come after all tables.
    lines = []
    kernels = []
    for results in found:
        rows = results.get("rows", [])
        if "launch_us" in results:
            lines += ["", f"A bare launch takes the host {shown(results['launch_us'])} us."]
        if rows:
            lines += ["", table([launches_line(row) for row in rows])]
        for row in rows:
            kernels += kernel_lines(row)
    return titled("Launches", lines + kernels)


def kernel_lines(row: dict) -> list[str]:
    """The longest kernels of a row; nothing if they were not measured."""
    if not row.get("longest"):
        return []
    title = f"{row['model']}, {row['variant']}, the longest kernels:"
    return ["", title, "", *(f"- {k['ms']:.2f} ms in {k['times']}: `{k['name']}`" for k in row["longest"])]


def launches_line(row: dict) -> dict[str, str]:
    """A line of the table of launches."""
    line = dict(
        model=row["model"],
        pixels=row["pixels"],
        variant=row["variant"],
        amp=row["amp"],
        batch=row["batch_size"],
    )
    # A CPU has no launches; compiled code on it has no count either.
    line["launches"] = row.get("error") or row.get("launches", "")
    line["kernels"] = row.get("kernels", "")
    line["issued by the host, ms"] = shown(row.get("host_ms"))
    line["device busy, ms"] = figure(row, "busy_ms")
    line["step, ms"] = shown(row.get("step_ms"))
    line["host us/launch"] = figure(row, "us_per_launch", 1)
    return line


def form_line(row: dict) -> dict[str, object]:
    """A line of the table of forms: the obvious one and ours."""
    return {
        "form": row["form"],
        "amp": row["amp"],
        "batch": row["batch_size"],
        "ms": row.get("error") or shown(row["ms"]),
        "times obvious": shown(row.get("times_obvious")),
        "peak GiB": gib(row, "peak_mib"),
    }


def memory_line(row: dict) -> dict[str, object]:
    """A line of the table of growing batches."""
    peak = row.get("error") or gib(row, "peak_mib")
    return {"swept, batch": row["batch_size"], "amp": row["amp"], "peak GiB": peak}


def share_line(row: dict) -> dict[str, object]:
    """A line of the table of the heads' shares of a step."""
    return {
        "model": row["model"],
        "amp": row["amp"],
        "tokens": row.get("tokens", ""),
        "pairs": row.get("pairs", ""),
        "ms": row.get("error") or median(row, "ms"),
        "step ms": median(row, "step_ms"),
        "% of the step": median(row, "share", 100, 1),
        "peak GiB": gib(row, "peak_mib"),
        "step's": gib(row, "step_mib"),
    }


# Name in the record -> title of the table ("" for none), and a line of it.
RPL_TABLES: dict[str, tuple[str, Callable[[dict], dict]]] = {
    "forms": ("All 38,416 pairs of 196 tokens, forward and backward:", form_line),
    "memory": ("", memory_line),
    "shares": ("As a share of a ViT-B/16 step without labels:", share_line),
}


def rpl_section(found: list[dict]) -> list[str]:
    """Relative positional labels."""
    lines = []
    # A record that was cut off has fewer tables.
    for results in found:
        for name, (title, line) in RPL_TABLES.items():
            if name not in results:
                continue
            if title:
                lines += ["", title]
            lines += ["", table([line(row) for row in results[name]])]
    return titled("Relative positional labels", lines)


def data_line(row: dict) -> dict[str, str]:
    """A line of the tables of data paths."""
    return {
        "path": row["path"],
        "images/s": shown(row["images_per_s"], 0),
        "times the first": shown(row.get("ratio")),
    }


def data_section(found: list[dict]) -> list[str]:
    """Data paths: on one core, in a loader, and on to the device."""
    titles = {"per_core": "One core", "loader": "Loader", "device": "Loader, and on to the device"}
    lines = []
    for results in found:
        for name, title in titles.items():
            if name in results:
                lines += ["", f"{title}:", "", table([data_line(row) for row in results[name]])]
    return titled("Data", lines)


def evaluation_section(found: list[dict]) -> list[str]:
    """Feature extraction, probes and nearest neighbours."""
    lines = []
    for results in found:
        lines += evaluation_lines(results)
    if not lines:
        return []
    return titled("Evaluation", ["", *lines])


def evaluation_lines(results: dict) -> list[str]:
    """A list item for each figure of a record, then for each part that failed."""
    # A part that failed is {"error": text}; one that did not run is missing.
    extraction = results.get("extraction", {})
    probing = results.get("probing", {})
    knn = results.get("neighbours", {})
    lines = []
    if "features" in extraction:
        rate = shown(extraction["features"], 0)
        share = shown(extraction["share"])
        lines.append(f"- feature extraction: {rate} images/s, {share} of the forward pass alone")
    if "error" not in probing:
        for kind, row in probing.items():
            lines.append(
                f"- probes at several rates against one, {kind}: {shown(row['ratio'])} times the time"
            )
    if "seconds" in knn:
        lines.append(
            f"- kNN, {knn['queries']} x {knn['bank']}: {shown(knn['seconds'])} s, {knn['peak_mib']:.0f} MiB "
            f"in addition to {knn['features_mib']:.0f} MiB of features"
        )
    return lines + [f"- {name}: {part['error']}" for name, part in results.items() if "error" in part]


# Column -> where the plan that `main_pretrain.py --dry_run` prints has its figure.
PLAN = {
    "images/s": r"  speed +(\S+) images/s",
    "waiting for data, %": r"  speed .* (\S+) % of it waiting",
    "utilisation, %": r"  utilisation +(\S+) %",
    "memory, MB": r"  memory +(\S+) MB",
}
# In the log: the output of an end-to-end stage, between its first and its last line.
STAGE = re.compile(r"^== (e2e\S*): begins[^\n]*\n(.*?)^== \1: rc", re.MULTILINE | re.DOTALL)


def end_to_end_section(log: str) -> list[str]:
    """The plan that `main_pretrain.py --dry_run` printed in each stage.

    A stage without a plan shows its last line of output.
    """
    lines = []
    # Only these stages print a plan; the other stages write records.
    for name, output in STAGE.findall(log):
        figures = {column: "".join(re.findall(pattern, output)[:1]) for column, pattern in PLAN.items()}
        # Most likely an error, such as a missing compiler.
        if not any(figures.values()):
            figures["images/s"] = "no plan: " + " ".join(output.splitlines()[-1:])[:100]
        lines.append(dict(stage=name) | figures)
    if not lines:
        return []
    return titled("From JPEGs to the step", ["", table(lines)])


def page(records: list[dict], log: str) -> str:
    """The whole page as Markdown; only a line break if there are no figures."""
    sections = [
        heading(records, log),
        step_section(results_of(records, "step")),
        launches_section(results_of(records, "launches")),
        rpl_section(results_of(records, "rpl")),
        data_section(results_of(records, "data")),
        evaluation_section(results_of(records, "evaluation")),
        end_to_end_section(log),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def write_page(folder: str, more: list[str]) -> None:
    """Write FOLDER/table.md from the records in the folder, further records, and the log."""
    # gpu.sh names the records of data and evaluation separately, as they are in another folder.
    records = load([*map(str, Path(folder).glob("*.json")), *more])
    log_file = Path(folder, "log.txt")
    log = ""
    if log_file.exists():
        # Programs may print bytes that are not valid UTF-8.
        log = log_file.read_text(errors="replace")
    text = page(records, log)
    if text.strip():
        Path(folder, "table.md").write_text(text)


if __name__ == "__main__":
    write_page(sys.argv[1], sys.argv[2:])
