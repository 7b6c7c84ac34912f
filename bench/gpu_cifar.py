"""CIFAR-100 with the paper's CNN and ResNet-18: backprop and the rules, three seeds, as far as a given time goes. Call it again to go on.

    python bench/gpu_cifar.py OUT DATA_DIR [--minutes M] [--epochs N] [--device D]

OUT/cifar100-MODEL gets metrics.jsonl and summary.json of the runs that are done, as ``fbkernels train`` would write them; what is there is
not run again. A run that the time cut short is in runs/, and goes on from there if that still exists.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fbkernels import train as job

METHODS = ("joint-output", "backprop", "weight-mirror", "dfa", "joint-loss", "ridge")
MODELS = ("paper_cnn", "resnet18")
SEEDS = (0, 1, 2)


def settings(model: str, methods: tuple[str, ...], seeds: tuple[int, ...], given: dict[str, Any]) -> job.Settings:
    feedback = "layerwise" if methods[0] == "weight-mirror" else "direct"
    return job.recipe(data="cifar100", model=model, feedback=feedback, rule=methods[0], compare=methods[1:], seeds=seeds, **given)


def one(s: job.Settings, work: Path, deadline: float) -> list[dict[str, Any]]:
    """The records of one run, or KeyboardInterrupt at the deadline."""
    state = None
    if (work / "checkpoint.pt").is_file():
        stored, state = job.load_checkpoint(work)
        if stored != s:
            raise ValueError(f"{work} holds a run with other settings: remove it")

    def log(r: dict[str, Any]) -> None:
        print(
            r["method"], r["seed"], r["epoch"], r["train_loss"], r["val_accuracy"], r["test_accuracy"], f"{r['seconds']:.1f} s", flush=True
        )

    records = job.train(s, work, checkpoint=state, watch=lambda _: time.monotonic() > deadline, log=log)
    shutil.rmtree(work)
    return records


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("data_dir")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    given = {"data_dir": args.data_dir, "epochs": args.epochs, "device": args.device}
    for seed in SEEDS:
        for model in MODELS:
            folder = args.out / f"cifar100-{model}"
            folder.mkdir(parents=True, exist_ok=True)
            lines = folder / "metrics.jsonl"
            records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
            for method in METHODS:
                done = max((r["epoch"] for r in records if (r["method"], r["seed"]) == (method, seed)), default=0)
                if done not in (0, args.epochs):
                    raise ValueError(f"{lines} holds runs of {done} epochs, not {args.epochs}")
                if done:
                    continue
                print(model, method, seed, flush=True)
                s = settings(model, (method,), (seed,), given)
                try:
                    records += one(s, Path("runs/gpu_cifar") / f"{model}-{method}-{seed}", deadline)
                except KeyboardInterrupt:
                    print("time is up: call again to go on", flush=True)
                    return
                seeds = tuple(dict.fromkeys(r["seed"] for r in records))
                methods = tuple(dict.fromkeys(r["method"] for r in records))
                whole = asdict(settings(model, methods, seeds, given))
                summary = {
                    "settings": whole,
                    "versions": job.versions(),
                    "hardware": job.hardware(s.device),
                    "results": job.summarise(records),
                }
                lines.write_text("".join(json.dumps(r) + "\n" for r in records))
                (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
