"""Write bench/results/README.md and bench/figures from the runs in bench/results: ``python bench/report.py``.

A run is a folder that ``fbkernels train --out`` has written; its settings, versions, hardware and numbers are taken from summary.json. What
else one should know of it is in note.md.
Benchmarks are the files that ``pytest bench --benchmark-json=FILE`` has written.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fbkernels.plot import curves
from fbkernels.train import recipe

RESULTS = Path(__file__).parent / "results"
HEAD = """# Results

Made by `python bench/report.py` from the raw files beside this page; no number is typed by hand. Mean over seeds, with the standard error
where there are several. *angle*: degrees between a layer's learned and true gradient at the end of training, from the first hidden layer to
the last. *time*: of a training epoch, relative to backprop's in the same run. Accuracy is of the last epoch, never of the best.
Where training images were held out, the figures show those, and the test set was read once, after the last epoch.
"""


def command(settings: dict[str, Any]) -> str:
    """What differs from the model's recipe."""
    kind = {k: settings[k] for k in ("data", "model")}
    default = json.loads(json.dumps(asdict(recipe(**kind))))
    words = ["fbkernels train"]
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if value is None or (value == default[name] and name not in kind):
            continue
        if name == "data_dir":
            value = "D"
        elif name == "seeds" and value == list(range(len(value))):
            value = len(value)
        elif isinstance(value, bool):
            option, value = option if value else option.replace("--", "--no-", 1), ""
        elif isinstance(value, list):
            value = ",".join(map(str, value)) or "''"
        elif isinstance(value, dict):
            option, value = "--rule-arg", " --rule-arg ".join(f"{k}={v}" for k, v in value.items())
        words.append(f"{option} {value}".strip())
    return " ".join(words)


def number(value: dict[str, float | None], digits: int) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.{digits}f}" + ("" if value["standard_error"] is None else f" ± {value['standard_error']:.{digits}f}")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(run: Path) -> str:
    summary = json.loads((run / "summary.json").read_text())
    rows = records(run)
    seconds = {m: sorted(r["seconds"] for r in rows if r["method"] == m) for m in summary["results"]}
    median = {m: s[len(s) // 2] for m, s in seconds.items()}
    last = max(r["epoch"] for r in rows)
    lines = ["| method | test accuracy % | train loss | angle | time |", "| --- | --- | --- | --- | --- |"]
    for method, result in summary["results"].items():
        final = [r for r in rows if r["method"] == method and r["epoch"] == last]
        angles = [[point["angle"] for point in r["points"].values()] for r in final if r.get("points")]
        angle = " ".join(f"{sum(layer) / len(layer):.0f}" for layer in zip(*angles, strict=True)) if angles else "0"
        time = f"{median[method] / median['backprop']:.2f}" if "backprop" in median else "-"
        accuracy, loss = number(result["test_accuracy"]["final"], 2), number(result["train_loss"]["final"], 3)
        lines.append(f"| {method} | {accuracy} | {loss} | {angle} | {time} |")
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    hardware = ", ".join(f"{name} {value}" for name, value in summary["hardware"].items() if value is not None)
    note = run / "note.md"
    lines += ["", note.read_text().strip()] if note.is_file() else []
    return f"\n## {run.name}\n\n`{command(summary['settings'])}`\n\n{versions}; {hardware}\n\n" + "\n".join(lines) + "\n"


def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def timings(path: Path) -> str:
    """A line a benchmark: ours, and each rival with its time over ours."""
    data = json.loads(path.read_text())
    machine, benchmarks = data["machine_info"], data["benchmarks"]
    lines = ["| benchmark | ours | others, and their time over ours |", "| --- | --- | --- |"]
    rates: dict[str, float] = {}
    for b in benchmarks:
        info = b["extra_info"]
        rates |= {k: v for k, v in info.items() if k.endswith(("_gmac_s", "_gb_s")) or "gmac_s_" in k or "gb_s_" in k}
        name = b["name"].removeprefix("test_")
        if "peak_mib" in info:
            peak = info["peak_mib"]
            ours = ", ".join(f"{k.removeprefix('ours ')} {v:.0f} MiB" for k, v in peak.items() if k.startswith("ours"))
            rest = ", ".join(f"{k} {v:.0f}" for k, v in peak.items() if not k.startswith("ours"))
            lines.append(f"| {name} | {ours} | {rest}; limit {info['limit_mib']:.0f} |")
        for unit in ("ms", "us", "ns"):
            times = info.get(f"median_{unit}", {})
            mine = {k: v for k, v in times.items() if k.startswith("ours")}
            best = min(mine.values(), default=0.0)
            if mine:
                ours = ", ".join(f"{k.removeprefix('ours').strip(' ,')} {figure(v)} {unit}".strip() for k, v in mine.items())
                rest = ", ".join(f"{k} {figure(v)} ({v / best:.2f})" for k, v in times.items() if k not in mine)
                lines.append(f"| {name} | {ours} | {rest} |")
    heading = f"\n## {path.stem}\n\n`pytest bench --benchmark-json={path.stem}.json`, medians of calls in turns\n"
    cpu = machine["cpu"].get("brand_raw", machine["processor"])
    where = f"{cpu}, {machine['cpu'].get('count', '?')} cores, python {machine['python_version']}; {data['datetime'][:10]}"
    roof = ", ".join(f"{k} {figure(v)}" for k, v in sorted(rates.items()))
    return f"{heading}\n{where}\n\n" + "\n".join(lines) + f"\n\nThe machine's own rates in the same run: {roof}.\n"


def sharing(path: Path) -> str:
    """What ``convert(share=)`` does to B's size and to the angle of each layer, as samples pass."""
    data = json.loads(path.read_text())
    results = data["results"]
    samples = list(next(iter(results.values()))["angles"])
    lines = [
        f"| share | noisy units | B, MiB | {' | '.join(f'{int(n):,} samples' for n in samples)} | floor |",
        "| --- " * (4 + len(samples)) + "|",
    ]
    for share, row in results.items():
        angles = [" ".join(f"{angle:.0f}" for angle in layers) for layers in (*row["angles"].values(), row["floor"])]
        lines.append(f"| {share} | {row['noisy_units']:,} | {row['B_bytes'] / 2**20:.2f} | {' | '.join(angles)} |")
    text = "angle of each layer while W is kept, and with the best B of the form; torch " + data["torch"]
    return f"\n## share\n\n`python bench/share.py --data-dir D`: {text}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    runs = sorted(path.parent for path in RESULTS.glob("*/summary.json"))
    benchmarks = sorted(path for path in RESULTS.glob("*.json") if "benchmarks" in json.loads(path.read_text()))
    shared = sharing(RESULTS / "share.json") if (RESULTS / "share.json").exists() else ""
    (RESULTS / "README.md").write_text(HEAD + "".join(map(timings, benchmarks)) + "".join(map(table, runs)) + shared)
    for run in runs:
        figures = RESULTS.parent / "figures" / run.name
        figures.mkdir(parents=True, exist_ok=True)
        curves(records(run), figures)


if __name__ == "__main__":
    main()
