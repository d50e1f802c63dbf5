"""Growing is looping, untied: bit for bit at the moment of growth, the optimizer's moments along the path."""
import copy
from argparse import Namespace

import pytest
import torch
from conftest import refused, same, some_tokens, tiny_model, works

from grow import METHODS, depth_schedule, grow, grow_optimizer, growth_steps, lidas, midas, stack
from loop import parse_loop
from model import load_checkpoint
from train import make_optimizers, training_flops


def adamw(model):
    return torch.optim.AdamW([{"params": [p for p in model.parameters() if (p.dim() < 2) == norms]} for norms in (0, 1)])


def ours(model):
    return make_optimizers(model, Namespace(weight_decay=0.1, lr=1e-2, embed_share=1.0))


def parts(optimizer):
    return optimizer if isinstance(optimizer, list) else [optimizer]


def train(model, optimizer, seed=0):
    tokens = some_tokens(seed=seed)
    model(tokens[:, :-1], tokens[:, 1:].contiguous())[1].backward()
    for part in parts(optimizer):
        part.step()
        part.zero_grad()


def moments_of(optimizer):
    return {p: moments for part in parts(optimizer) for p, moments in part.state.items()}


def pointers(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [1, 2, 3, 6])
@pytest.mark.parametrize("tied", [True, False])
def test_grown_equals_looped_at_two_successive_growths(method, block, tied):
    model, tokens = tiny_model(tied=tied, eot=5), some_tokens()
    for seed in (0, 1):
        path = METHODS[method](model.config.n_layer, block)
        grown = grow(model, path)
        assert grown.config.n_layer == len(path) and grown.config.path is None
        assert all(map(torch.equal, grown(tokens, tokens), model(tokens, tokens, path)))
        assert torch.equal(grown.generate(tokens, 9, temperature=0), model.generate(tokens, 9, path, temperature=0))
        train(grown, adamw(grown), seed)        # so that the second growth starts from layers that differ
        model = grown.eval()
    assert torch.equal(grow(model, [5, 5, 0])(tokens)[0], model(tokens, path=[5, 5, 0])[0])      # and any other path
    for bad in ([], [0, 99], [-1]):
        with pytest.raises(ValueError):
            grow(model, bad)


def test_untying_a_looped_model_sums_up_its_gradients():
    """The tied gradient is the sum of the untied ones."""
    looped, tokens = tiny_model(path=parse_loop("1-2x2-3")[1]), some_tokens()
    untied = grow(looped)
    assert untied.config.n_layer == 8 and torch.equal(untied(tokens)[0], looped(tokens)[0])
    for model in (looped, untied):
        model(tokens, tokens)[1].backward()
    visits = [untied.layers[v].mlp.proj.weight.grad for v in (1, 3)]
    torch.testing.assert_close(looped.layers[1].mlp.proj.weight.grad, visits[0] + visits[1], atol=1e-6, rtol=1e-4)
    optimizer = adamw(looped)
    optimizer.step()            # and its optimizer goes along, without a path to name
    assert len(moments_of(grow_optimizer(optimizer, adamw(untied), looped, untied))) == len(list(untied.parameters()))


def test_no_storage_is_shared():
    model = tiny_model()
    grown, before = grow(model, midas(6, 2)), copy.deepcopy(model.state_dict())
    own, theirs = (list(m.parameters()) for m in (model, grown))
    assert len(pointers(own + theirs)) == len(own) + len(theirs)
    for p in theirs:
        p.data.add_(1.0)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("make", [adamw, ours])
def test_moments_follow_the_path(make):
    model, path = tiny_model(), lidas(6, 2)
    optimizer = make(model)
    for seed in range(3):
        train(model, optimizer, seed)
    before = {p: copy.deepcopy(moments) for p, moments in moments_of(optimizer).items()}
    grown = grow(model, path)
    new = grow_optimizer(optimizer, make(grown), model, grown, path)
    pairs = [(model.embed.weight, grown.embed.weight), (model.norm.weight, grown.norm.weight)]
    for visit, index in enumerate(path):
        pairs += zip(model.layers[index].parameters(), grown.layers[visit].parameters())
    after = moments_of(new)
    assert len(before) == len(list(model.parameters())) and len(after) == len(pairs)
    assert all(same(before[source], after[copied]) for source, copied in pairs)
    tensors = [x for moments in (*after.values(), *moments_of(optimizer).values()) for x in moments.values()]
    assert len(pointers(tensors)) == len(tensors)
    assert all(part.state.keys() == {p for group in part.param_groups for p in group["params"]} for part in parts(new))
    before = {name: p.clone() for name, p in grown.named_parameters()}
    train(grown, new)
    assert not any(torch.equal(p, before[name]) for name, p in grown.named_parameters())


def test_an_optimizer_that_does_not_hold_exactly_the_model_is_refused():
    """The classic bug: growing the model and going on with the old optimizer."""
    model, path = tiny_model(), stack(6, 2)
    optimizer, grown = adamw(model), grow(model, path)
    for old, new in ((optimizer, optimizer), (adamw(tiny_model()), adamw(grown)), (optimizer, ours(grown)[:1]),
                     (optimizer, torch.optim.AdamW(list(grown.parameters())[:-1])), (optimizer, [])):
        with pytest.raises(ValueError, match="exactly"):
            grow_optimizer(old, new, model, grown, path)
    grow_optimizer(optimizer, ours(grown), model, grown, path)


def test_muon_is_torchs_in_float32():
    """Written again only because torch's runs in bfloat16, and matrix by matrix."""
    model = tiny_model()
    mine = ours(model)[0]
    held = [p for group in mine.param_groups for p in group["params"]]
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers.")]
    assert len(held) == len(matrices) and set(held) == set(matrices)
    before, copies = ([p.detach().clone() for p in held] for _ in range(2))
    theirs = torch.optim.Muon(copies, lr=1e-2, weight_decay=0.1, eps=1e-7, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, copied in zip(held, copies):
            p.grad = torch.randn_like(p)
            copied.grad = p.grad.clone()
        mine.step()
        theirs.step()
    for p, copied, first in zip(held, copies, before):
        one, two = p.detach() - first, copied - first
        assert torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0) > 0.99
        assert abs(one.norm() / two.norm() - 1) < 0.05


# which layers (counted from 0) are copied after themselves, worked by hand for n = 1 ... 6 blocks of 4
BY_HAND = {"stack": ["0-3", "4-7", "8-11", "12-15", "16-19", "20-23"],
           "midas": ["0-3", "0-3", "4-7", "4-7", "8-11", "8-11"],       # block ceil(n/2)
           "lidas": ["0-3", "2-5", "4-7", "6-9", "8-11", "10-13"]}      # L/2 - 2 ... L/2 + 1


@pytest.mark.parametrize("method", METHODS)
def test_operators_against_their_definitions(method):
    for n, copied in enumerate(BY_HAND[method], 1):
        first, last = map(int, copied.split("-"))
        expected = [*range(last + 1), *range(first, last + 1), *range(last + 1, 4 * n)]
        assert METHODS[method](4 * n, 4) == expected
        assert (midas(4 * n, 4) == lidas(4 * n, 4)) == (n % 2 == 1)
    for size in ((6, 4), (6, 0), (6, -2), (0, 2), (2, 4)):
        with pytest.raises(ValueError):
            METHODS[method](*size)


@pytest.mark.parametrize("total", [60, 97, 1600, 100003])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
def test_prop_alpha(total, alpha):
    """Rounding each stage on its own loses or invents steps."""
    steps, weight = growth_steps(total, 4, alpha), [i ** alpha for i in range(1, 5)]
    assert sum(steps) == total and all(abs(s - total * w / sum(weight)) <= 1 for s, w in zip(steps, weight))
    assert depth_schedule(total, 8, 2, alpha) == [(sum(steps[:i]), 2 * i + 2) for i in range(4)]


@pytest.mark.parametrize("bad", [(32, 3, 2000.0), (5, 6, 1.0), (5, 0, 1.0), (0, 1, 1.0), (9, 3, -1.0)])
def test_too_few_steps_for_the_stages(bad):
    with pytest.raises(ValueError):                 # and not that the numbers get too large
        growth_steps(*bad)


def test_layer_flops_of_growth_are_those_of_the_papers():
    """Six stages, alpha 1, 20% cooldown: 1/1.286 of the baseline's layer compute (the papers say 1/1.29)."""
    steps = growth_steps(80_000, 6, 1.0)
    grown = sum(n * 4 * (i + 1) for i, n in enumerate(steps)) + 20_000 * 24
    assert abs(100_000 * 24 / grown - 1.286) < 0.001


def test_flops_count_visits_and_agree_with_the_shapes():
    plain = tiny_model()
    flops = [training_flops(plain, 1, 24, depth) / 24 for depth in range(9)]         # of a token
    per_visit = flops[1] - flops[0]
    matrices = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 40           # q, k, v, proj; gate, up, down
    assert per_visit == 6 * matrices + 3 * 4 * 32 * 24 // 2 and flops[8] == flops[0] + 8 * per_visit
    assert training_flops(plain, 7, 24, 6) == 7 * 24 * flops[6]
    # shorter rows than the model's context cost less in attention
    assert training_flops(plain, 2, 12, 6) < training_flops(plain, 1, 24, 6)


def test_growing_keeps_what_is_not_a_weight():
    """A model in eval mode came back in training mode, a frozen embedding trainable."""
    model = tiny_model()
    model.embed.weight.requires_grad_(False)
    grown = grow(model, [0, 1, 1])
    assert not grown.training and not grown.embed.weight.requires_grad and grown.head.weight is grown.embed.weight
    with pytest.raises(ValueError, match="layers.0.norm1.weight"):
        held = [p for name, p in grown.named_parameters() if name != "layers.0.norm1.weight"]
        optimizer = torch.optim.AdamW(model.parameters())
        grow_optimizer(optimizer, torch.optim.AdamW(held), model, grown, [0, 1, 1])


def test_growing_a_checkpoint_by_command(trained, tmp_path):
    small, checkpoint = load_checkpoint(str(trained / "ckpt.pt"))
    tokens = checkpoint["heldout"]["general"][:2, :-1].long()
    for name, options, path in (("a", ["--method", "midas", "--block", 2], midas(6, 2)), ("b", [], lidas(6, 2)),
                                ("c", ["--loop", "1-1x3-4"], [0, 1, 1, 1, 2, 3, 4, 5]),
                                ("d", ["--path", "0-3,2-5"], [0, 1, 2, 3, 2, 3, 4, 5])):
        out = tmp_path / f"{name}.pt"
        printed = works("grow.py", trained / "ckpt.pt", *options, "--out", out).stdout
        assert f"6 -> {len(path)} layers, path {' '.join(map(str, path))}" in printed
        deep, deeper = load_checkpoint(str(out))
        assert torch.equal(deep(tokens)[0], small(tokens, path=path)[0])
        assert deeper["tokenizer"] == checkpoint["tokenizer"] and "optimizer" not in deeper and "flops" not in deeper


def test_bad_growth(trained, tmp_path):
    before = (trained / "ckpt.pt").read_bytes()
    for out, options, message in ((trained / "ckpt.pt", [], "exists"), (trained, [], "exists"),
                                  (tmp_path / "x.pt", ["--loop", "2-2x2-3"], "7 layers"),
                                  (tmp_path / "x.pt", ["--path", "0-6"], "layers 0 to 5"),
                                  (tmp_path / "x.pt", ["--path", "4-2"], "a path is"),
                                  (tmp_path / "x.pt", ["--block", 4], "blocks of 4"),
                                  (tmp_path / "x.pt", ["--method", "lidas", "--path", "0-3,2-5"], "--method"),
                                  (tmp_path / "x.pt", ["--loop", "2x3", "3x2"], "layers")):
        result = refused(message, "grow.py", trained / "ckpt.pt", *options, "--out", out)
        assert not result.stdout and not list(tmp_path.iterdir())        # before the losses, which take time
    assert (trained / "ckpt.pt").read_bytes() == before
