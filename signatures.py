"""
Depth signatures: what each *visit* of a path does, for any model along any path (arXiv 2505.13898, 2512.08819).
Claim 1 of the paper is that looped and grown models share them: later layers matter more than in a baseline (1a), and
the curves repeat with the block that was grown or looped (1b).

    python signatures.py out/lidas/ckpt.pt out/baseline/ckpt.pt                      # curves and numbers: a minute
    python signatures.py out/*/ckpt.pt --plot signatures.png                         # runs of several seeds
    python signatures.py out/lidas/ckpt.pt --loop 3-2x2-3                            # along a looped path
    python signatures.py HuggingFaceTB/SmolLM2-135M --data text.txt --block 4 --rows 4      # any Llama

h is the residual stream before a visit, a and m are the outputs of its attention and MLP, D = a + m is its update.
Interventions are paths, or masks of the positions at which a visit is left out; there is no second model.
"""
import statistics

import numpy as np
import torch
import torch.nn.functional as F

from evaluate import append_rows, plot_lines, print_tables, rows_of_models
from loop import command_parser, paths_of
from model import between, estimate_loss, positive_int, read_options, run_script

# --- running visit by visit -----------------------------------------------------------------------
# A model of your own needs config.resolve_path, config.eot, embed, rope_and_mask, norm, head, hidden (for losses), and
# layers with norm1, attn(x, rope_and_mask), norm2, mlp, added one after another as in Layer.forward

def run_visit(layer, x, rope_and_mask):
    """One visit on x (B, T, n_embd) -> a, m (B, T, n_embd)."""
    a = layer.attn(layer.norm1(x), rope_and_mask)
    return a, layer.mlp(layer.norm2(x + a))


def trace(model, tokens, path=None):
    """All visits on tokens (B, T) -> path; h, a, m (depth, B, T, n_embd); the last stream (B, T, n_embd)."""
    path, x, visits = model.config.resolve_path(path), model.embed(tokens), []      # x (B, T, n_embd)
    rope_and_mask = model.rope_and_mask(tokens)
    for index in path:
        a, m = run_visit(model.layers[index], x, rope_and_mask)
        visits.append((x, a, m))
        x = x + a + m       # as Layer.forward adds them
    h, a, m = (torch.stack(parts) for parts in zip(*visits))    # (depth, B, T, n_embd) each
    return path, h, a, m, x

# --- what each visit adds, and what leaving it out changes ----------------------------------------

@torch.no_grad()
def contributions(model, tokens, path=None):
    """How much each visit adds, and in which direction (arXiv 2505.13898): means over tokens -> {name: (depth,)},
    attention |a|/|h|, mlp |m|/|h + a|, update |D|/|h|, and the cosines of the same pairs, as cos_attention."""
    _, h, a, m, _ = trace(model, tokens, path)
    result = {}
    for name, x, y in (("attention", a, h), ("mlp", m, h + a), ("update", a + m, h)):   # (depth, B, T, n_embd) each
        result[name] = (x.norm(dim=-1) / y.norm(dim=-1)).mean((1, 2)).cpu()             # (depth,)
        result[f"cos_{name}"] = F.cosine_similarity(x, y, dim=-1).mean((1, 2)).cpu()    # (depth,)
    return result


@torch.no_grad()
def skip_effects(model, tokens, path=None, future=None, local=False):
    """What leaving out visit s changes after it (arXiv 2505.13898): maximum over positions, mean over rows.

    effect(s, l) = |D_l - D'_l| / |D_l|, D'_l being the update of a later visit l in the run without s; on the output
    |softmax - softmax'|_2. local: D'_l is that of visit l alone, given its stream of the full run less D_s. future=t:
    s is left out before t, its effect read from t on, where only attention can have carried it.
    -> effects (depth, depth), zero where l <= s; effect on the output (depth,).
    """
    path, h, a, m, last = trace(model, tokens, path)
    update, rope_and_mask = a + m, model.rope_and_mask(tokens)      # D (depth, B, T, n_embd)
    # 1. where a visit is left out, and where its effect is read
    begins = tokens == (-1 if model.config.eot is None else model.config.eot)          # (B, T)
    begins[:, 0] = True                 # a row may begin within a document
    skipped, read = ~begins, ~begins    # a document's first token keeps the visit, and is not read
    if future is not None:
        document, place = begins.cumsum(1), torch.arange(tokens.shape[1], device=tokens.device)
        cut = document == document[:, future - 1:future]        # the document that goes on at t
        skipped, read = skipped & cut & (place < future), read & cut & (place >= future)
    rows = skipped.any(1) & read.any(1)     # (B,), a row where nothing is left out, or read, says nothing
    if not rows.any():
        raise ValueError("no document goes on after what is left out: give longer documents or more rows")

    def over_positions(x):                  # (B, T) -> a number
        return x.masked_fill(~read, 0).amax(-1)[rows].mean()

    # 2. without each visit in turn
    output = model.head(model.norm(last)).softmax(-1)           # (B, T, vocab_size)
    effects, on_output = torch.zeros(len(path), len(path)), torch.zeros(len(path))
    for s in range(len(path)):
        taken = skipped.unsqueeze(-1) * update[s]               # D_s where it is left out (B, T, n_embd)
        x = h[s] + update[s] - taken                            # nothing before s changes
        for later in range(s + 1, len(path)):
            x = h[later] - taken if local else x                # local: nothing of the visits between
            a, m = run_visit(model.layers[path[later]], x, rope_and_mask)
            change = (update[later] - (a + m)).norm(dim=-1)     # (B, T)
            effects[s, later] = over_positions(change / update[later].norm(dim=-1).clamp(min=1e-6))     # no 0 / 0
            x = x + a + m
        x = last - taken if local else x
        change = (output - model.head(model.norm(x)).softmax(-1)).norm(dim=-1)          # (B, T)
        on_output[s] = over_positions(change)
    return effects, on_output


@torch.no_grad()
def early_exit(model, tokens, path=None):
    """The logit lens: the output head on the stream before each visit, and after all (the paper's lens is tuned).
    -> KL(exit || final) in nats and overlap of the five likeliest tokens, 0 to 1, (depth + 1,) each."""
    _, h, _, _, last = trace(model, tokens, path)
    final = model.head(model.norm(last)).log_softmax(-1)        # what the model says in the end (B, T, vocab_size)
    top = final.topk(min(5, final.shape[-1])).indices           # (B, T, 5)
    kl, overlap = [], []
    for x in [*h, last]:
        early = model.head(model.norm(x)).log_softmax(-1)       # what it would say if it ended here
        kl.append((early.exp() * (early - final)).sum(-1).mean())       # this way round, as published
        likeliest = early.topk(top.shape[-1]).indices           # (B, T, 5)
        overlap.append((likeliest.unsqueeze(-1) == top.unsqueeze(-2)).any(-1).float().mean())
    return torch.stack(kl).cpu(), torch.stack(overlap).cpu()


def reordered(path, size):
    """Every path with one unit of `size` visits skipped, swapped with the next one, or reversed inside. Grown models
    are said to bear blocks out of place well (arXiv 2512.08819)."""
    parts = [(path[:i], path[i:i + size], path[i + size:]) for i in range(0, len(path), size)]
    return {"skip": [before + after for before, _, after in parts if before or after],          # else nothing is left
            "swap": [before + after[:size] + unit + after[size:] for before, unit, after in parts if after],
            "reverse": [before + unit[::-1] + after for before, unit, after in parts if unit[::-1] != unit]}


def weight_similarity(model, path=None):
    """Cosine between the weights of every two visits, the mean over a layer's matrices -> (depth, depth). It shows the
    blocks that growth copied, and LIDAS's symmetry (arXiv 2512.08819)."""
    path, similarity = model.config.resolve_path(path), 0
    names = [name for name, p in model.layers[0].named_parameters() if p.dim() == 2]
    for name in names:
        w = F.normalize(torch.stack([layer.get_parameter(name).detach().flatten().float() for layer in model.layers]))
        similarity = similarity + w @ w.T / len(names)          # (n_layer, n_layer)
    return similarity[path][:, path].cpu()

# --- one number per claim: these are choices of this project --------------------------------------

def period_share(curve, block):
    """1b: the share of the curve's variance that (visit mod block) explains -> share, and its expectation when the
    visits are permuted."""
    x = curve[block:-block].double()    # without the first and the last block, which are large in any model
    groups = [x[i::block] for i in range(block)]
    # sum of squares between the groups over all of it, as in a one-way analysis of variance
    explained = sum(len(group) * (group.mean() - x.mean()) ** 2 for group in groups)
    total = ((x - x.mean()) ** 2).sum().clamp(min=1e-30)
    return (explained / total).item(), (block - 1) / (len(x) - 1)


def convergence(curve, other):
    """Correlation of two models' curves, the shorter stretched to the longer."""
    places = np.linspace(0, 1, max(len(curve), len(other)))
    curve, other = (np.interp(places, np.linspace(0, 1, len(c)), c) for c in (curve, other))    # of one length
    return np.corrcoef(curve, other)[0, 1].item()

# --- all of them for one model, and what is printed -----------------------------------------------

BY_VISIT = {    # in table and figure: what the y axis says
    "update": "|D| / |h|", "cos_attention": "cosine", "skip_output": "|softmax - softmax'|",
    "skip_later": "|D - D'| / |D|", "exit_kl": "nats", "exit_top5": "share"}


def all_signatures(model, rows, block, path=None):
    """Every signature on rows (n, T + 1) of held-out text -> dict of curves and matrices, by visit."""
    path = model.config.resolve_path(path)
    if len(path) < 3:
        raise ValueError("signatures compare visits: give a path of three or more")
    tokens = rows[:, :-1].long().to(model.embed.weight.device)      # (n, T)
    result = contributions(model, tokens, path)
    for name, kind in {"skip": {}, "future": {"future": tokens.shape[1] // 2}, "local": {"local": True}}.items():
        effects, result[f"{name}_output"] = skip_effects(model, tokens, path, **kind)
        # of each visit on those after it, the mean; the last one has none: (depth - 1,)
        result[f"{name}_later"] = torch.stack([effects[s, s + 1:].mean() for s in range(len(path) - 1)])
    result["exit_kl"], result["exit_top5"] = early_exit(model, tokens, path)
    result["weights"] = weight_similarity(model, path)
    plain = estimate_loss(model, rows, path)
    for size in {1, block}:     # layers and blocks; once, where a block is a layer
        for name, paths in reordered(path, size).items():
            change = [estimate_loss(model, rows, other) - plain for other in paths]     # nats, by place
            result[f"{name}_{'layer' if size == 1 else 'block'}"] = torch.tensor(change)
    return result


def numbers(curves, block):
    """The claims as numbers -> yields table, column, value"""
    # 1a: above 1 where late visits count more. First visits are large in any model, and hide this in a depth score
    for name in ("skip_output", "skip_later", "local_later", "update", "attention", "mlp"):
        _, middle, late = curves[name].tensor_split(3)      # of 8 visits: 3, 3 and 2
        if len(late):
            ratio = late.mean() / middle.mean()
            yield "1a: late over middle, the last third of visits over the middle third", name, ratio.item()
    # sum_s s e_s / sum_s e_s of arXiv 2505.13898, visits from 0, as a share of the last index
    for name in ("skip_output", "skip_later", "future_output", "future_later"):
        curve = curves[name]
        score = (torch.arange(len(curve)) * curve).sum() / curve.sum() / (len(curve) - 1)
        yield "1a: depth score, 0.5 for a flat curve", name, score.item()
    depth = len(curves["update"])
    if depth > 3 * block and block > 1:         # without the first and the last block, more than one is left
        for name in ("cos_attention", "attention", "update", "skip_output"):
            share, chance = period_share(curves[name], block)
            yield "1b: share of variance that visit mod block explains", name, share
        yield "1b: share of variance that visit mod block explains", "expected by chance", chance
    for apart in sorted({1, block}) if block < depth else ():
        yield "weights: cosine of visits apart", f"by {apart}", curves["weights"].diagonal(apart).mean().item()
    for name in curves:
        if name.endswith(("_layer", "_block")) and len(curves[name]):       # a layer has no inside to reverse
            yield "change of the loss, mean over places", name, curves[name].mean().item()


def measure(args, model, checkpoint):
    """Curves by visit, and numbers, of one model along each path, as evaluate.rows_of_models takes them."""
    if not checkpoint["heldout"]:
        raise ValueError("this model came without held-out text: give some with --data FILE")
    rows = next(iter(checkpoint["heldout"].values()))[:args.rows]       # of a run, its general text
    for name, path in (paths_of(args, model.config) or {"": model.config.resolve_path()}).items():
        # how many visits later a layer comes again: in a loop, the size of its block
        again = [visit - path.index(index) for visit, index in enumerate(path) if index in path[:visit]]
        block = args.block or min(again, default=0) or checkpoint["args"].get("block") or 2
        curves = all_signatures(model, rows, block, path)
        for column in BY_VISIT:
            for visit, value in enumerate(curves[column].tolist()):
                yield "by visit", f"{name} visit {visit}".strip(), column, {"value": value, "x": visit}
        for table, column, value in numbers(curves, block):
            yield table, name, column, {"value": value}


def convergence_rows(rows):
    """Convergence of every two models, the mean over their curves in rows: of different methods within the seed, of a
    method with itself over the other seeds -> rows."""
    curves = {}     # {(line, seed): {column: [value by visit]}}
    for row in rows:
        if "x" in row:
            line = row["model"].split(" visit ")[0]
            curves.setdefault((line, row["seed"]), {}).setdefault(row["column"], []).append(row["value"])
    for (line, seed), mine in curves.items():
        found = {}  # {other line: convergences}
        for (other, other_seed), theirs in curves.items():
            if (line == other) != (seed == other_seed):         # another method or another seed, not both
                found.setdefault(other, []).extend(convergence(mine[c], theirs[c]) for c in BY_VISIT)
        for other, values in found.items():
            yield {"table": "convergence: correlation of two models' curves", "model": line, "seed": seed,
                   "column": other, "value": statistics.mean(values)}

# --- the command ----------------------------------------------------------------------------------

def main():
    parser = command_parser(__doc__)
    parser.add_argument("models", nargs="+", help="checkpoints (.pt), or Hugging Face names or directories")
    parser.add_argument("--rows", type=between(1, 64, int), default=32, help="held-out rows up to 64 (default: 32)")
    parser.add_argument("--data", metavar="FILE", help="text in place of the run's held-out general text")
    parser.add_argument("--block", type=positive_int, help="size of blocks (default: the loop's or the run's, else 2)")
    parser.add_argument("--results", metavar="FILE", help="append the numbers to this .jsonl, for evaluate.py --table")
    parser.add_argument("--plot", metavar="FILE.png", help="save a figure (needs matplotlib)")
    args, _ = read_options(parser)
    rows = rows_of_models(args, measure)
    found = list(convergence_rows(rows))
    append_rows(args.results, found)
    print_tables(rows + found)
    if args.plot:
        plot_lines(args.plot, rows, "visit", BY_VISIT)


if __name__ == "__main__":
    run_script(main)
