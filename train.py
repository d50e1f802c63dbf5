r"""
The main job: trains a model that starts shallow, grows in depth during the constant phase of its learning rate,
and is cooled down at full depth on a mixture with math, as the models of the paper are.

    python train.py                                   # the built-in world, LIDAS growth: minutes on two cores
    python train.py --method baseline                 # full depth from the first step
    python train.py --loop 2-2x2-2                    # trained with tied weights along a looped path
    python train.py --resume                          # goes on after a crash as if there were none
    python train.py --init out/lidas/stable.pt --loop 3-2x2-3 --out out/lidas-loop   # loops in the cooldown only
    python train.py --data text.jsonl --math gsm8k_train.jsonl --out out/mine        # text of your own
    torchrun --nproc_per_node=2 train.py              # two GPUs

    LR  ___________________________
       /   |      |        |       |\          |  a growth step: a block of layers is duplicated (grow.py)
      / 2  |  4   |   6    |   8   | \         numbers: layers
     warm-up     constant           cooldown, linear to zero, with math
"""
import argparse
import datetime
import functools
import gc
import glob
import importlib.util
import json
import math
import os
import shutil
import time
import zlib

# Before torch is imported. OpenMP's threads wait in a busy loop: beside other programs a long one makes two threads
# slower than one (RESULTS.md, Busy machines).
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import evaluate
from grow import METHODS, depth_schedule, grow, grow_optimizer
from loop import add_path_options, path_of
from model import (GPT, GPTConfig, complete, estimate_loss, get_tokenizer, load_checkpoint, pick_device, positive_int,
                   read_options, run_script, save_atomically, save_checkpoint)

# -----------------------------------------------------------------------------
# data: a stream gives row `number`, (context + 1) token ids; a batch is a pure function of (seed, step, rank)

def file_stream(args, tokenizer, name, files):
    """Documents in files -> a stream of rows, permuted anew in each epoch; held-out rows; the tokens' checksum.

    They are encoded once, into the run's folder. The last 64 rows (or a twentieth, if fewer) are held out; the cut
    moves forward to the beginning of a document, if one begins in the first half of them.
    """
    cache, width = os.path.join(args.out, f"{name}.tokens"), args.context + 1
    dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.uint32
    if not os.path.exists(cache):
        parts = evaluate.encode_files(files, tokenizer, args.field)
        save_atomically(cache, lambda f: [f.write(part.astype(dtype).tobytes()) for part in parts])
    tokens = np.memmap(cache, dtype, mode="r") if os.path.getsize(cache) else np.empty(0, dtype)
    n_heldout = min(64, math.ceil(len(tokens) / width / 20))        # rows
    cut = max(0, len(tokens) - n_heldout * width)
    starts = np.flatnonzero(tokens[cut:cut + n_heldout * width // 2] == tokenizer.eot)
    cut += starts[0] if len(starts) else 0                          # no document stands in both parts
    rows = tokens[:cut // width * width].reshape(-1, width)
    heldout = tokens[cut:][:(len(tokens) - cut) // width * width].reshape(-1, width)
    if not len(rows) or not len(heldout):
        raise ValueError(f"{' '.join(files)}: {len(tokens)} tokens are too few for training and held-out rows of "
                         f"{width}; give more text or a smaller --context")

    def row(number):
        epoch, place = divmod(number, len(rows))    # every row once before any comes twice
        return rows[permutation(len(rows), args.seed, epoch)[place]]
    return row, torch.from_numpy(heldout.astype(np.int32)), zlib.crc32(tokens)


@functools.lru_cache(maxsize=4)
def permutation(n, *seed):
    return np.random.default_rng(seed).permutation(n)


def open_streams(args, tokenizer):
    """-> streams, held-out rows, checksums: three dicts by name, "general" and "math" """
    files, streams, heldout, data = {"general": args.data, "math": args.math}, {}, {}, {}
    for name in files:
        if files[name]:
            streams[name], heldout[name], data[name] = file_stream(args, tokenizer, name, files[name])
        elif not args.data:
            # the built-in world is made as it is read; held-out rows are the same for all seeds
            row = functools.partial(evaluate.world_row, tokenizer, args.context, name)
            streams[name] = functools.partial(row, heldout=False, seed=args.seed)
            rows = np.stack([row(heldout=True, seed=0, number=i) for i in range(64)])
            heldout[name] = torch.from_numpy(rows.astype(np.int32))
            # --resume compares this: the world's code, or the files, must not have changed
            data[name] = zlib.crc32(streams[name](number=0), zlib.crc32(heldout[name].numpy()))
    return streams, heldout, data


class Batches(torch.utils.data.Dataset):
    """Batch number `step`: a pure function of (seed, step, rank), so that a resumed run reads the same rows.
    Together, the ranks read the rows that one process alone would read. In the cooldown a row is math with chance
    args.math_share, where there is math."""

    def __init__(self, streams, args, rank=0, world_size=1):
        self.streams, self.args = streams, args
        self.my_rows = range(rank * args.batch // world_size, (rank + 1) * args.batch // world_size)

    def __getitem__(self, step):
        """-> (batch / world_size, context + 1) int64"""
        args, constant = self.args, constant_steps(self.args)
        share = args.math_share if step >= constant and "math" in self.streams else 0.0
        # which rows are math is drawn for all ranks, so that each finds its own
        is_math = np.random.default_rng((args.seed, step)).random(args.batch) < share
        rows = []
        for i in self.my_rows:
            # math is counted from the cooldown's first row on, so that none repeats within an epoch
            name, first = ("math", constant) if is_math[i] else ("general", 0)
            rows.append(self.streams[name](number=(step - first) * args.batch + i))
        return torch.from_numpy(np.stack(rows).astype(np.int64))

# -----------------------------------------------------------------------------
# the schedule, and what it costs: functions of the step alone

def constant_steps(args):
    """Steps before the cooldown, warm-up included."""
    return args.steps - round(args.steps * args.cooldown)


def learning_rate(args, step):
    """Warm-up over args.warmup steps from args.start on, constant args.lr, then linearly to zero over the share
    args.cooldown of args.steps (SmolLM's trapezoid)."""
    up = min(1.0, (step - args.start + 1) / max(1, args.warmup))    # counted from where this run begins
    down = min(1.0, (args.steps - step) / max(1, args.steps - constant_steps(args)))
    return args.lr * min(up, down)


def training_flops(config, rows, context, depth):
    """Floating point operations to train on rows of `context` tokens: a backward pass counts as two forward passes.

    Counted per *visit*: a layer visited twice costs as much as two layers. Per token and forward pass: 2 per weight of
    a matrix product (layers and output head, not the embedding's look-up), and 4 * n_embd * context / 2 for causal
    attention's two products.
    """
    qkv = config.n_embd * (config.n_head + 2 * config.n_kv_head) * config.head_dim
    layer = qkv + config.n_embd ** 2 + 3 * config.n_embd * config.d_ff      # weights: q, k, v; proj; gate, up, down
    attention = 4 * config.n_embd * context // 2
    return 3 * rows * context * (depth * (2 * layer + attention) + 2 * config.n_embd * config.vocab_size)


def growth_plan(args):
    """[(first step, depth), ...] of the whole run: one entry for a run that does not grow."""
    if args.method not in METHODS:
        # full depth from the first step
        return [(args.start, args.layers)]
    return depth_schedule(constant_steps(args), args.layers, args.block, args.alpha)


def flops_until(args, config, step):
    """Training FLOPs of all steps before this one, including those of the run given to --init."""
    plan, flops = growth_plan(args), args.start_flops
    for (start, depth), (end, _) in zip(plan, plan[1:] + [(args.steps, None)]):
        flops += training_flops(config, max(0, min(step, end) - start) * args.batch, args.context, depth)
    return flops

# -----------------------------------------------------------------------------
# the model and its optimizer

def model_config(args, n_vocab, eot):
    """A new model: of the first stage's depth, or of the layers that --loop or --path visits."""
    path = path_of(args)
    if args.device != "cpu":        # a GPU's matrix products are fast for sizes that are multiples of 64
        n_vocab = math.ceil(n_vocab / 64) * 64
    n_layer = max(path) + 1 if path else growth_plan(args)[0][1]    # a loop stores fewer layers than it visits
    d_ff = math.ceil(args.width * 8 / 3 / 8) * 8                    # 8/3 of the width, rounded up to a multiple of 8
    return GPTConfig(vocab_size=n_vocab, n_layer=n_layer, n_head=args.heads, n_kv_head=args.kv_heads,
                     n_embd=args.width, d_ff=d_ff, context=args.context, path=path, init_depth=args.layers, eot=eot)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): five Newton-Schulz steps make the momentum of a matrix nearly orthogonal. It is scaled
    by 0.2 * sqrt(the longer side), as in Moonlight (arXiv 2502.16982), to the size of an AdamW update, so that the
    rates of both are of one scale. torch.optim.Muon works in bfloat16, which is slow on a CPU: this one is in
    float32, with all matrices of one shape in one product."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:           # matrices of one shape go through one product
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                # 1. Nesterov's momentum: the average as it will be after another step along this gradient
                for p in params:
                    if not self.state[p]:       # the first step
                        self.state[p]["momentum"] = torch.zeros_like(p)
                averages = [self.state[p]["momentum"] for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, averages, group["momentum"]))   # (n, rows, columns)
                # 2. all singular values to about 1 (0.7 to 1.2), by a polynomial of x x^T with Jordan's coefficients
                x = x.mT if rows > columns else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315) @ x
                x = x.mT if rows > columns else x
                # 3. the update
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(params, list(x), alpha=0.2 * group["lr"] * max(rows, columns) ** 0.5)


def make_optimizers(model, args):
    """Muon for the matrices of the layers, AdamW for the rest, with decay on matrices only, not on the gains of norms.
    With AdamW alone, or an embedding that learns as fast as the layers, looking things up was learned late, and on some
    seeds never (RESULTS.md)."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    # the embedding is also the head: AdamW's, as in Jordan's recipe
    of_layers = set(matrices)
    embedding = [p for p in model.parameters() if p.dim() == 2 and p not in of_layers]
    gains = [p for p in model.parameters() if p.dim() < 2]
    # share: of the learning rate, which the loop sets in each step
    muon = [{"params": matrices, "weight_decay": args.weight_decay, "share": 1.0}]
    adamw = [{"params": embedding, "weight_decay": args.weight_decay, "share": args.embed_share},
             {"params": gains, "weight_decay": 0.0, "share": args.embed_share}]
    return [Muon(muon, lr=args.lr), torch.optim.AdamW(adamw, lr=args.lr, betas=(0.9, 0.95), fused=True)]


def compiles(args):
    """Whether the layers are compiled: where there is a compiler, on CUDA, and on the CPU for a run that is long
    enough to win the time back. Not on MPS."""
    if args.compile != "auto":
        return args.compile == "on"
    if args.device == "cpu":
        return args.steps - args.start >= 500 and any(map(shutil.which, ("g++", "clang++", "cl")))
    return (args.device.startswith("cuda") and importlib.util.find_spec("triton") is not None
            and any(map(shutil.which, ("gcc", "clang", "cc", "cl"))))


def prepare(model, args):
    """-> the model as training calls it, also after each growth: compiled layer by layer, and in DDP where there are
    several processes. A layer does not know where it stands, so growth and paths reuse the compiled code."""
    if compiles(args):
        torch._dynamo.config.optimize_ddp = False       # DDP would cut each layer's graph in two
        modules = list(model.layers)
        if model.embed.weight.is_cuda:
            modules.append(model.loss)                  # the logits in float32 are the largest tensor there
        for module in modules:
            module.compile(dynamic=False)
    if not dist.is_initialized():
        return model
    return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

# -----------------------------------------------------------------------------
# arguments

# start: the first step of this run; start_flops: what was spent before it. layers: the final depth, in visits
DEFAULTS = {"method": "lidas", "alpha": 0.0, "lr": 3e-3, "embed_share": 0.3, "warmup": 50, "weight_decay": 0.01,
            "math_share": 0.75, "seed": 0, "evals": 10, "compile": "auto", "start": 0, "start_flops": 0}
SIZES = {   # fits the device: minutes on two CPU cores, a larger model on a GPU
    "cpu": {"layers": 8, "block": 2, "width": 64, "heads": 2, "context": 192, "batch": 6, "steps": 3900,
            "cooldown": 0.25},
    "cuda": {"layers": 16, "block": 4, "width": 384, "heads": 6, "context": 512, "batch": 64, "steps": 2000,
             "cooldown": 0.2}}
OF_THE_MACHINE = {"device", "compile", "out", "resume"}         # may differ from those of a run that is resumed
DEPTH = ("method", "layers", "block", "alpha")
CONFLICTS = {   # options that another option decides already
    "loop": ("path", *DEPTH), "path": DEPTH, "init": (*DEPTH, "width", "heads", "kv_heads")}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # the model and how it gets its depth
    parser.add_argument("--method", choices=["baseline", *METHODS],
                        help="lidas grows by the layer-wise middle, the paper's best (default: lidas)")
    parser.add_argument("--layers", type=positive_int, help="depth at the end (default: 8, in 4 stages; CUDA: 16)")
    parser.add_argument("--block", type=positive_int, help="layers per stage (default: 2; CUDA: 4, as the papers)")
    parser.add_argument("--alpha", type=float, help="PROP-alpha: above 0, later stages get more steps (default: "
                                                    "0: early blocks must learn something to be copied)")
    add_path_options(parser)
    parser.add_argument("--width", type=positive_int, help="of the residual stream (default: 64; CUDA: 384)")
    parser.add_argument("--heads", type=positive_int, help="of attention, each at least 32 wide (default: 2; CUDA: 6)")
    parser.add_argument("--kv-heads", type=positive_int, help="of keys and values; fewer than --heads is grouped-query "
                                                              "attention (default: as many)")
    parser.add_argument("--context", type=positive_int, help="tokens in a row (default: 192; CUDA: 512)")
    # the schedule
    parser.add_argument("--steps", type=positive_int, help="steps (default: 3900; CUDA: 2000; with --init of a "
                                                           "model that is no run: 500)")
    parser.add_argument("--batch", type=positive_int, help="rows per step, over all GPUs (default: 6; CUDA: 64; with "
                                                           "--init of no run: 8)")
    parser.add_argument("--lr", type=float, help="of the constant phase (default: 0.003; at 0.0045 look-ups came "
                                                "later; with --init of no run: 0.0001)")
    parser.add_argument("--embed-share", type=float, help="learning rate of embedding and norms, as a share of --lr "
                                                          "(default: 0.3, for early look-ups; with --data: 1)")
    parser.add_argument("--warmup", type=int, help="steps in which the learning rate rises (default: 50)")
    parser.add_argument("--cooldown", type=float, help="the cooldown's share of all steps (default: 0.25, since "
                                                      "two hops are learned in it; CUDA: 0.2, as in the papers)")
    parser.add_argument("--weight-decay", type=float, help="of matrices (default: 0.01; the usual 0.1 makes small "
                                                           "models copy later)")
    parser.add_argument("--seed", type=int, help="of the init, the text and its order (default: 0)")
    # the data
    parser.add_argument("--data", nargs="+", action="extend", metavar="FILE",
                        help=".txt, .md, .jsonl, .jsonl.gz, .bin (default: the built-in world)")
    parser.add_argument("--math", nargs="+", action="extend", metavar="FILE",
                        help="for the cooldown (default: the world's)")
    parser.add_argument("--field", help="of a .jsonl line that holds the text (default: text, or question and answer)")
    parser.add_argument("--math-share", type=float, help="share of math rows in the cooldown (default: 0.75)")
    parser.add_argument("--encoding", help="a tiktoken name (default: gpt2 for files, the world's words without)")
    # the run
    parser.add_argument("--out", help="folder of checkpoints and log (default: out/METHOD, out/looped, out/init)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its arguments")
    parser.add_argument("--init", metavar="MODEL", help="train on: a run's stable.pt or ckpt.pt, a model of grow.py, "
                                                        "or a Hugging Face name or directory")
    parser.add_argument("--evals", type=positive_int, help="log lines and checkpoints, beside those of growth (10)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best one here)")
    parser.add_argument("--compile", choices=["auto", "on", "off"], help="default: where it pays")
    return parser


def read_args():
    """-> args, and the model and checkpoint that the run starts from, or None, None."""
    args, given = read_options(make_parser(), CONFLICTS, requires={"data": ("field",)})
    kind = "init" if args.init else "looped" if args.loop or args.path else args.method or "lidas"
    args.out = os.path.normpath(args.out or os.path.join("out", kind))
    model, checkpoint, defaults = resumed(args, given) if args.resume else begun(args)
    for name, value in defaults.items():            # what was not given
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.resume:
        args.device = pick_device(args.device)
    else:
        check(args, given, model, checkpoint)
    return args, model, checkpoint


def resumed(args, given):
    """A run that goes on has its own arguments, but for those of the machine -> model, checkpoint, {argument: value}"""
    latest = os.path.join(args.out, "ckpt.pt")
    if not os.path.exists(latest):
        runs = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(args.out)), "*", "ckpt.pt")))
        raise ValueError(f"there is no run in {args.out}; runs: {', '.join(map(os.path.dirname, runs)) or 'none'}")
    model, checkpoint = load_checkpoint(latest)
    if "optimizers" not in checkpoint:
        raise ValueError(f"{latest} is a model, not a run: train it on with --init")
    saved = checkpoint["args"]
    for name in given - OF_THE_MACHINE:
        if getattr(args, name) != saved[name]:
            raise ValueError(f"--{name.replace('_', '-')} was {saved[name]} in that run and cannot change")
    another_machine = saved["device"].split(":")[0] not in ("cpu", pick_device())
    return model, checkpoint, saved | ({"device": "auto"} if another_machine else {})


def begun(args):
    """A new run, or one from the model of --init -> that model and its checkpoint, or None, None; {argument: default}.

    Of the defaults the later ones count: those of the device; of another model; the arguments of a run that --init goes
    on with; what --init fixes.
    """
    args.device = pick_device(args.device or "auto")
    model, checkpoint = load_checkpoint(args.init) if args.init else (None, None)
    defaults = DEFAULTS | SIZES.get(args.device.split(":")[0], SIZES["cpu"])
    if args.data:
        defaults["embed_share"] = 1.0       # a large vocabulary is learned faster so
    path = path_of(args, model.config if model else None)
    if path:
        defaults |= {"method": "looped", "layers": len(path)}
        if set(path) != set(range(model.config.n_layer if model else max(path) + 1)):
            raise ValueError("a path that is trained visits every layer: grow.py removes those that it leaves out")
    if model:
        model.config.path = path or model.config.path
        defaults |= {"lr": 1e-4, "steps": 500, "batch": 8, "context": min(512, model.config.context)}
        if "optimizers" in checkpoint:              # a run: its steps are counted on, without another warm-up
            defaults |= checkpoint["args"] | {"warmup": 0, "start": checkpoint["step"],
                                              "start_flops": checkpoint["log"][-1]["flops"]}
        defaults |= {"method": "init", "layers": len(model.config.resolve_path())}
    defaults.setdefault("kv_heads", args.heads or defaults["heads"])
    # FLOPs are shown as a share of a plain model's: of the first run's depth, where --init goes on with a run
    defaults.setdefault("plain_layers", args.layers or defaults["layers"])
    return model, checkpoint, defaults


def check(args, given, model, checkpoint):
    """Raises ValueError for what cannot be, or would be passed over, before anything is written."""
    for name, low, high in (("cooldown", 0, 1), ("math_share", 0, 1), ("lr", 1e-12, 1e3), ("warmup", 0, 1e9),
                            ("embed_share", 0, 1e3), ("weight_decay", 0, 1e3), ("alpha", 0, 1e3), ("seed", 0, 2 ** 32)):
        if not low <= getattr(args, name) <= high:  # nan is refused as well
            raise ValueError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {getattr(args, name)}")
    if args.start >= args.steps:
        raise ValueError(f"that run has {args.start} steps already: give more --steps")
    if constant_steps(args) < 1 and not model:
        raise ValueError("--steps less the cooldown must leave a step")
    growth_plan(args)                               # whole blocks, and steps for each stage
    if not model:
        model_config(args, n_vocab=1, eot=0)        # heads that fit the width
    elif args.context > model.config.context:
        raise ValueError(f"--context {args.context} is longer than the model's {model.config.context}")
    elif "encoding" in given and checkpoint["tokenizer"]:
        raise ValueError(f"--encoding does not go with --init {args.init}, which has a tokenizer of its own")
    if args.method == "baseline" and given & {"block", "alpha"}:
        raise ValueError("--block and --alpha go with a --method that grows")
    if given & {"math", "math_share"} and constant_steps(args) == args.steps:
        raise ValueError("--math and --math-share are for the cooldown: give a --cooldown above 0")
    if args.math and not args.data:
        raise ValueError("--math goes with --data: the built-in world has math of its own")
    if "math_share" in given and args.data and not args.math:
        raise ValueError("--math-share needs --math FILE, where the math is taken from")
    for file in (args.data or []) + (args.math or []):
        evaluate.check_text_file(file)

# -----------------------------------------------------------------------------
# what a run prints and keeps

QUESTIONS = 64      # of each number of hops: a standard error of 6 points at most


@torch.compiler.set_stance("force_eager")       # compiled code is for training: evaluation has other shapes
def evaluation(model, heldout, tokenizer, args):
    """Held-out losses, and, of the built-in world, the accuracy by hops -> {name: value}"""
    row = {f"loss {name}": estimate_loss(model, rows) for name, rows in heldout.items()}    # nats per token
    for task in evaluate.HOPS if not args.data else []:
        row[task] = evaluate.accuracy(model, tokenizer, task, QUESTIONS)["value"]
    return row


def shown(row):
    """A row as text: held-out losses, and hops 0, 1, 2 ... in percent."""
    losses = "  ".join(f"{name.removeprefix('loss ')} {row[name]:.4f}" for name in row if name.startswith("loss "))
    hops = [f"{100 * row[name]:.0f}" for name in row if name.startswith("hops-")]
    return f"held-out {losses}" + (f"  hops 0-{len(hops) - 1}: {' '.join(hops)} %" if hops else "")


class Run:
    """What a run prints, keeps and saves; on the first process only, where there are several."""

    def __init__(self, args, config, log, tokenizer, heldout, kept):
        self.args, self.tokenizer, self.heldout, self.kept = args, tokenizer, heldout, kept
        self.since = None                               # (step, time) of the last report
        # training FLOPs of a plain model of full depth that takes all these steps: the log gives shares of it
        self.plain = training_flops(config, args.steps * args.batch, args.context, args.plain_layers)
        self.log = [{**row, "flops_share": row["flops"] / self.plain} for row in log]

    def report(self, model, step, loss=None, path=None):
        """One line and one row of the log. loss: mean training loss since the last one; path: along which the model has
        just grown, so that the line says what it does before it is trained. Raises ValueError when training has gone
        wrong."""
        args, depth, speed = self.args, len(model.config.resolve_path()), ""
        flops = flops_until(args, model.config, step)
        row = {"step": step, "loss": loss, **evaluation(model, self.heldout, self.tokenizer, args), "depth": depth,
               "lr": learning_rate(args, step), "flops": flops, "flops_share": flops / self.plain}
        if not all(math.isfinite(value) for value in row.values() if value is not None):
            raise ValueError(f"the loss is not finite at step {step}: start anew with a lower --lr")
        if self.since and step > self.since[0]:
            seconds = time.perf_counter() - self.since[1]
            row["tokens_per_second"] = (step - self.since[0]) * args.batch * args.context / seconds
            speed = f"  {row['tokens_per_second'] / 1e3:.1f}k tok/s"
        what = f"grows along {' '.join(map(str, path))}  " if path else f"loss {loss:.4f}  " if loss else ""
        tqdm.write(f"step {step:>6}/{args.steps}  {what}{shown(row)}{speed}  depth {depth}  "
                   f"FLOPs {flops / self.plain:.0%}")
        self.log.append({**row, "growth": path} if path else row)
        self.since = (step, time.perf_counter())

    def save(self, name, model, optimizers, step):
        out, states = self.args.out, [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(os.path.join(out, name), model, heldout=self.heldout, args=vars(self.args), step=step,
                        log=self.log, optimizers=states, **self.kept)
        save_atomically(os.path.join(out, "log.jsonl"),
                        lambda f: f.writelines(json.dumps(row).encode() + b"\n" for row in self.log))


def own_folder(folder, resume):
    """One run owns its folder: a lock of the system, which ends with the process, also when that is killed.
    -> the open file"""
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, "lock"), "w")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another process trains in {folder} right now")
    if resume:
        return file
    if any(os.path.exists(os.path.join(folder, name)) for name in ("ckpt.pt", "stable.pt")):
        raise ValueError(f"{folder} holds a run already: go on with --resume, or choose another --out")
    # tokens of a run that ended before its first checkpoint, perhaps on other data
    for name in ("general.tokens", "math.tokens"):
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    return file


def set_up_processes(args):
    """torchrun's variables -> rank, world_size"""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % world_size:
        raise ValueError(f"--batch {args.batch} cannot be shared by {world_size} processes")
    if world_size > 1:
        # torchrun has started one process per GPU
        gpu = int(os.environ["LOCAL_RANK"])
        if args.device == "cuda":
            if gpu >= torch.cuda.device_count():
                raise ValueError(f"process {gpu + 1} of this machine has no GPU of its own")
            torch.cuda.set_device(gpu)
        # the others wait while the first one evaluates
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    return rank, world_size

# -----------------------------------------------------------------------------

def main():
    args, model, checkpoint = read_args()
    rank, world_size = set_up_processes(args)
    torch.set_float32_matmul_precision("high")
    # ---- the data
    spec = args.encoding or ("gpt2" if args.data else evaluate.world_spec())
    if checkpoint:
        spec = checkpoint["tokenizer"] or args.encoding
    tokenizer = get_tokenizer(spec)
    lock = own_folder(args.out, args.resume) if rank == 0 else None
    if rank > 0:
        dist.barrier()          # the main process writes the token files, then the others read them
    streams, heldout, data = open_streams(args, tokenizer)
    if rank == 0 and world_size > 1:
        dist.barrier()
    # ---- the model, and its optimizer
    torch.manual_seed(args.seed)
    model = (model or GPT(model_config(args, tokenizer.n_vocab, tokenizer.eot))).to(args.device)
    model.config.eot = tokenizer.eot            # also of a Hugging Face model: documents do not see each other
    optimizers = make_optimizers(model, args)
    log = []
    if checkpoint and "optimizers" in checkpoint:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            # the moments are the run's, the settings those of this command
            optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
        # the line of the step from which --init goes on comes anew
        log = [row for row in checkpoint["log"] if args.resume or row["step"] < args.start]
    run = Run(args, model.config, log, tokenizer, heldout, {"tokenizer": spec, "data": data})
    if args.resume and data != checkpoint["data"]:
        raise ValueError("the data are not those of that run: its files, or the built-in world, have changed")
    if rank == 0:
        announce(args, model, checkpoint)
    start = checkpoint["step"] if args.resume else args.start
    model = train(run, model, optimizers, Batches(streams, args, rank, world_size), start, main_process=rank == 0)
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        finish(model, args, tokenizer)
    lock and lock.close()


def announce(args, model, checkpoint):
    """The first line of a run: what it is."""
    if checkpoint and "optimizers" not in checkpoint:
        tqdm.write(f"{args.init} has no optimizer: a fresh one starts, with {args.warmup} steps of warm-up")
    depths = " -> ".join(str(depth) for _, depth in growth_plan(args))
    looped = f" along {' '.join(map(str, model.config.path))}" if model.config.path else ""
    tqdm.write(f"{args.method}: depth {depths}{looped}, {args.steps} steps of {args.batch} x {args.context} tokens on "
               f"{args.device}, layers {'' if compiles(args) else 'not '}compiled")


def train(run, model, optimizers, batches, start, main_process):
    """The loop, from step `start` on. -> the model, which growth has replaced."""
    args, cuda = run.args, run.args.device.startswith("cuda")
    growth_steps, constant = dict(growth_plan(args)[1:]), constant_steps(args)
    report_steps = {round(args.steps * i / args.evals) for i in range(args.evals + 1)} | {constant}
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=cuda)
    # rows take time to make: on a GPU, other processes do it
    workers = min(8, os.cpu_count() // 2) if cuda and args.batch * args.context > 8192 else 0
    steps = range(start, args.steps)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers, pin_memory=cuda)
    wrapped, losses = prepare(model, args), []
    if main_process and not args.resume:
        run.report(model, start)
        run.save("ckpt.pt", model, optimizers, start)           # an unwritable --out is noticed now
    for step, rows in zip(tqdm(steps, unit="step", disable=not main_process or None), loader):
        # 1. the learning rate of this step
        rate = learning_rate(args, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * rate
        # 2. forward and backward
        rows = rows.to(args.device, non_blocking=True)                  # (batch, context + 1)
        with autocast:
            loss = wrapped(rows[:, :-1], rows[:, 1:])[1]
        loss.backward()
        # 3. the update
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())            # stays on the device: the loop waits for it at the log lines only
        del loss                                # its graph would hold the parameters that growth replaces
        done = step + 1
        due = done in report_steps or done in growth_steps
        # 4. report: the last line of a stage is of the model before it grows
        if due:
            mean_loss = torch.stack(losses).mean().item()
            losses.clear()
            if main_process:
                run.report(model, done, mean_loss)
        # 5. grow: duplicate a block, and the optimizer's moments with it
        if done in growth_steps:
            path = METHODS[args.method](model.config.n_layer, args.block)
            grown = grow(model, path)
            optimizers = grow_optimizer(optimizers, make_optimizers(grown, args), model, grown, path)
            model, wrapped = grown, prepare(grown, args)        # compiled layers and DDP are the old model's
            gc.collect()                        # compiled layers refer to themselves: the smaller model's would stay
            if main_process:
                run.report(model, done, path=path)
        # 6. save: stable.pt before ckpt.pt, so that --resume after a kill between the two comes here again
        if due and main_process:
            if done == constant:
                run.save("stable.pt", model, optimizers, done)
            run.save("ckpt.pt", model, optimizers, done)
    return model


@torch.compiler.set_stance("force_eager")
def finish(model, args, tokenizer):
    """A sample, and what to run next."""
    torch.manual_seed(args.seed)
    file = os.path.join(args.out, "ckpt.pt")
    print(f"\na sample:\n{complete(model, tokenizer, '', 80, temperature=0.8)}\n\nsaved {file}. Next:\n"
          f"  python evaluate.py {file}\n  python loop.py {file}\n  python signatures.py {file}")


if __name__ == "__main__":
    run_script(main)
