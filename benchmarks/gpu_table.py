"""The Markdown table of what benchmarks/gpu.sh measured: `python -m benchmarks.gpu_table FOLDER [MORE.json ...]`.

It reads FOLDER/*.json and FOLDER/log.txt and writes FOLDER/table.md. Stages that are missing are left out.
"""

import json
import re
import sys
from pathlib import Path

from benchmarks.timing import shown, table

HF, TIMM = (
    "transformers ViTMAE",
    "timm blocks, usual flow",
)  # as in benchmarks/step.py, whose import takes seconds
ORDER = ("mae_vit_small", "mae_vit_base", "mae_vit_large", "mae_vit_huge")


def load(paths) -> list[dict]:
    """The records that `benchmarks/run.py --json` wrote."""
    return [json.loads(Path(path).read_text()) for path in sorted(paths) if Path(path).exists()]


def results_of(records, benchmark) -> list[dict]:
    return [r["results"] for r in records if r["benchmark"] == benchmark]


def median(row, name, factor=1.0, digits=2) -> str:
    """A figure of a row as text; empty where the row does not have it."""
    if name not in row:
        return ""
    return f"{factor * row[name]['median']:.{digits}f}"


def gib(row, name) -> str:
    if name not in row:
        return ""
    return f"{row[name] / 1024:.2f}"


def heading(records, log: str) -> list[str]:
    """What was measured on: from the records, those of a GPU first; else the name of the machine in the log."""
    if not records:
        return [f"# {name}" for name in re.findall(r"^== machine: (.+)", log, re.MULTILINE)[-1:]]
    record = max(records, key=lambda r: r["machine"]["gpu"] is not None)
    machine, versions = record["machine"], record["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        f"# {machine['gpu'] or machine['cpu']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores. {listed}. Commit {record['commit'] or 'unknown'}.",
    ]


def step_section(found) -> list[str]:
    """Training steps. Ratios are of medians: a run that was cut off has no others."""
    lines = []
    for results in found:
        lines += step_lines(results.get("rows", []))
    if not lines:
        return []
    rank = {name: i for i, name in enumerate(ORDER)}
    lines.sort(
        key=lambda line: rank.get(line["model"].rpartition("_")[0], len(rank))
    )  # stable: variants keep their order
    rates = "; ".join(rate for results in found for rate in rates_of(results))
    text = (
        f"MFU is against a large F.linear, measured in the process of each model: {rates}. A step's parts are timed by "
        "themselves, with a wait after each, and add up to more than the step."
    )
    return ["## Training step", "", text, "", table(lines)]


def rates_of(results) -> list[str]:
    """The measured rates of products in one process, as text for each precision."""
    models = ", ".join(dict.fromkeys(row["model"] for row in results.get("rows", [])))
    return [
        f"{models} {amp} {peak / 1e12:.4g} TFLOP/s" for amp, peak in results.get("matmul_peak", {}).items()
    ]


def step_lines(rows) -> list[dict[str, str]]:
    good = {
        (r["model"], r["amp"], r["variant"]): r["images_per_s"]["median"] for r in rows if "error" not in r
    }
    lines = []
    for row in rows:
        line = dict(model=row["model"], variant=row["variant"], amp=row["amp"], batch=row["batch_size"])
        line["images/s"] = row.get("error") or median(row, "images_per_s", digits=0)
        line["ms/step"] = median(row, "seconds", 1e3, 1)
        parts = [median(row, part, 1e3, 1) for part in ("forward", "backward", "optimizer")]
        line["forward, backward, optimizer"] = ", ".join(filter(None, parts))
        line["MFU"] = median(row, "mfu")
        for peer, word in ((HF, "transformers"), (TIMM, "timm")):
            other = good.get((row["model"], row["amp"], peer))
            line[f"x {word}"] = ""
            if other and "error" not in row:
                line[f"x {word}"] = f"{row['images_per_s']['median'] / other:.2f}"
        line["peak GiB"] = gib(row, "peak_allocated_mib")
        line["reserved"] = gib(row, "peak_reserved_mib")
        line["beyond weights"] = gib(row, "extra_mib")
        line["compile s"] = ""
        if "compile_s" in row:
            line["compile s"] = f"{row['compile_s']:.1f}"
        lines.append(line)
    return lines


def launches_section(found) -> list[str]:
    """What a step costs the host beside what it costs the device."""
    lines, kernels = [], []
    for results in found:
        if "launch_us" in results:
            lines += ["", f"A bare launch takes the host {shown(results['launch_us'])} us."]
        if "rows" in results:
            lines += ["", table([launches_line(row) for row in results["rows"]])]
        for row in results.get("rows", []):
            if row.get("longest"):
                kernels += [
                    "",
                    f"{row['model']}, {row['variant']}, the kernels that take longest:",
                    "",
                    *(f"- {k['ms']:.2f} ms in {k['times']}: `{k['name']}`" for k in row["longest"]),
                ]
    if not lines:
        return []
    return ["## Launches", *lines, *kernels]


def launches_line(row) -> dict[str, str]:
    line = dict(
        model=row["model"],
        pixels=row["pixels"],
        variant=row["variant"],
        amp=row["amp"],
        batch=row["batch_size"],
    )
    line["launches"] = row.get("error") or row.get("launches", "")
    line["kernels"] = row.get("kernels", "")
    line["issued by the host, ms"] = shown(row.get("host_ms"))
    line["device busy, ms"] = ""
    if "busy_ms" in row:
        line["device busy, ms"] = f"{row['busy_ms']:.2f}"
    line["step, ms"] = shown(row.get("step_ms"))
    line["host us/launch"] = ""
    if "us_per_launch" in row:
        line["host us/launch"] = f"{row['us_per_launch']:.1f}"
    return line


def rpl_section(found) -> list[str]:
    lines = []
    for results in found:
        if "forms" in results:
            rows = [
                dict(
                    form=r["form"],
                    amp=r["amp"],
                    batch=r["batch_size"],
                    ms=r.get("error") or shown(r["ms"]),
                    **{"times obvious": shown(r.get("times_obvious")), "peak GiB": gib(r, "peak_mib")},
                )
                for r in results["forms"]
            ]
            lines += ["", "All 38,416 pairs of 196 tokens, forward and backward:", "", table(rows)]
        if "memory" in results:
            rows = [
                {
                    "swept, batch": r["batch_size"],
                    "amp": r["amp"],
                    "peak GiB": r.get("error") or gib(r, "peak_mib"),
                }
                for r in results["memory"]
            ]
            lines += ["", table(rows)]
        if "shares" in results:
            rows = [
                dict(
                    model=r["model"],
                    amp=r["amp"],
                    tokens=r.get("tokens", ""),
                    pairs=r.get("pairs", ""),
                    ms=r.get("error") or median(r, "ms"),
                    **{
                        "step ms": median(r, "step_ms"),
                        "% of the step": median(r, "share", 100, 1),
                        "peak GiB": gib(r, "peak_mib"),
                        "step's": gib(r, "step_mib"),
                    },
                )
                for r in results["shares"]
            ]
            lines += ["", "As a share of a ViT-B/16 step without labels:", "", table(rows)]
    if not lines:
        return []
    return ["## Relative positional labels", *lines]


def data_section(found) -> list[str]:
    lines = []
    for results in found:
        for name, title in (
            ("per_core", "One core"),
            ("loader", "Loader"),
            ("device", "Loader, and on to the device"),
        ):
            if name in results:
                rows = [
                    {
                        "path": r["path"],
                        "images/s": shown(r["images_per_s"], 0),
                        "times the first": shown(r.get("ratio")),
                    }
                    for r in results[name]
                ]
                lines += ["", f"{title}:", "", table(rows)]
    if not lines:
        return []
    return ["## Data", *lines]


def evaluation_section(found) -> list[str]:
    lines = []
    for results in found:
        extraction, probing = results.get("extraction", {}), results.get("probing", {})
        knn = results.get("neighbours", {})
        if "features" in extraction:
            lines.append(
                f"- feature extraction: {shown(extraction['features'], 0)} images/s, "
                f"{shown(extraction['share'])} of the bare forward pass"
            )
        if "error" not in probing:
            lines += [
                f"- probes at several rates against one, {kind}: {shown(row['ratio'])} times the time"
                for kind, row in probing.items()
            ]
        if "seconds" in knn:
            lines.append(
                f"- kNN, {knn['queries']} x {knn['bank']}: {shown(knn['seconds'])} s, {knn['peak_mib']:.0f} MiB "
                f"beside {knn['features_mib']:.0f} MiB of features"
            )
        lines += [f"- {name}: {part['error']}" for name, part in results.items() if "error" in part]
    if not lines:
        return []
    return ["## Evaluation", "", *lines]


PLAN = {
    "images/s": r"  speed +(\S+) images/s",
    "waiting for data, %": r"  speed .* (\S+) % of it waiting",
    "utilisation, %": r"  utilisation +(\S+) %",
    "memory, MB": r"  memory +(\S+) MB",
}


def end_to_end_section(log: str) -> list[str]:
    """The plan that `main_pretrain.py --dry_run` printed, a line for each stage; its last line where it has none."""
    lines = []
    for name, output in re.findall(
        r"^== (e2e\S*): begins[^\n]*\n(.*?)^== \1: rc", log, re.MULTILINE | re.DOTALL
    ):
        figures = {column: "".join(re.findall(pattern, output)[:1]) for column, pattern in PLAN.items()}
        if not any(figures.values()):
            figures["images/s"] = "no plan: " + " ".join(output.splitlines()[-1:])[:100]
        lines.append(dict(stage=name) | figures)
    if not lines:
        return []
    return ["## From JPEGs to the step", "", table(lines)]


def page(records: list[dict], log: str) -> str:
    sections = [heading(records, log)]
    sections.append(step_section(results_of(records, "step")))
    sections.append(launches_section(results_of(records, "launches")))
    sections.append(rpl_section(results_of(records, "rpl")))
    sections.append(data_section(results_of(records, "data")))
    sections.append(evaluation_section(results_of(records, "evaluation")))
    sections.append(end_to_end_section(log))
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def write_page(folder: str, more: list[str]) -> None:
    records = load([*map(str, Path(folder).glob("*.json")), *more])
    log = Path(folder, "log.txt")
    text = page(records, log.read_text(errors="replace") if log.exists() else "")
    if text.strip():
        Path(folder, "table.md").write_text(text)


if __name__ == "__main__":
    write_page(sys.argv[1], sys.argv[2:])
