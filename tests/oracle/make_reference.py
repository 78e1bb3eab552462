"""Write what transformers computes for a checkpoint, for `deepburn verify` to compare with.

    python tests/oracle/make_reference.py CHECKPOINT_DIR [--train-steps 10] [--batch 2] [--length 24] [--seed 0]

Writes into CHECKPOINT_DIR, in float32 on the CPU:

- reference.safetensors           the forward pass of random tokens with every intermediate result
- reference_generate.safetensors  32 greedy tokens with a cache, and the logits of each step
- reference_grads.safetensors     every gradient of the next-token loss of the first training batch
- reference_train.safetensors     losses, norms, loads and biases of some AdamW steps; the balance loss in both readings
- final_params.safetensors        the parameters after them
- reference_mtp_grads.safetensors every gradient of the loss with prediction of two tokens, where the checkpoint has one
                                  module for that; its results are in reference.safetensors

The tensors are described in tests/fixtures/README.md and tests/fixtures/tiny-train/README.md. Experts are written one by
one under their published names. Transformers' causal model has no module for multi-token prediction: one is put together
here from its decoder layer and norms, as tests/fixtures/tiny-mtp/README.md defines it. The smallest margins of routing and of greedy choice are printed: where one is below 1e-5, float noise alone may
choose differently, and another seed is the remedy.

Needs torch, transformers (tested with 5.23.0) and safetensors.
"""

import argparse
import copy
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

from check_transformers import is_quantized, load_model

NEW_TOKENS = 32
LEARNING_RATE, BETAS, EPSILON, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
CLIP_NORM, BIAS_SPEED, BALANCE_WEIGHT, MTP_WEIGHT = 1.0, 1e-3, 1e-4, 0.3


class Trace:
    """Results of modules during a forward pass, by the names of the reference files."""

    def __init__(self, model):
        self.found, self.model, self.handles = {}, model, []
        decoder = model.model
        self.keep(decoder.embed_tokens, "hidden_states.0")
        self.keep(decoder.norm, "final_hidden")
        for index, layer in enumerate(decoder.layers):
            self.keep(layer, f"hidden_states.{index + 1}")
            self.keep(layer.self_attn, f"layer.{index}.attn_output")
            self.keep(layer.mlp, f"layer.{index}.mlp_output")
            self.keep(layer.self_attn.kv_a_layernorm, f"layer.{index}.cache_kv_latent")
            self.keep(layer.self_attn.kv_a_proj_with_mqa, f"layer.{index}.kv")
            if hasattr(layer.mlp, "gate"):
                self.keep_all(layer.mlp.gate, f"layer.{index}.gate")

    def keep(self, module, name):
        def hook(_, __, output):
            self.found[name] = output[0] if isinstance(output, tuple) else output

        self.handles.append(module.register_forward_hook(hook))

    def keep_all(self, module, name):
        self.handles.append(module.register_forward_hook(lambda _, __, out: self.found.update({name: out})))

    def close(self):
        for handle in self.handles:
            handle.remove()


def rotated_key(model, kv):
    """The shared key turned by position, neighbouring pairs together."""
    key = kv[..., model.config.kv_lora_rank :]
    angles = torch.arange(key.shape[1])[:, None].float() * model.model.rotary_emb.inv_freq
    scaling = model.model.rotary_emb.attention_scaling
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    real, imaginary = key[..., 0::2], key[..., 1::2]
    return torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).flatten(-2)


def routing_margin(model, layer, logits):
    """How far the worst chosen expert is from the best that was passed over, within the chosen groups."""
    config = model.config
    choice = logits.sigmoid() + layer.mlp.gate.e_score_correction_bias
    groups = choice.view(len(choice), config.n_group, -1)
    scores = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
    ranked = scores.sort(-1, descending=True).values
    margin = torch.inf
    if config.topk_group < config.n_group:
        margin = (ranked[:, config.topk_group - 1] - ranked[:, config.topk_group]).min().item()
    kept = torch.zeros_like(scores).scatter(1, scores.topk(config.topk_group, -1).indices, 1).bool()
    masked = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1).sort(-1, descending=True).values
    k = config.num_experts_per_tok
    if k < config.topk_group * groups.shape[-1]:
        margin = min(margin, (masked[:, k - 1] - masked[:, k]).min().item())
    return margin


@torch.no_grad()
def forward(model, tokens):
    trace = Trace(model)
    logits = model(tokens, use_cache=False).logits
    trace.close()
    found, margin = {"input_ids": tokens, "logits": logits}, torch.inf
    for name, value in trace.found.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "kv":
            found[f"{prefix}.cache_k_rope"] = rotated_key(model, value)
        elif kind == "gate":
            router_logits, weights, indices = value
            indices, order = indices.sort(-1)
            found[f"{prefix}.router_logits"] = router_logits
            found[f"{prefix}.topk_indices"] = indices
            found[f"{prefix}.topk_weights"] = weights.gather(1, order)
            layer = model.model.layers[int(prefix.split(".")[1])]
            margin = min(margin, routing_margin(model, layer, router_logits))
        else:
            found[name] = value
    rotary = model.model.rotary_emb
    found["rope.inv_freq"] = rotary.inv_freq
    found["rope.attention_scaling"] = torch.tensor(float(rotary.attention_scaling))
    found["softmax_scale"] = torch.tensor(float(model.model.layers[0].self_attn.scaling))
    print(f"forward: smallest routing margin {margin:.1e}")
    return found


@torch.no_grad()
def generate(model, prompt):
    cache, tokens, steps, gap = None, prompt, [], torch.inf
    output = [prompt]
    for _ in range(NEW_TOKENS):
        result = model(tokens, past_key_values=cache, use_cache=True)
        cache, logits = result.past_key_values, result.logits[:, -1]
        best = logits.topk(2).values
        gap = min(gap, (best[:, 0] - best[:, 1]).min().item())
        steps.append(logits)
        tokens = logits.argmax(-1, keepdim=True)
        output.append(tokens)
    print(f"generate: smallest gap between the best two tokens {gap:.1e}")
    return {
        "prompt_ids": prompt,
        "output_ids": torch.cat(output, 1),
        "step_logits": torch.stack(steps, 1),
    }


def published(name, tensor):
    """A parameter under the names of published checkpoints: stacked experts one by one."""
    prefix, found, projection = name.partition(".experts.")
    if not found:
        return {name: tensor}
    parts = {"down_proj": tensor}
    if projection == "gate_up_proj":
        gate, up = tensor.chunk(2, 1)
        parts = {"gate_proj": gate, "up_proj": up}
    return {
        f"{prefix}.experts.{expert}.{part}.weight": matrix
        for part, matrices in parts.items()
        for expert, matrix in enumerate(matrices)
    }


class FurtherPrediction(torch.nn.Module):
    """The module of prediction depth 1. Embedding and output head are the main model's."""

    def __init__(self, model, directory):
        super().__init__()
        config = model.config
        self.layer = config.num_hidden_layers
        # The block has the names of one more decoder layer, so that transformers can read it as one.
        longer = copy.deepcopy(config)
        longer.num_hidden_layers += 1
        self.block = load_model(directory, config=longer)[0].model.layers[-1]
        self.enorm, self.hnorm, self.norm = (copy.deepcopy(model.model.norm) for _ in range(3))
        self.eh_proj = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        weights = {}
        for path in directory.glob("model*.safetensors"):
            weights |= load_file(path)
        with torch.no_grad():
            for name, parameter in self.own():
                parameter.copy_(weights[f"model.layers.{self.layer}.{name}"])

    def own(self):
        """What a decoder layer does not have, by its published name."""
        return [("enorm.weight", self.enorm.weight), ("hnorm.weight", self.hnorm.weight),
                ("eh_proj.weight", self.eh_proj.weight), ("shared_head.norm.weight", self.norm.weight)]

    def named_gradients(self):
        prefix = f"model.layers.{self.layer}."
        found = {prefix + name: parameter.grad for name, parameter in self.own()}
        for name, parameter in self.block.named_parameters():
            found |= published(prefix + name, parameter.grad)
        return found

    def losses(self, model, tokens):
        """The two losses, and the results on the way."""
        decoder, found = model.model, {}
        hidden = decoder(tokens, use_cache=False).last_hidden_state[:, :-1]
        main = cross_entropy(model.lm_head(hidden), tokens[:, 1:])
        joined = [self.enorm(decoder.embed_tokens(tokens[:, 1:])), self.hnorm(hidden)]
        x = found["mtp.eh_proj_output"] = self.eh_proj(torch.cat(joined, -1))
        positions = torch.arange(x.shape[1])[None]
        mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        kept = {}
        handle = None
        if hasattr(self.block.mlp, "gate"):
            handle = self.block.mlp.gate.register_forward_hook(lambda _, __, out: kept.update(gate=out))
        y = self.block(x, attention_mask=mask, position_ids=positions,
                       position_embeddings=decoder.rotary_emb(x, positions))
        y = found["mtp.block_output"] = y[0] if isinstance(y, tuple) else y
        if handle:
            handle.remove()
            router_logits, weights, indices = kept["gate"]
            indices, order = indices.sort(-1)
            found |= {"mtp.router_logits": router_logits, "mtp.topk_indices": indices,
                      "mtp.topk_weights": weights.gather(1, order)}
        normed = found["mtp.normed"] = self.norm(y)
        logits = found["mtp_logits"] = model.lm_head(normed)
        further = cross_entropy(logits[:, :-1], tokens[:, 2:])
        count = tokens[:, 2:].numel()
        found |= {"loss_main": main, "loss_mtp": further, "loss_total": main + MTP_WEIGHT * further,
                  "loss_mtp_sum": further * count, "loss_mtp_count": torch.tensor(count)}
        return found

    def gradients(self, model, tokens):
        """The results, and every gradient of the total loss."""
        found = self.losses(model, tokens)
        found["loss_total"].backward()
        gradients = self.named_gradients()
        for name, parameter in model.named_parameters():
            gradients |= published(name, parameter.grad)
        gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        model.zero_grad()
        return found, gradients


def cross_entropy(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def moe_layers(model):
    return [(index, layer.mlp) for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]


def next_token_loss(model, tokens):
    return cross_entropy(model(tokens, use_cache=False).logits[:, :-1], tokens[:, 1:])


def balance_losses(model, tokens):
    """Equations 17 to 20 with the factor alpha: f counts the top K of the affinities, or the experts really used."""
    found = {}
    k, experts = model.config.num_experts_per_tok, model.config.n_routed_experts
    batch, length = tokens.shape
    for reading in ("paper", "actual"):
        trace = Trace(model)
        model(tokens, use_cache=False)
        trace.close()
        losses = []
        for index, _ in moe_layers(model):
            logits, _, used = trace.found[f"layer.{index}.gate"]
            affinity = logits.sigmoid()
            chosen = affinity.topk(k, -1).indices if reading == "paper" else used
            hits = torch.nn.functional.one_hot(chosen, experts).view(batch, -1, experts).sum(1)
            frequency = hits * experts / (k * length)
            share = (affinity / affinity.sum(-1, keepdim=True)).view(batch, length, experts).mean(1)
            losses.append(BALANCE_WEIGHT * (frequency * share).sum(-1).mean())
        total = torch.stack(losses).sum()
        weights = [mlp.gate.weight for _, mlp in moe_layers(model)]
        for (index, _), gradient in zip(moe_layers(model), torch.autograd.grad(total, weights)):
            found[f"balance_grad.{reading}.model.layers.{index}.mlp.gate.weight"] = gradient
        found[f"balance_loss.{reading}"] = total.detach()
        found[f"balance_loss.{reading}.per_layer"] = torch.stack(losses).detach()
    return found


def train(model, batches):
    found = {f"input_ids.step{step}": tokens for step, tokens in enumerate(batches)}
    found |= balance_losses(model, batches[0])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY
    )
    gradients, rows = {}, {"loss": [], "grad_norm": [], "expert_load": [], "bias": []}
    margin = torch.inf
    for step, tokens in enumerate(batches):
        trace = Trace(model)
        loss = next_token_loss(model, tokens)
        trace.close()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                gradients |= published(name, parameter.grad.clone())
        # Summed in double precision: clip_grad_norm_'s own result is off by 4e-5 for a model of a few million weights.
        norm = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt().float()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        loads, biases = [], []
        for index, mlp in moe_layers(model):
            logits, _, used = trace.found[f"layer.{index}.gate"]
            margin = min(margin, routing_margin(model, model.model.layers[index], logits))
            load = torch.bincount(used.flatten(), minlength=model.config.n_routed_experts)
            bias = mlp.gate.e_score_correction_bias
            with torch.no_grad():
                bias += BIAS_SPEED * torch.sign(load.float().mean() - load)
            loads.append(load)
            biases.append(bias.clone())
        for name, value in zip(rows, (loss.detach(), norm, torch.stack(loads), torch.stack(biases))):
            rows[name].append(value)
    print(f"training: smallest routing margin {margin:.1e}")
    found |= {name: torch.stack(values) for name, values in rows.items()}
    final = {}
    for name, value in model.state_dict().items():
        final |= published(name, value)
    return gradients, found, final


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--train-steps", type=int, default=10, help="0 leaves training out")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, problems = load_model(arguments.checkpoint)
    if problems:
        sys.exit("\n".join(problems))
    torch.manual_seed(arguments.seed)

    def tokens():
        return torch.randint(model.config.vocab_size, (arguments.batch, arguments.length))

    files = {"reference": forward(model, tokens()), "reference_generate": generate(model, tokens())}
    modules = getattr(model.config, "num_nextn_predict_layers", 0)
    if modules and (modules > 1 or is_quantized(arguments.checkpoint)):
        print("prediction of further tokens: left out, it needs one module without FP8 (deepburn convert --dtype f32)")
    elif modules:
        module = FurtherPrediction(model, arguments.checkpoint)
        results, gradients = module.gradients(model, files["reference"]["input_ids"])
        files["reference"] |= results
        files["reference_mtp_grads"] = gradients
    if arguments.train_steps:
        batches = [tokens() for _ in range(arguments.train_steps)]
        gradients, steps, final = train(model, batches)
        files |= {"reference_grads": gradients, "reference_train": steps, "final_params": final}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, tensors in files.items():
        path = arguments.checkpoint / f"{name}.safetensors"
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path, versions)
        print(f"{path}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
