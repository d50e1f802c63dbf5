"""
Depth signatures: what each *visit* of a path does, for any checkpoint along any path (arXiv 2505.13898,
2512.08819). Claim 1 of the paper is that looped and grown models share them: later layers matter more than in
a baseline, and the curves repeat with the block that was grown or looped.

    python signatures.py out/lidas/ckpt.pt out/baseline/ckpt.pt out/looped/ckpt.pt    # curves, numbers: 1 min
    python signatures.py out/*/ckpt.pt --out signatures.json --plot signatures.png    # runs of several seeds
    python signatures.py out/lidas/ckpt.pt --loop 3,2,1                               # along a looped path

h is the residual stream before a visit, a and m are the outputs of its attention and MLP, D = a + m is its
update. Interventions are paths, or masks of the positions at which a visit is kept; there is no second model.
"""
import json
import statistics

import torch
import torch.nn.functional as F

from evaluate import append_rows, load_labelled, print_tables
from grow import Parser, at_least, make_folder, run_script, save_atomically
from loop import parse_repeats
from model import mean_loss

# -----------------------------------------------------------------------------
# running visit by visit. A model of your own needs config.visits, config.separator, embed, places, norm, head
# and layers with norm1, attn(x, places), norm2, mlp, added one after another as in Layer.forward; no dropout

def run_visits(model, x, places, path):
    """The visits of a path on x (batch, time, n_embd) -> lists of h before each, a and m; the last stream."""
    hs, attentions, mlps = [], [], []
    for index in path:
        layer = model.layers[index]
        a = layer.attn(layer.norm1(x), places)
        m = layer.mlp(layer.norm2(x + a))
        hs.append(x), attentions.append(a), mlps.append(m)
        x = x + a + m
    return hs, attentions, mlps, x


def trace(model, tokens, path=None):
    """All visits on tokens (batch, time) -> path; h, a, m (depth, batch, time, n_embd); the last stream."""
    path = model.config.visits(path)
    h, a, m, last = run_visits(model, model.embed(tokens), model.places(tokens), path)
    return path, torch.stack(h), torch.stack(a), torch.stack(m), last


@torch.no_grad()
def contributions(model, tokens, path=None):
    """Sublayer contributions (arXiv 2505.13898): how much each visit adds, and in which direction.

    -> dict of curves (depth,), means over tokens: attention |a|/|h|, mlp |m|/|h + a|, update |D|/|h|, and the
    cosines cos_attention (a, h), cos_mlp (m, h + a), cos_update (D, h).
    """
    _, h, a, m, _ = trace(model, tokens, path)
    pairs = {"attention": (a, h), "mlp": (m, h + a), "update": (a + m, h)}
    sizes = {name: (x.norm(dim=-1) / y.norm(dim=-1)).mean((1, 2)).cpu() for name, (x, y) in pairs.items()}
    return sizes | {f"cos_{name}": F.cosine_similarity(x, y, dim=-1).mean((1, 2)).cpu()
                    for name, (x, y) in pairs.items()}


@torch.no_grad()
def skip_effects(model, tokens, path=None, future=None, reduce="max"):
    """What leaving out one visit changes behind it (arXiv 2505.13898, which takes the max over positions).

    Visit s is left out everywhere but at the first token of a document, and effect(s, l) =
    |D_l - D'_l| / |D_l| of each later visit l; on the output |softmax - softmax'|_2. future=t: left out only
    at positions < t, read only at those >= t, where a change can have come through attention alone. reduce:
    "max" or "mean" over positions, then the mean over sequences. -> effects (depth, depth), zero where
    l <= s; effect on the output (depth,). Raises ValueError for another reduce or future.

    Cost: nothing in front of a visit changes, so the run without visit s starts behind it: in all
    depth * (depth + 1) / 2 layer passes; running the model anew for each takes depth + depth * (depth - 1).
    """
    path, h, a, m, last = trace(model, tokens, path)
    T = tokens.shape[1]
    if reduce not in ("max", "mean"):
        raise ValueError(f"reduce is max or mean over positions, not {reduce!r}")
    if T < 2 or future is not None and not 1 < future < T:
        raise ValueError(f"future is a position above 1 and below the {T} tokens (2 or more), not {future}")
    keep = tokens == (-1 if model.config.separator is None else model.config.separator)
    keep[:, :1] = keep[:, future or T:] = True              # where visit s still adds its update
    keep = keep.unsqueeze(-1)
    read = slice(future or 1, T)

    def over_positions(x):                                  # (..., batch, time) -> (...)
        return (x[..., read].amax(-1) if reduce == "max" else x[..., read].mean(-1)).mean(-1)

    update, places = a + m, model.places(tokens)
    output = model.head(model.norm(last)).softmax(-1)
    effects, on_output = torch.zeros(len(path), len(path)), torch.zeros(len(path))
    for s in range(len(path)):
        _, a2, m2, last2 = run_visits(model, h[s] + keep * update[s], places, path[s + 1:])
        if a2:
            change = (update[s + 1:] - torch.stack(a2) - torch.stack(m2)).norm(dim=-1)
            effects[s, s + 1:] = over_positions(change / update[s + 1:].norm(dim=-1)).cpu()
        on_output[s] = over_positions((output - model.head(model.norm(last2)).softmax(-1)).norm(dim=-1)).cpu()
    return effects, on_output


def later_mean(effects):
    """Mean effect of each visit on those behind it, (depth, depth) -> (depth - 1,): the last one has none."""
    return torch.stack([effects[s, s + 1:].mean() for s in range(len(effects) - 1)])


def depth_score(curve):
    """sum_s s e_s / sum_s e_s, visits counted from 0, as a share of the last index: 0.5 is a flat curve
    (arXiv 2512.08819, which does not divide by the depth)."""
    s = torch.arange(len(curve), dtype=curve.dtype)
    return ((s * curve).sum() / curve.sum() / (len(curve) - 1)).item()


def late_half_share(curve):
    """What the later half of visits has of the curve's sum; of an odd number, the middle one counts half."""
    n = len(curve)
    late = curve[(n + 1) // 2:].sum() + (curve[n // 2] / 2 if n % 2 else 0)
    return (late / curve.sum()).item()


def late_over_middle(curve):
    """Mean of the last third of visits over that of the middle third: above 1 where the late ones count more.
    First visits are large in any model and hide this in a depth score. A choice of this project."""
    _, middle, late = curve.tensor_split(3)
    return (late.mean() / middle.mean()).item()


@torch.no_grad()
def early_exit(model, tokens, path=None):
    """The logit lens (arXiv 2505.13898): the output head on the stream before each visit, and behind all.

    -> KL(final || exit) in nats (depth + 1,), overlap of the five likeliest tokens, 0 to 1, (depth + 1,).
    """
    _, h, _, _, last = trace(model, tokens, path)
    final = model.head(model.norm(last)).log_softmax(-1)
    top = final.topk(min(5, final.shape[-1])).indices
    kl, overlap = [], []
    for x in [*h, last]:
        exit = model.head(model.norm(x)).log_softmax(-1)
        kl.append((final.exp() * (final - exit)).sum(-1).mean())
        likeliest = exit.topk(top.shape[-1]).indices
        overlap.append((likeliest.unsqueeze(-1) == top.unsqueeze(-2)).any(-1).float().mean())
    return torch.stack(kl).cpu(), torch.stack(overlap).cpu()


def reordered(path, size):
    """Every path with one unit of `size` visits skipped, swapped with the next one, or reversed inside."""
    paths = {"skip": [], "swap": [], "reverse": []}
    for i in range(0, len(path), size):
        before, unit, behind = path[:i], path[i:i + size], path[i + size:]
        neighbour, rest = behind[:size], behind[size:]
        if before or behind:
            paths["skip"].append(before + behind)
        if neighbour:
            paths["swap"].append(before + neighbour + unit + rest)
        if unit[::-1] != unit:                  # else it is the same path
            paths["reverse"].append(before + unit[::-1] + behind)
    return {name: found for name, found in paths.items() if found}


def reorder_effects(model, rows, size, path=None):
    """Change of the loss (nats) on rows (n, time + 1) along each path of reordered(): dict of (places,).
    Grown models are said to bear blocks out of place, and single layers less (arXiv 2512.08819)."""
    path = model.config.visits(path)
    plain = mean_loss(model, rows, path)
    return {name: torch.tensor([mean_loss(model, rows, p) - plain for p in paths])
            for name, paths in reordered(path, size).items()}


def weight_similarity(model, path=None):
    """Cosine between the weights of every two visits, the mean over a layer's matrices -> (depth, depth).
    It shows the blocks that growth copied, and LIDAS's symmetry (arXiv 2512.08819)."""
    names = [name for name, p in model.layers[0].named_parameters() if p.dim() == 2]
    similarity = 0
    for name in names:
        w = F.normalize(torch.stack([layer.get_parameter(name).detach().flatten().float()
                                     for layer in model.layers]))
        similarity = similarity + w @ w.T / len(names)
    path = model.config.visits(path)
    return similarity[path][:, path].cpu()


def detrended(curve):
    """The curve less the straight line that fits it best."""
    t = torch.stack((torch.ones(len(curve)), torch.arange(len(curve)).float()), dim=1)
    return curve - (t @ torch.linalg.lstsq(t, curve.unsqueeze(1)).solution).squeeze(1)


def periodicity(curve):
    """Autocorrelation of the detrended curve at lags 1 ... half its length; a pattern aligned with blocks of
    B visits peaks at lag B. Each lag is a mean over its own number of pairs, so that long lags are not
    damped. A choice of this project, so that "recurring patterns" is a number."""
    x = detrended(curve.float())
    variance = (x * x).mean().clamp(min=1e-12 * (curve * curve).mean())      # of a straight line: rounding
    return torch.stack([(x[:-lag] * x[lag:]).mean() / variance for lag in range(1, len(x) // 2 + 1)])


def convergence(curve, other):
    """Correlation of two models' curves, the shorter stretched to the longer: 1 for a model with itself."""
    n = max(len(curve), len(other))
    curve, other = (F.interpolate(c.float()[None, None], size=n, mode="linear", align_corners=True)[0, 0]
                    for c in (curve, other))
    return torch.corrcoef(torch.stack((curve, other)))[0, 1].item()

# -----------------------------------------------------------------------------
# all of them for one model, and what is printed

COMPARED = ["attention", "mlp", "cos_attention", "cos_mlp", "skip_output", "skip_later"]  # in the convergence


def all_signatures(model, rows, block, path=None, reduce="max"):
    """Every signature on rows (n, time + 1) of held-out text -> dict of curves and matrices, by visit."""
    tokens = rows[:, :-1].long().to(model.embed.weight.device)
    result = contributions(model, tokens, path)
    effects, on_output = skip_effects(model, tokens, path, reduce=reduce)
    future, future_output = skip_effects(model, tokens, path, future=tokens.shape[1] // 2, reduce=reduce)
    kl, overlap = early_exit(model, tokens, path)
    result |= {"skip_effects": effects, "skip_output": on_output, "skip_later": later_mean(effects),
               "future_output": future_output, "future_later": later_mean(future), "exit_kl": kl,
               "exit_top5": overlap, "weights": weight_similarity(model, path)}
    for size in {1, block}:
        for name, change in reorder_effects(model, rows, size, path).items():
            result[f"{name}_{'layer' if size == 1 else 'block'}"] = change
    return {name: x.cpu() for name, x in result.items()}


def bars(path, result, names):
    """One line a visit, one column of bars a curve: a plot that a terminal can show."""
    print("visit layer  " + "".join(f"{name:<24}" for name in names))
    for visit, index in enumerate(path):
        line = f"{visit:>5} {index:>5}  "
        for name in names:
            curve = result[name]
            if visit >= len(curve):
                line += " " * 24
                continue
            value, largest = curve[visit].item(), curve.abs().max().item() or 1.0
            line += f"{'#' * round(abs(value) / largest * 14):<14}{value:>7.3f}   "
        print(line.rstrip())


def numbers(models, block):
    """The claims as numbers -> rows as evaluate.py's, which prints them with their spread over the seeds."""
    rows = []

    def add(table, column, value, of):
        for model in of:
            rows.append({"table": table, "model": model["name"], "seed": model["seed"], "run": model["file"],
                         "column": column, "value": value(model["curves"])})

    for column in ("update", "skip_later", "skip_output", "future_later", "future_output"):
        add("depth score, 0.5 for a flat curve", column, lambda c: depth_score(c[column]), models)
        add("share of the later half, 0.5 for a flat curve", column, lambda c: late_half_share(c[column]),
            models)
    for column in ("attention", "mlp", "update", "skip_later", "skip_output"):
        add("late over middle: the last third of visits over the middle third", column,
            lambda c: late_over_middle(c[column]), models)
    for curve in ("attention", "mlp", "cos_attention", "skip_output"):
        for lag in range(1, min(len(model["path"]) for model in models) // 2 + 1):
            for column in [f"lag {lag}"] + ["that of the block"] * (lag == block):
                add(f"periodicity of {curve}: autocorrelation by lag", column,
                    lambda c: periodicity(c[curve])[lag - 1].item(), models)
    for column in (name for name in models[0]["curves"] if name.endswith(("_layer", "_block"))):
        add(f"change of the loss, blocks of {block}, mean over places", column,
            lambda c: c[column].mean().item(), models)
    for model in models:
        for name in dict.fromkeys(other["name"] for other in models):
            # another method is compared within the seed; the method itself with all its other seeds: the
            # most that can be expected
            others = [other for other in models if other["name"] == name
                      and (other["seed"] == model["seed"]) != (name == model["name"])]
            if others:
                add("convergence: correlation of two models' curves, mean over " + ", ".join(COMPARED), name,
                    lambda c: statistics.mean(convergence(c[curve], other["curves"][curve])
                                              for other in others for curve in COMPARED), [model])
    return rows


def plot(file, models):
    """One figure: curves by visit in front, effects of skipping as pictures below."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = list(dict.fromkeys(model["name"] for model in models))
    shown = ["attention", "mlp", "skip_output", "skip_later"]
    figure, axes = plt.subplots(2, max(len(shown), len(names)), squeeze=False, layout="constrained",
                                figsize=(3 * max(len(shown), len(names)), 5.5))
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, curve in zip(axes[0], shown):
        axis.set_visible(True)
        for i, name in enumerate(names):
            group = torch.stack([model["curves"][curve] for model in models if model["name"] == name])
            axis.plot(group.mean(0), color=f"C{i}", marker=".", label=name)
            if len(group) > 1:
                axis.fill_between(range(group.shape[1]), group.mean(0) - group.std(0),
                                  group.mean(0) + group.std(0), color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set(title=curve, xlabel="visit")
    axes[0, 0].legend(fontsize="small")
    for axis, name in zip(axes[1], names):
        axis.set_visible(True)
        group = torch.stack([model["curves"]["skip_effects"] for model in models if model["name"] == name])
        axis.imshow(group.mean(0).T.log10(), origin="lower", vmin=-1, vmax=1.5)
        axis.set(title=f"{name}: log10 effect", xlabel="skipped visit", ylabel="on visit")
    make_folder(file)
    figure.savefig(file, dpi=150)

# -----------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    parser.add_checkpoints()
    parser.add_argument("--rows", type=at_least(1), default=16,
                        help="held-out rows (default: 16, for two digits)")
    parser.add_argument("--stream", default="general", help="which held-out text (default: general; or math)")
    parser.add_argument("--block", type=at_least(1), default=2,
                        help="size of reordered blocks (default: 2, as train.py's)")
    parser.add_argument("--loop", metavar="START,BLOCK,REPEATS", help="run all models along this looped path")
    parser.add_argument("--reduce", choices=["max", "mean"], default="max",
                        help="skip effects over positions (default: max, as arXiv 2505.13898)")
    parser.add_argument("--quiet", action="store_true", help="only the numbers, no curves")
    parser.add_argument("--out", default="signatures.json", help="file for curves (default: signatures.json)")
    parser.add_argument("--results", metavar="FILE", help="append the numbers to this .jsonl file, as "
                                                          "evaluate.py does, for its --table")
    parser.add_argument("--plot", metavar="FILE.png", help="save a figure (needs matplotlib)")
    parser.add_device()
    args = parser.parse_args()
    models = []
    for file, name, seed, model, checkpoint in load_labelled(args):
        stream = "tokens" if args.tokens else args.stream
        if stream not in checkpoint["heldout"]:
            raise ValueError(f"{file} has held-out text of {', '.join(checkpoint['heldout']) or 'nothing'}, "
                             f"not of {stream}: give another --stream, or --tokens FILE.bin")
        path = parse_repeats(args.loop, model.config.n_layer) if args.loop else model.config.visits()
        if len(path) < max(4, 2 * args.block):
            raise ValueError(f"{file}: {len(path)} visits are too few for signatures by depth, which need "
                             f"four, and two blocks of {args.block}")
        name += "".join(f" {x}" for x in (args.loop, stream, args.reduce)     # what is not the default
                        if x not in (None, "general", "tokens", "max"))
        rows = checkpoint["heldout"][stream][:args.rows]
        if rows.shape[1] < 5:
            raise ValueError(f"{file}: signatures need a context of four tokens or more")
        curves = all_signatures(model, rows, args.block, path, args.reduce)
        models.append({"file": file, "name": name, "seed": seed, "path": path, "curves": curves})
        if not args.quiet:
            print(f"\n{file}: depth {len(path)}, {len(rows)} rows of {stream} text")
            bars(path, curves, ["attention", "mlp", "skip_output", "skip_later"])
            bars(path, curves, ["cos_attention", "cos_mlp", "exit_kl", "exit_top5"])
    rows = numbers(models, args.block)
    print_tables(rows)
    curves = [{**model, "curves": {name: x.tolist() for name, x in model["curves"].items()}}
              for model in models]
    save_atomically(args.out, lambda f: f.write(json.dumps(curves).encode()))
    if args.results:
        append_rows(args.results, rows)
    if args.plot:
        plot(args.plot, models)


if __name__ == "__main__":
    run_script(main)
