"""Signatures against a slow, obvious recomputation: whole forward passes and hooks."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import optional, refused, some_tokens, tiny_model, works

import signatures as S

PATHS = {"plain": [0, 1, 2, 3, 4, 5], "looped": [0, 1, 2, 3, 2, 3, 4, 5]}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def recorded(model, tokens, path, skipped=None, left_out=None):
    """Runs the model itself, hooks on its sublayers -> list of (h, a, m) by visit, and the logits. The skipped
    visit's sublayers give zero at the positions left out (B, T)."""
    sublayers = []

    def hook(module, inputs, output):
        if len(sublayers) // 2 == skipped:
            output = output.masked_fill(left_out.unsqueeze(-1), 0)
        sublayers.append(output)
        return output
    handles = [sublayer.register_forward_hook(hook) for layer in model.layers for sublayer in (layer.attn, layer.mlp)]
    with torch.no_grad():
        logits = model(tokens, tokens, path)[0]
    for handle in handles:
        handle.remove()
    h, visits = model.embed(tokens).detach(), []
    for a, m in zip(sublayers[::2], sublayers[1::2]):
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
            cosines = [x[b, t] @ y[b, t] / x[b, t].norm() / y[b, t].norm() for b in range(3) for t in range(20)]
            torch.testing.assert_close(result[name][visit], sum(ratios) / 60, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(result[f"cos_{name}"][visit], sum(cosines) / 60, atol=1e-5, rtol=1e-4)


def positions(tokens, eot, future):
    """Where a visit is left out, and where its effect is read, spelled out one by one -> two (B, T)."""
    left_out, read = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for b, row in enumerate(tokens.tolist()):
        begins = [t for t, token in enumerate(row) if t == 0 or token == eot]
        for t in range(len(row)):
            if t in begins:
                continue                        # the first token of a document is kept, and not read
            document = max(begin for begin in begins if begin <= t)
            cut = max(begin for begin in begins if begin < (future or len(row)))       # the document that is cut at t
            left_out[b, t] = future is None or t < future and document == cut
            read[b, t] = future is None or t >= future and document == cut
    return left_out, read


@paths
@pytest.mark.parametrize("future, eot", [(None, None), (9, None), (None, 5), (9, 5)])
def test_skip_effects(path, future, eot):
    model, tokens = tiny_model(eot=eot), some_tokens()
    tokens[tokens == 5] = 6
    tokens[:, 7] = tokens[0, 13] = tokens[1, 9] = 5         # in row 1 no document of before position 9 goes on
    effects, on_output = S.skip_effects(model, tokens, path, future=future)
    plain, logits = recorded(model, tokens, path)
    left_out, read = positions(tokens, eot, future)
    rows = [b for b in range(3) if read[b].any() and left_out[b].any()]
    assert len(rows) == (2 if future and eot else 3)

    def over_positions(x):                                  # (B, T) -> a number
        return sum(max(x[b, t].item() for t in range(20) if read[b, t]) for b in rows) / len(rows)
    for s in range(len(path)):
        skipped, skipped_logits = recorded(model, tokens, path, s, left_out)
        for later in range(len(path)):
            D, D2 = (a + m for _, a, m in (plain[later], skipped[later]))
            expected = over_positions((D - D2).norm(dim=-1) / D.norm(dim=-1)) if later > s else 0
            assert effects[s, later].item() == pytest.approx(expected, abs=1e-4, rel=1e-3)
        expected = over_positions((logits.softmax(-1) - skipped_logits.softmax(-1)).norm(dim=-1))
        assert on_output[s].item() == pytest.approx(expected, abs=1e-5, rel=1e-3)


@paths
def test_local_effects(path):
    """A later visit gets its stream without one update; nothing else is propagated."""
    model, tokens = tiny_model(), some_tokens()
    effects, on_output = S.skip_effects(model, tokens, path, local=True)
    visits, logits = recorded(model, tokens, path)
    updates, left_out = [a + m for _, a, m in visits], positions(tokens, None, None)[0].unsqueeze(-1)
    rope_and_mask = model.rope_and_mask(tokens)
    with torch.no_grad():
        for s in range(len(path)):
            for later in range(s + 1, len(path)):
                given = visits[later][0] - updates[s] * left_out
                changed = model.layers[path[later]](given, rope_and_mask) - given
                expected = ((updates[later] - changed).norm(dim=-1) / updates[later].norm(dim=-1))[:, 1:].amax(1).mean()
                torch.testing.assert_close(effects[s, later], expected, atol=1e-4, rtol=1e-3)
            last = visits[-1][0] + updates[-1] - updates[s] * left_out
            change = (logits.softmax(-1) - model.head(model.norm(last)).softmax(-1)).norm(dim=-1)
            torch.testing.assert_close(on_output[s], change[:, 1:].amax(1).mean(), atol=1e-5, rtol=1e-3)


def test_a_visit_that_adds_nothing_gives_no_nan():
    model = tiny_model()
    for sublayer in (model.layers[3].attn, model.layers[3].mlp):
        sublayer.proj.weight.data.zero_()
    curves = S.all_signatures(model, some_tokens(time=21), 2)
    assert all(curve.isfinite().all() for curve in curves.values())
    effects, on_output = S.skip_effects(model, some_tokens(time=21)[:, :-1])
    assert on_output[3] == 0 and not effects[3].any()
    assert effects[0, 1:].mean() == curves["skip_later"][0] and len(curves["skip_later"]) == 5
    assert all(math.isfinite(value) for _, _, value in S.numbers(curves, 2))


def test_skip_effects_refuse():
    every_token_begins_a_document = torch.full((3, 20), 5)
    for tokens, future in ((some_tokens(), 1), (some_tokens(), 20), (every_token_begins_a_document, 9)):
        with pytest.raises(ValueError, match="longer documents"):
            S.skip_effects(tiny_model(eot=5), tokens, future=future)


def test_scores_by_hand():
    def numbers(*curve):
        names = ("skip_output", "skip_later", "local_later", "update", "attention", "mlp", "future_output", "future_later")
        found = S.numbers({**dict.fromkeys(names, torch.tensor(curve)), "weights": torch.eye(len(curve))}, 9)
        return {table[:8]: value for table, _, value in found}
    assert numbers(1.0, 1.0, 1.0)["1a: dept"] == 0.5 and numbers(0.0, 0.0, 2.0)["1a: dept"] == 1
    assert numbers(2.0, 1.0, 1.0)["1a: dept"] == pytest.approx((0 * 2 + 1 + 2) / 4 / 2)
    assert numbers(9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 6.0)["1a: late"] == 2.5


@paths
def test_early_exit_is_the_path_cut_short(path):
    """Leaving after v visits is running the first v visits of the path."""
    model, tokens = tiny_model(), some_tokens()
    kl, overlap = S.early_exit(model, tokens, path)
    with torch.no_grad():
        final = model(tokens, tokens, path)[0]
        for v in range(1, len(path) + 1):
            exit = model(tokens, tokens, path[:v])[0]
            # KL(exit || final): not the same the other way round
            expected = F.kl_div(final.log_softmax(-1), exit.log_softmax(-1), log_target=True, reduction="sum") / 60
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
    assert len(S.reordered(path, 1)["skip"]) == 6 and S.reordered(path, 1)["reverse"] == []
    assert S.reordered([0, 1, 1, 2, 3], 2)["reverse"] == [[1, 0, 1, 2, 3], [0, 1, 2, 1, 3]]    # not 3 alone


def test_weight_similarity_shows_what_was_copied():
    from grow import grow, midas
    grown = grow(tiny_model(), midas(6, 2))
    similarity = S.weight_similarity(grown)
    assert similarity.shape == (8, 8) and similarity[2, 4].item() == pytest.approx(1, abs=1e-5)
    assert similarity[3, 5].item() == pytest.approx(1, abs=1e-5) and similarity[2, 3].abs() < 0.2
    assert S.weight_similarity(tiny_model(), [0, 1, 0])[0, 2].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_the_share_of_a_period(period):
    """1 for a planted one, as noise says for noise; the first and the last block do not count."""
    curve = torch.cos(2 * math.pi * torch.arange(24.0) / period)
    share, chance = S.period_share(curve, period)
    assert share == pytest.approx(1) and chance == pytest.approx((period - 1) / (24 - 2 * period - 1))
    curve[:period], curve[-period:] = 99.0, -99.0
    assert S.period_share(curve, period)[0] == pytest.approx(1)
    noise = [S.period_share(torch.randn(24, generator=torch.Generator().manual_seed(i)), period)[0] for i in range(300)]
    assert sum(noise) / 300 == pytest.approx(chance, abs=0.03) and S.period_share(torch.ones(12), period)[0] == 0


def test_convergence_is_within_a_seed_or_with_all_other_seeds_of_the_method():
    """Of several seeds of one method only the last counted once."""
    assert S.convergence([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]) == pytest.approx(1)
    assert S.convergence([0.0, 1.0], [0.0, 5.0, 10.0]) == pytest.approx(1)      # the shorter one is stretched
    values = {(name, seed, column): torch.rand(8, generator=torch.Generator().manual_seed(seed + 9 * i)).tolist()
              for seed in range(3) for name in ("one", "two") for i, column in enumerate([name, *S.BY_VISIT]) if i}
    rows = [{"table": "by visit", "model": f"{name} 2x4 visit {visit}", "seed": seed, "column": column, "x": visit, "value": value}
            for (name, seed, column), curve in values.items() for visit, value in enumerate(curve)]

    def between(name, seed, other, other_seed):
        return sum(S.convergence(values[name, seed, c], values[other, other_seed, c]) for c in S.BY_VISIT) / len(S.BY_VISIT)
    found = {(r["model"], r["seed"], r["column"]): r["value"] for r in S.convergence_rows(rows)}
    assert len(found) == 12
    assert found["one 2x4", 1, "two 2x4"] == pytest.approx(between("one", 1, "two", 1))
    mean = (between("one", 1, "one", 0) + between("one", 1, "one", 2)) / 2
    assert found["one 2x4", 1, "one 2x4"] == pytest.approx(mean)


def test_the_command(trained, tmp_path):
    results = tmp_path / "rows.jsonl"
    both = ["signatures.py", trained / "ckpt.pt", trained / "stable.pt", "--rows", 6]
    printed = works(*both, "--results", results).stdout
    assert "late over middle" in printed and "convergence" in printed and "lidas visit 6" in printed
    assert works("evaluate.py", "--table", results).stdout == printed
    printed = works(*both[:2], "--rows", 6, "--loop", "2-2x2-2", "--path", "0-3,5").stdout
    assert "lidas 2-2x2-2 visit 7" in printed and "lidas 0-3,5 visit 4" in printed
    for bad in (["--loop", "2,2,1"], ["--rows", 0], ["--plot", results], ["--data", "none.txt"]):
        refused("", "signatures.py", trained / "ckpt.pt", *bad)
    optional("matplotlib")
    works(*both, "--plot", tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
