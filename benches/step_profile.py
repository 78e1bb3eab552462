#!/usr/bin/env python3
"""Where a training step's time goes: a table by operation and a flame graph.

    python3 benches/step_profile.py --out benches/results/NAME

Runs train_step.rs under perf (Debian: linux-perf), samples both threads with their stacks, and writes profile.md and
flamegraph.svg, of the measured steps only. Names of operations are those of kernels-cubecl. The machine should be idle.
A file profile.py would hide the module of that name from torch in peer_torch.py.
"""

import argparse
import collections
import html
import os
import pathlib
import re
import subprocess
import tempfile

from peer import ROOT, build, commit, processor

# The first that occurs in a stack names its operation: (part of a function's name, operation).
OPERATIONS = [
    ("head_cross_entropy", "output head and cross-entropy"),
    ("attend_grad", "attention, backward"),
    ("attend_saving", "attention, forward"),
    ("segment_swiglu_input_grad", "experts, gradients of inputs"),
    ("segment_swiglu_saving", "experts, forward"),
    ("segment_matmul_weight_grad", "experts, gradients of weights"),
    ("linear_input_grad", "linear layers, gradients of inputs"),
    ("linear_weight_grad", "linear layers, gradients of weights"),
    ("linear_product", "linear layers, forward"),
    ("rms_norm", "RMSNorm"),
    ("adamw", "AdamW, norm and clipping"),
    ("permute", "tokens to experts and back"),
    ("swiglu", "SwiGLU of dense layers"),
    ("routing", "routing"),
]
# What a thread does in it: (part of the name of one of the innermost functions, kind). The innermost match counts.
KINDS = [
    ("pack_", "copies of operands"),
    ("row_major", "copies of operands"),
    ("[f32; 64]", "copies of operands"),
    ("[f32; 6]", "copies of operands"),
    ("microkernel", "products"),
    ("memset", "zeros"),
    ("memmove", "copies"),
    ("memcpy", "copies"),
    ("clear_page", "zeros"),
]
REST = "arithmetic and the rest"
WAITING = re.compile(r"awake|wait_until|sched")
# Callers that the flame graph shows; the innermost function is there in any case.
SHOWN = re.compile(r"(deepburn_kernels::(?!awake|gemm|parts)|burn_flex::ops|gemm_f32::microkernel|gemm_common::pack)")


def samples(program, steps, threads):
    """Stacks of the measured steps, innermost function first, and what the program printed."""
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/perf.data"
        command = ["perf", "record", "-q", "-F", "499", "--call-graph", "dwarf,16384", "-o", data,
                   program, "--batches", "0", "--steps", str(steps)]
        environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
        text = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        script = subprocess.Popen(["perf", "script", "-i", data, "-F", "tid,time,ip,sym"],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        found, stack = [], []
        for line in script.stdout:
            if time := re.match(r"\s*\d+\s+([\d.]+):\s*$", line):
                stack = []
                found.append((float(time[1]), stack))
            elif line.strip():
                stack.append(line.split(None, 1)[1].strip().removesuffix(" (inlined)"))
    measured = sum(int(part) for part in re.findall(r"(\d+) ms", text)) * steps / 1e3
    end = max(time for time, _ in found)
    return [stack for time, stack in found if stack and time > end - measured], text


def operation(stack):
    for part, name in OPERATIONS:
        if any(part in function for function in stack):
            return name
    if not WAITING.search(" ".join(stack)):
        return "everything else"
    return "waiting" if kind(stack) == REST else "work taken over from another thread"


def kind(stack):
    for function in stack[:12]:
        for part, name in KINDS:
            if part in function:
                return name
        if function == "execute":
            return "products"
    return REST


def table(stacks):
    kinds = ["products", "copies of operands", "zeros", "copies", REST]
    counts = collections.Counter((operation(stack), kind(stack)) for stack in stacks)
    operations = collections.Counter(operation(stack) for stack in stacks)
    percent = lambda count: f"{100 * count / len(stacks):.1f}"
    lines = ["| % of the threads' time | all | " + " | ".join(kinds) + " |", "|---|" + "---|" * (len(kinds) + 1)]
    for name, count in operations.most_common():
        cells = [percent(counts[name, kind]) for kind in kinds]
        lines.append(f"| {name} | {percent(count)} | " + " | ".join(cells) + " |")
    cells = [percent(sum(counts[name, kind] for name in operations)) for kind in kinds]
    lines.append("| all | 100 | " + " | ".join(cells) + " |")
    return lines


def bare(function):
    """A path without types and closures; `<A as B>::f` is `A::f`."""
    function = re.sub(r"\{[^{}]*\}|_ZN\S*", "", re.sub(r"^<(.*) as .*?>::", r"\1::", function))
    while (less := re.sub(r"<[^<>]*>", "", function)) != function:
        function = less
    return "::".join(part for part in function.split("::") if part.strip("<> "))


def flame_graph(stacks, width=1200, row=16, least=0.002):
    """Functions as boxes, callers below what they call, as wide as their share of the samples."""
    tree = {"name": "all", "count": 0, "parts": {}}
    deepest = 0
    for stack in stacks:
        node, last = tree, None
        tree["count"] += 1
        functions = [bare(function) for function in reversed(stack)]
        functions = [function for function in functions[:-1] if SHOWN.match(function)] + functions[-1:]
        for name in [operation(stack), *("::".join(function.split("::")[-2:]) for function in functions)]:
            if name == last:
                continue
            node = node["parts"].setdefault(name, {"name": name, "count": 0, "parts": {}})
            node["count"] += 1
            last = name
    boxes = []

    def place(node, left, depth):
        nonlocal deepest
        share = node["count"] / tree["count"]
        if share < least:
            return
        deepest = max(deepest, depth)
        boxes.append((node["name"], share, left, depth))
        for part in sorted(node["parts"].values(), key=lambda part: -part["count"]):
            place(part, left, depth + 1)
            left += part["count"] / tree["count"] * width

    place(tree, 0.0, 0)
    height = (deepest + 1) * row
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="monospace" font-size="11">']
    for name, share, left, depth in boxes:
        wide, top = share * width, height - (depth + 1) * row
        hue = 20 + hash_of(name) % 40
        lines.append(f'<g><title>{html.escape(name)}: {100 * share:.1f}%</title><rect x="{left:.1f}" y="{top}" '
                     f'width="{max(wide - 0.5, 0.3):.1f}" height="{row - 1}" fill="hsl({hue}, 80%, 70%)"/>')
        if (letters := int(wide / 6.8)) >= 4:
            label = name if len(name) <= letters else name[: letters - 1] + "…"
            lines.append(f'<text x="{left + 2:.1f}" y="{top + 11}">{html.escape(label)}</text>')
        lines.append("</g>")
    return "\n".join([*lines, "</svg>", ""])


def hash_of(name):
    return sum(ord(letter) * (at + 1) for at, letter in enumerate(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    stacks, text = samples(build(), args.steps, args.threads)
    lines = [
        "# Where a training step's time goes",
        "",
        f"[step_profile.py](../../step_profile.py) at commit {commit()}: {len(stacks)} samples of {args.steps} steps, "
        f"{args.threads} threads of {processor()}.",
        "",
        "```",
        text.strip(),
        "```",
        "",
        *table(stacks),
        "",
        "![flame graph](flamegraph.svg)",
        "",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "profile.md").write_text("\n".join(lines))
    (args.out / "flamegraph.svg").write_text(flame_graph(stacks))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
