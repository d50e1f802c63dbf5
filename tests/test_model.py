"""The model along a path: what a position sees, what the loss counts, generation with a cache per visit."""
import pytest
import torch
import torch.nn.functional as F
from conftest import some_tokens, tiny_model

from grow import load_checkpoint, save_checkpoint
from loop import load_encoding
from model import GPT, GPTConfig

PATHS = {"plain": None, "looped": [0, 1, 2, 3, 2, 3, 4, 5], "skipped": [0, 1, 2, 3, 5],
         "swapped": [0, 1, 4, 5, 2, 3], "last layer again": [0, 1, 2, 3, 4, 5, 5, 5]}


@pytest.mark.parametrize("separator", [None, 27])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_generation_with_and_without_cache(path, separator):
    """One cache slot per layer, in place of one per visit, is wrong as soon as a layer is visited twice."""
    model, tokens = tiny_model(separator=separator), some_tokens(time=7)
    cached = model.generate(tokens, 40, path, temperature=0)        # 7 + 40 is past the context of 24
    uncached = model.generate(tokens, 40, path, temperature=0, use_cache=False)
    assert cached.shape == (3, 47) and torch.equal(cached, uncached)
    if path is not None:        # else the test would pass with the path ignored
        assert not torch.equal(cached, model.generate(tokens, 40, temperature=0))


@pytest.mark.parametrize("separator", [None, 5])
def test_cached_logits_equal_those_of_one_pass(separator):
    """Wrong rotary positions, or a wrong mask, behind a cache still give plausible text."""
    model, tokens, path = tiny_model(separator=separator), some_tokens(), PATHS["looped"]
    tokens[0, 4] = tokens[1, 12] = 5
    whole = model.hidden(tokens, path)
    cache = [[] for _ in path]
    pieces = [model.hidden(tokens[:, :end], path, cache) for end in (9, 10, 16, 20)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_generation_goes_on_past_a_prompt_longer_than_the_context():
    model, tokens = tiny_model(), some_tokens(time=50)
    assert model.generate(tokens, 3, temperature=0).shape == (3, 53)


def test_stop_token_and_top_k():
    model, tokens = tiny_model(), some_tokens(time=5)
    greedy = model.generate(tokens, 12, temperature=0)
    assert torch.equal(model.generate(tokens, 12, top_k=1), greedy)
    stop = greedy[0, 7].item()
    stopped = model.generate(tokens[:1], 12, temperature=0, stop=stop)
    assert stopped[0, -1] == stop and stop not in stopped[0, 5:-1]


@pytest.mark.parametrize("path", [None, PATHS["looped"]])
def test_no_position_sees_a_later_one(path):
    model, tokens = tiny_model(), some_tokens()
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    a, b = model.hidden(tokens, path), model.hidden(changed, path)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12], b[:, 12])


def test_documents_do_not_see_each_other():
    """Packed into one row, with a separator before each, they get the states that they have alone."""
    model, tokens = tiny_model(separator=5), some_tokens(time=20)
    tokens[tokens == 5] = 6
    tokens[:, 8] = 5
    torch.testing.assert_close(model.hidden(tokens)[:, 8:], model.hidden(tokens[:, 8:]), atol=1e-5, rtol=1e-5)
    model = tiny_model()
    assert not torch.allclose(model.hidden(tokens)[:, 8:], model.hidden(tokens[:, 8:]), atol=1e-3)


def test_a_row_does_not_depend_on_the_others():
    model, tokens = tiny_model(), some_tokens()
    torch.testing.assert_close(model.hidden(tokens)[:1], model.hidden(tokens[:1]), atol=1e-5, rtol=1e-5)


def test_loss_counts_the_targets_that_are_not_masked():
    model, tokens, targets = tiny_model(), some_tokens(), some_tokens(seed=2)
    targets[:, :15] = -1
    logits, loss = model(tokens, targets)
    assert logits.shape == (3, 20, 61)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 15:].flatten(0, 1), targets[:, 15:].flatten()))


def test_without_targets_only_the_last_position():
    model, tokens = tiny_model(), some_tokens()
    logits, loss = model(tokens)
    assert logits.shape == (3, 1, 61) and loss is None
    torch.testing.assert_close(logits, model(tokens, tokens)[0][:, -1:])


def test_configured_path_is_the_default():
    looped, plain, tokens = tiny_model(path=PATHS["looped"]), tiny_model(), some_tokens()
    looped.load_state_dict(plain.state_dict())
    assert torch.equal(looped(tokens)[0], plain(tokens, path=PATHS["looped"])[0])
    assert torch.equal(looped(tokens, path=range(6))[0], plain(tokens)[0])


def test_grouped_query_attention_is_attention_with_repeated_heads():
    """enable_gqa must pair query heads with key heads as Llama does: neighbours share."""
    grouped, full = tiny_model(n_layer=1), tiny_model(n_layer=1, n_kv_head=4)
    weights = grouped.state_dict()
    q, k, v = weights["layers.0.attn.qkv.weight"].split((32, 16, 16))
    k, v = (w.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for w in (k, v))
    weights["layers.0.attn.qkv.weight"] = torch.cat((q, k, v))
    full.load_state_dict(weights)
    torch.testing.assert_close(full(some_tokens())[0], grouped(some_tokens())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", [[], [0, 6], [-1]])
def test_impossible_paths(path):
    with pytest.raises(ValueError):
        tiny_model()(some_tokens(), path=path)
    with pytest.raises(ValueError):
        tiny_model(path=path)


@pytest.mark.parametrize("change", [dict(n_head=5), dict(n_kv_head=3), dict(n_layer=0), dict(n_embd=4),
                                    dict(context=-1), dict(rope_theta=0.0), dict(vocab_size=1.5),
                                    dict(init_depth=0)])
def test_impossible_configs(change):
    with pytest.raises(ValueError):
        tiny_model(**change)


def test_too_many_tokens():
    with pytest.raises(ValueError, match="context"):
        tiny_model()(some_tokens(time=25))


def test_nothing_in_a_layer_depends_on_the_depth():
    """Residual projections are scaled for the final depth, so a shallow model has the scale it grows into."""
    deep = GPT(GPTConfig(61, 12, 4, 4, 64, 64, 16))
    shallow = GPT(GPTConfig(61, 2, 4, 4, 64, 64, 16, init_depth=12))
    for name in ("attn.proj", "mlp.proj"):
        stds = [model.layers[1].get_submodule(name).weight.std().item() for model in (deep, shallow)]
        assert abs(stds[0] / stds[1] - 1) < 0.1
    assert {n for n, _ in deep.layers[0].named_buffers()} == set()


def test_word_encoding_takes_any_text():
    encoding = load_encoding(["Mia", " lives", " 14", "->", "___"])
    text = "Mia lives ->14 ___. Ünïcode ☃\n\n\tend"
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.decode([encoding.encode_ordinary("Mia lives")[0]]) == "Mia"


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    """Pickle runs code on loading: torch.load must be told not to."""
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"config": {}, "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"this is a text", b"PK\x03\x04 cut short",
                                     {"config": {}}, {"model": 1}, [1, 2]], ids=str)
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    """What unpickling raises depends on the bytes: IndexError for some texts."""
    file = tmp_path / "ckpt.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(file)


def test_a_failing_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    """A disk that fills up half way must cost the new checkpoint only, and leave no part of it behind."""
    import os
    file = str(tmp_path / "ckpt.pt")
    save_checkpoint(file, {"step": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        save_checkpoint(file, {"step": 2})
    assert torch.load(file, weights_only=True) == {"step": 1} and os.listdir(tmp_path) == ["ckpt.pt"]
