#!/usr/bin/env python3
"""Whether training in BF16 and FP8 follows training in single precision: the report's section 3.3 on a small model.

    python3 benches/precision.py --out benches/results/NAME [--steps 1000] [--set KEY=VALUE ..]

Trains configs/train/precision.toml three times with the same seed and data, and writes precision.md, precision.svg and
the metrics of each run. A loss is smoothed (0.9 of the last, 0.1 of the new), and the largest relative difference from
step 200 on is what counts: below 0.25% in the report. Every run resumes where an earlier one of the same folder ended.
"""

import argparse
import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
PRECISIONS = ["fp32", "bf16", "fp8"]
COLOURS = ["#222222", "#1f77b4", "#d62728", "#2ca02c"]
FROM, BOUND = 200, 0.0025


def program():
    command = ["cargo", "build", "--locked", "--release", "--workspace", "--bins", "--message-format", "json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return next(message["executable"] for message in map(json.loads, lines) if message.get("executable"))


def smoothed(losses):
    out, last = [], losses[0]
    for loss in losses:
        last = 0.9 * last + 0.1 * loss
        out.append(last)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs/precision")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--control", metavar="SETTING", help="a setting that should change nothing, for a run in fp32 beside the others")
    args = parser.parse_args()
    deepburn = program()
    curves = {}
    runs = [(precision, [f"precision={precision}"]) for precision in PRECISIONS]
    if args.control:
        runs.append(("control", ["precision=fp32", args.control]))
    for name, settings in runs:
        folder = args.runs / name
        settings += [f"run.directory={folder}", f"run.steps={args.steps}", *args.settings]
        command = [deepburn, "train", "configs/train/precision.toml"]
        for setting in settings:
            command += ["--set", setting]
        if (folder / "metrics.jsonl").exists():
            command.append("--resume")
        subprocess.run(command, cwd=ROOT, check=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, _ in runs:
        records = map(json.loads, (args.runs / name / "metrics.jsonl").read_text().splitlines())
        losses = {record["step"]: record["main"] for record in records if record["kind"] == "train"}
        curves[name] = smoothed([losses[step] for step in sorted(losses)])
        kept = {"step": list(losses), "main": list(losses.values())}
        (args.out / f"precision-{name}.json").write_text(json.dumps(kept) + "\n")

    def difference(one, other):
        differences = [a / b - 1 for a, b in zip(curves[one], curves[other])][FROM:]
        return max(map(abs, differences)), sum(differences) / len(differences)

    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    lines = [
        "# Training in three precisions",
        "",
        f"[precision.py](../../precision.py) at commit {commit}: configs/train/precision.toml, {args.steps} steps, same seed "
        f"and data, on the CPU. Largest relative difference of the smoothed next-token loss from step {FROM} on; the "
        f"report's bound is {BOUND:.2%}.",
        "",
        "![loss](precision.svg)",
        "",
        "| | largest difference | mean difference | last smoothed losses |",
        "|---|---|---|---|",
    ]
    pairs = [("fp8", "bf16"), ("fp8", "fp32"), ("bf16", "fp32")] + [("control", "fp32")] * bool(args.control)
    for one, other in pairs:
        largest, mean = difference(one, other)
        last = f"{curves[one][-1]:.4f}, {curves[other][-1]:.4f}"
        lines.append(f"| {one} against {other} | {largest:.3%} | {mean:+.3%} | {last} |")
    if args.control:
        lines += ["", f"The control is fp32 with `{args.control}`: what it differs by is what a change in the last bits grows to."]
    (args.out / "precision.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    width, height = 900, 420
    high = max(max(curve[10:]) for curve in curves.values())
    low = min(min(curve) for curve in curves.values())
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">']
    for number in range(6):
        value = low + (high - low) * number / 5
        y = height - 40 - (height - 70) * number / 5
        svg.append(f'<line x1="50" x2="{width - 20}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/><text x="8" y="{y + 4:.0f}">{value:.2f}</text>')
    for (name, curve), colour in zip(curves.items(), COLOURS):
        points = " ".join(
            f"{50 + (width - 70) * at / len(curve):.1f},{height - 40 - (height - 70) * (min(loss, high) - low) / (high - low):.1f}"
            for at, loss in enumerate(curve)
        )
        svg.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        y = 20 + 16 * list(curves).index(name)
        svg.append(f'<text x="{width - 90}" y="{y}" fill="{colour}">{name}</text>')
    svg.append(f'<text x="{width / 2 - 60:.0f}" y="{height - 12}">step, 1 to {args.steps}: smoothed next-token loss</text></svg>')
    (args.out / "precision.svg").write_text("\n".join(svg) + "\n")


if __name__ == "__main__":
    main()
