#!/usr/bin/env python3
"""Break the code in the ways that are easy to get wrong, one at a time, and see which tests notice.

    python tests/oracle/mutations.py [--only REGEX] [--out tests/oracle/results/mutations.md]

Works on a copy of the committed tree in a temporary folder; needs cargo with cargo-nextest, and a minute per mutation. Leaves
broken programs in cargo's target folder: give it one of its own with CARGO_TARGET_DIR.

Exit code 0: every mutation turns at least one test red. 1: one survives, or its text is not in the code any more.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What is wrong, where, the right text and the wrong one.
MUTATIONS = [
    ("epsilon of the latent norms 1e-5 for 1e-6", "model/src/attention/mod.rs",
     "LATENT_NORM_EPSILON: f64 = 1e-6", "LATENT_NORM_EPSILON: f64 = 1e-5"),
    ("rms_norm_eps 1e-5 for 1e-6", "model/src/transformer.rs",
     'RmsNorm::new(hidden, config.rms_norm_eps, init.child("norm"))', 'RmsNorm::new(hidden, 1e-5, init.child("norm"))'),
    ("group mask of 0 for minus infinity", "kernels-cubecl/src/routing/flex.rs",
     "    for group in kept {\n",
     "    for expert in (0..row.len()).filter(|expert| !kept.contains(&(expert / per_group))) {\n"
     "        best.offer(T::ZERO, expert);\n    }\n    for group in kept {\n"),
    ("groups judged by their best expert alone", "kernels-cubecl/src/routing/flex.rs",
     "    first += second;\n", "    let _ = second;\n"),
    ("weights of experts from biased scores", "kernels-cubecl/src/routing/reference.rs",
     "let chosen = super::select_experts(choice, limit);\n    let weights = affinity.gather(1, chosen.clone());",
     "let chosen = super::select_experts(choice.clone(), limit);\n    let weights = choice.gather(1, chosen.clone());"),
    ("weights of experts not normalised", "kernels-cubecl/src/routing/reference.rs", "if weighting.normalised {", "if false {"),
    ("routed_scaling_factor left out", "kernels-cubecl/src/routing/reference.rs",
     "(weights * weighting.scale)", "(weights * weighting.scale.signum())"),
    ("half-split RoPE for interleaved pairs", "model/src/rope.rs",
     "let pairs = x.reshape([batch, length, heads, width / 2, 2]);",
     "let pairs = x.reshape([batch, length, heads, 2, width / 2]).swap_dims(3, 4);"),
    ("softmax scale without mscale", "model/src/rope.rs",
     "softmax_scale: softmax_scale * all * all,", "softmax_scale,"),
    ("YaRN's ramp the other way round", "model/src/rope.rs",
     "(speed / self.factor * slowed + speed * (1.0 - slowed)) as f32",
     "(speed / self.factor * (1.0 - slowed) + speed * slowed) as f32"),
    ("positions of cached tokens forgotten", "model/src/transformer.rs",
     "self.rope.tables(cache.len(), length, &tokens.device())", "self.rope.tables(0, length, &tokens.device())"),
    ("halves of eh_proj's input exchanged", "model/src/mtp.rs",
     "vec![self.enorm.forward(embedded), self.hnorm.forward(previous)]",
     "vec![self.hnorm.forward(previous), self.enorm.forward(embedded)]"),
    ("balance loss counts the chosen experts in both readings", "model/src/loss.rs",
     "BalanceReading::Paper => routing.affinity.clone().detach().topk_with_indices(k, 1).1,",
     "BalanceReading::Paper => routing.chosen.clone(),"),
    ("selection bias moved towards the overloaded", "train/src/balance.rs",
     "Ordering::Greater => gamma", "Ordering::Greater => -gamma"),
    ("block scales of FP8 weights transposed", "kernels-cubecl/src/fp8/tiles.rs",
     "let scales = &scales[row / down * across..][..across];",
     "let scales: Vec<f32> = (0..across).map(|at| scales[(at * height + row / down) % scales.len()]).collect();\n"
     "        let scales = &scales;"),
    ("E4M3 rounds half away from zero", "kernels-cubecl/src/fp8/e4m3.rs", ".round_ties_even()", ".round()"),
    ("no promotion of FP8 scales per 128 columns", "kernels-cubecl/src/fp8/flex.rs",
     "a_scales[(first + row) * tiles + tile]", "a_scales[(first + row) * tiles]"),
]


def failing_tests(tree):
    """The tests that fail, or None where the code does not compile."""
    run = subprocess.run(
        ["cargo", "nextest", "run", "--locked", "--workspace", "--lib", "--bins", "--test", "parity", "--no-fail-fast"],
        cwd=tree, capture_output=True, text=True)
    if "Summary" not in run.stderr:
        print(run.stderr[-3000:], file=sys.stderr)
        return None
    summary = run.stderr[run.stderr.index("Summary"):]
    return sorted(set(re.findall(r"^ +(?:FAIL|SIGABRT|TIMEOUT) \[[^\]]*\] (?:\([^)]*\) )?(.+)$", summary, re.M)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose description this regular expression finds")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    rows, survived = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder, "deepburn")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
        if failing_tests(tree) != []:
            sys.exit("the tests do not pass without a mutation")
        for what, path, right, wrong in MUTATIONS:
            if not re.search(args.only, what):
                continue
            file = tree / path
            code = file.read_text()
            if code.count(right) != 1:
                sys.exit(f"{what}: {path} has {code.count(right)} of: {right}")
            file.write_text(code.replace(right, wrong))
            failed = failing_tests(tree)
            file.write_text(code)
            if failed is None:
                sys.exit(f"{what}: does not compile")
            survived += not failed
            shown = ", ".join(f"`{name}`" for name in failed[:4]) or "**none**"
            more = f" and {len(failed) - 4} more" if len(failed) > 4 else ""
            rows.append(f"| {what} | `{path}` | {len(failed)} | {shown}{more} |")
            print(rows[-1], flush=True)
    if args.out:
        args.out.write_text(
            "# Mutations and the tests that notice them\n\n"
            f"Made by [mutations.py](../mutations.py) at commit {commit}: each line is the code broken in one place.\n\n"
            "| what is wrong | where | red tests | some of them |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
