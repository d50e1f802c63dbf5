"""
A GPT that runs along a *path*: the list of layer indices in the order they are visited.

    plain model of 6 layers                        0 1 2 3 4 5
    looping layers 2-3 once more                   0 1 2 3 2 3 4 5
    leaving layer 4 out                            0 1 2 3 5
    growing by duplicating layers 2-3 (grow.py)    the looped path, every visit with weights of its own

The architecture is Llama's, as in SmolLM, the backbone of the paper's experiments: pre-norm RMSNorm, rotary
positions, grouped-query attention, SwiGLU, tied embeddings, no biases, no dropout.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size=1024, n_layer=6, n_head=2, n_kv_head=2, n_embd=64, n_hidden=176,
                          context=256))
    logits, loss = model(tokens, targets)                            # the plain model
    logits, loss = model(tokens, targets, path=[0, 1, 2, 3, 2, 3, 4, 5])   # layers 2-3 looped
"""
import functools
import json
import os
import pathlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# the model

@dataclass
class GPTConfig:
    vocab_size: int = 50304
    n_layer: int = 12           # stored layers; the depth is the length of the path
    n_head: int = 12
    n_kv_head: int = 12         # fewer than n_head: grouped-query attention
    n_embd: int = 768
    n_hidden: int = 2048        # width of the MLP, about 8/3 n_embd for SwiGLU
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True           # the output head shares its weights with the embedding
    separator: int | None = None    # token that begins a document, past which no position attends
    path: list | None = None    # order of visits; None is every layer once
    init_depth: int | None = None   # depth the init is scaled for: the final one, for a model that will grow

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.n_embd // self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if not self.rope_theta > 0 or not self.norm_eps > 0:
            raise ValueError(f"rope_theta {self.rope_theta} and norm_eps {self.norm_eps} must be above 0")
        if self.init_depth is not None and self.init_depth < 1:
            raise ValueError(f"init_depth must be above 0, not {self.init_depth}")
        self.path = None if self.path is None else self.visits(self.path)

    def visits(self, path=None):
        """The given path, else the configured one, else every layer once -> list of ints. Raises ValueError
        when it is empty or names a layer that does not exist."""
        path = self.path if path is None else path
        path = [int(index) for index in (range(self.n_layer) if path is None else path)]
        if not path or not 0 <= min(path) <= max(path) < self.n_layer:
            raise ValueError(f"a path is one visit or more of layers 0 to {self.n_layer - 1}, not {path}")
        return path


def loop_path(n_layer, start, block, repeats):
    """The path that visits layers start ... start + block - 1 `repeats` extra times; 0 is the plain model.

    loop_path(6, 2, 2, 1) -> [0, 1, 2, 3, 2, 3, 4, 5]. Raises ValueError for a block outside the model.
    """
    if block < 1 or start < 0 or start + block > n_layer:
        raise ValueError(f"no block of {block} layers at layer {start}: "
                         f"the model has layers 0 to {n_layer - 1}")
    if repeats < 0:
        raise ValueError(f"repeats are the extra visits of the block, 0 or more, not {repeats}")
    layers = list(range(n_layer))
    return layers[:start] + layers[start:start + block] * (repeats + 1) + layers[start + block:]


def rotate(x, cos, sin):
    """Rotary positions, half-split as in HF's Llama. x (batch, head, time, width), cos (time, width / 2)."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """x (batch, time, n_embd) of the new positions; places: cos, sin and mask, of GPT.places; slot: this
    visit's [keys, values] so far, each (batch, n_kv_head, seen, head width), to which the new are added."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_width = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_width, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, places, slot=None):
        B, T, C = x.shape
        cos, sin, mask = places
        qkv = self.qkv(x).view(B, T, -1, self.head_width).transpose(1, 2)  # (B, heads of q + k + v, T, width)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if slot is not None:                    # the keys and values that this visit has seen so far
            if slot:
                k, v = torch.cat((slot[0], k), dim=2), torch.cat((slot[1], v), dim=2)
            slot[:] = [k, v]
        if self.n_head != self.n_kv_head:       # not enable_gqa: with a mask, GPUs have a slow kernel only
            k, v = (x.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class Layer(nn.Module):
    """One transformer layer. It does not know where it stands, so it can be visited, copied or left out."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, places, slot=None):
        x = x + self.attn(self.norm1(x), places, slot)
        return x + self.mlp(self.norm2(x))


class Loss(nn.Module):
    """Mean cross-entropy in nats, in float32; a target of -1 is ignored. A module, so that it is compiled as
    a layer is: logits of a large vocabulary are the largest tensor there is, then read and written less."""

    def forward(self, logits, targets):
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)


def as_trained(module):
    """Only training runs compiled code (module.compile()): evaluation, without gradients, has other shapes at
    every call, each compiled anew. Layers share code: growth and paths recompile none."""
    return module if torch.is_grad_enabled() else module.forward


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss = Loss()
        if config.tied:
            self.head.weight = self.embed.weight
        # N(0, 1 / n_embd): at small widths the usual 0.02 leaves attention flat, and copying was never
        # learned with it. What is added to the residual stream is scaled down by the root of the number
        # of additions, at the model's final depth, so that a copy has the scale of the model it grows into.
        std, depth = config.n_embd ** -0.5, config.init_depth or len(config.visits())
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std / (2 * depth) ** 0.5 if name.endswith("proj.weight") else std)
        # Rotary attention without biases can look one position back, whatever stands there, only along a
        # direction that all embeddings share. Given one from the start, repeats are learned several times
        # sooner; tied logits do not notice it, since it adds the same to each of them.
        self.embed.weight.data += 2 * std * torch.randn(config.n_embd)
        head_width = config.n_embd // config.n_head
        frequency = config.rope_theta ** (-torch.arange(0, head_width, 2).float() / head_width)
        angle = torch.outer(torch.arange(config.context).float(), frequency)   # (context, head width / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    @classmethod
    def from_huggingface(cls, folder):
        """The model of a Hugging Face directory of Llama's architecture (SmolLM, TinyLlama, Llama), float32.

        Raises ValueError naming what this architecture does not have, or what is missing in the folder.
        """
        model, weights = cls(read_llama_config(folder)), read_llama_weights(folder)
        names = llama_names(model.config)
        try:
            state = {ours: torch.cat([weights.pop(name).float() for name in names[ours]])
                     for ours, _ in model.named_parameters()}
            model.load_state_dict(state, strict=False)      # a tied head is the embedding
        except KeyError as error:
            raise ValueError(f"{folder} has no weights named {error}")
        except (AttributeError, RuntimeError) as error:     # no tensors, or shapes that are not the config's
            raise ValueError(f"{folder}: {one_line(error)}")
        unread = [name for name in weights if not name.endswith(("rotary_emb.inv_freq", "lm_head.weight"))]
        if unread:
            raise ValueError(f"{folder} has weights that have no place here: {', '.join(unread[:3])}")
        return model

    def places(self, tokens, seen=0):
        """What attention has to know of the positions behind the first `seen`.

        -> cos, sin (time, head width / 2), and a mask (batch or 1, 1, time, seen + time) of the positions
        that can be seen, or None where that is every earlier one.
        """
        T, mask = tokens.shape[1], None
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context}")
        if self.config.separator is not None or 0 < seen < T - 1:
            mask = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()[None]
        if self.config.separator is not None:
            document = (tokens == self.config.separator).cumsum(1)
            mask = mask & (document[:, :, None] == document[:, None, :])
        return self.cos[seen:T], self.sin[seen:T], None if mask is None else mask[:, None, seen:]

    def hidden(self, tokens, path=None, cache=None):
        """The residual stream (batch, time, n_embd) behind the last norm; self.head turns it into logits.

        cache: a list with one slot per *visit*, each an empty list at first. A layer visited twice has two:
        its second visit attends to the keys of second visits. tokens are still all of them, but only those
        that the cache has not seen are run: (batch, time - seen, n_embd).
        """
        path = self.config.visits(path)
        seen = cache[0][0].shape[2] if cache and cache[0] else 0
        if tokens.shape[1] <= seen:
            raise ValueError(f"no token is new: {seen} are in the cache, which are to be given again")
        places = self.places(tokens, seen)
        x = self.embed(tokens[:, seen:])
        for visit, index in enumerate(path):
            x = as_trained(self.layers[index])(x, places, None if cache is None else cache[visit])
        return self.norm(x)

    def forward(self, tokens, targets=None, path=None):
        """tokens (batch, time) int64 -> logits, loss.

        With targets (batch, time; -1 is ignored): logits (batch, time, vocab_size) and their mean
        cross-entropy in nats. Without: logits of the last position only, (batch, 1, vocab_size), and None.
        path: layer indices in the order of the visits, in place of the configured one. Raises ValueError for
        an empty path, an index that does not exist, or more tokens than the context.
        """
        x = self.hidden(tokens, path)
        if targets is None:
            return self.head(x[:, -1:]), None
        logits = self.head(x)
        return logits, as_trained(self.loss)(logits, targets)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, path=None, temperature=1.0, top_k=None, stop=None,
                 use_cache=True):
        """Continues tokens (batch, time) by up to max_new_tokens and returns all of them.

        temperature 0 is greedy. stop: a row that has this token is filled with it, and the call ends once
        every row has it. Past the context, each step runs the last `context` tokens anew: all positions have
        moved.
        """
        path = self.config.visits(path)
        cache = [[] for _ in path]
        done = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            if not use_cache or tokens.shape[1] > self.config.context:
                cache = None
            logits = self.head(self.hidden(tokens[:, -self.config.context:], path, cache)[:, -1]).float()
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            if temperature < 1e-6:      # float32 cannot divide by much less
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            if stop is not None:
                new = new.masked_fill(done, stop)
                done |= new == stop
            tokens = torch.cat((tokens, new), dim=1)
            if stop is not None and done.all():
                break
        return tokens


@torch.no_grad()
def mean_loss(model, rows, path=None, batch=16):
    """Mean cross-entropy (nats per token) on rows (n, time + 1) of token ids."""
    device = model.embed.weight.device
    total = 0.0
    for part in rows.split(batch):
        part = part.to(device).long()
        total += model(part[:, :-1], part[:, 1:].contiguous(), path)[1].item() * len(part)
    return total / len(rows)

# -----------------------------------------------------------------------------
# Hugging Face's Llama directories: the same architecture, with q, k, v and gate, up in matrices of their own

PARTS = {"norm1": ["input_layernorm"], "attn.qkv": [f"self_attn.{x}_proj" for x in "qkv"],
         "attn.proj": ["self_attn.o_proj"], "norm2": ["post_attention_layernorm"],
         "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.proj": ["mlp.down_proj"]}
ONLY = {"model_type": ["llama"], "hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False],
        "pretraining_tp": [1], "sliding_window": [None], "partial_rotary_factor": [1.0],
        "rope_type": ["default"], "quantization_config": [None]}        # what our layer can be


def llama_names(config):
    """{our parameter: [Llama's parameters, which it holds one above the other]}"""
    names = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"],
             "head.weight": ["lm_head.weight"]}
    for i in range(config.n_layer):
        for ours, theirs in PARTS.items():
            names[f"layers.{i}.{ours}.weight"] = [f"model.layers.{i}.{name}.weight" for name in theirs]
    return names


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def read_json(folder, name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return dict(**json.load(f))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{os.path.join(folder, name)} is not a JSON object")


def refuse_others(settings, only):
    """Raises ValueError naming a setting that is none of the values that are supported."""
    for name, values in only.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(f"{name} {settings[name]!r} is not supported, only {values[0]!r}")


def read_llama_config(folder):
    """config.json -> GPTConfig. Raises ValueError naming a setting that is not supported."""
    hf = {"model_type": None, "rope_theta": 10000.0, **read_json(folder, "config.json")}
    try:
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}    # transformers 5, or older
        kind = rope.get("rope_type") or rope.get("type") or "default"
        hf = {**hf, **rope, "rope_type": kind}
        refuse_others(hf, ONLY)
        config = GPTConfig(
            vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"],
            n_kv_head=hf.get("num_key_value_heads") or hf["num_attention_heads"], n_embd=hf["hidden_size"],
            n_hidden=hf["intermediate_size"], context=hf["max_position_embeddings"],
            rope_theta=hf["rope_theta"], norm_eps=hf["rms_norm_eps"],
            tied=hf.get("tie_word_embeddings", False))
    except KeyError as error:
        raise ValueError(f"{folder}: config.json has no {error}")
    except (TypeError, AttributeError, ValueError) as error:    # also a text where a number belongs
        raise ValueError(f"{folder}: config.json: {error}")
    if (hf.get("head_dim") or config.n_embd // config.n_head) * config.n_head != config.n_embd:
        raise ValueError(f"{folder}: head_dim {hf['head_dim']} is not supported, only hidden_size / heads")
    return config


def read_llama_weights(folder):
    """All tensors of model*.safetensors, or else pytorch_model*.bin, one shard or many -> {name: tensor}."""
    files = (sorted(pathlib.Path(folder).glob("model*.safetensors")) or
             sorted(pathlib.Path(folder).glob("pytorch_model*.bin")))
    if not files:
        raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    if files[0].suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("reading .safetensors needs the package: pip install safetensors")
    else:
        load_file = functools.partial(torch.load, map_location="cpu", weights_only=True)
    weights = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except OSError:
            raise
        except Exception as error:      # each format has exceptions of its own for a file that is cut short
            raise ValueError(f"{file} cannot be read: {one_line(error)}")
    return weights
