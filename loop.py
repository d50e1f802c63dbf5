"""
Looping: visiting a block of layers again, with the same weights. A loop is only a path, so any model can be looped at
inference, also one that was not trained to loop (claim 2 of the paper). Loops are written e-LxK-d (arXiv 2502.17416):
e layers, L layers visited K times in all, d layers.

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

from model import (complete, estimate_loss, get_tokenizer, load_checkpoint, pick_device,
                   positive_int, read_options, run_script, score_targets)

# --- paths that loop, and how they are written. A mistake raises ValueError -----------------------

def loop_path(n_layer, start, block, repeats):
    """Layers start ... start + block - 1 once and `repeats` times more: (6, 2, 2, 1) -> [0, 1, 2, 3, 2, 3, 4, 5]"""
    if block < 1 or start < 0 or start + block > n_layer or repeats < 0:
        raise ValueError(f"no block of {block} layers at layer {start}, {repeats} times more, in {n_layer} layers")
    layers = list(range(n_layer))
    return layers[:start] + layers[start:start + block] * (repeats + 1) + layers[start + block:]


def parse_loop(text):
    """e-LxK-d, or LxK: "2-2x3-2" -> 6 stored layers, [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]; "2x3" -> 2, [0, 1, 0, 1, 0, 1]"""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)x(\d+)(?:-(\d+))?", text)    # e-, L, x, K, -d
    if not match or int(match[3]) < 1:
        raise ValueError(f"a loop is written e-LxK-d or LxK, as in 2-2x3-2 or 4x6, not {text!r}")
    before, block, visits, after = (int(group or 0) for group in match.groups())    # of LxK the ends are None
    n_layer = before + block + after
    return n_layer, loop_path(n_layer, before, block, visits - 1)       # K counts all visits


def write_loop(n_layer, start, block, visits):
    """What parse_loop reads: (8, 3, 2, 2) -> "3-2x2-3" """
    return f"{start}-{block}x{visits}-{n_layer - start - block}"


def parse_path(text):
    """Layers and inclusive ranges: "0-3,2-5,6" -> [0, 1, 2, 3, 2, 3, 4, 5, 6]"""
    path = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())         # 3 or 2-5
        layers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()   # both ends are visited
        if not layers:
            raise ValueError(f"a path is layers and ranges, as in 0-3,2-5,4-7, not {text!r}")
        path += layers
    return path


def command_parser(doc):
    """What every command takes: paths, and where it runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", nargs="+", action="extend", metavar="E-LxK-D", help="3-2x2-3: of 8 layers, 3-4 twice")
    parser.add_argument("--path", nargs="+", action="extend", metavar="PATH", help="0-3,2-5,4-7 loops, 0-3,6-7 skips")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best one here)")
    return parser


def paths_of(args, config=None):
    """--loop and --path of a command -> {what was written: path}, checked against a model's layers, if there is one."""
    paths = {}
    for text in args.loop or []:
        n_layer, paths[text] = parse_loop(text)
        if config and n_layer != config.n_layer:        # a loop of fewer layers would run, and mean nothing
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

# --- the scan: which block is worth another visit? ------------------------------------------------

@torch.no_grad()
def scan(model, tokens, targets, paths, batch=8):
    """Scores many paths on tokens, targets (n, T; -1 is not scored) -> yields loss and right of score_targets, (n,)
    each, of the plain model and then of each path. What begins as the plain path does is computed once."""
    device, plain, parts = model.embed.weight.device, list(range(len(model.layers))), []
    # 1. one plain pass, which keeps the streams before and after each layer: n * T * n_embd numbers a layer
    for part, target in zip(tokens.to(device).split(batch), targets.to(device).split(batch)):
        rope_and_mask, streams = model.rope_and_mask(part), [model.embed(part)]
        for layer in model.layers:
            streams.append(layer(streams[-1], rope_and_mask))   # streams[i] is what layer i reads (batch, T, n_embd)
        parts.append((streams, rope_and_mask, target))
    # 2. of each path only the rest: where a block loops, what comes after its first visit
    for path in [plain, *paths]:
        shared, scores = len(os.path.commonprefix([plain, path])), []       # it takes lists as well
        for streams, rope_and_mask, target in parts:
            x = streams[shared]                                 # (batch, T, n_embd)
            for index in path[shared:]:
                x = model.layers[index](x, rope_and_mask)
            scores.append(score_targets(model, model.norm(x), target))
        yield [torch.cat(column).cpu() for column in zip(*scores)]      # loss, right (n,)


def show_scan(model, checkpoint, args):
    """What each block gains from --visits: chosen on one half of the examples, reported on the other."""
    import evaluate
    tokens, targets = evaluate.examples_of(args, get_tokenizer(checkpoint["tokenizer"]), model.config.context)  # (n, T)
    if model.config.path or args.visits < 2 or len(tokens) < 4:
        raise ValueError("a scan needs a model without a loop of its own (see grow.py), 2 --visits and 4 examples")
    label, seed = evaluate.label_of(args.model, checkpoint)
    what, n_layer = os.path.basename(args.data or args.questions or args.task), model.config.n_layer
    row = {"table": f"gain of {args.visits} visits: {what}", "seed": seed, "n": len(tokens) // 2}
    # 1. what --results has: a scan is known by what is in the model and the examples, since files move
    checksum = args.visits
    for tensor in (*model.state_dict().values(), tokens, targets):
        checksum = zlib.crc32(tensor.cpu().numpy().tobytes(), checksum)
    rows = evaluate.read_rows(args.results) if args.results and os.path.exists(args.results) else []
    gains = {(old["loop"], old["column"]): {**old, **row, "model": f"{label} {old['loop']}"}
             for old in rows if old.get("scan") == checksum}
    # 2. of the other blocks the gain over the plain model
    blocks = {write_loop(n_layer, first, last - first + 1, args.visits): (first, last)
              for first in range(n_layer) for last in range(first, n_layer)}
    rest = [loop for loop in blocks if (loop, "reported") not in gains]
    scores = scan(model, tokens, targets, [parse_loop(loop)[1] for loop in rest])
    plain_loss, plain_right = next(scores)      # (n,) each
    for loop, (loss, right) in zip(tqdm(rest, unit="block", disable=None), scores):
        gain = plain_loss - loss if args.data else right.float() - plain_right.float()      # paired over the examples
        for column, half in (("chosen", gain[::2]), ("reported", gain[1::2])):
            gains[loop, column] = {**row, "model": f"{label} {loop}", "column": column, "value": half.mean().item(),
                                   "se": (half.std() / len(half) ** 0.5).item(), "loop": loop, "scan": checksum}
            evaluate.append_rows(args.results, [gains[loop, column]])       # at once: the scan may be stopped
    if not any(row["value"] or row["se"] for row in gains.values()):
        tqdm.write("no block changes any answer: give shorter ones, or text by --data")
    # 3. the best by the first half; for a table over the seeds, the plain model and what its best block gains
    best = sorted(blocks, key=lambda loop: -gains[loop, "chosen"]["value"])[:10]
    score = (plain_loss if args.data else plain_right.float())[1::2]    # of the reported half
    row |= {"table": f"scan: the best block visited {args.visits} times", "column": what}
    gain = {name: gains[best[0], "reported"][name] for name in ("value", "se", "loop")}
    summary = [{**row, "model": label, "value": score.mean().item()}, {**row, "model": f"{label} gain", **gain}]
    evaluate.print_tables([gains[loop, half] for loop in best for half in ("chosen", "reported")] + summary)
    evaluate.append_rows(args.results, summary)
    if args.plot:
        plot_scan(args.plot, n_layer, blocks, gains)


def plot_scan(file, n_layer, blocks, gains):
    """A heat map. blocks: {loop: (first, last layer)}, gains: {(loop, half): row}"""
    from matplotlib import colors, figure
    values = torch.full((n_layer, n_layer), torch.nan)      # a block does not end before it begins
    for loop, block in blocks.items():
        values[block] = (gains[loop, "chosen"]["value"] + gains[loop, "reported"]["value"]) / 2     # over all examples
    axis = figure.Figure(layout="constrained").subplots()
    image = axis.imshow(values.numpy(), cmap="RdBu", norm=colors.CenteredNorm(), origin="lower")    # white is no change
    axis.set(title=gains[loop, "chosen"]["table"], xlabel="last layer of the block", ylabel="first layer")
    axis.figure.colorbar(image)
    axis.figure.savefig(file, dpi=120)


def main():
    import evaluate     # here, since it imports this file
    parser = command_parser(__doc__)
    parser.add_argument("model", help="a checkpoint (.pt), or a Hugging Face name or directory")
    # the demo
    parser.add_argument("--prompt", default="", help="text to continue (default: a document's beginning)")
    parser.add_argument("--length", type=positive_int, default=48, help="tokens to write (default: 48)")
    # the scan
    parser.add_argument("--scan", action="store_true", help="visit every block again: the ten best of them")
    parser.add_argument("--visits", type=positive_int, default=2, help="of the block in the scan (default: 2)")
    parser.add_argument("--task", default="hops-2", choices=evaluate.TASKS, help="what it asks (default: hops-2)")
    parser.add_argument("--data", metavar="FILE", help="in place of a task: text, scored by its loss")
    parser.add_argument("--questions", metavar="FILE.jsonl", help="in place of a task: yours, with short answers")
    parser.add_argument("-n", type=positive_int, default=200, help="examples, or rows of text (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the task's questions (default: 0)")
    parser.add_argument("--results", metavar="FILE.jsonl", help="append each block's gain; go on from what is there")
    parser.add_argument("--plot", metavar="FILE.png", help="a heat map of the scan (needs matplotlib)")
    scan_only = ("task", "data", "questions", "visits", "n", "seed", "results", "plot")
    args, _ = read_options(parser, {"scan": ("loop", "path", "prompt", "length"), "data": ("task", "questions", "seed"),
                                    "questions": ("task", "seed")}, requires={"scan": scan_only})   # none is ignored
    model, checkpoint = load_checkpoint(args.model, pick_device(args.device))
    if args.scan:
        return show_scan(model, checkpoint, args)
    # the prompt along each path
    tokenizer, n_layer = get_tokenizer(checkpoint["tokenizer"]), model.config.n_layer
    paths, own = paths_of(args, model.config), model.config.resolve_path()
    if not paths:       # its own path, and numbers of visits of the layers that it loops, or of the middle quarter
        quarter = max(1, n_layer // 4)
        middle = range((n_layer - quarter) // 2, (n_layer + quarter) // 2)
        looped = [index for index in range(n_layer) if own.count(index) > 1] or middle
        loops = [write_loop(n_layer, looped[0], len(looped), visits) for visits in (1, 2, 3, 5)]
        paths = {"its own path": own, **{loop: path for loop in loops if (path := parse_loop(loop)[1]) != own}}
    for name, path in paths.items():
        print(f"\n{name}   depth {len(path)}   path {' '.join(map(str, path))}")
        for kind, rows in checkpoint["heldout"].items():        # a Hugging Face model has none
            print(f"held-out loss, {kind}: {estimate_loss(model, rows, path):.4f}")
        print(f"{args.prompt}|{complete(model, tokenizer, args.prompt, args.length, path)}")


if __name__ == "__main__":
    run_script(main)
