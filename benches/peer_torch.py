"""Speed of PyTorch with transformers at the shape of configs/model/bench-24m.json: the peer of train_step.rs.

    python benches/peer_torch.py [--threads 2] [--experts default|grouped_mm]

The same measurement: a training step is forward, backward, clipping and fused AdamW on 8 x 256 tokens; decoding is
greedy with a cache after a 32-token prompt. Medians after warming up, in float32 on the CPU. Attention by
scaled_dot_product_attention; experts as transformers implements them by default, or by grouped matrix products.
peer.py runs both beside Deepburn.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SHAPE = Path(__file__).parent.parent / "configs/model/bench-24m.json"
SEQUENCES, LENGTH, PROMPT, NEW_TOKENS = 8, 256, 32, 128


def build(experts):
    config = DeepseekV3Config.from_json_file(SHAPE)
    config.pad_token_id = None
    config._attn_implementation = "sdpa"
    if experts:
        config._experts_implementation = experts
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config)


def training(model):
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    vocabulary, times = model.config.vocab_size, []
    for step in range(9):
        tokens = torch.randint(vocabulary, (SEQUENCES, LENGTH + 1))
        start = time.perf_counter()
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2:
            times.append(time.perf_counter() - start)
    return SEQUENCES * LENGTH / statistics.median(times)


@torch.inference_mode()
def decoding(model, batch):
    model.eval()
    rates = []
    for _ in range(5):
        next_tokens = torch.randint(model.config.vocab_size, (batch, PROMPT))
        cache, start = None, None
        for token in range(NEW_TOKENS + 1):
            output = model(next_tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            next_tokens = output.logits[:, -1:].argmax(-1)
            if token == 0:
                start = time.perf_counter()
        rates.append(batch * NEW_TOKENS / (time.perf_counter() - start))
    return statistics.median(rates)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", choices=["default", "grouped_mm"], default="default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    model = build(None if arguments.experts == "default" else arguments.experts)
    print(f"training: {training(model):.0f} tokens/s")
    for batch in (1, 8):
        print(f"decoding, batch {batch}: {decoding(model, batch):.0f} tokens/s")


if __name__ == "__main__":
    main()
