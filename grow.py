"""
Growing a model in depth: *growing is looping, untied*. A growth operator is a path that visits one block
twice; the grown model has weights of its own for every visit, and computes at that moment exactly what the
small one computes along the path.

    gradual stacking   the last block once more, on top                            0 1 2 3 4 5 | 4 5
    MIDAS              the middle block of layers once more (arXiv 2409.19044)     0 1 2 3 | 2 3 | 4 5
    LIDAS              the layer-wise middle once more (arXiv 2512.08819)          0 1 2 3 | 2 3 | 4 5

With an odd number of blocks MIDAS and LIDAS agree; with an even one LIDAS takes the last half of the block
before the middle and the first of the one behind: of 8 layers in blocks of 4, MIDAS copies 0-3, LIDAS 2-5.
Behind growing stand its schedule and cost, and what every script needs: checkpoints, and the command line.

    python grow.py out/lidas/ckpt.pt --method lidas --block 2 --out deeper.pt       # seconds
"""
import argparse
import copy
import dataclasses
import glob
import io
import itertools
import os
import re
import sys

import numpy as np
import torch

from model import GPT, GPTConfig, loop_path, mean_loss, one_line, read_json

# -----------------------------------------------------------------------------
# growth operators: (stored layers, layers per block) -> path of n_layer + block visits, one block twice

def check_blocks(n_layer, block):
    if block < 1 or n_layer < block or n_layer % block:
        raise ValueError(f"{n_layer} layers are not a whole number of blocks of {block}")


def stack(n_layer, block):
    """Gradual stacking: the last block once more, on top. Raises ValueError unless block divides n_layer."""
    check_blocks(n_layer, block)
    return loop_path(n_layer, n_layer - block, block, 1)


def midas(n_layer, block):
    """MIDAS (arXiv 2409.19044): of n = n_layer / block blocks, block ceil(n/2), counted from 1, is copied
    behind itself. Raises ValueError unless block divides n_layer."""
    check_blocks(n_layer, block)
    middle = (n_layer // block + 1) // 2            # ceil(n/2), counted from 1
    return loop_path(n_layer, (middle - 1) * block, block, 1)


def lidas(n_layer, block):
    """LIDAS (arXiv 2512.08819): layers L/2 - B/2 ... L/2 + B/2 - 1 are copied behind themselves (rounded
    down, for an odd block and an even number of blocks). Raises ValueError unless block divides n_layer."""
    check_blocks(n_layer, block)
    return loop_path(n_layer, (n_layer - block) // 2, block, 1)


METHODS = {"stack": stack, "midas": midas, "lidas": lidas}

# -----------------------------------------------------------------------------
# growing the weights, and the optimizer's state with them

def parameters_along(model, path):
    """{a parameter's name in the model grown along the path: the parameter of this one that it copies}"""
    sources = {name: p for name, p in model.named_parameters() if not name.startswith("layers.")}
    for visit, index in enumerate(path):
        for name, p in model.layers[index].named_parameters():
            sources[f"layers.{visit}.{name}"] = p
    return sources


@torch.no_grad()
def grow(model, path):
    """An independent model with one layer per visit of the path (its own for None): layer v of it is a copy
    of layer path[v].

    At this moment grow(model, path)(tokens) == model(tokens, path=path), bit for bit. Raises ValueError for a
    path that is empty or visits a layer that does not exist.
    """
    path = model.config.visits(path)
    grown = GPT(dataclasses.replace(model.config, n_layer=len(path), path=None))
    grown.to(model.embed.weight.device, model.embed.weight.dtype)
    sources = parameters_along(model, path)
    for name, p in grown.named_parameters():
        p.copy_(sources[name])                                          # no storage is shared
    return grown


def grow_optimizer(optimizer, new_optimizer, model, grown, path):
    """Gives the grown model's optimizer the moments and step counts of the small model's, along the path.

    new_optimizer: a fresh torch optimizer over the grown model's parameters, in any groups. The papers do not
    say what happens to the moments; they follow the path here like the weights, so that the first step after
    growth is scaled as those before it. A layer's first visit takes its moments, further ones get copies, so
    that growth needs less memory than a step of the deeper model; the small model's optimizer is left empty.
    Raises ValueError unless each optimizer holds exactly its model's parameters.
    """
    check_optimizer(optimizer, model), check_optimizer(new_optimizer, grown)
    targets, taken = dict(grown.named_parameters()), set()
    for name, source in parameters_along(model, path).items():
        if source in optimizer.state:
            state = optimizer.state[source]
            new_optimizer.state[targets[name]] = copy.deepcopy(state) if source in taken else state
            taken.add(source)
    optimizer.state.clear()
    return new_optimizer


def check_optimizer(optimizer, model):
    """Raises ValueError unless the optimizer's parameters are the model's: layers that are never trained are
    the classic bug of growing."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if sorted(held) != sorted(id(p) for p in model.parameters()):
        raise ValueError("the optimizer does not hold exactly the model's parameters")

# -----------------------------------------------------------------------------
# the schedule, and what it costs: functions of the step alone. args holds train.py's arguments

def growth_steps(total, stages, alpha=1.0):
    """PROP-alpha (arXiv 2409.19044): the steps that each stage gets, T_i = total * i^alpha / sum_j j^alpha.

    -> list of `stages` ints that sum to `total`. Raises ValueError when a stage would get no step.
    """
    if stages < 1 or total < 1:
        raise ValueError(f"growth needs at least one stage and one step, not {stages} and {total}")
    weight = [(i / stages) ** alpha for i in range(1, stages + 1)]
    ends = [round(total * sum(weight[:i]) / sum(weight)) for i in range(stages + 1)]
    steps = [end - start for start, end in zip(ends, ends[1:])]
    if min(steps) < 1:
        raise ValueError(f"{total} steps are too few for {stages} stages of growth with alpha {alpha}: "
                         f"{steps}")
    return steps


def constant_steps(args):
    """Steps before the cooldown, warm-up included."""
    return args.steps - round(args.steps * args.cooldown)


def learning_rate(args, step):
    """Warm-up over args.warmup steps (1 or more), constant args.lr, then linearly to zero over the share
    args.cooldown of args.steps (SmolLM's trapezoid)."""
    left = max(0, args.steps - step) / max(1, args.steps - constant_steps(args))
    return args.lr * min(1.0, (step + 1) / args.warmup, left)


def stages(args):
    """[(first step, depth), ...]: growth by args.block layers in the constant phase, then the cooldown.

    args.layers: visits at the end of the constant phase; args.depth: visits in the cooldown, which differ
    where --init adds a --loop. Stored layers are config.n_layer: fewer, where a path visits some twice.
    Raises ValueError for layers that are no whole number of blocks, and as growth_steps does.
    """
    constant, first = constant_steps(args), [(0, args.layers)]
    if args.method in METHODS:
        check_blocks(args.layers, args.block)
        steps = growth_steps(constant, args.layers // args.block, args.alpha)
        first = [(sum(steps[:i]), (i + 1) * args.block) for i in range(len(steps))]
    return first + [(constant, args.depth)]


def training_flops(config, n_tokens, path=None):
    """Floating point operations to train on n_tokens: a backward pass counts as two forward passes.

    Counted by *visit*, so a looped layer costs as much as two layers. Per token and forward pass: 2 per
    weight of a matrix product (layers and output head, not the embedding's look-up), and
    4 * n_embd * context / 2 for causal attention's two products.
    """
    visits = len(config.visits() if path is None else path)
    head_width = config.n_embd // config.n_head
    qkv = config.n_embd * (config.n_head + 2 * config.n_kv_head) * head_width
    layer = qkv + config.n_embd ** 2 + 3 * config.n_embd * config.n_hidden
    attention = 4 * config.n_embd * config.context // 2
    head = config.n_embd * config.vocab_size
    return 3 * n_tokens * (visits * (2 * layer + attention) + 2 * head)


def flops_until(args, config, step):
    """Training FLOPs of all steps before this one."""
    plan, flops = stages(args), 0
    for (start, depth), (end, _) in zip(plan, plan[1:] + [(args.steps, None)]):
        n_tokens = max(0, min(step, end) - start) * args.batch * args.context
        flops += training_flops(config, n_tokens, path=range(depth))
    return flops


PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
              "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "4090": 165e12, "3090": 71e12,
              "T4": 65e12}      # dense bf16 (T4: fp16), by the data sheets; the first name that fits counts


def peak_flops(device):
    name = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    return next((peak for gpu, peak in PEAK_FLOPS.items() if re.search(rf"\b{gpu}\b", name)), None)

# -----------------------------------------------------------------------------
# files of tokens

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
# checkpoints: a dict with config, model, encoding (of load_encoding), heldout rows, and what train.py needs

def make_folder(file):
    """The folder that a file will lie in."""
    os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)


def save_atomically(file, write):
    """Writes a file in one step: after a crash at any instant, a reader finds the old one or the new one."""
    part = f"{file}.{os.getpid()}.part"      # two runs may write the same file of data
    try:
        make_folder(file)
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
    """checkpoint: of tensors, numbers, texts, lists, dicts; load_checkpoint refuses what else pickle can hold
    (numpy's numbers, Path, range). Raises OSError where it cannot be written; the old file stays."""
    buffer = io.BytesIO()       # serialised in memory first, so that a full disk is a plain OSError
    torch.save(checkpoint, buffer)
    save_atomically(file, lambda f: f.write(buffer.getbuffer()))


def load_checkpoint(file, device="cpu", tokens=None):
    """file: of train.py or grow.py, or a Hugging Face directory; tokens: a .bin file to hold out in its place
    -> model, checkpoint. Raises ValueError, with the reason, for what is no checkpoint of this project."""
    if os.path.isdir(file):
        if not os.path.exists(os.path.join(file, "config.json")):
            raise ValueError(f"{file} is a folder without Hugging Face's config.json; a run's checkpoint is "
                             f"the ckpt.pt in it")
        model, checkpoint = GPT.from_huggingface(file), {"heldout": {}}
        there = {"config.json", "tokenizer.json"} & {*os.listdir(file)}
        checkpoint["encoding"] = {name: read_json(file, name) for name in there}    # for load_encoding
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
    return {"config": dataclasses.asdict(model.config), "model": model.state_dict(), **more}


def save_derived(file, model, checkpoint, **more):
    """Saves a model made from that of the checkpoint: without an optimizer or training FLOPs, which are not
    its own. Raises ValueError where there is a file, which might be a run's only checkpoint."""
    if os.path.exists(file):
        raise ValueError(f"{file} exists: choose a new file")
    kept = {key: checkpoint[key] for key in ("encoding", "heldout", "args") if key in checkpoint}
    save_checkpoint(file, checkpoint_of(model, **kept, **more))

# -----------------------------------------------------------------------------
# what every script does at its start

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


def at_least(least, kind=int, above=False):
    """A type for argparse: a finite number, `least` or more; with above, more than that."""
    def number(text):
        value = kind(text)
        if not least <= value < float("inf") or above and value == least:       # nan is refused as well
            bound = f"above {least}" if above else f"{least} or more"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")
        return value
    number.__name__ = kind.__name__                 # what argparse calls it
    return number


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
                [name] if os.path.exists(name) else sorted(glob.glob(name)) or [name]
                for name in args.checkpoints), *args.hf]
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
    """Bad input, or a disk that refuses, ends in one line and exit code 2, Ctrl-C in none; the rest keeps its
    traceback."""
    for stream in (sys.stdout, sys.stderr):     # a model can write what the terminal cannot show
        stream.reconfigure(errors="replace")
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        # how torch says that there is no memory, and that a process was killed, for the same reason mostly
        if isinstance(error, RuntimeError) and not re.search("allocate|DataLoader worker", str(error)):
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)           # as shells do

# -----------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    parser.add_checkpoints(most=1)
    parser.add_argument("--method", choices=METHODS, default="lidas", help="growth operator (default: lidas)")
    parser.add_argument("--block", type=int, default=2, help="layers to copy (default: 2, as train.py's)")
    parser.add_argument("--out", required=True, help="file to write the deeper model to")
    args = parser.parse_args()

    file, = args.checkpoints
    model, checkpoint = load_checkpoint(file, tokens=args.tokens)
    if model.config.path is not None:
        raise ValueError(f"{file} is a looped model: its path is its depth. "
                         f"loop.py --unroll unties it")
    path = METHODS[args.method](model.config.n_layer, args.block)
    grown = grow(model, path)
    print(f"{args.method}: {model.config.n_layer} -> {grown.config.n_layer} layers, "
          f"path {' '.join(map(str, path))}")
    for name, rows in checkpoint["heldout"].items():
        print(f"held-out {name} loss: {mean_loss(model, rows):.4f} before, {mean_loss(grown, rows):.4f} "
              f"after, {mean_loss(model, rows, path):.4f} of the small model along the path")
    growth = checkpoint.get("growth", []) + [{"step": checkpoint.get("step", 0), "path": path}]
    save_derived(args.out, grown, checkpoint, growth=growth, step=checkpoint.get("step", 0))
    print(f"saved {args.out}; it holds no optimizer, so train.py cannot go on with it. Next:\n"
          f"  python loop.py {args.out} --prompt \"...\"")


if __name__ == "__main__":
    run_script(main)
