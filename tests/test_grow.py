"""Growing is looping, untied: bit for bit at the moment of growth, the optimizer's moments along the path."""
import copy

import pytest
import torch
from conftest import script, some_tokens, tiny_model

from grow import (METHODS, check_optimizer, grow, grow_optimizer, growth_steps, lidas, load_checkpoint, midas,
                  stack, training_flops)
from model import GPTConfig


def adamw(model):
    groups = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    return torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)


def train(model, optimizer, seed=0, path=None):
    tokens = some_tokens(seed=seed)
    model(tokens[:, :-1], tokens[:, 1:].contiguous(), path)[1].backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_grown_equals_looped_at_two_successive_growths(method, block):
    model, tokens = tiny_model(), some_tokens()
    for seed in (0, 1):
        path = METHODS[method](model.config.n_layer, block)
        looped = model(tokens, tokens, path=path)
        grown = grow(model, path)
        assert grown.config.n_layer == len(path) and grown.config.path is None
        for ours, theirs in zip(grown(tokens, tokens), looped):
            assert torch.equal(ours, theirs)
        assert torch.equal(grown.generate(tokens, 9, temperature=0),
                           model.generate(tokens, 9, path, temperature=0))
        train(grown, adamw(grown), seed)        # so that the second growth starts from layers that differ
        model = grown.eval()


def test_no_storage_is_shared():
    model = tiny_model()
    grown = grow(model, midas(6, 2))
    pointers = [p.data_ptr() for m in (model, grown) for p in m.parameters()]
    assert len(set(pointers)) == len(pointers)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    for p in grown.parameters():
        p.data.add_(1.0)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_moments_follow_the_path():
    model = tiny_model()
    optimizer = adamw(model)
    for seed in range(3):
        train(model, optimizer, seed)
    before, path = copy.deepcopy(list(optimizer.state.values())), lidas(6, 2)
    before = dict(zip(optimizer.state, before))
    grown = grow(model, path)
    new = grow_optimizer(optimizer, adamw(grown), model, grown, path)
    pairs = [(model.embed.weight, grown.embed.weight), (model.norm.weight, grown.norm.weight)]
    for visit, index in enumerate(path):
        pairs += zip(model.layers[index].parameters(), grown.layers[visit].parameters())
    for source, copied in pairs:
        assert before[source].keys() == new.state[copied].keys()
        assert all(torch.equal(x, new.state[copied][key]) for key, x in before[source].items())
    pointers = [x.data_ptr() for state in new.state.values() for x in state.values()]
    assert len(set(pointers)) == len(pointers) == 3 * len(pairs) and not optimizer.state
    before = grown.layers[3].mlp.proj.weight.clone()
    train(grown, new)
    assert not torch.equal(grown.layers[3].mlp.proj.weight, before)


def test_layers_that_the_optimizer_does_not_hold_are_noticed():
    """The classic bug: growing the model and going on with the old optimizer."""
    model = tiny_model()
    optimizer = adamw(model)
    check_optimizer(optimizer, model)
    grown = grow(model, stack(6, 2))
    with pytest.raises(ValueError):
        check_optimizer(optimizer, grown)
    with pytest.raises(ValueError):
        grow_optimizer(optimizer, optimizer, model, grown, stack(6, 2))


def test_growing_a_looped_model_unties_it():
    model, tokens = tiny_model(path=[0, 1, 2, 1, 2, 3, 4, 5]), some_tokens()
    grown = grow(model, model.config.path)
    assert grown.config.n_layer == 8 and torch.equal(grown(tokens)[0], model(tokens)[0])


# which layers (0-indexed) are copied behind themselves, worked by hand for n = 1 ... 6 blocks of 4
BY_HAND = {"stack": ["0-3", "4-7", "8-11", "12-15", "16-19", "20-23"],
           "midas": ["0-3", "0-3", "4-7", "4-7", "8-11", "8-11"],       # block ceil(n/2)
           "lidas": ["0-3", "2-5", "4-7", "6-9", "8-11", "10-13"]}      # L/2 - 2 ... L/2 + 1


@pytest.mark.parametrize("method", METHODS)
def test_operators_against_their_definitions(method):
    for n, copied in enumerate(BY_HAND[method], 1):
        first, last = map(int, copied.split("-"))
        expected = [*range(last + 1), *range(first, last + 1), *range(last + 1, 4 * n)]
        assert METHODS[method](4 * n, 4) == expected
    assert midas(8, 4) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert lidas(8, 4) == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]


def test_midas_and_lidas_agree_on_odd_numbers_of_blocks_only():
    for n in range(1, 7):
        assert (midas(4 * n, 4) == lidas(4 * n, 4)) == (n % 2 == 1)


@pytest.mark.parametrize("size", [(6, 4), (6, 0), (6, -2), (0, 2), (2, 4)])
def test_sizes_that_do_not_fit(size):
    for operator in METHODS.values():
        with pytest.raises(ValueError):
            operator(*size)


@pytest.mark.parametrize("total", [60, 97, 1600, 100003])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0, 3.0])
def test_prop_alpha(total, alpha):
    """Rounding each stage on its own loses or invents steps."""
    steps = growth_steps(total, 4, alpha)
    weight = [i ** alpha for i in range(1, 5)]
    assert sum(steps) == total and all(abs(s - total * w / sum(weight)) <= 1 for s, w in zip(steps, weight))


def test_too_few_steps_for_the_stages():
    with pytest.raises(ValueError):                 # and not that the numbers get too large
        growth_steps(32, 3, 2000.0)
    with pytest.raises(ValueError):
        growth_steps(5, 6, 1.0)


def test_layer_flops_of_growth_are_those_of_the_papers():
    """Six stages, alpha 1, 20% cooldown: 1/1.286 of the baseline's layer compute (the papers say 1/1.29)."""
    steps = growth_steps(80_000, 6, 1.0)
    grown = sum(n * 4 * (i + 1) for i, n in enumerate(steps)) + 20_000 * 24
    assert abs(100_000 * 24 / grown - 1.286) < 0.001


def test_flops_count_visits_and_agree_with_the_parameters():
    config = GPTConfig(vocab_size=1000, n_layer=6, n_head=4, n_kv_head=2, n_embd=64, n_hidden=128, context=32)
    per_visit = training_flops(config, 1, path=[0, 1]) - training_flops(config, 1, path=[0])
    assert training_flops(config, 1, [0, 1, 2, 3, 2, 3, 4, 5]) == training_flops(config, 1) + 2 * per_visit
    layer = tiny_model(vocab_size=1000, n_embd=64, n_hidden=128).layers[0]
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert per_visit == 6 * matrices + 3 * 4 * 64 * 32 // 2
    assert training_flops(config, 7) == 7 * training_flops(config, 1)


def test_growing_a_checkpoint_by_command(trained, tmp_path):
    out = tmp_path / "deeper.pt"
    result = script("grow.py", trained / "ckpt.pt", "--method", "midas", "--block", 2, "--out", out)
    assert result.returncode == 0 and "6 -> 8 layers, path 0 1 2 3 2 3 4 5" in result.stdout, result.stderr
    for line in result.stdout.splitlines()[1:3]:        # "... before, X after, X of the small model ..."
        assert line.split(", ")[1].split()[0] == line.split(", ")[2].split()[0]
    small, checkpoint = load_checkpoint(trained / "ckpt.pt")
    deep, deeper = load_checkpoint(out)
    tokens = checkpoint["heldout"]["general"][:2, :-1].long()
    assert torch.equal(deep(tokens)[0], small(tokens, path=midas(6, 2))[0])
    assert deeper["growth"] == checkpoint["growth"] + [{"step": 30, "path": midas(6, 2)}]
    result = script("grow.py", trained / "ckpt.pt", "--out", trained / "ckpt.pt")
    assert result.returncode == 2 and "exists" in result.stderr     # it would lose the run's optimizer


def test_an_optimizer_of_another_model_is_refused():
    """Growing in place left the old optimizer with layers that the model no longer had: moments were lost."""
    model = tiny_model()
    other, grown = torch.optim.AdamW(tiny_model().parameters()), grow(model, lidas(6, 2))
    with pytest.raises(ValueError, match="exactly"):
        grow_optimizer(other, torch.optim.AdamW(grown.parameters()), model, grown, lidas(6, 2))
