"""
Growing a model in depth: *growing is looping, untied*. A growth operator is a path that visits one block twice. The
grown model has weights of its own for every visit. At that moment it computes exactly what the smaller one computes
along the path: not what that computes without the loop, so that the loss jumps, and comes back within some hundred
steps. Four layers in blocks of two, the copy between bars (with an odd number of blocks MIDAS and LIDAS agree):

    gradual stacking   the last block, on top                      0 1 2 3 | 2 3 |
    MIDAS              the middle block (arXiv 2409.19044)         0 1 | 0 1 | 2 3
    LIDAS              the middle layers (arXiv 2512.08819)        0 1 2 | 1 2 | 3

    python grow.py out/lidas/ckpt.pt --method lidas --block 2 --out deeper.pt
    python train.py --init deeper.pt                                        # trains on
    python grow.py HuggingFaceTB/SmolLM2-135M --path 0-23,6-29 --out deeper --dtype bfloat16    # for Hugging Face
"""
import copy
import dataclasses
from collections import Counter

import torch
import torch.nn as nn

from loop import command_parser, loop_path, path_of
from model import (check_outputs, estimate_loss, load_checkpoint, pick_device, positive_int, read_options,
                   run_script, save_checkpoint)

# --- growth operators: stored layers, layers per block -> path ------------------------------------

def check_blocks(n_layer, block):
    if block < 1 or n_layer < block or n_layer % block:
        raise ValueError(f"expected whole blocks: {n_layer} layers do not divide into blocks of {block}")


def stack(n_layer, block):
    """Gradual stacking: the last block once more, on top."""
    check_blocks(n_layer, block)
    return loop_path(n_layer, n_layer - block, block, 1)            # one extra visit


def midas(n_layer, block):
    """MIDAS (arXiv 2409.19044): of n = n_layer / block blocks, block ceil(n/2), directly after itself."""
    check_blocks(n_layer, block)
    middle = (n_layer // block + 1) // 2            # ceil(n/2), counted from 1
    return loop_path(n_layer, (middle - 1) * block, block, 1)


def lidas(n_layer, block):
    """LIDAS (arXiv 2512.08819): layers L/2 - B/2 ... L/2 + B/2 - 1 directly after themselves."""
    check_blocks(n_layer, block)
    return loop_path(n_layer, (n_layer - block) // 2, block, 1)     # rounded down


METHODS = {"stack": stack, "midas": midas, "lidas": lidas}

# --- growing the weights, and the optimizer's state with them; and when to grow -------------------

def grow(model, path=None):
    """An independent model with a layer for each visit of the path (its own for None), a copy of layer path[visit]: now
    grow(model, path)(tokens) == model(tokens, path=path), bit for bit (with dropout: in eval mode). Give it the bare
    model, without DDP or torch.compile around it; compile and wrap what it returns (train.prepare)."""
    path = model.config.resolve_path(path)
    grown = copy.deepcopy(model)        # with the embedding and a head that is tied to it
    grown.layers = nn.ModuleList(copy.deepcopy(model.layers[index]) for index in path)
    grown.config = dataclasses.replace(model.config, n_layer=len(path), path=None)      # each layer once
    return grown


def grow_optimizer(optimizer, new_optimizer, model, grown, path=None):
    """Gives new_optimizer, a fresh one of `grown`, the moments and step counts of that of `model`, along grow's path.
    Each may be a list (Muon beside AdamW). Learning rates and schedulers are not copied: set the rate in every step."""
    old, new = ([x] if isinstance(x, torch.optim.Optimizer) else x for x in (optimizer, new_optimizer))
    # 1. the classic bug of growing: new layers that no optimizer holds are never trained
    for optimizers, owner in ((old, model), (new, grown)):
        held = Counter(p for part in optimizers for group in part.param_groups for p in group["params"])
        if held != Counter(owner.parameters()):             # each of them once, and no others
            wrong = [name for name, p in owner.named_parameters() if held[p] != 1] or ["one that is not the model's"]
            raise ValueError(f"the optimizer does not hold exactly the model's parameters, each once: {wrong[0]}")
    targets, sources = dict(grown.named_parameters()), model.parameter_sources(path)
    assert sources.keys() == targets.keys(), f"a parameter of one model only: {min(sources.keys() ^ targets.keys())}"
    # 2. the moments of each old parameter, and the optimizer that holds each new one
    state = {p: moments for part in old for p, moments in part.state.items()}
    holder = {p: part for part in new for group in part.param_groups for p in group["params"]}
    # 3. The papers do not say what happens to moments. Here they follow the path as the weights do, so that the first
    # step after growth is scaled as those before it. Before the first step of all there are none.
    for name, target in targets.items():
        if sources[name] in state:
            holder[target].state[target] = copy.deepcopy(state[sources[name]])      # each visit has its own
    return new_optimizer


def growth_steps(total, stages, alpha=0.0):
    """PROP-alpha (arXiv 2409.19044): the steps that each stage gets, T_i = total * i^alpha / sum_j j^alpha; alpha 0
    is equal stages. -> list of `stages` ints that sum to `total`. Raises ValueError when a stage would get none."""
    if stages < 1 or total < 1 or alpha < 0:
        raise ValueError(f"expected a stage and a step or more, and alpha 0 or more, not {stages}, {total}, {alpha}")
    # i / stages in place of i: the shares are the same, and a large alpha does not overflow
    weight = [(i / stages) ** alpha for i in range(1, stages + 1)]
    # rounded as ends, so that the sum is exact
    ends = [round(total * sum(weight[:i]) / sum(weight)) for i in range(stages + 1)]
    steps = [end - start for start, end in zip(ends, ends[1:])]
    if min(steps) < 1:
        raise ValueError(f"{total} steps are too few for {stages} stages of growth with alpha {alpha}: {steps}")
    return steps


def depth_schedule(total, depth, block, alpha=0.0):
    """Growth from one block to `depth` layers; total: the steps before the cooldown -> [(first step, depth), ...] of
    each stage: depth_schedule(3200, 8, 2) -> [(0, 2), (800, 4), (1600, 6), (2400, 8)]"""
    check_blocks(depth, block)
    steps = growth_steps(total, depth // block, alpha)
    return [(sum(steps[:i]), (i + 1) * block) for i in range(len(steps))]      # a block more in each

# --- the command ----------------------------------------------------------------------------------

def main():
    parser = command_parser(__doc__)
    parser.add_argument("model", help="a checkpoint (.pt), or a Hugging Face name or directory")
    parser.add_argument("--method", choices=METHODS, help="growth operator (default: the model's own loop, else lidas)")
    parser.add_argument("--block", type=positive_int, help="layers to copy (default: the run's own, else 2)")
    parser.add_argument("--out", required=True, help="NAME.pt, or a directory for Hugging Face (by itself an export)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the directory")
    args, given = read_options(parser, excludes={"loop": ("path", "method", "block"), "path": ("method", "block")})
    check_outputs(args.out)
    if args.out.endswith(".pt") and "dtype" in given:
        raise ValueError("--dtype is of a Hugging Face directory; a .pt file keeps float32")
    model, checkpoint = load_checkpoint(args.model, pick_device(args.device))
    # the path: given, or that of a growth operator, or the model's own: a directory by itself is an export
    path = path_of(args, model.config) or model.config.path     # None, if it has none
    if given & {"method", "block"} or (path is None and args.out.endswith(".pt")):
        block = args.block or checkpoint["args"].get("block") or 2
        path = METHODS[args.method or "lidas"](model.config.n_layer, block)
    path = model.config.resolve_path(path)
    # at this moment growing does what looping does, so that the loss after it is known before it
    for name, rows in checkpoint["heldout"].items():
        print(f"held-out {name} loss: {estimate_loss(model, rows):.4f} before, "
              f"{estimate_loss(model, rows, path):.4f} after")
    if args.out.endswith(".pt"):
        save_checkpoint(args.out, grow(model, path), checkpoint["tokenizer"], checkpoint["heldout"], checkpoint["args"])
    else:
        model.save_pretrained(args.out, path, getattr(torch, args.dtype))
    print(f"saved {args.out}: {model.config.n_layer} -> {len(path)} layers, path {' '.join(map(str, path))}")


if __name__ == "__main__":
    run_script(main)
