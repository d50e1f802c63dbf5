"""
Depth signatures: what each *visit* of a path does, for any model along any path (arXiv 2505.13898, 2512.08819). Claim 1
of the paper: looped and grown models share them. Later layers matter more than in a baseline (1a), and the curves
repeat with the block that was grown or looped (1b). Interventions are paths, or positions at which a visit is left out.

    python signatures.py out/lidas/ckpt.pt out/baseline/ckpt.pt                      # curves and numbers: a minute
    python signatures.py out/*/ckpt.pt --plot signatures.png                         # runs of several seeds
    python signatures.py out/lidas/ckpt.pt --loop 3-2x2-3                            # along a looped path
    python signatures.py HuggingFaceTB/SmolLM2-135M --data text.txt --block 4        # any Llama

h is the residual stream before a visit, a and m are the outputs of its attention and MLP, D = a + m is its update.
"""
import argparse
import statistics

import numpy as np
import torch
import torch.nn.functional as F

from evaluate import append_rows, plot_lines, print_tables, rows_of_models
from loop import add_path_options, paths_of
from model import check_outputs, estimate_loss, positive_int, run_script

# --- running visit by visit -----------------------------------------------------------------------
# A model of your own needs config.resolve_path, config.eot, embed, rope_and_mask, norm, head, and layers with norm1,
# attn(x, rope_and_mask), norm2, mlp, added one after another as in Layer.forward

def run_visit(layer, x, rope_and_mask):
    """One visit on x (B, T, n_embd) -> a, m (B, T, n_embd)."""
    a = layer.attn(layer.norm1(x), rope_and_mask)
    return a, layer.mlp(layer.norm2(x + a))


def trace(model, tokens, path=None):
    """All visits on tokens (B, T) -> path; h, a, m (depth, B, T, n_embd); the last stream (B, T, n_embd)."""
    path, x, visits = model.config.resolve_path(path), model.embed(tokens), []
    rope_and_mask = model.rope_and_mask(tokens)
    for index in path:
        a, m = run_visit(model.layers[index], x, rope_and_mask)
        visits.append((x, a, m))
        x = x + a + m
    h, a, m = (torch.stack(parts) for parts in zip(*visits))    # (depth, B, T, n_embd) each
    return path, h, a, m, x

# --- what each visit adds, and what leaving it out changes ----------------------------------------

@torch.no_grad()
def contributions(model, tokens, path=None):
    """How much each visit adds, and in which direction (arXiv 2505.13898) -> curves (depth,), means over tokens:
    attention |a|/|h|, mlp |m|/|h + a|, update |D|/|h|; cos_attention (a, h), cos_mlp (m, h + a), cos_update (D, h)."""
    _, h, a, m, _ = trace(model, tokens, path)
    result = {}
    for name, x, y in (("attention", a, h), ("mlp", m, h + a), ("update", a + m, h)):   # (depth, B, T, n_embd) each
        result[name] = (x.norm(dim=-1) / y.norm(dim=-1)).mean((1, 2)).cpu()
        result[f"cos_{name}"] = F.cosine_similarity(x, y, dim=-1).mean((1, 2)).cpu()
    return result


@torch.no_grad()
def skip_effects(model, tokens, path=None, future=None, local=False):
    """What leaving out visit s changes after it (arXiv 2505.13898): the maximum over positions, the mean over rows.

    It is left out everywhere but at the first token of a document. Of a later visit l, |D_l - D'_l| / |D_l|, with D'_l
    its update without s; of the output, |softmax - softmax'|_2. local: D'_l is that of visit l alone, given its stream
    of the full run less D_s. future=t: s is left out before t, and read from t on, in documents that began before t:
    only attention can have carried it there. -> effects (depth, depth), 0 where l <= s; on the output (depth,).
    """
    path, h, a, m, last = trace(model, tokens, path)
    update, rope_and_mask = a + m, model.rope_and_mask(tokens)
    # 1. where a visit is left out, and where its effect is read
    begins = tokens == (-1 if model.config.eot is None else model.config.eot)          # (B, T)
    begins[:, 0] = True     # a row may begin within a document
    skipped, read = ~begins, ~begins    # a document's first token keeps the visit, and is not read
    if future is not None:
        document, place = begins.cumsum(1), torch.arange(tokens.shape[1], device=tokens.device)
        cut = document == document[:, future - 1:future]        # the document that goes on at t
        skipped, read = skipped & cut & (place < future), read & cut & (place >= future)
    rows = skipped.any(1) & read.any(1)                 # a row where nothing is left out, or read, says nothing
    if not rows.any():
        raise ValueError("no document goes on past the future position: give longer documents or more rows")

    def over_positions(x):                              # (B, T) -> a number
        return x.masked_fill(~read, 0).amax(-1)[rows].mean()

    # 2. without each visit in turn
    output = model.head(model.norm(last)).softmax(-1)                       # (B, T, vocab_size)
    effects, on_output = torch.zeros(len(path), len(path)), torch.zeros(len(path))
    for s in range(len(path)):
        taken = skipped.unsqueeze(-1) * update[s]       # D_s where it is left out (B, T, n_embd)
        x = h[s] + update[s] - taken                    # the stream after s without it; nothing before s changes
        for later in range(s + 1, len(path)):
            if local:                                   # each later visit alone: its stream of the full run, less D_s
                x = h[later] - taken
            a, m = run_visit(model.layers[path[later]], x, rope_and_mask)
            change = (update[later] - (a + m)).norm(dim=-1)                 # (B, T)
            effects[s, later] = over_positions(change / update[later].norm(dim=-1).clamp(min=1e-6))     # no 0 / 0
            x = x + a + m
        if local:
            x = last - taken
        new_output = model.head(model.norm(x)).softmax(-1)
        on_output[s] = over_positions((output - new_output).norm(dim=-1))
    return effects, on_output


@torch.no_grad()
def early_exit(model, tokens, path=None):
    """The logit lens (arXiv 2505.13898; the paper uses a tuned lens): the output head on the stream before each visit,
    and after all. -> KL(exit || final) in nats and overlap of the five likeliest tokens, 0 to 1, (depth + 1,) each."""
    _, h, _, _, last = trace(model, tokens, path)
    # what the model says in the end
    final = model.head(model.norm(last)).log_softmax(-1)                                # (B, T, vocab_size)
    top = final.topk(min(5, final.shape[-1])).indices
    kl, overlap = [], []
    for x in [*h, last]:    # and what it would say if it ended here
        early = model.head(model.norm(x)).log_softmax(-1)
        kl.append((early.exp() * (early - final)).sum(-1).mean())   # KL(exit || final), this way round as published
        likeliest = early.topk(top.shape[-1]).indices
        overlap.append((likeliest.unsqueeze(-1) == top.unsqueeze(-2)).any(-1).float().mean())
    return torch.stack(kl).cpu(), torch.stack(overlap).cpu()


def reordered(path, size):
    """Every path with one unit of `size` visits skipped, swapped with the next one, or reversed inside. Grown models
    are said to bear blocks out of place well (arXiv 2512.08819). -> {kind: paths}"""
    paths = {"skip": [], "swap": [], "reverse": []}
    for i in range(0, len(path), size):
        before, unit, after = path[:i], path[i:i + size], path[i + size:]
        neighbour, rest = after[:size], after[size:]    # the unit after it, and what follows
        if before or after:
            paths["skip"].append(before + after)
        if neighbour:
            paths["swap"].append(before + neighbour + unit + rest)
        if unit[::-1] != unit:                          # else it is the same path
            paths["reverse"].append(before + unit[::-1] + after)
    return {name: found for name, found in paths.items() if found}


def weight_similarity(model, path=None):
    """Cosine between the weights of every two visits, the mean over a layer's matrices -> (depth, depth). It shows the
    blocks that growth copied, and LIDAS's symmetry (arXiv 2512.08819)."""
    names = [name for name, p in model.layers[0].named_parameters() if p.dim() == 2]
    similarity = 0
    for name in names:
        w = F.normalize(torch.stack([layer.get_parameter(name).detach().flatten().float() for layer in model.layers]))
        similarity = similarity + w @ w.T / len(names)  # (n_layer, n_layer)
    path = model.config.resolve_path(path)
    return similarity[path][:, path].cpu()

# --- one number per claim -------------------------------------------------------------------------

def late_over_middle(curve):
    """1a: mean of the last third of visits over that of the middle third (of 8 visits: 2 over 3); above 1 where late
    visits count more. First visits are large in any model and hide this in a depth score. A choice of this project."""
    _, middle, late = curve.tensor_split(3)     # where 3 does not divide the depth, the last third is shorter
    return (late.mean() / middle.mean()).item()


def depth_score(curve):
    """sum_s s e_s / sum_s e_s, visits counted from 0, as a share of the last index: 0.5 is a flat curve (arXiv
    2505.13898, which does not divide by the depth and takes future effects)."""
    s = torch.arange(len(curve), dtype=curve.dtype)
    return ((s * curve).sum() / curve.sum() / (len(curve) - 1)).item()


def period_share(curve, block):
    """1b: the share of the curve's variance that (visit mod block) explains, without the first and the last block,
    which are large in any model. -> share, and its expectation when the visits are permuted. A choice of this
    project, so that "recurring patterns" is a number."""
    x = curve[block:-block].double()    # without the two ends
    groups = [x[i::block] for i in range(block)]
    # sum of squares between the groups over all of it, as in a one-way analysis of variance
    between = sum(len(group) * (group.mean() - x.mean()) ** 2 for group in groups)
    total = ((x - x.mean()) ** 2).sum().clamp(min=1e-30)
    return (between / total).item(), (block - 1) / (len(x) - 1)


def convergence(curve, other):
    """Correlation of two models' curves, the shorter stretched to the longer: 1 for a model with itself. A choice of
    this project."""
    places = np.linspace(0, 1, max(len(curve), len(other)))
    curve, other = (np.interp(places, np.linspace(0, 1, len(c)), c) for c in (curve, other))
    return np.corrcoef(curve, other)[0, 1].item()

# --- all of them for one model, and what is printed -----------------------------------------------

BY_VISIT = {    # in table and figure: what the y axis says
    "update": "|D| / |h|", "cos_attention": "cosine", "skip_output": "|softmax - softmax'|",
    "skip_later": "|D - D'| / |D|", "exit_kl": "nats", "exit_top5": "share"}


def all_signatures(model, rows, block, path=None):
    """Every signature on rows (n, T + 1) of held-out text -> {name: curve by visit, or changes by place}"""
    path, tokens = model.config.resolve_path(path), rows[:, :-1].long().to(model.embed.weight.device)
    if len(path) < 3:
        raise ValueError("signatures compare visits: give a path of three or more")
    result = contributions(model, tokens, path)
    for name, kind in {"skip": {}, "future": {"future": tokens.shape[1] // 2}, "local": {"local": True}}.items():
        effects, result[f"{name}_output"] = skip_effects(model, tokens, path, **kind)
        # the mean over the visits after it; the last one has none
        result[f"{name}_later"] = effects.sum(1)[:-1] / torch.arange(len(path) - 1, 0, -1)
    result["exit_kl"], result["exit_top5"] = early_exit(model, tokens, path)
    result["weights"], plain = weight_similarity(model, path), estimate_loss(model, rows, path)
    for size in {1, block}:     # layers and blocks; once, where a block is a layer
        for kind, paths in reordered(path, size).items():
            changes = [estimate_loss(model, rows, other) - plain for other in paths]        # nats
            result[f"{kind}_{'layer' if size == 1 else 'block'}"] = torch.tensor(changes)
    return result


def numbers(curves, block):
    """The claims as numbers, of one model -> {table: {column: value}}"""
    depth, tables = len(curves["update"]), {}
    tables["1a: late over middle, the last third of visits over the middle third"] = {
        name: late_over_middle(curves[name])
        for name in ("skip_output", "skip_later", "local_later", "update", "attention", "mlp")
        if len(curves[name]) >= 3}              # "later" has no value for the last visit
    tables["1a: depth score, 0.5 for a flat curve"] = {
        name: depth_score(curves[name]) for name in ("skip_output", "skip_later", "future_output", "future_later")}
    if depth >= 3 * block + 1 and block > 1:        # without the first and the last block, more than one is left
        period = tables["1b: share of variance that visit mod block explains"] = {}
        for name in ("cos_attention", "attention", "update", "skip_output"):
            period[name], period["expected by chance"] = period_share(curves[name], block)
    if block < depth:
        tables["weights: cosine of visits apart"] = {
            f"by {apart}": curves["weights"].diagonal(apart).mean().item() for apart in sorted({1, block})}
    tables["change of the loss, mean over places"] = {
        name: curves[name].mean().item() for name in curves if name.endswith(("_layer", "_block"))}
    return tables


def measure(args, model, checkpoint):
    """Curves by visit, and numbers, of one model along each path, as evaluate.rows_of_models takes them."""
    if not checkpoint["heldout"]:
        raise ValueError("this model came without held-out text: give some with --data FILE")
    rows = next(iter(checkpoint["heldout"].values()))[:args.rows]       # of a run, its general text
    for name, path in (paths_of(args, model.config) or {"": model.config.resolve_path()}).items():
        looped = {index for index in path if path.count(index) > 1}         # the layers that the path repeats
        block = args.block or len(looped) or checkpoint["args"].get("block") or 2
        curves = all_signatures(model, rows, block, path)
        for column in BY_VISIT:
            for visit, value in enumerate(curves[column].tolist()):
                yield "by visit", f"{name} visit {visit}".strip(), column, {"value": value, "x": visit}
        for table, columns in numbers(curves, block).items():
            for column, value in columns.items():
                yield table, name, column, {"value": value}


def convergence_rows(rows):
    """Of the curves in rows, the convergence of every two models, the mean over the curves: of different methods within
    the seed, of a method with itself over the other seeds -> rows."""
    curves = {}     # {(line, seed): {column: [value by visit]}}
    for row in rows:
        if "x" in row:
            line = row["model"].split(" visit ")[0]
            curves.setdefault((line, row["seed"]), {}).setdefault(row["column"], []).append(row["value"])
    for (line, seed), mine in curves.items():
        found = {}      # {other line: convergences}
        for (other, other_seed), theirs in curves.items():
            if seed != other_seed if line == other else seed == other_seed:
                found.setdefault(other, []).extend(convergence(mine[c], theirs[c]) for c in BY_VISIT)
        for other, values in found.items():
            yield {"table": "convergence: correlation of two models' curves", "model": line, "seed": seed,
                   "column": other, "value": statistics.mean(values)}

# --- the command ----------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoints (.pt), or Hugging Face names or directories")
    add_path_options(parser)
    parser.add_argument("--rows", type=positive_int, default=32, help="held-out rows up to 64 (default: 32)")
    parser.add_argument("--data", metavar="FILE", help="text in place of the run's held-out general text")
    parser.add_argument("--block", type=positive_int, help="size of blocks (default: the loop's or the run's, else 2)")
    parser.add_argument("--results", metavar="FILE", help="append the numbers to this .jsonl, for evaluate.py --table")
    parser.add_argument("--plot", metavar="FILE.png", help="save a figure (needs matplotlib)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best one here)")
    args = parser.parse_args()
    check_outputs(rows=args.results, plot=args.plot)
    rows = rows_of_models(args, measure)
    found = list(convergence_rows(rows))
    if args.results:
        append_rows(args.results, found)
    print_tables(rows + found)
    if args.plot:
        plot_lines(args.plot, rows, "visit", BY_VISIT)


if __name__ == "__main__":
    run_script(main)
