"""Signatures against a slow, obvious recomputation: whole forward passes and hooks."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import script, some_tokens, tiny_model

import signatures as S

PATHS = {"plain": [0, 1, 2, 3, 4, 5], "looped": [0, 1, 2, 3, 2, 3, 4, 5]}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def recorded(model, tokens, path, skipped=None, cut=None):
    """Runs the model itself, hooks on its sublayers -> list of (h, a, m) by visit, and the logits. The
    skipped visit's sublayers give zero at positions from 1 to cut, but where a document begins."""
    seen, sublayers = [], []

    def hook(module, inputs, output):
        visit = len(sublayers) // 2
        if visit == skipped:
            output = output.clone()
            left_out = (tokens != 5) if model.config.separator else torch.ones_like(tokens, dtype=torch.bool)
            left_out[:, 0] = False
            left_out[:, cut or 20:] = False
            output[left_out] = 0
        sublayers.append(output)
        if len(sublayers) % 2 == 0:
            seen.append((*sublayers[-2:],))
        return output
    handles = [sublayer.register_forward_hook(hook)
               for layer in model.layers for sublayer in (layer.attn, layer.mlp)]
    with torch.no_grad():
        logits = model(tokens, tokens, path)[0]
    for handle in handles:
        handle.remove()
    h, visits = model.embed(tokens).detach(), []
    for a, m in seen:
        visits.append((h, a, m))
        h = h + a + m
    return visits, logits


@paths
def test_contributions(path):
    model, tokens = tiny_model(), some_tokens()
    result = S.contributions(model, tokens, path)
    for visit, (h, a, m) in enumerate(recorded(model, tokens, path)[0]):
        for name, x, y in (("attention", a, h), ("mlp", m, h + a), ("update", a + m, h)):
            ratios = [x[b, t].norm() / y[b, t].norm() for b in range(3) for t in range(20)]
            cosines = [x[b, t] @ y[b, t] / x[b, t].norm() / y[b, t].norm()
                       for b in range(3) for t in range(20)]
            torch.testing.assert_close(result[name][visit], sum(ratios) / 60, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(result[f"cos_{name}"][visit], sum(cosines) / 60, atol=1e-5, rtol=1e-4)


@paths
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("future, separator", [(None, None), (9, None), (None, 5), (9, 5)])
def test_skip_effects(path, reduce, future, separator):
    model, tokens = tiny_model(separator=separator), some_tokens()
    tokens[:, 7] = tokens[0, 13] = 5
    effects, on_output = S.skip_effects(model, tokens, path, future, reduce)
    plain, logits = recorded(model, tokens, path)
    over = {"max": max, "mean": lambda values: sum(values) / len(values)}[reduce]
    positions = range(future or 1, 20)
    for s in range(len(path)):
        skipped, skipped_logits = recorded(model, tokens, path, s, future)
        for later in range(len(path)):
            D, D2 = (a + m for _, a, m in (plain[later], skipped[later]))
            expected = torch.stack([over([(D[b, t] - D2[b, t]).norm() / D[b, t].norm() for t in positions])
                                    for b in range(3)]).mean()
            if later <= s:
                assert effects[s, later] == 0
            else:
                torch.testing.assert_close(effects[s, later], expected, atol=1e-4, rtol=1e-3)
        change = (logits.softmax(-1) - skipped_logits.softmax(-1)).norm(dim=-1)
        expected = torch.stack([over([change[b, t] for t in positions]) for b in range(3)]).mean()
        torch.testing.assert_close(on_output[s], expected, atol=1e-5, rtol=1e-3)


@paths
def test_skip_effects_run_half_of_the_layer_passes(path):
    """depth * (depth + 1) / 2 calls, as the docstring says; rerunning the prefix would take depth * depth."""
    model, calls = tiny_model(), []
    handles = [layer.attn.register_forward_hook(lambda *_: calls.append(1)) for layer in model.layers]
    S.skip_effects(model, some_tokens(), path)
    assert len(calls) == len(path) * (len(path) + 1) // 2
    for handle in handles:
        handle.remove()


def test_future_effect_comes_through_attention_only():
    """A visit behind which nothing attends any more cannot reach the future."""
    model = tiny_model()
    effects, on_output = S.skip_effects(model, some_tokens(), future=9)
    assert on_output[-1] < 1e-6 and (on_output[:-1] > 1e-4).all()


@pytest.mark.parametrize("options", [dict(reduce="sum"), dict(future=1), dict(future=20)])
def test_skip_effects_refuse(options):
    with pytest.raises(ValueError):
        S.skip_effects(tiny_model(), some_tokens(), **options)


def test_scores_by_hand():
    assert S.depth_score(torch.tensor([1.0, 1.0, 1.0])) == 0.5
    assert S.depth_score(torch.tensor([0.0, 0.0, 2.0])) == 1
    assert S.depth_score(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx((0 * 2 + 1 + 2) / 4 / 2)
    assert S.late_half_share(torch.tensor([1.0, 1.0, 3.0, 3.0])) == 0.75
    assert S.late_half_share(torch.tensor([1.0, 1.0, 1.0])) == 0.5
    assert S.late_over_middle(torch.tensor([9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 6.0])) == 2.5
    effects = torch.tensor([[0.0, 2.0, 4.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]])
    assert S.later_mean(effects).tolist() == [3.0, 5.0]


@paths
def test_early_exit_is_the_path_cut_short(path):
    """Leaving after v visits is running the first v visits of the path."""
    model, tokens = tiny_model(), some_tokens()
    kl, overlap = S.early_exit(model, tokens, path)
    with torch.no_grad():
        final = model(tokens, tokens, path)[0]
        for v in range(1, len(path) + 1):
            exit = model(tokens, tokens, path[:v])[0]
            expected = F.kl_div(exit.log_softmax(-1), final.log_softmax(-1), log_target=True,
                                reduction="sum") / 60
            torch.testing.assert_close(kl[v], expected, atol=1e-5, rtol=1e-3)
            shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in
                         zip(exit.topk(5).indices.flatten(0, 1), final.topk(5).indices.flatten(0, 1)))
            assert overlap[v].item() == pytest.approx(shared / 300)
    assert kl[-1].abs() < 1e-5 and overlap[-1] == 1


def test_reordered_paths_by_hand():
    path = [0, 1, 2, 3, 2, 3]
    assert S.reordered(path, 2) == {
        "skip": [[2, 3, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]],
        "swap": [[2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 2, 3]],
        "reverse": [[1, 0, 2, 3, 2, 3], [0, 1, 3, 2, 2, 3], [0, 1, 2, 3, 3, 2]]}
    assert len(S.reordered(path, 1)["skip"]) == 6 and "reverse" not in S.reordered(path, 1)
    assert S.reordered([0, 1, 1, 2, 3], 2)["reverse"] == [[1, 0, 1, 2, 3], [0, 1, 2, 1, 3]]    # not 3 alone


def test_reorder_effects_are_changes_of_the_loss():
    model, rows = tiny_model(), some_tokens(time=21)
    changes = S.reorder_effects(model, rows, 2)
    plain = model(rows[:, :-1], rows[:, 1:].contiguous())[1]
    swapped = model(rows[:, :-1], rows[:, 1:].contiguous(), [2, 3, 0, 1, 4, 5])[1]
    assert changes["swap"][0].item() == pytest.approx((swapped - plain).item(), abs=1e-5)


def test_weight_similarity_shows_what_was_copied():
    from grow import grow, midas
    grown = grow(tiny_model(), midas(6, 2))
    similarity = S.weight_similarity(grown)
    assert similarity.shape == (8, 8) and similarity[2, 4].item() == pytest.approx(1, abs=1e-5)
    assert similarity[3, 5].item() == pytest.approx(1, abs=1e-5) and similarity[2, 3].abs() < 0.2
    assert S.weight_similarity(tiny_model(), [0, 1, 0])[0, 2].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_periodicity_finds_a_planted_period(period):
    """Also on a slope, which must not look like a long correlation."""
    t = torch.arange(24.0)
    curve = 0.5 * t + torch.cos(2 * math.pi * t / period)
    lags = S.periodicity(curve)
    assert len(lags) == 12 and lags[period - 1] > 0.9 and lags[:period + 1].argmax() == period - 1
    assert S.detrended(0.5 * t).abs().max() < 1e-4


def test_convergence():
    curve = torch.tensor([1.0, 3.0, 2.0, 5.0])
    assert S.convergence(curve, curve) == pytest.approx(1)
    assert S.convergence(curve, 2 * curve + 7) == pytest.approx(1)
    assert S.convergence(curve, -curve) == pytest.approx(-1)
    stretched = F.interpolate(curve[None, None], size=7, mode="linear", align_corners=True)[0, 0]
    assert S.convergence(curve, stretched) == pytest.approx(1)


def test_convergence_is_within_a_seed_or_with_all_other_seeds_of_the_method():
    """Of several seeds of one method only the last counted once."""
    generator = torch.Generator().manual_seed(0)
    models = [{"name": name, "seed": seed, "file": "", "path": range(8),
               "curves": {curve: torch.rand(8, generator=generator) for curve in
                          (*S.COMPARED, "update", "future_later", "future_output")}}
              for seed in range(3) for name in ("one", "two")]

    def between(a, b):
        return sum(S.convergence(a["curves"][c], b["curves"][c]) for c in S.COMPARED) / len(S.COMPARED)
    rows = {(r["model"], r["seed"], r["column"]): r["value"] for r in S.numbers(models, 2)
            if r["table"].startswith("convergence")}
    assert len(rows) == 12
    assert rows["one", 1, "two"] == pytest.approx(between(models[2], models[3]))
    mean = (between(models[2], models[0]) + between(models[2], models[4])) / 2
    assert rows["one", 1, "one"] == pytest.approx(mean)


def test_the_command(trained, tmp_path):
    out = tmp_path / "s.json"
    result = script("signatures.py", trained / "ckpt.pt", trained / "stable.pt", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "that of the block" in result.stdout and "convergence" in result.stdout and "####" in result.stdout
    models = json.loads(out.read_text())
    assert [len(m["curves"]["skip_output"]) for m in models] == [6, 6]
    assert models[0]["path"] == [0, 1, 2, 3, 4, 5]
    looped = script("signatures.py", trained / "ckpt.pt", "--loop", "2,2,1", "--out", out, "--quiet")
    assert looped.returncode == 0 and json.loads(out.read_text())[0]["path"] == [0, 1, 2, 3, 2, 3, 4, 5]
    bad = script("signatures.py", trained / "ckpt.pt", "--loop", "2,2", "--out", out)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1


def test_a_straight_line_has_no_period():
    """What is left of it is rounding, which correlated with itself up to 0.93."""
    for curve in (torch.ones(8), torch.arange(8.0) / 3):
        assert S.periodicity(curve).abs().max() < 0.1
