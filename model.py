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
import argparse
import glob
import io
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
import tiktoken
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
    separator: int | None = None    # token that begins a document: no position attends past that of its own
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
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           enable_gqa=self.n_head != self.n_kv_head)
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


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
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
        T = tokens.shape[1]
        mask = None
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
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of {self.config.context}")
        if tokens.shape[1] <= seen:
            raise ValueError("the model needs at least one token")
        places = self.places(tokens, seen)
        x = self.embed(tokens[:, seen:])
        for visit, index in enumerate(path):
            # Only training runs compiled code (layer.compile()): evaluation, without gradients, has other
            # shapes at every call, each compiled anew. Layers share code: growth and paths recompile none.
            layer = self.layers[index] if torch.is_grad_enabled() else self.layers[index].forward
            x = layer(x, places, None if cache is None else cache[visit])
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
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

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
            if temperature == 0:
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


def continue_text(model, encoding, text, length, path=None, temperature=0.0):
    """What the model writes behind a text that begins a document: up to `length` tokens -> text, which ends
    where the document does: at the first special token."""
    tokens = [encoding.eot_token] + encoding.encode_ordinary(text)
    new = model.generate(torch.tensor([tokens], device=model.embed.weight.device), length, path, temperature,
                         stop=encoding.eot_token)[0, len(tokens):].tolist()
    special = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    return encoding.decode(list(itertools.takewhile(lambda token: token not in special, new)))

# -----------------------------------------------------------------------------
# Hugging Face's Llama directories: the same architecture, with q, k, v and gate, up in matrices of their own

PARTS = {"norm1": ["input_layernorm"], "attn.qkv": [f"self_attn.{x}_proj" for x in "qkv"],
         "attn.proj": ["self_attn.o_proj"], "norm2": ["post_attention_layernorm"],
         "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.proj": ["mlp.down_proj"]}
ONLY = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "pretraining_tp": 1, "sliding_window": None, "partial_rotary_factor": 1.0, "rope_type": "default",
        "quantization_config": None}        # what our layer can be


def llama_names(config):
    """{our parameter: [Llama's parameters, which it holds one above the other]}"""
    names = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"],
             "head.weight": ["lm_head.weight"]}
    for i in range(config.n_layer):
        for ours, theirs in PARTS.items():
            names[f"layers.{i}.{ours}.weight"] = [f"model.layers.{i}.{name}.weight" for name in theirs]
    return names


def read_json(folder, name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return dict(**json.load(f))
    except (ValueError, TypeError):
        raise ValueError(f"{os.path.join(folder, name)} is not a JSON object")


def read_llama_config(folder):
    """config.json -> GPTConfig. Raises ValueError naming a setting that is not supported."""
    hf = {"model_type": None, "rope_theta": 10000.0, **read_json(folder, "config.json")}
    try:
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}    # transformers 5, or older
        kind = rope.get("rope_type") or rope.get("type") or "default"
        hf = {**hf, **rope, "rope_type": kind}
        for name, value in ONLY.items():
            if hf.get(name, value) != value:
                raise ValueError(f"{folder}: {name} {hf[name]!r} is not supported, only {value!r}")
        config = GPTConfig(
            vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"],
            n_kv_head=hf.get("num_key_value_heads") or hf["num_attention_heads"], n_embd=hf["hidden_size"],
            n_hidden=hf["intermediate_size"], context=hf["max_position_embeddings"],
            rope_theta=hf["rope_theta"], norm_eps=hf["rms_norm_eps"],
            tied=hf.get("tie_word_embeddings", False))
    except KeyError as error:
        raise ValueError(f"{folder}: config.json has no {error}")
    except (TypeError, AttributeError) as error:        # a text where a number belongs
        raise ValueError(f"{folder}: config.json holds a value of the wrong kind: {error}")
    if (hf.get("head_dim") or config.n_embd // config.n_head) * config.n_head != config.n_embd:
        raise ValueError(f"{folder}: head_dim {hf['head_dim']} is not supported, only hidden_size / heads")
    return config


def read_llama_weights(folder):
    """All tensors of model.safetensors or pytorch_model.bin, in shards or not -> {name: tensor}."""
    found = [name for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                               "pytorch_model.bin.index.json") if os.path.exists(os.path.join(folder, name))]
    if not found:
        raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    files = found[:1]
    if files[0].endswith(".json"):
        shards = read_json(folder, files[0]).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{os.path.join(folder, files[0])} has no weight_map that names files")
        files = sorted(set(shards.values()))
    if files[0].endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("reading .safetensors needs the package: pip install safetensors")
    else:
        def load_file(file):
            return torch.load(file, map_location="cpu", weights_only=True)
    weights = {}
    for file in files:
        try:
            weights.update(load_file(os.path.join(folder, file)))
        except OSError:
            raise
        except Exception as error:      # each format has exceptions of its own for a file that is cut short
            raise ValueError(f"{os.path.join(folder, file)} cannot be read: {one_line(error)}")
    return weights


# how GPT-2 splits text, and how SmolLM does, which gives every digit a token
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
DIGITS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""


# Every byte of ordinary text. Vocabularies in use lack control characters and bytes that no text has
TEXT_BYTES = {*b"\t\n\r", *range(32, 127), *range(128, 192), *range(194, 241)}


def read_llama_encoding(folder):
    """tokenizer.json -> what load_encoding takes, where tiktoken can express it: byte-level BPE as GPT-2's,
    SmolLM's, Llama 3's. Begin-of-text, or else the end's token, begins a document. Raises ValueError."""
    config, tokenizer = read_json(folder, "config.json"), read_json(folder, "tokenizer.json")
    try:
        return llama_encoding(config, tokenizer)
    except ValueError as error:
        raise ValueError(f"{os.path.join(folder, 'tokenizer.json')}: {error}")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder}: tokenizer.json is not as the tokenizers package writes it: {error!r}")


def llama_encoding(config, tokenizer):
    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds, last = [step.get("type") for step in steps], steps[-1]
    pattern = None
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        pattern = GPT2
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last.get("use_regex", True):
        pattern = DIGITS
    elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        split = steps[0]["pattern"].get("Regex") if steps[0]["behavior"] == "Isolated" else None
        # what lies between two matches is a piece too; tiktoken would leave it out
        pattern = split and rf"(?:{split})|(?:(?!{split})[\s\S])+"
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    obstacles = {
        f"a {model['type']} model": model["type"] != "BPE",
        "byte fallback (SentencePiece)": model.get("byte_fallback"),
        "a normalizer": tokenizer.get("normalizer"),
        "dropout": model.get("dropout"),
        "marks inside or at the end of words":
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"),
        "a space put before the text": last.get("add_prefix_space"),
        "added tokens that are not special": not all(token["special"] for token in tokenizer["added_tokens"]),
        f"text split by {kinds} with these settings": pattern is None}
    found = [name for name, there in obstacles.items() if there]
    if found:
        raise ValueError(f"tiktoken cannot express a tokenizer with {', '.join(found)}")

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]       # bytes that stand for themselves
    others = sorted({*range(256)} - {*shown})
    byte = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = [first + second for first, second in merges]
    order = [vocab[token] for token in merged]
    if order != sorted(order):
        raise ValueError("tiktoken cannot express a tokenizer whose ids are not in merging order")
    if not model.get("ignore_merges") and not set(vocab) <= set(byte) | set(merged):
        raise ValueError("tiktoken cannot express a tokenizer with tokens that no merge makes")
    tokens = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
    if not TEXT_BYTES <= {token[0] for token in tokens if len(token) == 1}:
        raise ValueError("tiktoken cannot express a tokenizer that lacks single bytes of text")

    ids = {*range(config["vocab_size"])}
    first = config.get("eos_token_id") if config.get("bos_token_id") is None else config["bos_token_id"]
    if not isinstance(first, int) or first not in ids:
        raise ValueError(f"a document begins with config.json's bos_token_id, or else eos_token_id, which "
                         f"must be a token of the model, not {first}")
    if not ids.issuperset(vocab.values()):
        raise ValueError(f"tokenizer.json has tokens that the model has not: its vocab_size is {len(ids)}")
    special["<|endoftext|>"] = first        # tiktoken's name for it
    # the model may generate any id, also those without a token, so that each needs a text
    unnamed = ids - {*vocab.values(), *special.values()}
    special |= {f"<|unnamed {i}|>": i for i in sorted(unnamed)}
    # latin-1, since a checkpoint holds no bytes
    return {"pattern": pattern, "special": special,
            "tokens": {token.decode("latin-1"): i for token, i in tokens.items()}}

# -----------------------------------------------------------------------------
# encodings: any of tiktoken's by name, or one made of a list of words, which needs no download

# an assigned variable with its equals sign, the blank to fill in, words and numbers below 100 with the space
# before them, single other characters
PIECES = r"""(?<![A-Za-z])[a-z] ?=| ?___\.? ->|\n+| ?[A-Za-z]+| ?\d{1,2}| ?[^\sA-Za-z\d]|\s"""


def load_encoding(spec):
    """spec: a name that tiktoken knows, a list of words, or what read_llama_encoding returns
    -> tiktoken.Encoding with an end-of-text token. Raises ValueError where that is not to be had.

    A list makes an encoding of the 256 bytes and those words, so that every text can be encoded and decoded.
    """
    if isinstance(spec, dict) and "missing" in spec:
        raise ValueError(spec["missing"])
    if isinstance(spec, dict):
        return tiktoken.Encoding("huggingface", pat_str=spec["pattern"], special_tokens=spec["special"],
                                 mergeable_ranks={t.encode("latin-1"): i for t, i in spec["tokens"].items()})
    if not isinstance(spec, str):
        tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in spec]
        return tiktoken.Encoding("words", pat_str=PIECES, special_tokens={"<|endoftext|>": len(tokens)},
                                 mergeable_ranks={t: i for i, t in enumerate(tokens)})
    if spec not in tiktoken.list_encoding_names():
        raise ValueError(f"no encoding {spec!r}: tiktoken knows {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(spec)
    except Exception as error:      # whatever the network stack raises: the cause is in the message
        raise ValueError(f"tiktoken could not load {spec!r}: it downloads the vocabulary on first use. "
                         f"Offline, set TIKTOKEN_CACHE_DIR to a folder that holds it ({one_line(error)})")


def token_dtype(encoding):
    """The smallest type of whole numbers, as stored in files, that holds every token."""
    return np.uint16 if encoding.max_token_value < 2 ** 16 else np.uint32


def tokens_of(file):
    """A .bin file of tokens: raw uint16 (nanoGPT), or with a header of 256 int32 (llm.c, modded-nanogpt)."""
    header = np.fromfile(file, dtype=np.int32, count=256)
    if len(header) == 256 and header[0] in (20240520, 20240801):        # GPT-2's tokens, Llama 3's
        tokens = np.memmap(file, np.uint16 if header[0] == 20240520 else np.uint32, mode="r", offset=1024)
        if len(tokens) != header[2]:
            raise ValueError(f"{file} is cut short: its header says {header[2]} tokens, "
                             f"it holds {len(tokens)}")
        return tokens
    size = os.path.getsize(file)
    if size % 2 or size == 0:
        raise ValueError(f"{file} is no token file: uint16 tokens do not make {size} bytes")
    return np.memmap(file, dtype=np.uint16, mode="r")

# -----------------------------------------------------------------------------
# checkpoints: a dict with config, model, encoding (as above), heldout rows, and what train.py needs to go on

def make_folder(file):
    """The folder that a file will lie in."""
    os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)


def save_atomically(file, write):
    """Writes a file in one step: after a crash at any instant, a reader finds the old one or the new one."""
    make_folder(file)
    part = f"{file}.{os.getpid()}.part"      # two runs may write the same file of data
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, file)
    except OSError as error:
        raise OSError(f"{file} could not be written: {error}")
    finally:
        if os.path.exists(part):
            os.remove(part)


def save_checkpoint(file, checkpoint):
    buffer = io.BytesIO()       # serialised in memory first, so that a full disk is a plain OSError
    torch.save(checkpoint, buffer)
    save_atomically(file, lambda f: f.write(buffer.getbuffer()))


def load_checkpoint(file, device="cpu", tokens=None):
    """file: of train.py or grow.py, or a Hugging Face directory; tokens: a .bin file to hold out in its place
    -> model, checkpoint. Raises ValueError, with the reason, for what is no checkpoint of this project."""
    if os.path.isdir(file):
        model, checkpoint = GPT.from_huggingface(file), {"heldout": {}}
        try:
            checkpoint["encoding"] = read_llama_encoding(file)
        except (ValueError, OSError) as error:      # losses on --tokens need none: an error where it is used
            checkpoint["encoding"] = {"missing": f"no tokenizer, only --tokens FILE.bin works: {error}"}
    else:
        with open(file, "rb") as f:
            data = io.BytesIO(f.read())     # first, so that what fails below is the content and not the disk
        try:
            checkpoint = torch.load(data, map_location="cpu", weights_only=True)    # runs no code in it
            model = GPT(GPTConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
            checkpoint["encoding"], checkpoint["heldout"]       # there as well
        except Exception as error:      # unpickling what is no checkpoint raises errors of every kind
            raise ValueError(f"{file} is not a whole checkpoint of this project: {one_line(error)}")
    if tokens:
        stream, width = tokens_of(tokens), min(model.config.context, 256) + 1
        rows = torch.from_numpy(stream[:len(stream) // width * width][:64 * width].astype(np.int32))
        if not len(rows) or rows.max() >= model.config.vocab_size:
            raise ValueError(f"{tokens} must hold {width} tokens or more, all below "
                             f"{model.config.vocab_size}")
        checkpoint["heldout"] = {"tokens": rows.view(-1, width)}
    return model.to(device), checkpoint


def checkpoint_of(model, **more):
    return {"config": asdict(model.config), "model": model.state_dict(), **more}


def save_derived(file, model, checkpoint, **more):
    """Saves a model made from that of the checkpoint: without an optimizer or training FLOPs, which are not
    its own. Raises ValueError where there is a file, which might be a run's only checkpoint."""
    if os.path.exists(file):
        raise ValueError(f"{file} exists: choose a new file")
    kept = {key: checkpoint[key] for key in ("encoding", "heldout", "args") if key in checkpoint}
    save_checkpoint(file, checkpoint_of(model, **kept, **more))

# -----------------------------------------------------------------------------
# what every script does at its start

def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def available_device(text):
    try:
        zero = torch.zeros(1, device=text)
        zero.item()                                     # the device "meta" holds no numbers
        return str(zero.device)
    except (RuntimeError, AssertionError, NotImplementedError):     # torch's ways to say that there is none
        raise argparse.ArgumentTypeError(f"no device {text!r} here: cuda, mps or cpu")


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_checkpoints(self, least=1, most=None):
        """The models of a command: files of train.py or grow.py, or Hugging Face directories."""
        self.add_argument("checkpoints", nargs="*", help="checkpoints of train.py or grow.py")
        self.add_argument("--hf", nargs="+", default=[], metavar="DIR", help="Hugging Face Llama directories")
        self.add_argument("--tokens", metavar="FILE.bin", help="held-out tokens, as nanoGPT's or llm.c's, in "
                                                               "place of the checkpoint's own")
        self.least, self.most = least, most or float("inf")

    def parse_args(self, *given):
        args = super().parse_args(*given)
        if "hf" in args:        # Windows' shells leave out/*/ckpt.pt to the program
            args.checkpoints = [*itertools.chain.from_iterable(
                sorted(glob.glob(name)) or [name] for name in args.checkpoints), *args.hf]
            if not self.least <= len(args.checkpoints) <= self.most:
                self.error(f"name {'one checkpoint' if self.most == 1 else 'checkpoints'}, or with --hf "
                           f"directories of Hugging Face, not {len(args.checkpoints)}")
        return args

    def add_device(self):
        self.add_argument("--device", type=available_device, default=default_device(),
                          help="cuda, mps or cpu (default: the best one here)")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_script(main):
    """Bad input, or a disk that refuses, ends in one line and exit code 2; the rest keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):     # a model can write what the terminal cannot show
        stream.reconfigure(errors="replace")
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
