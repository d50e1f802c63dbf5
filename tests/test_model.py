"""The model along a path: what a position sees, what the loss counts, generation with a cache per visit."""
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import some_tokens, tiny_model

from evaluate import PIECES
from model import (GPT, GPTConfig, Tokenizer, apply_rope, complete, estimate_loss, get_tokenizer, load_checkpoint,
                   save_checkpoint)

PATHS = {"plain": None, "looped": [0, 1, 2, 3, 2, 3, 4, 5], "skipped": [0, 1, 2, 3, 5],
         "swapped": [0, 1, 4, 5, 2, 3], "last layer again": [0, 1, 2, 3, 4, 5, 5, 5]}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@pytest.mark.parametrize("eot, n_kv_head", [(None, 2), (27, 1)])
@paths
def test_generation_with_and_without_cache(path, eot, n_kv_head):
    """One cache per layer, in place of one per visit, is wrong as soon as a layer is visited twice."""
    model, tokens = tiny_model(eot=eot, n_kv_head=n_kv_head), some_tokens(time=7)
    cached = model.generate(tokens, 25, path, temperature=0)        # 7 + 25 is past the context of 24
    uncached = model.generate(tokens, 25, path, temperature=0, use_cache=False)
    assert cached.shape == (3, 32) and torch.equal(cached, uncached)
    if path is not None:        # else the test would pass with the path ignored
        assert not torch.equal(cached, model.generate(tokens, 25, temperature=0))


@pytest.mark.parametrize("eot", [None, 5])
@paths
def test_states_through_a_cache_equal_those_of_one_pass(path, eot):
    """Wrong rotary positions, or a wrong mask, after a cache still give plausible text."""
    model, tokens = tiny_model(eot=eot), some_tokens()
    tokens[0, 4] = tokens[1, 12] = 5
    cache, ends = model.new_cache(path, 3, 20), (0, 9, 10, 16, 20)
    pieces = [model.hidden(tokens[:, :end], path, cache, seen) for seen, end in zip(ends, ends[1:])]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(tokens, path), atol=1e-5, rtol=1e-5)


def test_prompts_longer_than_the_context_stop_token_and_top_k():
    model, tokens = tiny_model(), some_tokens(time=50)
    assert model.generate(tokens, 3, temperature=0).shape == (3, 53)
    tokens = tokens[:, :5]
    greedy = model.generate(tokens, 12, temperature=0)
    assert torch.equal(model.generate(tokens, 12, top_k=1), greedy)
    for stop in (greedy[0, 7].item(), greedy[:2, 8].tolist()):              # one token, or any of several
        stopped = model.generate(tokens, 12, temperature=0, stop=stop)      # the other rows go on
        ends = [stop] if isinstance(stop, int) else stop
        for row, whole in zip(stopped.tolist(), greedy.tolist()):
            end = next((i for i in range(5, 17) if whole[i] in ends), 16)
            assert row[:end + 1] == whole[:end + 1][:len(row)] and set(row[end:]) <= {whole[end]}


def test_documents_do_not_see_each_other():
    """Packed into one row, each after an end-of-text token, they get the states that they have alone."""
    model, tokens = tiny_model(eot=5), some_tokens()
    tokens[tokens == 5] = 6
    tokens[:, 8] = 5
    torch.testing.assert_close(model.hidden(tokens)[:, 8:], model.hidden(tokens[:, 8:]), atol=1e-5, rtol=1e-5)
    model = tiny_model()
    assert not torch.allclose(model.hidden(tokens)[:, 8:], model.hidden(tokens[:, 8:]), atol=1e-3)


def test_loss_counts_the_targets_that_are_not_masked():
    model, tokens, targets = tiny_model(), some_tokens(), some_tokens(seed=2)
    targets[:, :15] = -1
    logits, loss = model(tokens, targets)
    assert logits.shape == (3, 20, 61)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 15:].flatten(0, 1), targets[:, 15:].flatten()))
    last, none = model(tokens)
    assert none is None and last.shape == (3, 1, 61)
    torch.testing.assert_close(last, logits[:, -1:])
    rows = some_tokens(19, 21)          # two batches of unequal size count by their rows
    expected = model(rows[:, :-1], rows[:, 1:].contiguous())[1].item()
    assert estimate_loss(model, rows) == pytest.approx(expected, abs=1e-5)


def test_impossible_paths_and_configs():
    model, tokens = tiny_model(), some_tokens()
    for path in ([], [0, 6], [-1]):
        for call in (lambda: model(tokens, path=path), lambda: model.generate(tokens, 1, path),
                     lambda: tiny_model(path=path)):
            with pytest.raises(ValueError):
                call()
    for change in (dict(n_head=5), dict(n_kv_head=3), dict(n_layer=0), dict(n_embd=4)):
        with pytest.raises(ValueError):
            tiny_model(**change)


def test_too_many_tokens():
    with pytest.raises(ValueError, match="context"):
        tiny_model()(some_tokens(time=25))
    with pytest.raises(ValueError, match="25 tokens"):       # a prompt is never cut in silence
        complete(tiny_model(), Tokenizer(lambda text: [1] * 24, str, 0, 61, (0,)), "", 5)
    assert len(complete(tiny_model(), Tokenizer(lambda text: [1] * 20, list, 0, 61, ()), "", 9)) == 3     # of 24


def test_nothing_in_a_layer_depends_on_the_depth():
    """Residual projections are scaled for the final depth, so a shallow model has the scale it grows into."""
    deep = GPT(GPTConfig(61, 12, 4, 4, 64, 64, 16))
    shallow = GPT(GPTConfig(61, 2, 4, 4, 64, 64, 16, init_depth=12))
    for name in ("attn.proj", "mlp.proj"):
        stds = [model.layers[1].get_submodule(name).weight.std().item() for model in (deep, shallow)]
        assert abs(stds[0] / stds[1] - 1) < 0.1
    assert not list(deep.layers[0].named_buffers())


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_attention_of_layer_0_begins_at_the_token_before(n_kv_head):
    """Of equal tokens, where only the place tells them apart. Turned the other way, it would be the token after."""
    model, x = GPT(GPTConfig(61, 2, 4, n_kv_head, 64, 64, 16)), torch.randn(64).expand(16, 64)
    attn = model.layers[0].attn
    q, k = (part(x).view(16, -1, 16).transpose(0, 1) for part in (attn.q, attn.k))      # (heads, T, head_dim)
    q, k = (apply_rope(part, model.cos, model.sin) for part in (q[::4 // n_kv_head], k))    # a head of each group
    assert ((q @ k.mT).argmax(-1)[:, 1:] == torch.arange(15)).all()
    GPT(GPTConfig(61, 2, 4, n_kv_head, 64, 64, context=1))      # where there is no token before


def test_words_are_one_token_each_whatever_space_stands_around_them():
    tokenizer = get_tokenizer({"words": ["<|endoftext|>", "\n", "Mia", "k", "k=", "14", "."], "pattern": PIECES})
    assert tokenizer.encode("k= 14\nMia k.") == tokenizer.encode("k=14 \n Mia k .") == [4, 5, 1, 2, 3, 6]
    assert tokenizer.decode([4, 5, 1, 2, 3, 6]) == "k= 14\nMia k ." and (tokenizer.eot, tokenizer.n_vocab) == (0, 7)
    for text, word in (("Mia Ben", "'Ben'"), ("k=14 \u00e9_", "'\u00e9'")):
        with pytest.raises(ValueError, match=f"{word} is not a word"):
            tokenizer.encode(text)


def test_what_is_written_ends_at_any_of_the_ends_and_has_no_id_that_is_no_token():
    """A Llama wrote on after its eos, which does not begin a document; a vocabulary padded for a GPU has further ids."""
    tokenizer = Tokenizer(lambda text: [1], list, 0, 51, (0, 5, 7, 9))      # of 61
    texts = [complete(tiny_model(), tokenizer, "", 20, temperature=100.0) for _ in range(20)]
    assert min(map(len, texts)) < 19 and set(sum(texts, [])) <= set(range(51)) - {0, 5, 7, 9}


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    """Pickle runs code on loading: torch.load must be told not to."""
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"config": {}, "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="as a checkpoint"):
        load_checkpoint(str(tmp_path / "bomb.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"this is a text", b"PK\x03\x04 cut short", {"config": {}}, [1, 2]], ids=str)
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    """What unpickling raises depends on the bytes: IndexError for some texts."""
    file = tmp_path / "ckpt.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match="as a checkpoint"):
        load_checkpoint(str(file))


def test_a_failing_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    """A disk that fills up half way must cost the new checkpoint only."""
    file = str(tmp_path / "ckpt.pt")
    save_checkpoint(file, tiny_model(), step=1)

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        save_checkpoint(file, tiny_model(), step=2)
    monkeypatch.undo()
    assert torch.load(file, weights_only=True)["step"] == 1
    save_checkpoint(file, tiny_model(), step=3)         # over the part that is left
    assert torch.load(file, weights_only=True)["step"] == 3 and os.listdir(tmp_path) == ["ckpt.pt"]
