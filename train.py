"""
The main job: trains a model that starts shallow, grows in depth during the constant phase of its learning
rate, and is cooled down at full depth on a mixture with math, as the models of the paper are.

    python train.py                                   # the built-in world, LIDAS growth: minutes on two cores
    python train.py --method baseline                 # full depth from the first step
    python train.py --method looped --loop 2-2x2-2    # trained with tied weights along a looped path
    python train.py --resume                          # goes on after a crash as if there were none
    python train.py --init out/lidas/stable.pt --loop 3-2x2-3 --out out/lidas-loop  # a run's second cooldown
    python train.py --data text.jsonl --math gsm8k_train.jsonl --out out/mine       # text of your own
    torchrun --nproc_per_node=2 train.py              # two GPUs

    LR  ___________________________
       /   |      |        |       |\\          |  a growth step: a block of layers is duplicated (grow.py)
      / 2  |  4   |   6    |   8   | \\         numbers: layers
     warm-up     constant           cooldown, linear to zero, with math
"""
import datetime
import functools
import gc
import glob
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import evaluate
from grow import (METHODS, Parser, at_least, checkpoint_of, constant_steps, flops_until, grow, grow_optimizer,
                  learning_rate, load_checkpoint, peak_flops, run_script, save_atomically, save_checkpoint,
                  stages, token_dtype, training_flops)
from loop import continue_text, encode, load_encoding, parse_loop
from model import GPT, GPTConfig, mean_loss

# -----------------------------------------------------------------------------
# data: a stream is an array of rows (n, context + 1) of token ids, memory-mapped from one cached token file

def cached_rows(args, encoding, key, produce):
    """The rows (n, context + 1) of a token file beside --out, made by produce(write) if there is none yet."""
    name, dtype = hashlib.sha256(repr(key).encode()).hexdigest()[:16], token_dtype(encoding)
    # not .bin: that would be uint16 as --data
    file = os.path.join(os.path.dirname(os.path.abspath(args.out)), "data", f"{name}.{dtype.__name__}")
    if not os.path.exists(file):
        save_atomically(file, lambda f: produce(f.write))
    if os.path.getsize(file) == 0:
        raise ValueError("there is no text in the files")
    tokens = np.memmap(file, dtype=dtype, mode="r")
    return tokens[:len(tokens) // (args.context + 1) * (args.context + 1)].reshape(-1, args.context + 1)


def file_stream(args, encoding, files):
    """-> training rows, held-out rows (the last 64, or the last twentieth of a small file)."""
    stats = [(os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    key = (stats, args.encoding, encoding.encode_ordinary(evaluate.__doc__))    # world's words can change
    rows = cached_rows(args, encoding, key, lambda write: encode(files, encoding, write))
    n_heldout = min(64, -(-len(rows) // 20))
    if len(rows) - n_heldout < 1:
        raise ValueError(f"{' '.join(files)}: too short for a context of {args.context} tokens, which needs "
                         f"at least {2 * (args.context + 1)} of them; give more text or a smaller --context")
    return rows[:-n_heldout], rows[-n_heldout:]


def world_stream(args, encoding, stream, n):
    """-> n training rows, 64 held-out rows of the built-in world."""
    def rows(n, heldout):
        def made(n):
            return evaluate.world_rows(encoding, args.context, n, stream, heldout, seed=0).tobytes()
        # the first rows in the key: another world or another encoding is another file
        return cached_rows(args, encoding, (stream, n, heldout, made(8)), lambda write: write(made(n)))
    return rows(n, False), rows(64, True)


@functools.lru_cache(maxsize=4)
def permutation(n, *seed):
    return np.random.default_rng(seed).permutation(n)


def batch_of(streams, args, step, rank=0, world_size=1):
    """streams: {"general": rows, "math": rows}, of (n, context + 1); math only where there is a --math-share.
    Tokens and targets (batch / world_size, context) int64 of one rank at one step; a pure function of
    (seed, step, rank), so that a resumed run sees the same rows. All ranks together make the batch of one.

    Each epoch of a stream permutes its rows anew. In the cooldown a row is math with chance --math-share.
    """
    chance = args.math_share if step >= constant_steps(args) else 0.0
    is_math = np.random.default_rng((args.seed, step)).random(args.batch) < chance
    rows = []
    for i in range(rank * args.batch // world_size, (rank + 1) * args.batch // world_size):
        stream = streams["math" if is_math[i] else "general"]
        epoch, place = divmod(step * args.batch + i, len(stream))
        rows.append(stream[permutation(len(stream), args.seed, epoch)[place]])
    rows = torch.from_numpy(np.stack(rows).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()      # else they are copied before they travel

# -----------------------------------------------------------------------------
# the model and its optimizer

def make_optimizer(model, args):
    """AdamW, with decay on the matrices only: not on the gains of the norms."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def compiles(args):
    """Whether the layers are compiled: where there is a compiler, on CUDA, and on the CPU for a run that is
    long enough to win the time back. Not on MPS."""
    if args.compile != "auto":
        return args.compile == "on"
    if args.device == "cpu":
        return args.steps >= 500 and any(map(shutil.which, ("g++", "clang++", "cl")))
    return (args.device.startswith("cuda") and importlib.util.find_spec("triton") is not None
            and any(map(shutil.which, ("gcc", "clang", "cc", "cl"))))


def prepare(model, compiled, distributed):
    """-> what training calls: compiled layer by layer, so that growth and paths reuse the code; in DDP.
    The loss on a GPU only: on two cores it gains 2%, not worth other roundings than README's runs have."""
    if compiled:
        torch._dynamo.config.optimize_ddp = False       # DDP would cut each layer's graph in two
        for module in [*model.layers, model.loss] if model.embed.weight.is_cuda else model.layers:
            module.compile(dynamic=False)
    if not distributed:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def grow_by_one_block(model, optimizer, args):
    """One stage of growth: the deeper model, and its optimizer with moments copied along the same path."""
    path = METHODS[args.method](model.config.n_layer, args.block)
    grown = grow(model, path)
    new_optimizer = grow_optimizer(optimizer, make_optimizer(grown, args), model, grown, path)
    return grown, new_optimizer, path

# -----------------------------------------------------------------------------
# arguments

SIZES = {   # fits the device: minutes on two CPU cores, a larger model on a GPU
    "cpu": {"layers": 8, "width": 64, "heads": 2, "context": 256, "batch": 4, "steps": 6000},
    "mps": {"layers": 8, "width": 128, "heads": 4, "context": 256, "batch": 8, "steps": 6000},
    "cuda": {"layers": 16, "width": 384, "heads": 6, "context": 512, "batch": 64, "steps": 2000},
}
MAY_DIFFER = {"device", "compile"}                          # from the run that is resumed
MAY_BRANCH = MAY_DIFFER | {"init", "loop", "math", "math_share", "lr", "seed"}      # from the run of --init


def read_args():
    parser = Parser(__doc__)
    # the model and how it gets its depth
    parser.add_argument("--method", default="lidas", choices=["baseline", *METHODS, "looped"],
                        help="lidas grows by the layer-wise middle, the paper's best (default: lidas)")
    parser.add_argument("--layers", type=int, help="depth at the end (default: 8, in 4 stages; CUDA: 16)")
    parser.add_argument("--block", type=at_least(1), default=2,
                        help="layers a stage (default: 2; papers: 4 of 24)")
    parser.add_argument("--loop", help="e-LxK-d: train along this looped path (default for --method looped: "
                                       "the middle quarter twice, 2-2x2-2 for 8 layers)")
    parser.add_argument("--alpha", type=at_least(0, float, above=True), default=1.0,
                        help="PROP-alpha: more steps later (default: 1)")
    parser.add_argument("--width", type=int, help="of the residual stream (default: 64; MPS: 128; CUDA: 384)")
    parser.add_argument("--heads", type=int,
                        help="each at least 32 wide, or nothing is copied (default: 2; MPS: 4; CUDA: 6)")
    parser.add_argument("--kv-heads", type=int, help="fewer: grouped-query attention (default: as --heads)")
    parser.add_argument("--context", type=int, help="tokens in a row (default: 256, 3 puzzles; CUDA: 512)")
    # the schedule
    parser.add_argument("--steps", type=at_least(1), help="all of them (default: 6000, minutes; CUDA: 2000)")
    parser.add_argument("--batch", type=at_least(1),
                        help="rows a step, over all GPUs (default: 4: many small steps learn sooner than few "
                             "large ones; CUDA: 64)")
    parser.add_argument("--lr", type=at_least(0, float, above=True), default=1.5e-3,
                        help="at 0.001 copying, at 0.002 looking up came too late (default: 0.0015)")
    parser.add_argument("--warmup", type=at_least(1), default=50,
                        help="steps of rising learning rate (default: 50)")
    parser.add_argument("--cooldown", type=float, default=0.2, help="share of steps (default: 0.2, SmolLM's)")
    parser.add_argument("--weight-decay", type=at_least(0, float), default=0.01,
                        help="of matrices (default: 0.01; the usual 0.1 makes small models copy later)")
    parser.add_argument("--seed", type=at_least(0), default=0,
                        help="of the init and the order of rows (default: 0)")
    # the data
    parser.add_argument("--data", nargs="+", help=".txt, .jsonl, .jsonl.gz, .bin (default: built-in world)")
    parser.add_argument("--math", nargs="+", help="for the cooldown (default: the built-in world's math)")
    parser.add_argument("--math-share", type=float, help="of rows in the cooldown (default: 0.75: two steps "
                                                         "are learned, little forgotten; 0 without math)")
    parser.add_argument("--encoding", help="a tiktoken name, or world: 1,000 words, no download "
                                           "(default: gpt2 for files)")
    # the run
    parser.add_argument("--out", help="folder of checkpoints and log (default: out/METHOD)")
    parser.add_argument("--resume", action="store_true",
                        help="go on from --out's checkpoint, if it has one, with its arguments")
    parser.add_argument("--init", metavar="stable.pt", help="only a cooldown, from a run's constant phase")
    parser.add_argument("--evals", type=at_least(1), default=20,
                        help="log lines and checkpoints (default: 20)")
    parser.add_device()
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"],
                        help="the layers (default: where it pays)")

    args, model, checkpoint = parser.parse_args(), None, None
    if args.init and not args.out:
        raise ValueError("--init needs --out: a folder for this cooldown")
    out = args.out or os.path.join("out", args.method)
    latest = os.path.join(out, "ckpt.pt")
    resume = args.resume and os.path.exists(latest)
    if args.resume and not resume:
        print(f"nothing to resume: there is no {latest} yet, so that the run starts")
    elif not resume and os.path.exists(latest):
        raise ValueError(f"{out} holds a run already: go on with --resume, or choose another --out")
    if source := latest if resume else args.init:   # its arguments are the defaults; what is given must fit
        model, checkpoint = load_checkpoint(source)
        saved = {k: v for k, v in checkpoint.get("args", {}).items() if k not in ("resume", "out")}
        if not saved or "optimizer" not in checkpoint:
            raise ValueError(f"{source} was not written by train.py")
        if args.math and not resume and not saved["math_share"]:
            saved["math_share"] = None                      # of a run that had no math
        parser.set_defaults(**saved)
        args = parser.parse_args()
        may_change = MAY_DIFFER if resume else MAY_BRANCH
        changed = [k for k in saved if getattr(args, k) != saved[k] and k not in may_change]
        if changed:
            raise ValueError(f"--{changed[0].replace('_', '-')} was {saved[changed[0]]} in that run "
                             "and cannot change")
        if not resume and checkpoint["step"] != constant_steps(args):
            raise ValueError(f"{source} is at step {checkpoint['step']}, not at the end of the constant "
                             "phase, as a run's stable.pt is")
    else:
        for key, value in SIZES.get(args.device.split(":")[0], SIZES["cpu"]).items():
            if getattr(args, key) is None and not (key == "layers" and args.loop):
                setattr(args, key, value)
        if args.loop and args.method != "looped":
            raise ValueError("--loop trains along a path from the first step with --method looped, or in a "
                             "cooldown of its own with --init")
    args.out, args.resume = out, resume
    check(args)
    return args, model, checkpoint


def check(args):
    """Fills in what follows from other arguments. Raises ValueError for what contradicts."""
    for name, value in (("cooldown", args.cooldown), ("math-share", args.math_share or 0.0)):
        if not 0 <= value <= 1:
            raise ValueError(f"--{name} is a share, from 0 to 1, not {value}")
    if constant_steps(args) < 1:
        raise ValueError("--steps less the cooldown must leave a step")
    if args.method == "looped":
        if not args.loop and args.layers < 3:
            raise ValueError(f"--method looped needs 3 layers or more, not {args.layers}, or its own --loop")
        quarter = max(1, (args.layers or 0) // 4)
        others = (args.layers or 0) - 2 * quarter       # half of them before it
        args.loop = args.loop or f"{others // 2}-{quarter}x2-{others - others // 2}"
        depth = len(parse_loop(args.loop)[1])
        if args.layers not in (None, depth) and not args.init:
            raise ValueError(f"--loop {args.loop} is {depth} visits deep, "
                             f"which contradicts --layers {args.layers}")
        args.layers = args.layers or depth      # with --init, that of the constant phase
    args.depth = len(parse_loop(args.loop)[1]) if args.loop else args.layers
    stages(args)                                            # whole blocks, and steps for each stage
    args.kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    if args.math_share is None:
        args.math_share = 0.0 if args.data and not args.math else 0.75
    if args.math_share and args.data and not args.math:
        raise ValueError("--math-share needs --math FILE, where the math is taken from")
    for file in (args.data or []) + (args.math or []):
        if not os.path.isfile(file):
            raise ValueError(f"there is no file {file}")
    args.encoding = args.encoding or ("gpt2" if args.data else "world")


def open_streams(args, encoding):
    """-> training rows of each stream, held-out rows of each stream."""
    files, streams = {"general": args.data, "math": args.math}, {}
    sizes = {"general": args.steps, "math": max(1, args.steps - constant_steps(args))}
    for name in files:
        if files[name]:
            streams[name] = file_stream(args, encoding, files[name])
        elif not args.data:     # the world writes as much as the run reads
            streams[name] = world_stream(args, encoding, name, sizes[name] * args.batch)
    return ({name: train for name, (train, _) in streams.items()},
            {name: torch.from_numpy(heldout.astype(np.int32)) for name, (_, heldout) in streams.items()})


def build(args, encoding):
    n_layer, path = parse_loop(args.loop) if args.loop else (stages(args)[0][1], None)
    torch.manual_seed(args.seed)
    # a GPU's matrix products are fast for sizes that are multiples of 64
    n_vocab = encoding.n_vocab if args.device == "cpu" else -(-encoding.n_vocab // 64) * 64
    return GPT(GPTConfig(vocab_size=n_vocab, n_layer=n_layer, n_head=args.heads,
                         n_kv_head=args.kv_heads, n_embd=args.width,
                         n_hidden=-(-args.width * 8 // 3 // 8) * 8, context=args.context, path=path,
                         init_depth=args.layers, separator=encoding.eot_token)).to(args.device)

# -----------------------------------------------------------------------------

def main():
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu, n_gpu = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if 0 < gpu < n_gpu:
        torch.cuda.set_device(gpu)          # what "cuda" means from here on
    args, model, checkpoint = read_args()
    if args.batch % world_size:
        raise ValueError(f"--batch {args.batch} cannot be shared by {world_size} processes")
    if world_size > 1:
        args.device = args.device.split(":")[0]
        if args.device == "cuda" and gpu >= n_gpu:
            raise ValueError(f"process {gpu + 1} of this machine has no GPU of its own: there are {n_gpu}")
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))     # the others wait for the encoding
    torch.set_float32_matmul_precision("high")
    say = tqdm.write if rank == 0 else lambda line: None

    # ---- the data
    spec = checkpoint["encoding"] if checkpoint else args.encoding
    spec = evaluate.world_words() if spec == "world" else spec
    encoding = load_encoding(spec)
    if rank > 0:
        dist.barrier()          # the first one writes the token files
    streams, heldout = open_streams(args, encoding)
    if rank == 0 and world_size > 1:
        dist.barrier()
    data = {name: zlib.crc32(rows, zlib.crc32(heldout[name].numpy())) for name, rows in streams.items()}
    changed = [name for name in data if checkpoint and data[name] != checkpoint.get("data", data).get(name)]
    if "general" in changed or args.resume and changed:     # a second cooldown may have math of its own
        raise ValueError("the data are not those of that run: its files, or the built-in world, have changed")

    # ---- the model, new or as it was saved
    start, log, growth = 0, [], []
    if checkpoint is None:
        model = build(args, encoding)
    else:
        start, log, growth = checkpoint["step"], checkpoint["log"], checkpoint["growth"]
        if args.loop:           # with --init: from here on the middle block loops
            n_layer, path = parse_loop(args.loop)
            if n_layer != model.config.n_layer:
                raise ValueError(f"--loop {args.loop} is of {n_layer} layers, "
                                 f"the model has {model.config.n_layer}")
            model.config.path = path
    model.to(args.device)       # of this process
    optimizer = make_optimizer(model, args)
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
    compiled, cuda = compiles(args), args.device.startswith("cuda")
    training = prepare(model, compiled, world_size > 1)
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, cuda)
    plan, peak = stages(args), peak_flops(args.device)
    total = flops_until(args, model.config, args.steps)
    plain = training_flops(model.config, args.steps * args.batch * args.context, path=range(args.depth))
    say(f"{args.method}: depth {' -> '.join(str(depth) for _, depth in plan[:-1])}"
        f"{f', looped {args.loop}' if args.loop else ''}, {args.steps} steps of {args.batch} x {args.context}"
        f" tokens on {args.device}, layers {'' if compiled else 'not '}compiled, {total:.2e} FLOPs = "
        f"{total / plain:.0%} of a plain model's of depth {args.depth}")

    def save(name, step):
        flops = flops_until(args, model.config, step)
        save_checkpoint(os.path.join(args.out, name), checkpoint_of(
            model, encoding=spec, heldout=heldout, data=data, args=vars(args), step=step, log=log,
            growth=growth, optimizer=optimizer.state_dict(), flops=flops))
        save_atomically(os.path.join(args.out, "log.jsonl"),
                        lambda f: f.writelines(json.dumps(row).encode() + b"\n" for row in log))

    def report(step, loss, seconds, n_steps):
        """One line and one row of the log. Raises ValueError when training has gone wrong."""
        losses = {name: mean_loss(model, rows) for name, rows in heldout.items()}
        if not all(map(math.isfinite, [loss, *losses.values()])):
            raise ValueError(f"the loss is not finite at step {step}: --resume goes on from the last good "
                             f"checkpoint, but to the same end, so start anew with a lower --lr")
        flops = flops_until(args, model.config, step)
        rate = (flops - flops_until(args, model.config, step - n_steps)) / seconds if n_steps else 0.0
        row = {"step": step, "loss": loss, **{f"loss {name}": value for name, value in losses.items()},
               "lr": learning_rate(args, step), "depth": len(model.config.visits()),
               "flops": flops, "flops_share": flops / plain,
               "tokens_per_second": n_steps * args.batch * args.context / seconds}
        if peak:
            row["mfu"] = rate / peak / world_size
        log.append(row)
        eta = datetime.timedelta(seconds=round((total - flops) / rate)) if rate else "-"
        say(f"step {step:>6}/{args.steps} {step / args.steps:>4.0%}  loss {loss:.4f}  held-out " +
            "  ".join(f"{name} {value:.4f}" for name, value in losses.items()) +
            f"  lr {row['lr']:.1e}  depth {row['depth']}  {row['tokens_per_second'] / 1e3:.1f}k tok/s" +
            (f"  MFU {row['mfu']:.0%}" if peak else "") +
            f"  FLOPs {flops:.2e} ({flops / plain:.0%})  ETA {eta}")

    # ---- training
    constant = constant_steps(args)
    growing = {step for step, _ in plan[1:-1]}
    reporting = {round(args.steps * i / args.evals) for i in range(args.evals + 1)} | {constant}
    signals = []

    def on_signal(number, frame):       # the second one ends the program at once
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        # the others wait for the first one: were each to stop at its own step, some would wait for ever
        signal.signal(number, on_signal if rank == 0 else signal.SIG_IGN)

    if rank == 0 and not log:
        report(0, mean_loss(model, heldout["general"]), 1.0, 0)
    if rank == 0 and not args.resume:
        save("ckpt.pt", start)          # an unwritable --out is noticed now
    if rank == 0:
        for part in glob.glob(os.path.join(glob.escape(args.out), "*.[0-9]*.part")):
            os.remove(part)             # of a run that was killed while it wrote
    loss_sum, since = 0.0, start
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank > 0 or None,
                     unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        tokens, targets = ((x.pin_memory() if cuda else x).to(args.device, non_blocking=True)
                           for x in batch_of(streams, args, step, rank, world_size))
        with autocast:
            loss = training(tokens, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.detach()       # stays on the device: the loop waits for it at the log lines only
        del loss                        # its graph would hold the parameters that growth replaces

        done = step + 1
        if step == start:
            clock = time.perf_counter()     # not before: the first step compiles, which is no part of speed
        if done in growing:
            before = mean_loss(model, heldout["general"])
            model, optimizer, path = grow_by_one_block(model, optimizer, args)
            training = prepare(model, compiled, world_size > 1)
            gc.collect()        # compiled layers refer to themselves: the small model's would stay for long
            after = mean_loss(model, heldout["general"])
            growth = growth + [{"step": done, "path": path}]
            log.append({"step": done, "growth": path, "loss before": before, "loss after": after})
            say(f"step {done:>6} grows to {len(path)} layers along {' '.join(map(str, path))}: held-out "
                f"general loss {before:.4f} before, {after:.4f} after")
        if rank == 0 and (done in reporting or signals):
            report(done, float(loss_sum) / (done - since), time.perf_counter() - clock,
                   done - max(since, start + 1))
            if done == constant:        # first, since a run that has the other one does not come here again
                save("stable.pt", done)
            save("ckpt.pt", done)
            loss_sum, since, clock = 0.0, done, time.perf_counter()
        if signals:
            say(f"stopped at step {done}; go on with the same command and --resume (--out {args.out})")
            sys.exit(128 + signals[0])

    # ---- the end
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)       # all is saved
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        finish(model, args, encoding)


def finish(model, args, encoding):
    """A sample, the accuracies on a few tasks, and what to run next."""
    torch.manual_seed(args.seed)
    print("\na sample:\n" + continue_text(model, encoding, "", 80, temperature=0.8))
    if not args.data:
        print("\nright, of 200 held-out questions (chance in brackets):")
        for task in evaluate.TASKS_AT_THE_END:
            try:
                score = evaluate.accuracy(model, encoding, task)
                print(f"  {task:<14} {score['value']:>6.1%} ({score['chance']:.0%})")
            except ValueError as error:         # a short context
                print(f"  {error}")
    file = os.path.join(args.out, "ckpt.pt")
    print(f"\nsaved {file}. Next:\n  python evaluate.py {file}\n  python loop.py {file} --sweep\n"
          f"  python signatures.py {file}")


if __name__ == "__main__":
    run_script(main)
