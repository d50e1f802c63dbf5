"""
Looping: visiting a block of layers again, with the same weights. A loop is only a path, so any model can be
looped at inference, also one that was not trained to loop (claim 2 of the paper). A model that was trained to loop has
its path in its config. Loops are written e-LxK-d (arXiv 2502.17416): e layers, L layers visited K times in all, d.

    python loop.py out/lidas/ckpt.pt --prompt "Where does Mia live ?"   # a block visited 1, 2, 3, 5 times
    python loop.py out/lidas/ckpt.pt --prompt "a=7 a=" --loop 3-2x2-3 --path 0-3,2-5,4-7    # paths of your own
    python loop.py out/lidas/ckpt.pt --scan --task hops-3           # every block once more: which one helps?
    python loop.py HuggingFaceTB/SmolLM2-135M --scan --questions mine.jsonl --plot scan.png     # any Llama
"""
import argparse
import os
import re
import zlib

import torch
from tqdm import tqdm

from model import (check_outputs, complete, estimate_loss, get_tokenizer, load_checkpoint, pick_device,
                   positive_int, read_options, run_script, score_targets)

# -----------------------------------------------------------------------------
# paths that loop, and how they are written

def loop_path(n_layer, start, block, repeats):
    """The path that visits layers start ... start + block - 1 `repeats` extra times; 0 is the plain model.

    loop_path(6, 2, 2, 1) -> [0, 1, 2, 3, 2, 3, 4, 5]. Raises ValueError for a block outside the model.
    """
    if block < 1 or start < 0 or start + block > n_layer or repeats < 0:
        raise ValueError(f"no block of {block} layers at layer {start} with {repeats} extra visits: "
                         f"the model has layers 0 to {n_layer - 1}")
    layers = list(range(n_layer))
    return layers[:start] + layers[start:start + block] * (repeats + 1) + layers[start + block:]


def parse_loop(text):
    """Loop(e-LxK-d), or Loop(LxK), of arXiv 2502.17416, K counting all visits -> (stored layers, path).

    "2-2x3-2" -> (6, [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]); "4x6" -> (4, [0, 1, 2, 3] * 6).
    Raises ValueError for other text.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)x(\d+)(?:-(\d+))?", text)    # e-, L, x, K, -d
    if not match or int(match[3]) < 1:
        raise ValueError(f"a loop is written e-LxK-d or LxK, as in 2-2x3-2 or 4x6, not {text!r}")
    # of LxK the ends are None: no layers
    before, block, visits, after = (int(group or 0) for group in match.groups())
    n_layer = before + block + after
    return n_layer, loop_path(n_layer, before, block, visits - 1)


def write_loop(n_layer, start, block, visits):
    """What parse_loop reads: (8, 3, 2, 2) -> "3-2x2-3" """
    return f"{start}-{block}x{visits}-{n_layer - start - block}"


def parse_path(text):
    """Layers and inclusive ranges: "0-3,2-5,6" -> [0, 1, 2, 3, 2, 3, 4, 5, 6]. Raises ValueError for other text."""
    path = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        layers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()   # both ends are visited
        if not layers:
            raise ValueError(f"a path is layers and ranges, as in 0-3,2-5,4-7, not {text!r}")
        path += layers
    return path


def loop_of(path):
    """The block that an e-LxK-d path repeats -> its first layer and its number of layers (e, L), or None."""
    repeated = sorted({index for index in path if path.count(index) > 1})
    # is it the path that loops exactly these layers?
    if repeated and path == loop_path(max(path) + 1, repeated[0], len(repeated), path.count(repeated[0]) - 1):
        return repeated[0], len(repeated)
    return None


def add_path_options(parser):
    parser.add_argument("--loop", nargs="+", action="extend", metavar="E-LxK-D",
                        help="along a loop: of 8 layers, 3-2x2-3 visits layers 3-4 twice")
    parser.add_argument("--path", nargs="+", action="extend", metavar="PATH",
                        help="along any path: 0-3,2-5,4-7 (inclusive) loops, 0-3,6-7 skips")


def paths_of(args, config=None):
    """--loop and --path of a command -> {what was written: path}, checked against a model's layers, if there is one."""
    paths = {}
    for text in args.loop or []:
        n_layer, paths[text] = parse_loop(text)
        if config and n_layer != config.n_layer:
            raise ValueError(f"--loop {text} is of {n_layer} layers, the model has {config.n_layer}")
    for text in args.path or []:
        paths[text] = config.resolve_path(parse_path(text)) if config else parse_path(text)
    return paths


def path_of(args, config=None):
    """The one path of a command that takes one, or None."""
    paths = list(paths_of(args, config).values())
    if len(paths) > 1:
        raise ValueError("give one --loop or one --path")
    return paths[0] if paths else None

# -----------------------------------------------------------------------------
# the scan: which block is worth another visit? Every (start, end), on examples with answers

@torch.no_grad()
def scan(model, tokens, targets, blocks, visits=2, batch=8):
    """Visits each block (first layer, last layer) `visits` times in all; everything before that is computed once.

    tokens, targets (n, T); a target of -1 is not scored -> yields, first for None (the plain model) and then for each
    block: the block, and loss and right of score_targets, (n,) each. A block costs what comes after its first visit.
    Memory: n * T * n_embd numbers for each layer.
    """
    # 1. one plain pass, which keeps the n_layer + 1 streams before and after each layer
    model_device, parts = model.embed.weight.device, []
    for part, target in zip(tokens.split(batch), targets.split(batch)):
        part = part.to(model_device)
        rope_and_mask, streams = model.rope_and_mask(part), [model.embed(part)]     # each (batch, T, n_embd)
        for layer in model.layers:
            streams.append(layer(streams[-1], rope_and_mask))   # streams[i] is what layer i reads
        parts.append((streams, rope_and_mask, target.to(model_device)))
    # 2. of each block only what comes after its first visit
    for block in [None, *blocks]:
        scores = []
        last, rest = len(model.layers) - 1, []          # of the plain model nothing is left to compute
        if block is not None:
            first, last = block
            rest = [*range(first, last + 1)] * (visits - 1) + [*range(last + 1, len(model.layers))]
        for streams, rope_and_mask, target in parts:
            x = streams[last + 1]               # the stream after the block's first visit
            for index in rest:
                x = model.layers[index](x, rope_and_mask)
            scores.append(score_targets(model, model.norm(x), target))
        loss, right = (torch.cat(column).cpu() for column in zip(*scores))      # (n,) each
        yield block, loss, right

# -----------------------------------------------------------------------------
# the command: one prompt along several paths, or the scan

def show(model, checkpoint, args):
    """The same prompt continued along each path, with the held-out loss there."""
    tokenizer, n_layer = get_tokenizer(checkpoint["tokenizer"]), model.config.n_layer
    paths, own = paths_of(args, model.config), model.config.resolve_path()
    if not paths:       # numbers of visits of its own loop, or of the middle quarter of the layers
        middle = max(1, n_layer // 4)
        start, block = loop_of(own) or ((n_layer - middle) // 2, middle)
        loops = [write_loop(n_layer, start, block, visits) for visits in (1, 2, 3, 5)]
        paths = {loop: parse_loop(loop)[1] for loop in loops}
        if own not in paths.values():
            paths["its own path"] = own
    for name, path in paths.items():
        losses = "  ".join(f"{stream} {estimate_loss(model, rows, path):.4f}"
                           for stream, rows in checkpoint["heldout"].items())
        text = complete(model, tokenizer, args.prompt, args.length, path)
        print(f"\n{name}   depth {len(path)}   path {' '.join(map(str, path))}"
              + (f"\nheld-out loss: {losses}" if losses else "") + f"\n{args.prompt}|{text}")


def show_scan(model, checkpoint, args):
    """Runs the scan, prints the ten best blocks, and draws a heat map."""
    import evaluate     # here, since it imports this file
    if model.config.path:
        raise ValueError("the scan needs a model without a loop of its own: grow.py makes one of a looped model")
    tokens, targets = evaluate.examples_of(args, get_tokenizer(checkpoint["tokenizer"]), model.config.context)
    if len(tokens) < 4 or args.visits < 2:
        raise ValueError("a scan needs 4 examples, two to choose and two to report, and 2 --visits")
    label, seed = evaluate.label_of(args.model, checkpoint)
    what = os.path.basename(args.data or args.questions or args.task)
    # 1. the gain of each block
    row = {"table": f"gain of {args.visits} visits: {what}", "seed": seed, "n": len(tokens) // 2}
    plain, gains = measure_gains(model, tokens, targets, args, row, label)
    # 2. the best
    best = sorted(gains, key=lambda block: -gains[block][0]["value"])[:10]
    print(f"plain model: {'loss' if args.data else 'accuracy'} {plain:.4f} on {len(tokens)} examples. The blocks that "
          f"gain most,\nchosen on one half of the examples, reported on the other (mean, standard error):")
    evaluate.print_tables([half for block in best for half in gains[block]])
    if args.results:        # for a table over the seeds: the plain model, and the gain of its best block
        row |= {"table": f"scan: the best block visited {args.visits} times", "column": what}
        gain = {name: gains[best[0]][1][name] for name in ("value", "se", "loop")}
        evaluate.append_rows(args.results, [{**row, "model": label, "value": plain},
                                            {**row, "model": f"{label} gain", **gain}])
    if args.plot:
        plot_scan(args.plot, gains, model.config.n_layer, f"gain of {args.visits} visits: {what}")


def measure_gains(model, tokens, targets, args, row, label):
    """-> the plain model's score, and each block's gain over it, above 0 where the block helps: {block: two rows}. By
    the even examples a block is "chosen", on the odd ones it is "reported". row: what the rows share. What --results
    has of this scan is not measured again."""
    import evaluate
    # 1. a scan is known by the content of its model and its examples: a copy of them is the same
    checksum = args.visits
    for tensor in (*model.state_dict().values(), tokens, targets):
        checksum = zlib.crc32(tensor.cpu().numpy().tobytes(), checksum)
    known = {}      # {loop: two rows}
    for other in evaluate.read_rows(args.results) if args.results and os.path.exists(args.results) else []:
        if other.get("of") == checksum:
            known.setdefault(other["loop"], []).append({**other, "model": f"{label} {other['loop']}"})
    # 2. the blocks, first and last layer, and the loop that each makes
    n_layer = model.config.n_layer
    loops = {(first, last): write_loop(n_layer, first, last - first + 1, args.visits)
             for first in range(n_layer) for last in range(first, n_layer)}
    gains = {block: known[loop] for block, loop in loops.items() if len(known.get(loop, [])) == 2}
    rest = [block for block in loops if block not in gains]
    # 3. those that are not known
    scores = ((block, -loss if args.data else right.float())            # (n,), higher is better
              for block, loss, right in scan(model, tokens, targets, rest, args.visits))
    _, plain = next(scores)
    for block, score in tqdm(scores, total=len(rest), unit="block", disable=None):
        gain = score - plain        # paired over the examples
        gains[block] = [{**row, "model": f"{label} {loops[block]}", "column": column, "value": half.mean().item(),
                         "se": (half.std() / len(half) ** 0.5).item(), "of": checksum, "loop": loops[block]}
                        for column, half in (("chosen", gain[::2]), ("reported", gain[1::2]))]
        if args.results:
            evaluate.append_rows(args.results, gains[block])
    return plain.abs().mean().item(), gains     # a loss without its minus


def plot_scan(file, gains, n_layer, title):
    """A heat map: first layer of the block by last, the gain as the colour."""
    from matplotlib.figure import Figure
    values = torch.full((n_layer, n_layer), torch.nan)
    for block, (chosen, reported) in gains.items():
        values[block] = (chosen["value"] + reported["value"]) / 2       # over all examples
    most = values.nan_to_num().abs().max().item()   # white is no change
    figure = Figure(layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, cmap="RdBu", vmin=-most, vmax=most, origin="lower")
    axis.set(title=title, xlabel="last layer of the block", ylabel="first layer")
    figure.colorbar(image)
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint (.pt), or a Hugging Face name or directory")
    add_path_options(parser)
    # the demo
    parser.add_argument("--prompt", default="", help="text to continue (default: a document's beginning)")
    parser.add_argument("--length", type=positive_int, default=48, help="tokens to write (default: 48)")
    # the scan
    parser.add_argument("--scan", action="store_true", help="visit every block once more: which one helps?")
    parser.add_argument("--visits", type=positive_int, default=2, help="of the block in the scan (default: 2)")
    parser.add_argument("--task", default="hops-2", help="what it asks: a task of evaluate.py (default: hops-2)")
    parser.add_argument("--data", metavar="FILE", help="in place of a task: text, scored by its loss")
    parser.add_argument("--questions", metavar="FILE.jsonl", help="in place of a task: your questions and answers")
    parser.add_argument("-n", type=positive_int, default=200, help="examples, or rows of text (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the task's questions (default: 0)")
    parser.add_argument("--results", metavar="FILE.jsonl", help="append each block's gain; go on from what is there")
    parser.add_argument("--plot", metavar="FILE.png", help="a heat map of the scan (needs matplotlib)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best one here)")
    args, _ = read_options(
        parser, {"scan": ("loop", "path", "prompt", "length"), "data": ("task", "questions", "seed"),
                 "questions": ("task", "seed")},
        requires={"scan": ("task", "data", "questions", "visits", "n", "seed", "results", "plot")})
    check_outputs(rows=args.results, plot=args.plot)
    model, checkpoint = load_checkpoint(args.model, pick_device(args.device))
    if args.scan:
        show_scan(model, checkpoint, args)
    else:
        show(model, checkpoint, args)


if __name__ == "__main__":
    run_script(main)
