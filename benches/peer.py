#!/usr/bin/env python3
"""Deepburn and PyTorch at the same shape, in turn on one machine; writes what came out.

    PYTHON benches/peer.py [--rounds 3] [--threads 2] [--out benches/results/NAME]

PYTHON has torch and transformers (pip install torch==2.11.0 transformers==5.23.0). Each round runs train_step.rs, then
peer_torch.py with every way of computing experts; a rate is the median over rounds of medians over steps or
generations, and the best way of PyTorch counts. Peak memory is the largest resident set of the process. The machine
should be idle: the load before each run is recorded.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
WAYS = ["default", "grouped_mm"]
RATE = re.compile(r"(training|decoding)[^:\n]*?(?:batch (\d+))?: (\d+) tokens/s")


def build():
    command = ["cargo", "bench", "--locked", "--workspace", "--bench", "train_step", "--no-run", "--message-format", "json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    made = [message for message in map(json.loads, lines) if message.get("target", {}).get("name") == "train_step"]
    return next(message["executable"] for message in made if message.get("executable"))


def run(command, threads):
    """Tokens per second by name, and the peak memory in MiB."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    load = os.getloadavg()[0]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{command}: ended with {status}\n{text}")
    found = {}
    for kind, batch, rate in RATE.findall(text):
        found[f"{kind}, batch {batch}" if batch else kind] = float(rate)
    print(f"{pathlib.Path(command[0]).name}: {found}, {usage.ru_maxrss >> 10} MiB, load before {load:.1f}", flush=True)
    return found, usage.ru_maxrss >> 10, load


def commit():
    return subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()


def processor():
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="a folder for peer.json and peer.md")
    args = parser.parse_args()
    ours = [build()]
    torch = {way: [sys.executable, "benches/peer_torch.py", "--threads", str(args.threads), "--experts", way] for way in WAYS}
    commands = {"Deepburn": ours} | {f"PyTorch, experts {way}": command for way, command in torch.items()}
    runs = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            runs[name].append(run(command, args.threads))

    rates = {
        name: {what: statistics.median(found[what] for found, _, _ in rounds) for what in rounds[0][0]}
        for name, rounds in runs.items()
    }
    peaks = {name: statistics.median(peak for _, peak, _ in rounds) for name, rounds in runs.items()}
    versions = subprocess.check_output(
        [sys.executable, "-c", "import torch, transformers; print('torch', torch.__version__ + ', transformers', transformers.__version__)"],
        text=True).strip()
    at = commit()
    load = max(load for rounds in runs.values() for _, _, load in rounds)
    names = list(commands)
    lines = [
        "# Deepburn and PyTorch at one shape",
        "",
        f"[peer.py](../../peer.py) at commit {at}: {args.rounds} rounds, {args.threads} threads of {processor()}, "
        f"{versions}; one-minute load before a run at most {load:.1f}.",
        "Shape: configs/model/bench-24m.json, training 8 x 256 tokens a step, greedy decoding after 32 tokens, single precision.",
        "",
        "| tokens/s | " + " | ".join(names) + " | Deepburn / best of PyTorch |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for what, rate in rates["Deepburn"].items():
        best = max(rates[name].get(what, 0) for name in names[1:])
        cells = [f"{rates[name].get(what, float('nan')):.0f}" for name in names]
        lines.append(f"| {what} | " + " | ".join(cells) + f" | {rate / best:.2f} |")
    least = min(peaks[name] for name in names[1:])
    cells = [f"{peaks[name]:.0f}" for name in names]
    lines.append("| peak memory, MiB | " + " | ".join(cells) + f" | {peaks['Deepburn'] / least:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "peer.md").write_text(text)
        record = {"commit": at, "processor": processor(), "versions": versions, "threads": args.threads, "runs": runs}
        (args.out / "peer.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
