"""Write bench/results/README.md and bench/figures from the raw files in bench/results: ``python bench/report.py``.

A run is a folder that ``fbkernels train --out`` or ``fbkernels reproduce --out`` has written; its settings, versions, hardware and numbers
are taken from summary.json, or from results.json. What else one should know of it is in note.md.
Benchmarks are the files that ``pytest bench --benchmark-json=FILE`` has written, cpu.json and those of bench/gpu.sh.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fbkernels.bench.suite import SWEEPS, figure
from fbkernels.lab.paper import EXPERIMENTS
from fbkernels.lab.plot import curves
from fbkernels.lab.train import number, recipe

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
    lines += ["", f"![{run.name}: accuracy](../figures/{run.name}/accuracy.png)"]
    return f"\n## {run.name}\n\n`{command(summary['settings'])}`\n\n{versions}; {hardware}\n\n" + "\n".join(lines) + "\n"


class Target(NamedTuple):
    """A row of DESIGN.md's "How fast": a number that ``value`` finds in the benchmarks, at least or at most ``bound``."""

    work: str
    rival: str
    relation: str
    bound: float
    value: Callable[[dict[str, Any]], float]


def _noise(kind: str, shape: str) -> Callable[[dict[str, Any]], float]:
    def value(b: dict[str, Any]) -> float:
        names = [n for n in b if n.startswith(f"bench_noise::test_noise[{kind}-{shape}-") and n.endswith("2]")]
        times = b[names[0] if names else "bench_noise"]["median_ns"]
        return float(times["torch.randn, per element"] / times["ours, per element"])

    return value


def _classifier(b: dict[str, Any]) -> dict[str, float]:
    return b["bench_fused_mlp::test_classifier[mse]"]["speedup"]


def _best(values: dict[str, float], prefix: str = "ours") -> float:
    return min(v for k, v in values.items() if k.startswith(prefix))


def _some(b: dict[str, Any], prefix: str) -> list[Any]:
    return [info for name, info in b.items() if name.startswith(prefix)] or b[prefix]  # or KeyError


CPU = [
    Target("FusedMLP 784-50-20-10, a step", "best eager ridge", ">=", 6, lambda b: _best(_classifier(b), "ridge")),
    Target("the same", "eager backprop, torch.optim", ">=", 5, lambda b: _classifier(b)["backprop with torch.optim"]),
    Target("the same", "eager backprop without an optimiser object", ">=", 5, lambda b: _classifier(b)["backprop by autograd"]),
    Target(
        "FusedMLP 784-200-2-200-784, a step",
        "eager ridge, torch.linalg.solve",
        ">=",
        10,
        lambda b: b["bench_fused_mlp::test_autoencoder"]["speedup"]["ridge solve"],
    ),
    Target(
        "the paper's CNN, ridge: share of a step's time",
        "eager backprop, the faster layout",
        "<=",
        0.85,
        lambda b: b["bench_cnn::test_step[default]"]["time_over_backprop"]["ours ridge"],
    ),
    Target("the same", "careful eager", ">=", 1.35, lambda b: b["bench_cnn::test_step[default]"]["speedup_over_eager"]["ridge"]),
    Target("pointwise and B's update, 24,576 units", "eager", ">=", 2.5, lambda b: b["bench_pointwise::test_pointwise[2]"]["speedup"]),
    Target("Gaussian noise, 64 x 24,576", "torch.randn", ">=", 2, _noise("gaussian", "64x24576")),
    Target("Gaussian noise, 32 x 50", "torch.randn", ">=", 2, _noise("gaussian", "32x50")),
    Target("Rademacher noise, 64 x 24,576", "torch.randn", ">=", 15, _noise("rademacher", "64x24576")),
    Target("Rademacher noise, 32 x 50", "torch.randn", ">=", 15, _noise("rademacher", "32x50")),
    Target(
        "peak memory of the CNN's step",
        "backprop's and B and statistics",
        "<=",
        1,
        lambda b: (m := b["bench_cnn::test_memory"])["peak_mib"]["ours ridge"] / m["limit_mib"],
    ),
]
GPU = [
    Target(
        "the paper's CNN, batch 512, bf16: share of a step's time",
        "compiled backprop",
        "<=",
        0.9,
        lambda b: _best(b["bench_triton::test_step[cnn]"]["time_over_compiled_backprop"]),
    ),
    Target(
        "the same",
        "eager learned feedback",
        ">=",
        3,
        lambda b: _best(m := b["bench_triton::test_step[cnn]"]["median_ms"], "eager") / _best(m),
    ),
    Target(
        "ResNet-18, batch 512: share of a step's time",
        "compiled backprop",
        "<=",
        1.1,
        lambda b: _best(b["bench_triton::test_step[resnet18]"]["time_over_compiled_backprop"]),
    ),
    Target(
        "B's update, the slowest of its shapes",
        "copy",
        ">=",
        0.8,
        lambda b: min(max(v for k, v in i["share_of_copy"].items() if k != "copy") for i in _some(b, "bench_triton::test_update[")),
    ),
    Target(
        "a layer in one launch, the slowest: share of its time",
        "cat([x, p]) and compiled epilogue",
        "<=",
        1,
        lambda b: max(i["time_over_compiled"]["ours"] for i in _some(b, "bench_triton::test_layer[")),
    ),
    *(
        Target(
            f"FusedMLP, {name}",
            "compiled backprop, reduce-overhead",
            ">=",
            5,
            lambda b, name=name: b[f"bench_fused_mlp_cuda::test_step[{name}]"]["times_ours"]["backprop, compiled"],
        )
        for name in ("classifier", "autoencoder")
    ),
    Target(
        "launches of a layer: forward, noise and B's update",
        "",
        "<=",
        1,
        lambda b: max(b["bench_triton::test_launches"]["launches"][name] for name in ("perturbed_linear", "perturbed_conv2d")),
    ),
]


def benchmarks() -> list[Path]:
    return sorted(path for path in RESULTS.glob("*.json") if "benchmarks" in json.loads(path.read_text()))


def extra(files: list[Path]) -> dict[str, Any]:
    """``extra_info`` of each benchmark, as FILE::NAME."""
    found = (b for path in files for b in json.loads(path.read_text())["benchmarks"])
    return {f"{Path(b['fullname'].partition('::')[0]).stem}::{b['name']}": b["extra_info"] for b in found}


def targets(info: dict[str, Any]) -> str:
    lines = ["| machine | work | rival | target | measured | |", "| --- | --- | --- | --- | --- | --- |"]
    for machine, rows in (("two CPU cores", CPU), ("one Hopper GPU", GPU)):
        for t in rows:
            try:
                value = t.value(info)
            except (KeyError, ValueError):
                measured, verdict = "-", "not measured"
            else:
                met = value >= t.bound if t.relation == ">=" else value <= t.bound
                measured, verdict = figure(value), "met" if met else "**not met**"
            lines.append(f"| {machine} | {t.work} | {t.rival} | {t.relation} {t.bound:g} | {measured} | {verdict} |")
    return "\n## Targets\n\nTimes faster than the rival, where the work does not say otherwise.\n\n" + "\n".join(lines) + "\n"


def cases(info: dict[str, Any]) -> Iterator[str]:
    """A table for each op, layer and step of bench_suite.py."""
    heads = {
        "us": "us",
        "ratio": "ratio",
        "mflop": "MFLOP",
        "kb": "kB",
        "gflop_s": "GFLOP/s",
        "gb_s": "GB/s",
        "roofline": "% of roofline",
        "peak_kib": "peak KiB",
        "launches": "launches",
        "host_us": "host us",
    }
    for name, b in info.items():
        if not name.startswith("bench_suite::") or "sweep" in name:
            continue
        for case in b["cases"]:
            where = f"{b['gpu'] or b['cpu']}, {b['threads']} threads, torch {b['torch']}, load {b['load'][0]:.1f}"
            yield f"\n### {case['name']}\n\n{where}; ratio to {case['baseline']}.\n"
            yield "| provider | " + " | ".join(heads.values()) + " |"
            yield "| --- " * (len(heads) + 1) + "|"
            for row in case["rows"]:
                numbers = ("-" if row.get(key) is None else figure(row[key]) for key in heads)
                yield (
                    f"| {row['provider']} | {' | '.join(numbers)} |" if "us" in row else f"| {row['provider']} | failed: {row['failed']} |"
                )
            if not any(row["provider"].startswith("BioTorch") for row in case["rows"]) and case["baseline"] == "backprop":
                yield "\nBioTorch was not installed."


def lost(path: Path) -> str:
    """The benchmarks in which a rival is faster than ours."""
    slower = []
    for b in json.loads(path.read_text())["benchmarks"]:
        info, name = b["extra_info"], b["name"].removeprefix("test_")
        groups = [(name, times) for unit in ("ms", "us", "ns") if (times := info.get(f"median_{unit}"))]
        groups += [(c["name"], {r["provider"]: r["us"] for r in c["rows"] if "us" in r}) for c in info.get("cases", ())]
        for title, times in groups:
            mine = [v for k, v in times.items() if k.startswith("ours") or k == "per element"]
            rest = {k: v for k, v in times.items() if not k.startswith("ours") and "copy" not in k}
            if mine and rest and min(mine) > min(rest.values()):
                best = min(rest, key=lambda k: rest[k])
                slower.append(f"| {title} | {best} | {min(mine) / rest[best]:.2f} |")
    if not slower:
        return ""
    return "\n### Lost\n\n| benchmark | the fastest | our time over its |\n| --- | --- | --- |\n" + "\n".join(slower) + "\n"


def speed(info: dict[str, Any], hardware: str, out: Path) -> None:
    """A step's time over backprop's, a group of bars for each network; above each, the time itself."""
    networks: dict[str, dict[str, float]] = {}  # ms
    for name, title in (
        ("test_classifier[mse]", "784-50-20-10\nFusedMLP, batch 32"),
        ("test_autoencoder", "784-200-2-200-784\nFusedMLP, batch 32"),
    ):
        times = {k: v / 1e3 for k, v in info[f"bench_fused_mlp::{name}"]["median_us"].items()}
        networks[title] = {"backprop": _best(times, "backprop with"), "careful eager": _best(times, "ridge"), "ours": _best(times)}
    times = info["bench_cnn::test_step[default]"]["median_ms"]
    backprop = min(times["backprop"], times["backprop nchw"])
    networks["the paper's CNN\nbatch 64"] = {"backprop": backprop, "careful eager": times["eager ridge"], "ours": times["ours ridge"]}

    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.add_subplot(ylabel="time of a step / backprop's")
    axes.set_title(f"ridge learned feedback on {hardware}", fontsize=10)
    for i, (label, color) in enumerate((("backprop", "C7"), ("careful eager", "C1"), ("ours", "C0"))):
        heights = [times[label] / times["backprop"] for times in networks.values()]
        bars = axes.bar([x + 0.27 * (i - 1) for x in range(len(networks))], heights, 0.25, label=label, color=color)
        axes.bar_label(bars, [f"{times[label]:.3g} ms" for times in networks.values()], fontsize=8)
    axes.set_xticks(range(len(networks)), list(networks))
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.margins(y=0.1)
    axes.legend()
    picture.savefig(out, dpi=150)


def sweeps(info: dict[str, Any], out: Path) -> None:
    """How a step's time grows with batch, width, classes and depth."""
    picture = Figure(figsize=(8, 6), layout="constrained")
    for axes, axis in zip(picture.subplots(2, 2).flatten(), SWEEPS, strict=True):
        b = info[f"bench_suite::test_sweep[{axis}]"]
        rows = [(int(case["at"]), row) for case in b["cases"] for row in case["rows"]]
        for provider, color in (("backprop", "C7"), ("ours ridge", "C0"), ("ours joint", "C2")):
            points = [(at, row["us"] / 1e3) for at, row in rows if row["provider"] == provider]
            axes.plot(*zip(*points, strict=True), marker=".", label=provider, color=color)
        axes.set(xlabel=axis, xscale="log", yscale="log", ylabel="ms a step")
        axes.set_xticks(SWEEPS[axis], [f"{n:,}" for n in SWEEPS[axis]])
        axes.minorticks_off()
        axes.yaxis.set(major_locator=LogLocator(10, (1, 2, 5)), major_formatter="{x:g}")
    axes.legend()
    picture.suptitle(f"784-256-256-256-10, batch 64, direct feedback; {b['gpu'] or b['cpu']}, {b['threads']} threads", fontsize=10)
    picture.savefig(out, dpi=150)


def hardware(path: Path) -> str:
    cpu = json.loads(path.read_text())["machine_info"]
    return f"{cpu['cpu'].get('brand_raw', cpu['processor'])}, {cpu['cpu'].get('count', '?')} cores"


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
    where = f"{hardware(path)}, python {machine['python_version']}; {data['datetime'][:10]}"
    roof = ", ".join(f"{k} {figure(v)}" for k, v in sorted(rates.items()))
    return f"{heading}\n{where}\n\n" + "\n".join(lines) + f"\n\nThe machine's own rates in the same run: {roof}.\n"


def smaller(path: Path) -> str:
    """What ``convert(share=)`` and ``convert(rank=)`` do to B's size and to the angle of each layer, as samples pass."""
    text = ""
    for what, data in json.loads(path.read_text()).items():
        rows = data["rows"]
        times, signals = "step_cpu_seconds" in rows[0], len({row["signal"] for row in rows}) > 1
        samples = [f"{int(n):,} samples" for n in rows[0]["angles"]]
        head = [what, *(["signal"] if signals else []), "noisy units", "B, MiB", *(["time"] if times else []), *samples, "floor"]
        lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        for row in rows:
            angles = [" ".join(f"{angle:.0f}" for angle in layers) for layers in (*row["angles"].values(), row["floor"])]
            time = [f"{row['step_cpu_seconds'] / rows[0]['step_cpu_seconds']:.2f}"] if times else []
            cells = [
                "all" if row[what] is None else str(row[what]),
                *([row["signal"]] if signals else []),
                f"{row['noisy_units']:,}",
                f"{row['B_bytes'] / 2**20:.2f}",
            ]
            lines.append(f"| {' | '.join((*cells, *time, *angles))} |")
        about = f"{data['settings']['data']}, angle of each layer while W is kept, and with the best B of the form; torch {data['torch']}"
        about += "; time: of the processor for a step, relative to the first row, medians of steps in turns" if times else ""
        text += f"\n## {what}\n\n`python bench/share.py --data-dir D`: {about}\n\n" + "\n".join(lines) + "\n"
    return text


def soaked(path: Path) -> str:
    """What long runs leak and how far they drift."""
    data = json.loads(path.read_text())
    lines = ["| network | steps | bytes a step | at most | not finite | skipped | B's error | V's asymmetry |", "| --- " * 8 + "|"]
    for name, r in data["results"].items():
        numbers = [" ".join(f"{v:.1e}" for v in r.get("error_of_B", ())) or "-", f"{r['asymmetry']:.1e}" if "asymmetry" in r else "-"]
        memory = f"{r['bytes_per_step']:.3f} | {r['bytes_per_step_upper']:.3f}"
        lines.append(f"| {name} | {r['steps']:,} | {memory} | {r['non_finite_losses']} | {r['skipped']} | {' | '.join(numbers)} |")
    about = ", ".join(f"{k} {v}" for part in ("versions", "hardware") for k, v in data[part].items() if v is not None)
    text = (
        "*bytes a step*: the slope of resident memory, and the upper end of its 95 % interval; an allocation lost each step would take 32. "
        "*B's error*: of each layer, to the ridge solution of all steps in float64 (SPEC 7's norm)."
    )
    return f"\n## soak\n\n`python bench/soak.py`\n\n{about}\n\n{text}\n\n" + "\n".join(lines) + "\n"


def foreign(path: Path) -> str:
    """Of the public architectures those that pass every check of bench/zoo.py, by where they are from, and why the others do not."""
    data = json.loads(path.read_text())
    structures, rows = list(data["settings"]["rules"]), [r for r in data["rows"] if r["plain"]["ok"]]
    wrong = {
        (r["name"], s): [c["note"] for k, c in r["structures"][s].items() if not (c["ok"] or k == "bitwise")]
        for r in rows
        for s in structures
    }
    lines = ["| from | " + " | ".join(structures) + " |", "| --- " * (1 + len(structures)) + "|"]
    for source in (*dict.fromkeys(r["source"] for r in rows), ""):
        names = [r["name"] for r in rows if source in ("", r["source"])]
        counts = [f"{sum(not wrong[name, s] for name in names)} of {len(names)}" for s in structures]
        lines.append(f"| {source or 'all'} | " + " | ".join(counts) + " |")
    reasons = {name: notes[0].split(": ", 1)[-1] for (name, _), notes in wrong.items() if notes}
    about = "; ".join(f"{s} {rule}" for s, rule in data["settings"]["rules"].items())
    checked = sum("oracle" in r["structures"]["direct"] for r in rows)
    text = f"torch {data['torch']}; {about}. The checks in float64 were run on {checked} of them.\n\n" + "\n".join(lines) + "\n\nNot:\n\n"
    return "\n## zoo\n\n`python bench/zoo.py`\n\n" + text + "\n".join(f"* {name}: {why}" for name, why in reasons.items()) + "\n"


def experiment(folder: Path) -> str:
    """A figure or table of the paper, as ``fbkernels reproduce`` has made it."""
    raw = json.loads((folder / "results.json").read_text())
    made = EXPERIMENTS[raw["experiment"]]
    drawn = RESULTS.parent / "figures" / folder.name
    drawn.mkdir(parents=True, exist_ok=True)
    pictures = ""
    for name, picture in made.figures(raw["results"]).items():
        picture.savefig(drawn / f"{name}.png", dpi=100)
        pictures += f"\n![{made.about}: {name}](../figures/{folder.name}/{name}.png)\n"
    about = ", ".join(f"{k} {v}" for part in ("versions", "hardware") for k, v in raw[part].items() if v is not None)
    note = folder / "note.md"
    own = f"\n{note.read_text().strip()}\n" if note.is_file() else ""
    tables = "\n".join(table.markdown() for table in made.tables(raw["results"]))
    return f"\n## {folder.name}\n\n`{raw['command']}`\n\n{about}\n\n{tables}{own}{pictures}"


def main() -> None:
    figures = RESULTS.parent / "figures"
    runs = sorted(path.parent for path in RESULTS.glob("*/summary.json"))
    shared = smaller(RESULTS / "share.json") if (RESULTS / "share.json").exists() else ""
    shared += soaked(RESULTS / "soak.json") if (RESULTS / "soak.json").exists() else ""
    shared += foreign(RESULTS / "zoo.json") if (RESULTS / "zoo.json").exists() else ""
    reproduced = "".join(experiment(path.parent) for path in sorted(RESULTS.glob("*/results.json")))
    info = extra(benchmarks())
    tables = [targets(info), *(timings(path) + lost(path) for path in benchmarks())]
    suite = "\n".join(cases(info))
    tables += [f"\n## Ops, layers and steps\n{suite}\n"] if suite else []
    (RESULTS / "README.md").write_text(HEAD + "".join(map(table, runs)) + shared + reproduced + "".join(tables))
    speed(info, hardware(RESULTS / "cpu.json"), figures / "speed.png")
    if "bench_suite::test_sweep[batch]" in info:
        sweeps(info, figures / "sweep.png")
    for run in runs:
        (figures / run.name).mkdir(parents=True, exist_ok=True)
        curves(records(run), figures / run.name)


if __name__ == "__main__":
    main()
