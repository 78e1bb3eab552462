#!/usr/bin/env python3
"""Two pipeline ranks of one thread each beside one process, and beside what the simulator says of them.

    python3 benches/pipeline.py --out benches/results/NAME [--steps 12] [--rounds 3] [--set KEY=VALUE ..]

Trains configs/train/quickstart.toml, eight micro-batches a step, as one process with one thread and with two, and as two
processes of mpirun with one thread each, by every schedule, in turn; writes pipeline.md and pipeline.json. A rate is the
median over rounds of the median over the steps after the second. Efficiency is the rate over twice that of one thread;
the simulator's is the part of the time in which ranks compute, for stages that are alike. The machine should be idle.
Needs OpenMPI, and builds Deepburn with `--features mpi`.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile

from peer import ROOT, commit, processor
from precision import program

SCHEDULES = ["1f1b", "zb1p", "dualpipe", "dualpipe-v"]
MICRO_BATCHES = 8
WARM_UP = 2


def rate(args, ranks, threads, settings):
    """Tokens per second."""
    with tempfile.TemporaryDirectory() as directory:
        command = [args.program, "train", "configs/train/quickstart.toml", "--plain"]
        given = {
            "run.directory": directory,
            "run.steps": args.steps,
            "batch.sequences": 2,
            "batch.accumulation": MICRO_BATCHES,
            "validation.windows": 1,
        }
        for setting in [f"{key}={value}" for key, value in given.items()] + args.settings + settings:
            command += ["--set", setting]
        if ranks > 1:
            command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks), *command]
        environment = {
            "RAYON_NUM_THREADS": str(threads),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
        records = map(json.loads, (pathlib.Path(directory) / "metrics.jsonl").read_text().splitlines())
        rates = [record["tokens_per_second"] for record in records if record["kind"] == "train"]
    return statistics.median(rates[WARM_UP:])


def predicted(args, schedule):
    """The part of the makespan in which the busiest rank computes."""
    command = [args.program, "pipeline", "--ranks", "2", "--micro-batches", str(MICRO_BATCHES), "--schedule", schedule, "--json"]
    found = json.loads(subprocess.check_output(command))
    return 1 - max(found["bubble_per_rank"]) / found["makespan"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--program", help="a deepburn with MPI that is there; built otherwise")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="for all runs")
    args = parser.parse_args()
    args.program = args.program or program("--features", "mpi")
    cases = {"one process, 1 thread": (1, 1, []), "one process, 2 threads": (1, 2, [])}
    for schedule in SCHEDULES:
        cases[schedule] = (2, 1, ["parallel.pipeline=2", f'parallel.schedule="{schedule}"'])
    rounds = [{name: rate(args, *case) for name, case in cases.items()} for _ in range(args.rounds)]
    rates = {name: statistics.median(found[name] for found in rounds) for name in cases}
    one = rates["one process, 1 thread"]
    at = commit()
    lines = [
        "# Two pipeline ranks on two cores",
        "",
        f"[pipeline.py](../../pipeline.py) at commit {at}: configs/train/quickstart.toml, {MICRO_BATCHES} micro-batches of "
        f"2 x 256 tokens, {args.steps} steps, {args.rounds} rounds, {processor()}.",
        "",
        "| | tokens/s | steps/s | efficiency | simulator |",
        "|---|---|---|---|---|",
    ]
    for name, found in rates.items():
        threads = cases[name][0] * cases[name][1]
        simulated = f"{predicted(args, name):.1%}" if name in SCHEDULES else ""
        lines.append(f"| {name} | {found:.0f} | {found / (MICRO_BATCHES * 2 * 256):.2f} | {found / (threads * one):.1%} | {simulated} |")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pipeline.md").write_text("\n".join(lines) + "\n")
    (args.out / "pipeline.json").write_text(json.dumps({"commit": at, "rounds": rounds}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
