"""Compare logits written by Deepburn with what transformers computes from the same checkpoint.

    python tests/oracle/check_transformers.py CHECKPOINT_DIR LOGITS.safetensors [--tolerance 2e-5] [--json OUT]

LOGITS holds `input_ids` (int64 [B, S]) and `logits` (float32 [B, S, V]); other tensors in it are ignored.
The checkpoint is loaded in float32 with eager attention. Multi-token-prediction layers, which transformers'
causal model does not have, are the only weights that may be left over; none may be missing.

Exit code 0: every logit within the tolerance. 1: a difference, or a checkpoint that does not match the model.
Needs torch, transformers (5.23.0 made the reference cases) and safetensors; for FP8 weights accelerate too.
"""

import argparse
import json
import pathlib
import platform
import re
import sys

import safetensors
import torch
import transformers
from safetensors.torch import load_file

# Float noise of float32 transformers against float64 is below 1.5e-5 on the reference cases, and a wrong
# RMS epsilon moves logits by 5.5e-5.
TOLERANCE = 2e-5


def is_quantized(directory):
    return "quantization_config" in json.loads((directory / "config.json").read_text())


def load_model(directory, **more):
    """The model, and what is wrong with its checkpoint."""
    # FP8 weights are dequantised: without a GPU transformers cannot multiply them.
    if is_quantized(directory):
        more["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **more
    )
    first = model.config.num_hidden_layers
    layers = range(first, first + (getattr(model.config, "num_nextn_predict_layers", 0) or 0))

    def is_mtp(name):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return layer is not None and int(layer.group(1)) in layers

    problems = [f"missing weight: {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected weight: {n}" for n in sorted(info["unexpected_keys"]) if not is_mtp(n)]
    problems += [f"weight of another shape: {m}" for m in sorted(map(str, info["mismatched_keys"]))]
    problems += [f"loading: {message}" for message in info.get("error_msgs") or []]
    # What a quantised model refuses by itself.
    return torch.nn.Module.float(model).eval(), problems


def load_logits(path, vocab_size):
    tensors = load_file(path)
    for name in ("input_ids", "logits"):
        if name not in tensors:
            sys.exit(f"{path}: no tensor `{name}`")
    ids, logits = tensors["input_ids"], tensors["logits"]
    if ids.dtype != torch.int64 or ids.dim() != 2:
        sys.exit(f"{path}: input_ids must be int64 [B, S], found {ids.dtype} {list(ids.shape)}")
    expected = [*ids.shape, vocab_size]
    if logits.dtype != torch.float32 or list(logits.shape) != expected:
        sys.exit(f"{path}: logits must be float32 {expected}, found {logits.dtype} {list(logits.shape)}")
    return ids, logits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("logits", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="maximum absolute difference")
    parser.add_argument("--json", type=pathlib.Path, help="write the result and the versions here")
    arguments = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    model, problems = load_model(arguments.checkpoint)
    ids, ours = load_logits(arguments.logits, model.config.vocab_size)
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits

    difference = (ours.double() - theirs.double()).abs()
    largest, mean = difference.max().item(), difference.mean().item()
    # Written so that a NaN on either side fails.
    passed = not problems and largest <= arguments.tolerance

    for problem in problems:
        print(problem)
    print(f"logits {list(ours.shape)}: max abs difference {largest:.3e}, mean {mean:.3e}")
    print(f"{'PASS' if passed else 'FAIL'} at {arguments.tolerance:g}")
    if arguments.json:
        result = {
            "passed": passed,
            "max_abs_difference": largest,
            "mean_abs_difference": mean,
            "tolerance": arguments.tolerance,
            "shape": list(ours.shape),
            "problems": problems,
            "versions": {
                "python": platform.python_version(),
                "safetensors": safetensors.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
