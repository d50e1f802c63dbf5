"""Paths that loop, and looping any checkpoint."""
import pytest
import tiktoken
import torch
from conftest import script, some_tokens, tiny_model

from grow import load_checkpoint
from loop import PIECES, continue_text, loop_path, parse_loop, unroll


def test_loop_paths_by_hand():
    assert loop_path(6, 2, 2, 0) == [0, 1, 2, 3, 4, 5]
    assert loop_path(6, 2, 2, 1) == [0, 1, 2, 3, 2, 3, 4, 5]
    assert loop_path(3, 0, 3, 1) == [0, 1, 2, 0, 1, 2]
    assert loop_path(3, 2, 1, 2) == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("bad", [(6, 5, 2, 1), (6, -1, 2, 1), (6, 0, 0, 1), (6, 0, 2, -1), (6, 0, 7, 0)])
def test_blocks_outside_the_model(bad):
    with pytest.raises(ValueError):
        loop_path(*bad)


def test_loops_as_the_papers_write_them():
    assert parse_loop("2-2x3-2") == (6, [0, 1, 2, 3, 2, 3, 2, 3, 4, 5])
    assert parse_loop("4x6") == (4, [0, 1, 2, 3] * 6)
    assert parse_loop("12x2")[0] == 12 and len(parse_loop("4-4x4-4")[1]) == 24


@pytest.mark.parametrize("text", ["", "x", "2x", "0x3", "2x0", "2-2x3-", "-2x3", "2-2-2", "2-2x3-2-1",
                                  "2.5x2", "2x-1"])
def test_other_text_is_no_loop(text):
    with pytest.raises(ValueError):
        parse_loop(text)


def test_unrolled_equals_looped():
    n_layer, path = parse_loop("2-2x3-2")
    looped, tokens = tiny_model(path=path), some_tokens()
    untied = unroll(looped)
    assert untied.config.n_layer == 10 and untied.config.path is None
    assert torch.equal(untied(tokens, tokens)[1], looped(tokens, tokens)[1])
    assert torch.equal(unroll(looped, [0, 5])(tokens)[0], looped(tokens, path=[0, 5])[0])


def test_a_looped_layer_gets_the_gradients_of_all_its_visits():
    """The tied gradient is the sum of the untied ones."""
    looped, tokens = tiny_model(path=[0, 1, 2, 1, 2, 3]), some_tokens()
    untied = unroll(looped)
    for model in (looped, untied):
        model(tokens, tokens)[1].backward()
    tied = looped.layers[1].mlp.proj.weight.grad
    visits = [untied.layers[v].mlp.proj.weight.grad for v in (1, 3)]
    torch.testing.assert_close(tied, visits[0] + visits[1], atol=1e-6, rtol=1e-4)


def test_looping_a_checkpoint_by_command(trained):
    result = script("loop.py", trained / "ckpt.pt", "--prompt", "k=4\n", "--start", 2, "--repeats", 0, 1,
                    "--length", 5)
    assert result.returncode == 0, result.stderr
    assert "repeats 0   depth 6   path 0 1 2 3 4 5" in result.stdout
    assert "repeats 1   depth 8   path 0 1 2 3 2 3 4 5" in result.stdout
    result = script("loop.py", trained / "ckpt.pt", "--sweep", "--repeats", 0, 1)
    lines = [line.split() for line in result.stdout.splitlines() if line[:7].strip().isdigit()]
    assert [line[0] for line in lines] == list("01234") * 2     # both streams
    assert len({line[1] for line in lines[:5]}) == 1            # repeats 0 is the same wherever the block is


def test_unrolling_by_command(trained, tmp_path):
    result = script("loop.py", trained / "ckpt.pt", "--unroll", tmp_path / "untied.pt")
    assert result.returncode == 0, result.stderr
    a, checkpoint = load_checkpoint(trained / "ckpt.pt")
    b, _ = load_checkpoint(tmp_path / "untied.pt")
    tokens = checkpoint["heldout"]["math"][:2, :-1].long()
    assert torch.equal(a(tokens)[0], b(tokens)[0])
    result = script("loop.py", trained / "ckpt.pt", "--unroll", tmp_path / "looped.pt", "--start", 2,
                    "--repeats", 1)
    assert result.returncode == 0, result.stderr
    looped, kept = load_checkpoint(tmp_path / "looped.pt")
    assert torch.equal(a(tokens, path=[0, 1, 2, 3, 2, 3, 4, 5])[0], looped(tokens)[0])
    assert kept["args"]["seed"] == checkpoint["args"]["seed"] and "flops" not in kept


def test_a_runs_folder_is_refused_with_the_name_of_its_checkpoint(trained):
    """A folder is read as Hugging Face's, so that the message was about a config.json."""
    result = script("loop.py", trained)
    assert result.returncode == 2 and "ckpt.pt" in result.stderr and result.stderr.count("\n") == 1


def test_an_id_that_is_no_token_ends_the_text():
    """Encodings such as cl100k_base have some, and decoding one is a KeyError."""
    encoding = tiktoken.Encoding("gap", pat_str=PIECES, mergeable_ranks={bytes([b]): b for b in range(256)},
                                 special_tokens={"<|endoftext|>": 256, "<|last|>": 299})
    model = tiny_model(vocab_size=300)
    texts = [continue_text(model, encoding, "a", 20, temperature=100.0) for _ in range(20)]
    assert min(map(len, texts)) < 10 < max(map(len, texts))


def test_a_path_that_looks_like_a_pattern_is_a_path(trained, tmp_path):
    """run[1] was taken for a pattern, which run1 fits."""
    for name in ("run[1]", "run1"):
        (tmp_path / name).mkdir()
    (tmp_path / "run[1]" / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    (tmp_path / "run1" / "ckpt.pt").write_bytes(b"another")
    result = script("loop.py", tmp_path / "run[1]" / "ckpt.pt", "--repeats", 0)
    assert result.returncode == 0, result.stderr
