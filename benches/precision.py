#!/usr/bin/env python3
"""Whether training in BF16 and FP8 follows training in single precision: the report's section 3.3 on a small model.

    python3 benches/precision.py --out benches/results/NAME [--steps N] [--batch N] [--learning-rate X] [--set KEY=VALUE ..]
                                 [--control SETTING] [--ablations [NAME ..]] [--ablation-steps N] [--program FILE]

Trains configs/train/precision.toml in each precision with the same seed and data, and writes precision.md, precision.svg
and the losses of each run. A loss is smoothed (0.9 of the last, 0.1 of the new), and its relative difference from that of
another run counts from step 200 on: below 0.25% in the report.

What the differences mean is seen against two kinds of further runs: the control in single precision with a setting that
should change nothing, and ablations, which are FP8 without a part of the recipe and should be worse.

A run that is complete is not repeated, one that was cut short goes on. --runs names where they are.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import time

from peer import ROOT, commit

PRECISIONS = ["fp32", "bf16", "fp8"]
ABLATIONS = ["per-tensor", "e5m2-weights", "no-promotion"]
COLOURS = ["#222222", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"]
SMOOTHING, FROM, BOUND = 0.9, 200, 0.0025


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs/precision")
    parser.add_argument("--program", help="a deepburn that is there; built otherwise")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, metavar="SEQUENCES", help="sequences per micro-batch")
    parser.add_argument("--accumulation", type=int, metavar="N", help="micro-batches per step")
    parser.add_argument("--learning-rate", type=float, metavar="PEAK")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--control", metavar="SETTING", help="a setting that should change nothing, for a run in fp32 beside the others")
    parser.add_argument("--ablations", nargs="*", choices=ABLATIONS, metavar="NAME", default=[], help=f"of {', '.join(ABLATIONS)}; all without a name")
    parser.add_argument("--ablation-steps", type=int, metavar="N", help="after how many steps ablations are stopped")
    args = parser.parse_args()
    if "--ablations" in sys.argv and not args.ablations:
        args.ablations = ABLATIONS
    args.ablation_steps = min(args.ablation_steps or args.steps, args.steps)
    if args.ablation_steps <= FROM:
        parser.error(f"{args.ablation_steps} steps: differences count from step {FROM} on")
    return args


def planned(args):
    """Name and own settings of every run."""
    runs = {"fp32": ["precision=fp32"]}
    if args.control:
        # Before the long ones: at settings where it differs much, they show nothing.
        runs["control"] = ["precision=fp32", args.control]
    runs |= {precision: [f"precision={precision}"] for precision in PRECISIONS[1:]}
    for name in args.ablations:
        runs[name] = ["precision=fp8", f"ablation.fp8={name}"]
    return runs


def shared(args):
    """The settings of all runs."""
    given = {
        "run.steps": args.steps,
        "batch.sequences": args.batch,
        "batch.accumulation": args.accumulation,
        "schedule.peak": args.learning_rate,
    }
    return [f"{key}={value}" for key, value in given.items() if value is not None] + args.settings


def program(*options):
    command = ["cargo", "build", "--locked", "--release", "--workspace", "--bins", *options, "--message-format", "json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return next(message["executable"] for message in map(json.loads, lines) if message.get("executable"))


def losses(folder):
    """The next-token loss by step; a line that was cut short is left out."""
    log = folder / "metrics.jsonl"
    text = log.read_text() if log.exists() else ""
    records = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return {record["step"]: record["main"] for record in records if record["kind"] == "train"}


def steps_of(args, name):
    return args.ablation_steps if name in args.ablations else args.steps


def train(args, name, settings):
    """Trains from wherever an earlier start ended, up to the last step or until as many are done as are wanted."""
    folder = args.runs / name
    note = folder / "settings.json"
    if note.exists():
        found = json.loads(note.read_text())
        if found != settings:
            sys.exit(f"{folder}: was trained with {found}, not with {settings}; choose another --runs")
    wanted = steps_of(args, name)
    if len(losses(folder)) >= wanted:
        print(f"{name}: is complete")
        return
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings) + "\n")
    args.program = args.program or program()
    command = [args.program, "train", "configs/train/precision.toml", "--set", f"run.directory={folder}"]
    for setting in settings:
        command += ["--set", setting]
    if any((folder / "checkpoints").glob("step-*")):
        command.append("--resume")
    run = subprocess.Popen(command, cwd=ROOT)
    while run.poll() is None:
        if wanted < args.steps and len(losses(folder)) >= wanted:
            run.send_signal(signal.SIGINT)
            run.wait()
            return
        time.sleep(5)
    if run.returncode != 0:
        sys.exit(f"{name}: ended with {run.returncode}")


def smoothed(values):
    out, last = [], values[0]
    for value in values:
        last = SMOOTHING * last + (1 - SMOOTHING) * value
        out.append(last)
    return out


def difference(curve, reference):
    """The largest and the mean magnitude of the relative difference, and its mean."""
    differences = [a / b - 1 for a, b in zip(curve, reference)][FROM:]
    magnitudes = list(map(abs, differences))
    return max(magnitudes), sum(magnitudes) / len(magnitudes), sum(differences) / len(differences)


def table(args, curves):
    pairs = [("fp8", "bf16"), ("fp8", "fp32"), ("bf16", "fp32")]
    pairs += [("control", "fp32")] * bool(args.control)
    pairs += [(name, other) for name in args.ablations for other in ("bf16", "fp8")]
    lines = [
        "| | largest difference | mean magnitude | mean | last smoothed losses |",
        "|---|---|---|---|---|",
    ]
    for one, other in pairs:
        largest, magnitude, mean = difference(curves[one], curves[other])
        step = min(len(curves[one]), len(curves[other]))
        last = f"{curves[one][step - 1]:.4f}, {curves[other][step - 1]:.4f}"
        lines.append(f"| {one} against {other} | {largest:.3%} | {magnitude:.3%} | {mean:+.3%} | {last} |")
    return lines


def report(args, curves):
    lines = [
        "# Training in three precisions",
        "",
        f"[precision.py](../../precision.py) at commit {commit()}: configs/train/precision.toml with `{' '.join(shared(args))}`, "
        f"same seed and data, on the CPU. Relative differences of the smoothed next-token loss from step {FROM} on; the "
        f"report's bound for FP8 against BF16 is {BOUND:.2%}.",
        "",
        "![loss](precision.svg)",
        "",
        *table(args, curves),
    ]
    if args.control:
        lines += ["", f"The control is fp32 with `{args.control}`: what it differs by is what a change in the last bits grows to."]
    if args.ablations:
        stopped = f", stopped after {args.ablation_steps} steps" if args.ablation_steps < args.steps else ""
        lines += ["", f"{', '.join(args.ablations)}: FP8 without that part of the recipe (`ablation.fp8`){stopped}."]
    return lines


def plot(curves, steps):
    """All curves above, their relative differences from bf16 below."""
    width, half, left = 900, 380, 60

    def axis(low, high, top, form):
        across = lambda at: left + (width - left - 20) * at / steps
        down = lambda value: top + half - 40 - (half - 70) * (min(max(value, low), high) - low) / (high - low)
        lines = []
        for number in range(6):
            value = low + (high - low) * number / 5
            lines.append(f'<line x1="{left}" x2="{width - 20}" y1="{down(value):.0f}" y2="{down(value):.0f}" stroke="#ddd"/><text x="8" y="{down(value) + 4:.0f}">{form(value)}</text>')
        return lines, lambda values, first: " ".join(f"{across(first + at):.1f},{down(value):.1f}" for at, value in enumerate(values))

    def line(points, colour):
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>'

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{2 * half}" font-family="sans-serif" font-size="12">']
    colours = dict(zip(curves, COLOURS))
    low = min(min(curve) for curve in curves.values())
    lines, points = axis(low, max(max(curve[10:]) for curve in curves.values()), 0, "{:.2f}".format)
    svg += lines + [line(points(curve, 0), colours[name]) for name, curve in curves.items()]
    for at, name in enumerate(curves):
        svg.append(f'<text x="{width - 110}" y="{20 + 16 * at}" fill="{colours[name]}">{name}</text>')
    svg.append(f'<text x="{left}" y="{half - 12}">step, 1 to {steps}: smoothed next-token loss</text>')

    apart = {name: [a / b - 1 for a, b in zip(curve, curves["bf16"])][FROM:] for name, curve in curves.items()}
    most = max(2 * BOUND, max(max(map(abs, values)) for values in apart.values()))
    lines, points = axis(-most, most, half, "{:+.2%}".format)
    svg += lines + [line(points(values, FROM), colours[name]) for name, values in apart.items()]
    for bound in (-BOUND, BOUND):
        svg.append(f'<polyline points="{points([bound] * (steps - FROM), FROM)}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
    svg.append(f'<text x="{left}" y="{2 * half - 12}">relative difference from bf16 from step {FROM} on; dashed: {BOUND:.2%}</text></svg>')
    return svg


def main():
    args = arguments()
    args.runs = args.runs.resolve()
    runs = planned(args)
    for name, settings in runs.items():
        train(args, name, settings + shared(args))
    args.out.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name in runs:
        found, steps = losses(args.runs / name), list(range(1, steps_of(args, name) + 1))
        if not set(steps) <= set(found):
            sys.exit(f"{args.runs / name}: has {len(found)} of {len(steps)} steps")
        values = [found[step] for step in steps]
        curves[name] = smoothed(values)
        (args.out / f"precision-{name}.json").write_text(json.dumps({"step": steps, "main": values}) + "\n")
    lines = report(args, curves)
    (args.out / "precision.md").write_text("\n".join(lines) + "\n")
    (args.out / "precision.svg").write_text("\n".join(plot(curves, args.steps)) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
