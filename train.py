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
import functools
import gc
import json
import math
import os
import pathlib
import shutil
import sqlite3
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
from loop import command_parser, path_of
from model import (GPT, GPTConfig, between, complete, estimate_loss, get_tokenizer, load_checkpoint, pick_device,
                   positive_int, read_options, run_script, save_atomically, save_checkpoint)

# --- data -----------------------------------------------------------------------------------------

def open_stream(name, files, args, tokenizer):
    """One kind of text -> a function that gives training row `number`, (context + 1) token ids; held-out rows
    (n, context + 1); a checksum, which tells whether the text has changed."""
    if not files:       # the built-in world is made as it is read; its held-out rows are the same for all seeds
        row = functools.partial(evaluate.world_row, tokenizer, args.context, name, False, args.seed)
        heldout = np.stack([evaluate.world_row(tokenizer, args.context, name, True, 0, number) for number in range(64)])
        return row, torch.from_numpy(heldout).int(), zlib.crc32(np.stack([row(0), *heldout]))
    dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.uint32
    parts = [part.astype(dtype) for part in evaluate.encode_files(files, tokenizer, args.field)]
    tokens = np.concatenate([np.empty(0, dtype), *parts])       # the empty one: there may be no document
    training, heldout = split_rows(tokens, tokenizer.eot, args.context + 1)
    if not len(training) or not len(heldout):
        raise ValueError(f"{len(tokens)} {name} tokens are too few: give more text, or a smaller --context")
    training = np.random.default_rng(args.seed).permutation(training)
    row = functools.partial(np.take, training, axis=0, mode="wrap")         # after the last one the same order again
    return row, torch.from_numpy(heldout.astype(np.int32)), zlib.crc32(tokens)


def split_rows(tokens, eot, width):
    """tokens (n,) -> training rows, held-out rows, (rows, width) each: the last 64, or a twentieth. No document stands
    in both, if one begins in the first half of these."""
    n_heldout = min(64, math.ceil(len(tokens) / width / 20))        # rows
    cut = max(0, len(tokens) - n_heldout * width)
    begins = np.flatnonzero(tokens[cut:cut + n_heldout * width // 2] == eot)
    cut += begins[0] if len(begins) else 0
    return [part[:len(part) // width * width].reshape(-1, width) for part in (tokens[:cut], tokens[cut:])]


def make_batch(streams, args, rank, world_size, step):
    """A pure function of its arguments, so that a resumed run reads the same rows. Together, the ranks read the rows
    that one process alone would read. -> (batch / world_size, context + 1) int64"""
    share, rows = args.batch // world_size, []
    # which rows of the cooldown are math is drawn for all ranks, so that each finds its own
    math_share = args.math_share if step >= args.constant and "math" in streams else 0
    is_math = np.random.default_rng((args.seed, step)).random(args.batch) < math_share
    for i in range(rank * share, (rank + 1) * share):
        # math is counted from the cooldown's first row on
        stream, begin = ("math", args.constant) if is_math[i] else ("general", 0)
        rows.append(streams[stream]((step - begin) * args.batch + i))
    return torch.from_numpy(np.stack(rows).astype(np.int64))

# --- the schedule, and what it costs: functions of the step alone ---------------------------------
# read_args sets args.constant, the steps before the cooldown, and args.stages, [(first step, depth), ...]

def learning_rate(args, step):
    """Warm-up, constant, then linearly to zero in the cooldown (SmolLM's trapezoid)."""
    up = min(1.0, (step - args.start + 1) / max(1, args.warmup))    # counted from where this run begins
    down = min(1.0, (args.steps - step) / max(1, args.steps - args.constant))   # 1 until the cooldown
    return args.lr * min(up, down)


def training_flops(model, n_rows, context, depth):
    """Floating point operations to train on n_rows of `context` tokens; a backward pass counts as two forward passes, a
    layer once per visit. Forward: 2 per token and weight of a matrix product (not of the embedding's look-up)."""
    weights = sum(p.numel() for p in model.layers[0].parameters() if p.dim() == 2)      # of a layer's matrices
    attention = 4 * model.config.n_embd * context // 2      # q k^T and its product with v, of half a row on average
    return 3 * n_rows * context * (depth * (2 * weights + attention) + 2 * model.head.weight.numel())

# --- the model and its optimizer ------------------------------------------------------------------

def model_config(args, tokenizer):
    """A new model: of the first stage's depth, or of the layers that --loop or --path visits."""
    path, n_vocab = path_of(args), tokenizer.n_vocab
    if args.device != "cpu":        # a GPU's matrix products are fast for sizes that are multiples of 64
        n_vocab = math.ceil(n_vocab / 64) * 64
    n_layer = max(path) + 1 if path else args.stages[0][1]          # a loop stores fewer layers than it visits
    d_ff = math.ceil(args.width * 8 / 3 / 8) * 8                    # 8/3 of the width, rounded up to a multiple of 8
    return GPTConfig(vocab_size=n_vocab, n_layer=n_layer, n_head=args.heads, n_kv_head=args.kv_heads or args.heads,
                     n_embd=args.width, d_ff=d_ff, context=args.context, path=path, init_depth=args.layers)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): five Newton-Schulz steps make the momentum of a matrix nearly orthogonal. torch's own
    is in bfloat16, 17 times slower on a CPU. This one is in float32 (TF32 on a GPU) and takes a group's matrices, of
    one shape, in one product."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, (rows, columns) = group["params"], group["params"][0].shape
            # 1. Nesterov's momentum, zero at first: the average as it will be after another step along this gradient
            averages = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            grads = [p.grad for p in params]
            torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
            x = torch.stack(torch._foreach_lerp(grads, averages, group["momentum"]))    # (n, rows, columns)
            # 2. all singular values to about 1 (0.7 to 1.2), by a polynomial of x x^T with Jordan's coefficients
            x = x.mT if rows > columns else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315) @ x
            x = x.mT if rows > columns else x
            # 3. the update, of an AdamW update's size as in Moonlight (arXiv 2502.16982): both take one learning rate
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(params, list(x), alpha=0.2 * group["lr"] * max(rows, columns) ** 0.5)


def make_optimizers(model, args):
    """Muon for the matrices of the layers, AdamW for the rest, with decay on matrices only, not on the gains of norms.
    With AdamW alone, or an embedding at the layers' rate, looking things up was learned late or never (RESULTS.md)."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    embedding = list(dict.fromkeys((model.embed.weight, model.head.weight)))    # once, where both are one matrix
    gains = [p for p in model.parameters() if p.dim() < 2]
    # share: of the learning rate, which the loop sets in each step
    muon = [{"params": [p for p in matrices if p.shape == shape], "weight_decay": args.weight_decay, "share": 1.0}
            for shape in dict.fromkeys(p.shape for p in matrices)]
    adamw = [{"params": embedding, "weight_decay": args.weight_decay, "share": args.embed_share},
             {"params": gains, "weight_decay": 0.0, "share": args.embed_share}]
    return [Muon(muon, {"lr": args.lr, "momentum": 0.95}),
            torch.optim.AdamW(adamw, lr=args.lr, betas=(0.9, 0.95), fused=True)]


def prepare(model, args):
    """-> the model as training calls it, anew after each growth: compiled layer by layer, in DDP if there are several
    processes. A layer does not know where it stands, so growth and paths reuse the compiled code."""
    # by default where there is a compiler (on a GPU, Triton takes C), in a run that is long enough to win the time back
    compilers = ("g++", "clang++", "cl") if args.device == "cpu" else ("gcc", "clang", "cc")
    pays = args.device != "mps" and args.steps - args.start >= 500 and any(map(shutil.which, compilers))
    if args.compile == "on" or (args.compile == "auto" and pays):
        torch._dynamo.config.optimize_ddp = False       # DDP would cut each layer's graph in two
        for layer in model.layers:
            layer.compile(dynamic=False)
        if args.device.startswith("cuda"):
            model.loss.compile(dynamic=False)           # the logits in float32 are the largest tensor there
    if dist.is_initialized():
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return model

# --- arguments ------------------------------------------------------------------------------------

QUESTIONS = 64      # of each number of hops, at a log line: a standard error of about 6 points
DEPTH = ("method", "layers", "block", "alpha")
# an option: those that it decides already
EXCLUDES = {"loop": ("path", *DEPTH), "path": DEPTH, "init": (*DEPTH, "width", "heads", "kv_heads")}
# the defaults of a GPU, where those of the parser are a CPU's
CUDA = {"layers": 16, "block": 4, "width": 384, "heads": 6, "context": 512, "batch": 64, "steps": 2000, "cooldown": 0.2}


def make_parser():
    parser = command_parser(__doc__)
    add = parser.add_argument
    # the model and how it gets its depth
    add("--method", choices=["baseline", *METHODS], default="lidas", help="lidas (default) is the paper's best")
    add("--layers", type=positive_int, default=8, help="depth at the end, in visits (default: 8; CUDA: 16)")
    add("--block", type=positive_int, default=2, help="layers per stage (default: 2; CUDA: 4, as in the papers)")
    add("--alpha", type=between(0, 1000), default=0.0, help="PROP-alpha: above 0 later stages are longer (default: 0)")
    add("--width", type=positive_int, default=64, help="of the residual stream (default: 64; CUDA: 384)")
    add("--heads", type=positive_int, default=2, help="of attention, best 32 wide or more (default: 2; CUDA: 6)")
    add("--kv-heads", type=positive_int, help="fewer than --heads: grouped-query attention (default: as many)")
    add("--context", type=positive_int, default=192, help="tokens in a row (default: 192; CUDA, --init of no run: 512)")
    # the schedule; with --init of a run the defaults are that run's, without a warm-up
    add("--steps", type=positive_int, default=3900, help="default: 3900; CUDA: 2000; --init of no run: 500")
    add("--batch", type=positive_int, default=6, help="rows of all GPUs (default: 6; CUDA: 64; --init of no run: 8)")
    add("--lr", type=between(1e-12, 1000), default=3e-3, help="at its highest (default: 0.003; --init of no run: 1e-4)")
    add("--embed-share", type=between(0, 1000), default=0.3, help="of --lr: embedding, norms (default: 0.3; --data: 1)")
    add("--warmup", type=between(0, 10 ** 9, int), default=50, help="steps of a rising learning rate (default: 50)")
    add("--cooldown", type=between(0, 1), default=0.25, help="share of all steps (default: 0.25; CUDA: 0.2)")
    add("--weight-decay", type=between(0, 1000), default=0.01, help="of matrices (default: 0.01; 0.1 delays copying)")
    add("--seed", type=between(0, 2 ** 32, int), default=0, help="of the init, the text and its order (default: 0)")
    # the data
    files = {"nargs": "+", "action": "extend", "type": os.path.abspath, "metavar": "FILE"}
    add("--data", **files, help="text, .jsonl, .bin (default: the built-in world)")
    add("--math", **files, help="for the cooldown (default: the world's, or none)")
    add("--field", help="of a .jsonl line that holds the text (default: text, or question and answer)")
    add("--math-share", type=between(0, 1), default=0.75, help="of math rows in the cooldown (default: 0.75)")
    add("--encoding", help="a tiktoken name (default: gpt2 for files, the world's words without)")
    # the run
    add("--out", help="folder of checkpoints and log (default: out/METHOD, out/looped, out/init)")
    add("--resume", action="store_true", help="go on with the run in --out, with its arguments")
    add("--init", metavar="MODEL", help="train on: a run's stable.pt or ckpt.pt, a model of grow.py or Hugging Face")
    add("--evals", type=positive_int, default=10, help="log lines and checkpoints, beside growth (default: 10)")
    add("--compile", choices=["auto", "on", "off"], default="auto", help="the layers (default: where it pays)")
    parser.set_defaults(start=0)        # no option: the first step of this run, after those of the run of --init
    return parser


def read_args():
    """-> args, and the model and checkpoint that the run starts from: None and {} for a new model"""
    args, given = read_options(make_parser(), EXCLUDES, requires={"data": ("field",)})
    kind = "init" if args.init else "looped" if args.loop or args.path else args.method
    args.out = os.path.normpath(args.out or os.path.join("out", kind))
    # 1. what the run starts from
    latest, model, checkpoint = os.path.join(args.out, "ckpt.pt"), None, {}
    source = latest if args.resume else args.init
    if source and (not args.resume or os.path.exists(latest)):
        model, checkpoint = load_checkpoint(source)
    stored = checkpoint["args"] if "optimizers" in checkpoint else {}      # else it is a model that is no run
    if args.resume:
        if not stored:                      # a new run would hide a mistyped name
            runs = sorted(str(file.parent) for file in pathlib.Path(args.out).parent.glob("*/ckpt.pt"))
            raise ValueError(f"there is no run in {args.out} (models: --init); runs: {', '.join(runs) or 'none'}")
        # what may change: what is of the machine, and where the text is, since its checksum is compared
        for name in given - {"out", "resume", "device", "compile", "data", "math"}:
            if getattr(args, name) != stored[name]:
                raise ValueError(f"--{name.replace('_', '-')} was {stored[name]} in that run and cannot change")
        if "device" not in given and stored["device"] == "cpu":
            args.device = "cpu"     # the same bits; a GPU's run goes on on the best device here
    args.device = pick_device(args.device)      # auto: the best one here
    path = path_of(args, model.config if model else None)
    # 2. where a value comes from: each of these counts more than those before it, the parser's defaults
    # (values is args itself)
    values, typed = vars(args), {name: getattr(args, name) for name in given | {"out", "resume", "device"}}
    if args.device.startswith("cuda"):
        values.update(CUDA)
    if args.data:
        values.update(encoding="gpt2", embed_share=1.0)         # a large vocabulary is learned faster so
    if path:
        values.update(method="looped", layers=len(path))        # depth counts visits
    if model:
        model.config.path = path or model.config.path
        # of a run its own: longer rows of the same text would be held out where it has trained
        longest = checkpoint["args"].get("context", model.config.context)
        if typed.get("context", 0) > longest:
            raise ValueError(f"--context {typed['context']} is longer than the {longest} of --init")
        values.update(method="init", layers=len(model.config.resolve_path()), block=None, lr=1e-4, steps=500, batch=8,
                      context=min(512, longest), encoding=None)
    values.update(stored)                       # of a run all, also its depth, of which FLOPs are a share
    if stored and not typed["resume"]:          # the steps of --init are counted on, without another warm-up
        values.update(method="init", warmup=0, start=checkpoint["step"])
    values.update(typed)
    # 3. what follows from them: the steps before the cooldown, and when the model has which depth
    args.constant, args.stages = args.steps - round(args.steps * args.cooldown), [(0, args.layers)]
    if args.method in METHODS:
        args.stages = depth_schedule(args.constant, args.layers, args.block, args.alpha)
    if not args.resume:
        check(args, given, path, model, checkpoint)
    return args, model, checkpoint


def check(args, given, path, model, checkpoint):
    """Raises ValueError for what cannot be, or would be passed over, before any text is read or anything written."""
    if args.start >= args.steps:
        raise ValueError(f"that run has {args.start} steps already: give more --steps")
    if path and set(path) != set(range(model.config.n_layer if model else max(path) + 1)):
        raise ValueError("a path that is trained visits every layer: grow.py removes those that it leaves out")
    if model and "encoding" in given and checkpoint["tokenizer"]:
        raise ValueError(f"--encoding does not go with --init {args.init}, which has a tokenizer of its own")
    if args.method == "baseline" and given & {"block", "alpha"}:
        raise ValueError("--block and --alpha go with a --method that grows")
    if given & {"math", "math_share"} and (args.constant == args.steps or bool(args.math) != bool(args.data)):
        raise ValueError("--math goes with --data, --math-share with both or none, and each with a --cooldown above 0")
    if model and not args.data and checkpoint["tokenizer"] != evaluate.TOKENIZER:
        raise ValueError(f"{args.init} is no model of the built-in world: give a text by --data")
    for file in (args.data or []) + (args.math or []):
        evaluate.check_text_file(file)

# --- what a run prints and keeps ------------------------------------------------------------------

class Run:
    """What a run prints, keeps and saves: on the first process only, where there are several."""

    def __init__(self, args, model, tokenizer, heldout, kept, log, first):
        # kept: what its checkpoints have besides; log: of the run that goes on
        self.args, self.tokenizer, self.heldout, self.kept, self.first = args, tokenizer, heldout, kept, first
        # the log gives shares of what a plain model of full depth costs that takes all these steps
        self.plain_flops = training_flops(model, args.steps * args.batch, args.context, args.layers)
        self.log = [{**row, "flops_share": row["flops"] / self.plain_flops} for row in log]
        self.time = time.perf_counter()     # of the last report

    @torch.compiler.set_stance("force_eager")       # compiled code is for training: evaluation has other shapes
    def report(self, model, step, loss=None, path=None):
        """One line, one row of the log. loss: mean since the last one; path: along which the model has just grown."""
        if not self.first:
            return
        # as a row: what was trained since the last one, held-out losses, accuracy by hops in the built-in world
        args, depth, last = self.args, len(model.config.resolve_path()), self.log[-1] if self.log else {}
        steps, seconds = step - last.get("step", 0), time.perf_counter() - self.time        # at this depth
        flops = last.get("flops", 0) + training_flops(model, steps * args.batch, args.context, depth)
        row = {"step": step, "loss": loss, "depth": depth, "lr": learning_rate(args, step), "flops": flops,
               "flops_share": flops / self.plain_flops}
        for name, rows in self.heldout.items():
            row[f"loss {name}"] = estimate_loss(model, rows)            # nats per token
        for task in evaluate.HOPS if not args.data else []:
            row[task] = evaluate.accuracy(model, self.tokenizer, task, QUESTIONS)["value"]
        if not all(math.isfinite(value) for value in row.values() if value is not None):
            raise ValueError(f"the loss is not finite at step {step}: start anew with a lower --lr")
        # as text; what does not apply is left out
        hops = [f"{100 * row[task]:.0f}" for task in evaluate.HOPS if task in row]      # in percent
        parts = [f"step {step:>6}/{args.steps}",
                 f"grows along {' '.join(map(str, path))}" if path else f"loss {loss:.4f}" if loss else "",
                 "held-out " + "  ".join(f"{name} {row[f'loss {name}']:.4f}" for name in self.heldout),
                 f"hops 0-{len(hops) - 1}: {' '.join(hops)} %" if hops else "",
                 f"{steps * args.batch * args.context / seconds / 1e3:.1f}k tok/s" if steps else "",
                 f"depth {depth}", f"FLOPs {row['flops_share']:.0%}"]
        tqdm.write("  ".join(filter(None, parts)))
        if steps or path or not self.log:       # --init: the line of the run that goes on stays
            self.log.append({**row, "growth": path} if path else row)
        self.time = time.perf_counter()         # evaluation is not training

    def save(self, name, model, optimizers, step):
        if self.first:
            save_checkpoint(os.path.join(self.args.out, name), model, heldout=self.heldout, args=vars(self.args),
                            step=step, log=self.log, optimizers=[part.state_dict() for part in optimizers], **self.kept)
            lines = [json.dumps(row).encode() + b"\n" for row in self.log]
            save_atomically(os.path.join(self.args.out, "log.jsonl"), lambda f: f.writelines(lines))


def own_folder(args):
    """Makes the run's folder -> its lock: SQLite's, which on every system ends with the process, also a killed one."""
    os.makedirs(args.out, exist_ok=True)
    try:
        lock = sqlite3.connect(os.path.join(args.out, "lock"), timeout=0, isolation_level=None)     # stores nothing
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        raise ValueError(f"{args.out} cannot be locked: another process trains there, if it is locked ({error})")
    if not args.resume and any(os.path.exists(os.path.join(args.out, name)) for name in ("ckpt.pt", "stable.pt")):
        raise ValueError(f"{args.out} holds a run already: go on with --resume, or choose another --out")
    return lock


def start_processes(args):
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # torchrun sets them
    if args.batch % world_size:
        raise ValueError(f"--batch {args.batch} cannot be shared by {world_size} processes")
    if world_size > 1:
        if args.device == "cuda":       # torchrun has started one process per GPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    return rank, world_size


def main():
    args, model, checkpoint = read_args()
    rank, world_size = start_processes(args)
    lock = own_folder(args) if rank == 0 else None      # held until the process ends
    torch.set_float32_matmul_precision("high")      # TF32, on a GPU
    # 1. the model, and its optimizers
    spec = checkpoint.get("tokenizer") or args.encoding or (None if model else evaluate.TOKENIZER)
    tokenizer = get_tokenizer(spec)
    torch.manual_seed(args.seed)
    model = (model or GPT(model_config(args, tokenizer))).to(args.device)       # --resume and --init have brought one
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"the encoding has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}")
    model.config.eot = tokenizer.eot            # also of a Hugging Face model: documents do not see each other
    optimizers = make_optimizers(model, args)
    for optimizer, state in zip(optimizers, checkpoint.get("optimizers", [])):
        # the moments are the run's, the settings those of this command
        optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    # 2. the data: each process reads all of them
    streams, heldout, checksums = {}, {}, {}
    for name, files in (("general", args.data), ("math", args.math)):
        if files or not args.data:
            streams[name], heldout[name], checksums[name] = open_stream(name, files, args, tokenizer)
    before = checkpoint.get("data", checksums)      # of the run that goes on; --init may bring files of its own
    same_files = args.data and args.data == checkpoint.get("args", {}).get("data")
    if (args.resume and checksums != before) or (same_files and checksums["general"] != before["general"]):
        raise ValueError("the data are not those of that run: its files, or the built-in world, have changed")
    # 3. what the first process prints and keeps
    kept, start = {"tokenizer": spec, "data": checksums}, checkpoint.get("step", 0)
    run = Run(args, model, tokenizer, heldout, kept, checkpoint.get("log", []), first=rank == 0)
    if rank == 0:
        optimizer = "its optimizer" if "optimizers" in checkpoint else "a fresh optimizer"
        tqdm.write(f"{args.method}: {args.steps} steps of {args.batch} x {args.context} on {args.device}, {optimizer}")
    if not args.resume:
        run.report(model, start)
        run.save("ckpt.pt", model, optimizers, start)
    # 4. training
    batches = functools.partial(make_batch, streams, args, rank, world_size)
    model = train(args, model, optimizers, batches, start, run)
    if world_size > 1:
        dist.destroy_process_group()
    # 5. a sample
    if rank == 0:
        torch.manual_seed(args.seed)
        with torch.compiler.set_stance("force_eager"):
            sample = complete(model, tokenizer, "", 80, temperature=0.8)
        print(f"\na sample:\n{sample}\n\nsaved {args.out}/ckpt.pt; next: python evaluate.py {args.out}/ckpt.pt")


def train(args, model, optimizers, make, start, run):
    """The loop, from step `start` on. make: gives the batch of a step. -> the model, which growth has replaced."""
    cuda = args.device.startswith("cuda")
    grows_at = {step for step, _ in args.stages[1:]}
    report_steps = {round(args.steps * i / args.evals) for i in range(args.evals + 1)} | grows_at | {args.constant}
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=cuda)
    # rows take time to make: on a GPU, other processes do it, where they can have our functions by a fork
    workers = min(8, os.cpu_count() // 2) if cuda and hasattr(os, "fork") and args.batch * args.context > 8192 else 0
    steps = range(start, args.steps)
    loader = torch.utils.data.DataLoader(steps, batch_size=None, collate_fn=make, num_workers=workers, pin_memory=cuda,
                                         multiprocessing_context="fork" if workers else None)
    wrapped, losses = prepare(model, args), []          # losses since the last report
    for step, rows in zip(tqdm(steps, unit="step", disable=None if run.first else True), loader):
        # 1. the batch
        rows = rows.to(args.device, non_blocking=True)                  # (batch, context + 1)
        # 2. forward and backward
        with autocast:
            loss = wrapped(rows[:, :-1], rows[:, 1:])[1]
        loss.backward()
        # 3. the update, at the learning rate of this step
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(args, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * rate         # share: see make_optimizers
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())            # stays on the device: the loop waits for it at the log lines only
        del loss                                # its graph would hold the parameters that growth replaces
        done = step + 1
        # 4. report: the last line of a stage is of the model before it grows
        if done in report_steps:
            run.report(model, done, torch.stack(losses).mean().item())
            losses.clear()
        # 5. grow: duplicate a block, and the optimizer's moments with it
        if done in grows_at:
            path = METHODS[args.method](model.config.n_layer, args.block)
            grown = grow(model, path)
            optimizers = grow_optimizer(optimizers, make_optimizers(grown, args), model, grown, path)
            model, wrapped = grown, prepare(grown, args)        # compiled layers and DDP are the old model's
            gc.collect()                        # compiled layers refer to themselves: the smaller model's would stay
            run.report(model, done, path=path)
        # 6. save: stable.pt before ckpt.pt, so that --resume after a kill between the two comes here again
        if done in report_steps:
            if done == args.constant:
                run.save("stable.pt", model, optimizers, done)
            run.save("ckpt.pt", model, optimizers, done)
    return model


if __name__ == "__main__":
    run_script(main)
