"""
A GPT that runs along a *path*: the list of layer indices in the order they are visited.

    plain model of 6 layers                        0 1 2 3 4 5
    looping block 2-3 once more                    0 1 2 3 2 3 4 5
    skipping layer 4                               0 1 2 3 5
    growing by duplicating block 2-3 (grow.py)     the looped path, every visit with weights of its own

The architecture is Llama's, as in SmolLM, the backbone of the paper's experiments: pre-norm RMSNorm, rotary
positions, grouped-query attention, SwiGLU, tied embeddings, no biases, no dropout.

    model = GPT(GPTConfig(vocab_size=1024, n_layer=6, n_head=2, n_kv_head=2, n_embd=64, d_ff=176, context=256))
    logits, loss = model(tokens, targets)                                  # the plain model
    logits, loss = model(tokens, targets, path=[0, 1, 2, 3, 2, 3, 4, 5])   # block 2-3 looped
"""
import argparse
import collections
import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- the model ------------------------------------------------------------------------------------

@dataclasses.dataclass
class GPTConfig:
    vocab_size: int = 50304
    n_layer: int = 12               # stored layers; the depth is the length of the path
    n_head: int = 12
    n_kv_head: int = 12             # fewer than n_head: grouped-query attention
    n_embd: int = 768
    d_ff: int = 2048                # width of the MLP, about 8/3 n_embd for SwiGLU
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True               # the output head shares its weights with the embedding
    eot: int | None = None          # <|endoftext|>, which stands before each document: attention never crosses it
    path: list | None = None        # order of visits; None is every layer once
    init_depth: int | None = None   # depth the init is scaled for: the final one, for a model that will grow
    rope_freqs: list | None = None  # rotary frequencies, where they are not those of rope_theta
    hf_config: dict | None = None   # of a model of Hugging Face, for the way back: its config, and
    hf_files: dict | None = None    # {name: bytes} of its tokenizer, chat template and generation config

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head) or self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} heads of an even width do not fit n_embd {self.n_embd} or "
                             f"n_kv_head {self.n_kv_head}")
        self.head_dim = self.n_embd // self.n_head
        self.path = None if self.path is None else self.resolve_path()      # refuses layers that do not exist

    def resolve_path(self, path=None):
        """The given path, else the configured one, else every layer once -> list of ints"""
        path = self.path if path is None else path
        path = [int(index) for index in (range(self.n_layer) if path is None else path)]
        if not path or not 0 <= min(path) <= max(path) < self.n_layer:
            raise ValueError(f"expected a path of layers 0 to {self.n_layer - 1}, not {path}")
        return path


def apply_rope(x, cos, sin):
    """Rotary positions, half-split as in Hugging Face's Llama. x (B, heads, T, head_dim), cos (T, head_dim / 2)."""
    x1, x2 = x.float().chunk(2, dim=-1)     # each (B, heads, T, head_dim / 2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention of T new positions, x (B, T, n_embd), the last of all S. kv_cache: this *visit's* keys and
    values, a view (2, B, n_kv_head, S, head_dim) whose last T positions are written; without it S is T."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        # apart, not in one matrix: train.py's Muon takes each as one
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.v = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope_and_mask, kv_cache=None):
        B, T, C = x.shape
        cos, sin, mask = rope_and_mask          # of the T new positions
        # each (B, heads, T, head_dim)
        q, k, v = (part(x).view(B, T, -1, self.head_dim).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if kv_cache is not None:
            kv_cache[0, :, :, -T:] = k
            kv_cache[1, :, :, -T:] = v
            k, v = kv_cache                                                 # (B, n_kv_head, S, head_dim)
        if self.n_head != self.n_kv_head:       # by hand: with a mask, enable_gqa is slow on GPUs
            groups = self.n_head // self.n_kv_head
            # each (B, n_head, S, head_dim)
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        # one new token sees every key: with is_causal it would see the first one only
        is_causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)    # (B, n_head, T, head_dim)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))                # (B, T, n_embd)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.d_ff, bias=False)
        self.up = nn.Linear(config.n_embd, config.d_ff, bias=False)
        self.proj = nn.Linear(config.d_ff, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.silu(self.gate(x)) * self.up(x))     # (B, T, d_ff) -> (B, T, n_embd)


class Layer(nn.Module):
    """One transformer layer. It does not know where it stands, so it can be visited, copied or left out."""

    def __init__(self, config):
        super().__init__()
        # pre-norm: the residual stream itself is never normed
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope_and_mask, kv_cache=None):
        x = x + self.attn(self.norm1(x), rope_and_mask, kv_cache)       # (B, T, n_embd)
        return x + self.mlp(self.norm2(x))                              # (B, T, n_embd)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss = nn.CrossEntropyLoss(ignore_index=-1)    # a module, so that it can be compiled as a layer is
        if config.tied:
            self.head.weight = self.embed.weight    # one matrix for both, as in SmolLM
        exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
        freqs = torch.as_tensor(config.rope_freqs or config.rope_theta ** -exponents)   # (head_dim / 2,)
        # two positions at least: init_weights turns by one
        angles = torch.outer(torch.arange(max(2, config.context)).float(), freqs)   # (context, head_dim / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)     # (context, head_dim / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        # 1 / sqrt(n_embd), not GPT-2's 0.02, which makes attention nearly uniform at small widths
        std = self.config.n_embd ** -0.5
        # Each visit adds to the residual stream twice (attention and MLP): what is added starts smaller, as in GPT-2.
        # The final depth counts, so that a copied layer has the scale of the model that it grows into.
        depth = self.config.init_depth or len(self.config.resolve_path())
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std / (2 * depth) ** 0.5 if name.endswith("proj.weight") else std)
        # Not in Llama: one random vector is added to all embeddings. With it, rotary attention without biases can find
        # "the previous position", whatever its token is. With tied weights it shifts all logits alike.
        self.embed.weight += 2 * std * torch.randn(self.config.n_embd)
        # Nor is this: layer 0's keys begin as its queries, turned by one position, so that attention begins at the
        # token before. Looking up needs that; without it, one seed in fifteen never found it (RESULTS.md).
        attn = self.layers[0].attn
        q = attn.q.weight.view(attn.n_kv_head, -1, attn.head_dim, self.config.n_embd)[:, 0]    # a head of each group
        attn.k.weight.copy_(apply_rope(q.mT, self.cos[1:2], self.sin[1:2]).mT.flatten(0, 1))

    def rope_and_mask(self, tokens, seen=0):
        """tokens (B, S), of which T = S - seen are new -> of the new ones rotary cos and sin (T, head_dim / 2), and a
        mask (B or 1, 1, T, S) of what they can attend to, or None where causal attention needs none."""
        S = tokens.shape[1]
        if S > self.config.context:
            raise ValueError(f"{S} tokens do not fit the context of {self.config.context}")
        # Without documents, a mask is needed only for several new tokens after a cache: a single one sees everything,
        # and a text from its beginning takes the fast causal kernel.
        mask = None
        if self.config.eot is not None or 0 < seen < S - 1:
            # row i is position seen + i, which sees the positions 0 to seen + i
            mask = torch.ones(1, 1, S - seen, S, dtype=torch.bool, device=tokens.device).tril(seen)
        if self.config.eot is not None:
            # number the documents of each row: a position looks at its own one only
            document = (tokens == self.config.eot).cumsum(1)[:, None]                       # (B, 1, S)
            mask = mask & (document[:, :, seen:, None] == document[:, :, None, :])          # (B, 1, T, S)
        return self.cos[seen:S], self.sin[seen:S], mask

    def new_cache(self, path, batch, length):
        """Room for keys and values, one slot per *visit*: a layer that is visited twice has other keys on its second
        visit, which must read what second visits wrote. -> (visits, 2, batch, n_kv_head, length, head_dim)"""
        return self.embed.weight.new_empty(len(self.config.resolve_path(path)), 2, batch,
                                           self.config.n_kv_head, length, self.config.head_dim)

    def hidden(self, tokens, path=None, cache=None, seen=0):
        """The residual stream (B, T, n_embd) after the last norm; self.head makes logits of it. tokens (B, S) are the
        whole sequence, of which T = S - seen are new; what comes before is in the cache, which new_cache makes."""
        rope_and_mask = self.rope_and_mask(tokens, seen)
        x = self.embed(tokens[:, seen:])                # (B, T, n_embd)
        for visit, index in enumerate(self.config.resolve_path(path)):
            kv_cache = None if cache is None else cache[visit, :, :, :, :tokens.shape[1]]
            x = self.layers[index](x, rope_and_mask, kv_cache)      # the path: any layer, any number of times
        return self.norm(x)

    def forward(self, tokens, targets=None, path=None):
        """tokens (B, T) int64 -> logits (B, T, vocab_size), and their mean cross-entropy with targets (B, T; -1 is
        ignored). Without targets: logits of the last position only, (B, 1, vocab_size), and None."""
        x = self.hidden(tokens, path)                   # (B, T, n_embd)
        if targets is None:
            return self.head(x[:, -1:]), None           # (B, 1, vocab_size)
        logits = self.head(x)                           # (B, T, vocab_size)
        return logits, self.loss(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, path=None, temperature=1.0, top_k=None, stop=None, use_cache=True):
        """Continues tokens (B, S) by max_new_tokens, or until each row has the token `stop` (or one of a list), which
        then fills it. -> all tokens. temperature 0 is greedy."""
        B, S = tokens.shape
        cache = self.new_cache(path, B, min(S + max_new_tokens, self.config.context)) if use_cache else None
        done = torch.zeros(B, 1, dtype=torch.bool, device=tokens.device)
        ends = torch.tensor([] if stop is None else stop, dtype=torch.long, device=tokens.device)
        for step in range(max_new_tokens):
            if tokens.shape[1] > self.config.context:
                cache = None        # the window moves, and with it the position of every stored key
            seen = tokens.shape[1] - 1 if step and cache is not None else 0         # all but the newest token
            # 1. logits of the last position
            x = self.hidden(tokens[:, -self.config.context:], path, cache, seen)    # (B, T new ones, n_embd)
            logits = self.head(x[:, -1]).float()                                    # (B, vocab_size)
            # 2. the next token
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]        # (B, 1), the k-th largest
                logits = logits.masked_fill(logits < least, -torch.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)                               # (B, 1)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1)      # (B, 1)
            # 3. finished rows stay finished
            new = torch.where(done, tokens[:, -1:], new)
            done = done | torch.isin(new, ends)                                     # (B, 1)
            tokens = torch.cat((tokens, new), dim=1)                                # (B, S + tokens so far)
            if stop is not None and done.all():
                break
        return tokens

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """A Llama of Hugging Face (SmolLM, TinyLlama, Llama 2 and 3), by hub name or directory, in float32."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        # 1. what our layer does not have is refused by name, before the weights are fetched
        config = AutoConfig.from_pretrained(name_or_dir)
        for name, value in SUPPORTED.items():
            if (given := getattr(config, name, value)) != value:
                raise ValueError(f"{name} {given!r} is not supported, only {value!r}")
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            raise ValueError(f"head_dim {config.head_dim} is not supported, only hidden_size / num_attention_heads")
        if (rope := config.rope_parameters["rope_type"]) not in ("default", "linear", "llama3"):
            raise ValueError(f"rope_type {rope!r} is not supported: its frequencies or scores change")
        # 2. their model; weights that are missing would stay random
        hf, info = AutoModelForCausalLM.from_pretrained(name_or_dir, dtype=torch.float32, output_loading_info=True)
        if wrong := sorted(info["missing_keys"] | info["unexpected_keys"]):
            raise ValueError(f"{name_or_dir} lacks weights, or has weights that its config does not: {wrong[0]}")
        # 3. what goes with it; a directory may have no tokenizer: losses can be measured, text needs one
        files = {"generation_config.json": hf.generation_config.to_json_string().encode()}
        if not os.path.isdir(name_or_dir) or any(pathlib.Path(name_or_dir).glob("tokenizer*")):
            with tempfile.TemporaryDirectory() as folder:
                AutoTokenizer.from_pretrained(name_or_dir).save_pretrained(folder, save_jinja_files=False)
                files |= {file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()}
        # 4. ours; inv_freq is what theirs computes with, which rope_theta alone does not tell of a scaled rope
        settings = {ours: getattr(config, theirs) for ours, theirs in SETTINGS.items()}
        settings["rope_freqs"] = hf.model.rotary_emb.inv_freq.tolist()
        model = cls(GPTConfig(**settings, hf_config=config.to_dict(), hf_files=files))
        model.load_state_dict({name: hf.get_parameter(llama_name(name)) for name in model.state_dict()})
        return model

    def save_pretrained(self, folder, path=None, dtype=torch.float32):
        """Writes the model along a path, every visit untied, as a Llama directory of Hugging Face, with the tokenizer,
        chat template and generation config that came from there. Llama has no mask between documents."""
        from transformers import LlamaConfig, LlamaForCausalLM
        check_outputs(folder)
        path = self.config.resolve_path(path)
        special = {"bos_token_id": self.config.eot, "eos_token_id": self.config.eot}
        rope = {"rope_type": "default", "rope_theta": self.config.rope_theta}
        config = dict(self.config.hf_config or {"rope_parameters": rope, **special})
        config |= {theirs: getattr(self.config, ours) for ours, theirs in SETTINGS.items()}
        hf = LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": len(path)}))
        state = {llama_name(name): p for name, p in self.parameter_sources(path).items()}
        hf.load_state_dict(state | {"lm_head.weight": self.head.weight})        # also of a head that is tied
        part = f"{os.path.normpath(folder)}.part"       # a crash leaves no half a model of that name
        hf.to(dtype).save_pretrained(part)
        for name, content in (self.config.hf_files or {}).items():
            pathlib.Path(part, name).write_bytes(content)
        os.replace(part, folder)

    def parameter_sources(self, path=None):
        """{name of each parameter of grow(self, path): the parameter of this model that it copies}"""
        sources = {name: p for name, p in self.named_parameters() if not name.startswith("layers.")}
        # layer path[visit] has become layer `visit`: a list in which a layer stands once for each visit
        visits = nn.ModuleList(self.layers[index] for index in self.config.resolve_path(path))
        return sources | dict(visits.named_parameters("layers", remove_duplicate=False))

# --- scoring --------------------------------------------------------------------------------------

def score_targets(model, hidden, targets):
    """hidden (B, T, n_embd) of model.hidden, targets (B, T; -1 is not scored) -> of each row the mean loss in nats, and
    whether its answer is right, (B,) each: whether each of its tokens is the likeliest after the true ones before it.
    Then what greedy decoding gives begins with it, and one forward pass tells."""
    scored = targets >= 0                                                       # (B, T)
    # only scored positions reach the head: of a large vocabulary it is most of the work
    logits = model.head(hidden[scored]).float()                                 # (scored tokens, vocab_size)
    loss, right = torch.zeros(targets.shape, device=targets.device), ~scored    # (B, T), 0 and right where not scored
    loss[scored] = F.cross_entropy(logits, targets[scored], reduction="none")
    right[scored] = logits.argmax(-1) == targets[scored]
    return loss.sum(1) / scored.sum(1), right.all(1)


@torch.no_grad()
def score_rows(model, tokens, targets, path=None, batch=16):
    """score_targets of tokens, targets (n, T), some rows at a time -> losses, right, (n,) each"""
    device, scores = model.embed.weight.device, []
    batch = min(batch, max(1, 4096 // tokens.shape[1]))     # logits of long rows are large
    for part, target in zip(tokens.split(batch), targets.split(batch)):
        hidden = model.hidden(part.to(device).long(), path)                     # (batch, T, n_embd)
        scores.append(score_targets(model, hidden, target.to(device).long()))
    return [torch.cat(column).cpu() for column in zip(*scores)]                 # (n,) each


def estimate_loss(model, rows, path=None):
    """Mean cross-entropy (nats per token) on rows (n, T + 1) of token ids."""
    return score_rows(model, rows[:, :-1], rows[:, 1:], path)[0].mean().item()

# --- opening and saving, and what every script does at its start ----------------------------------

LLAMA = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
         "norm1": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
         "attn.v": "self_attn.v_proj", "attn.proj": "self_attn.o_proj", "norm2": "post_attention_layernorm",
         "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
SETTINGS = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "d_ff": "intermediate_size",
            "context": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings"}
SUPPORTED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
             "pretraining_tp": 1, "sliding_window": None, "quantization_config": None}

# encode: text -> list of ids, where names of special tokens mean those tokens; eot: the token that begins a document;
# stop: those that end what a model writes, eot and after it eos first
Tokenizer = collections.namedtuple("Tokenizer", "encode decode eot n_vocab stop")


def llama_name(name):
    """layers.3.attn.q.weight -> model.layers.3.self_attn.q_proj.weight"""
    layer, part = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups()
    return f"{'model.' + layer if layer else ''}{LLAMA[part]}.weight"


def get_tokenizer(spec):
    """spec: a name that tiktoken knows; {"words": list, "pattern": str} of evaluate.py's world; or {"files": {name:
    bytes}} of a Hugging Face tokenizer -> Tokenizer. Raises ValueError where it cannot be loaded."""
    if spec is None:
        raise ValueError("this model came without a tokenizer: train.py takes one by --encoding")
    if isinstance(spec, str):
        import tiktoken
        try:
            bpe = tiktoken.get_encoding(spec)
        except OSError as error:
            raise ValueError(f"tiktoken downloads {spec!r} on first use, which failed. Offline, set TIKTOKEN_CACHE_DIR "
                             f"to a folder that holds it, named by its hash ({error})")
        return Tokenizer(lambda text: bpe.encode(text, allowed_special="all"), bpe.decode, bpe.eot_token, bpe.n_vocab,
                         (bpe.eot_token,))
    if "files" in spec:
        from transformers import AutoTokenizer
        with tempfile.TemporaryDirectory() as folder:
            for name, content in spec["files"].items():
                pathlib.Path(folder, name).write_bytes(content)
            hf = AutoTokenizer.from_pretrained(folder)
        # What begins a document: the token that the tokenizer itself puts before a text (Llama's begin-of-text),
        # else end-of-text; the eos of a chat model ends a turn, not a document. Both end what is written.
        added = hf.encode("")
        eot = added[0] if added else hf.get_vocab().get("<|endoftext|>", hf.eos_token_id)
        # a chat model's generation config has further ends
        more = json.loads(spec["files"].get("generation_config.json", b"{}")).get("eos_token_id")
        stop = [eot, hf.eos_token_id, *(more if isinstance(more, list) else [more])]

        def encode(text):       # half of an emoji is no UTF-8
            return hf.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False, verbose=False)
        return Tokenizer(encode, hf.decode, eot, len(hf), tuple(token for token in stop if token is not None))
    # one token a word, whatever space stands around it: the pattern cuts the text, each piece is a word of the list
    words = spec["words"]
    ids = {word: i for i, word in enumerate(words)}

    def encode(text):
        try:
            return [ids[piece] for piece in re.findall(spec["pattern"], text)]
        except KeyError as piece:
            raise ValueError(f"{piece} is not a word of the built-in world")
    return Tokenizer(encode, lambda ids: " ".join(words[i] for i in ids).replace(" \n ", "\n"), 0, len(words), (0,))


def complete(model, tokenizer, text, length, path=None, temperature=0.0):
    """The beginning of a document -> what the model writes after it: to the document's end, or `length` tokens, or
    as many as the context has room for."""
    tokens = [tokenizer.eot] + tokenizer.encode(text)       # as every document of training text begins
    if (room := model.config.context - len(tokens)) < 0:
        raise ValueError(f"the prompt has {len(tokens)} tokens, the context {model.config.context}")
    batch = torch.tensor([tokens], device=model.embed.weight.device)        # (1, S)
    new = model.generate(batch, min(length, room), path, temperature, stop=tokenizer.stop)[0, len(tokens):].tolist()
    # without the end; a vocabulary may be padded
    return tokenizer.decode([token for token in new if token < tokenizer.n_vocab and token not in tokenizer.stop])


def save_atomically(file, write):
    """Calls write(f) on a binary file that takes its name when whole: a crash leaves the old one or the new, and at
    most a .part, which the next save writes over."""
    os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
    with open(f"{file}.part", "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())    # on the disk before it takes the name
    os.replace(f"{file}.part", file)    # atomic on every system


def save_checkpoint(file, model, tokenizer=None, heldout={}, args={}, **more):
    """tokenizer: a spec of get_tokenizer; heldout: {name: rows}; args, more: what train.py needs to go on. All are
    tensors, numbers, texts, bytes, lists, tuples and dicts: reading them runs no code."""
    state = {"config": dataclasses.asdict(model.config), "model": model.state_dict(), "tokenizer": tokenizer}
    save_atomically(file, lambda f: torch.save({**state, "heldout": heldout, "args": args, **more}, f))


def load_checkpoint(name, device="cpu"):
    """A file of save_checkpoint (.pt), or a Hugging Face name or directory -> model, checkpoint (a dict)"""
    try:
        if name.endswith(".pt"):
            checkpoint = torch.load(name, map_location="cpu", weights_only=True)    # runs no code
            model = GPT(GPTConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
        else:
            model = GPT.from_pretrained(name)
            files = model.config.hf_files
            spec = {"files": files} if "tokenizer_config.json" in files else None
            checkpoint = {"tokenizer": spec, "heldout": {}, "args": {}}
            if spec:
                tokenizer = get_tokenizer(spec)
                model.config.eot = tokenizer.eot        # documents in one row do not see each other, as in training
                if tokenizer.eot is None or tokenizer.n_vocab > model.config.vocab_size:
                    raise ValueError("its tokenizer has no end-of-text token, or more tokens than the model")
    except ModuleNotFoundError:     # transformers: run_script says what to install
        raise
    except Exception as error:      # pickle, safetensors and the hub raise errors of every kind
        raise ValueError(f"{name} cannot be opened as a checkpoint (.pt), or as a Llama of Hugging Face "
                         f"({type(error).__name__}: {error})")
    return model.to(device), checkpoint


def check_outputs(new=None, rows=None, plot=None):
    """Before any work: nothing will be overwritten, rows are appended to a .jsonl file, a figure can be drawn."""
    if plot:
        import matplotlib.figure    # noqa: F401: fails here, not after the work
    for file in (new, plot):
        if file and os.path.exists(file):
            raise ValueError(f"{file} exists: choose another name, or remove it")
    for file, endings in ((rows, (".jsonl",)), (plot, (".png", ".pdf", ".svg"))):
        if file and not file.endswith(endings):
            raise ValueError(f"{file} must end in {' or '.join(endings)}")
        if file and not os.path.isdir(os.path.dirname(os.path.abspath(file))):
            raise ValueError(f"there is no folder for {file}")


def pick_device(text="auto"):
    """auto, cuda, cuda:1, mps or cpu -> the device's name; auto takes the best one here."""
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError):     # torch's ways to say that there is none
        raise ValueError(f"there is no device {text!r} here: cuda, mps or cpu")
    return text


def between(low, high, kind=float):
    """A type for argparse: a number of a range."""
    def number(text):
        if not low <= kind(text) <= high:       # nan is refused as well
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return kind(text)
    return number


positive_int = between(1, 10 ** 9, int)


def read_options(parser, excludes={}, requires={}):
    """-> args, and the names that were given. excludes: {name: names that mean nothing beside it}, requires: {name:
    names that mean nothing without it}. Raises ValueError for what would be ignored, or for a --results or --plot that
    cannot be written."""
    # argparse does not tell a default that was typed from one that was not: parse once more, and see what stays `unset`
    # (a list, which action="extend" copies)
    args, unset = parser.parse_args(), []
    marked = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(marked).items() if value is not unset}
    wrong = {other: f"does not go with --{name}" for name in given & excludes.keys() for other in excludes[name]}
    wrong |= {other: f"goes only with --{name}" for name in requires.keys() - given for other in requires[name]}
    if ignored := sorted(given & wrong.keys()):
        dashes = "-" if len(ignored[0]) == 1 else "--"
        raise ValueError(f"{dashes}{ignored[0]} {wrong[ignored[0]]}".replace("_", "-"))
    check_outputs(rows=vars(args).get("results"), plot=vars(args).get("plot"))
    return args, given


def run_script(main):
    """Runs a command. Bad input or a missing package ends in one line and exit code 2, all else in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")        # a model can write what the terminal cannot show
    try:
        main()
    except (ValueError, OSError, re.error, ModuleNotFoundError) as error:
        hint = f": pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)           # as shells do
