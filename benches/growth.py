#!/usr/bin/env python3
"""How speed and memory grow with sequence length, experts, layers, context and threads.

    python3 benches/growth.py --out benches/results/NAME

Runs train_step.rs once per size on the CPU, at the shape of configs/model/bench-24m.json but for what is varied, and
writes growth.md, growth.json and growth.svg. Peak memory is the largest resident set of the process. The machine should
be idle. Needs nothing but Python.
"""

import argparse
import json
import pathlib
import subprocess

from peer import ROOT, build, commit, processor, run

EXPERTS = [8, 16, 32, 64, 128, 256]
TRAINING = ["--batches", "0", "--steps", "3"]
DECODING = ["--steps", "0", "--batches", "1"]
# What is varied, its name, its values, the arguments for a value, and the threads.
SERIES = [
    ("training", "sequence length", [256, 512, 1024, 2048, 4096, 8192], lambda n: [*TRAINING, "--sequences", "1", "--length", str(n)]),
    ("training", "experts", EXPERTS, lambda n: [*TRAINING, "--set", f"n_routed_experts={n}"]),
    ("training", "layers", [2, 4, 8, 16], lambda n: [*TRAINING, "--set", f"num_hidden_layers={n}"]),
    ("training", "threads", [1, 2], lambda n: TRAINING),
    ("decoding", "experts", EXPERTS, lambda n: [*DECODING, "--set", f"n_routed_experts={n}"]),
    ("decoding", "context", [32, 128, 512, 2048, 8000], lambda n: [*DECODING, "--context", str(n)]),
    ("decoding", "threads", [1, 2], lambda n: DECODING),
]


def chart(series, left, top, width, height):
    """Tokens per second, with the sizes at equal distances."""
    kind, name, points = series
    highest = max(point["rate"] for point in points)
    xs = [left + 40 + i * (width - 60) / max(1, len(points) - 1) for i in range(len(points))]
    ys = [top + height - 30 - point["rate"] / highest * (height - 70) for point in points]
    lines = [f'<text x="{left + 40}" y="{top + 18}" font-weight="bold">{kind}, tokens/s by {name}</text>']
    lines.append(f'<line x1="{left + 40}" x2="{left + width - 20}" y1="{top + height - 30}" y2="{top + height - 30}" stroke="#999"/>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys))
    lines.append(f'<polyline points="{path}" fill="none" stroke="#1f77b4" stroke-width="2"/>')
    for x, y, point in zip(xs, ys, points):
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f77b4"/>')
        lines.append(f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{point["rate"]:.0f}</text>')
        lines.append(f'<text x="{x:.1f}" y="{top + height - 14}" text-anchor="middle">{point["size"]}</text>')
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    program = build()
    found = []
    for kind, name, sizes, arguments in SERIES:
        points = []
        for size in sizes:
            threads = size if name == "threads" else args.threads
            print(f"{kind}, {name} {size}: ", end="", flush=True)
            rates, peak, _ = run([program, *arguments(size)], threads)
            points.append({"size": size, "rate": next(iter(rates.values())), "peak_mib": peak})
        found.append((kind, name, points))

    write({"commit": commit(), "processor": processor(), "threads": args.threads, "series": found}, args.out)


def write(record, out):
    found = record["series"]
    text = [
        "# How speed and memory grow",
        "",
        f"[growth.py](../../growth.py) at commit {record['commit']}, {record['threads']} threads of {record['processor']} "
        "unless varied. Shape: configs/model/bench-24m.json (4 of 16 experts for each token, 8 layers); training 8 x 256 "
        "tokens a step, or one sequence where its length is varied; decoding at batch 1 after 32 tokens.",
        "",
        "![tokens per second](growth.svg)",
    ]
    for kind, name, points in found:
        text += ["", f"| {kind}: {name} | tokens/s | peak memory, MiB |", "|---|---|---|"]
        text += [f"| {point['size']} | {point['rate']:.0f} | {point['peak_mib']} |" for point in points]
    width, height = 420, 220
    rows = (len(found) + 1) // 2
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{rows * height}" font-family="sans-serif" font-size="11">']
    for at, series in enumerate(found):
        svg += chart(series, at % 2 * width, at // 2 * height, width, height)
    out.mkdir(parents=True, exist_ok=True)
    (out / "growth.md").write_text("\n".join(text) + "\n")
    (out / "growth.svg").write_text("\n".join([*svg, "</svg>"]) + "\n")
    (out / "growth.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
