"""Hugging Face's Llama directories, read and written: against transformers where it is installed."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import script, some_tokens, tiny_model

from grow import load_checkpoint
from loop import export, load_encoding, loop_path
from model import GPT, llama_names, read_json

CONFIG = dict(model_type="llama", vocab_size=61, num_hidden_layers=6, num_attention_heads=4,
              num_key_value_heads=2, hidden_size=32, intermediate_size=40, max_position_embeddings=24,
              rms_norm_eps=1e-5, rope_theta=500.0, tie_word_embeddings=True, hidden_act="silu",
              eos_token_id=0)


def directory(folder, model, sharded=False, **changes):
    """A directory made by hand, without transformers or safetensors."""
    os.makedirs(folder, exist_ok=True)
    state, weights = model.state_dict(), {}
    for ours, theirs in llama_names(model.config).items():
        sizes = {3: [32, 16, 16], 2: [40, 40], 1: [len(state[ours])]}[len(theirs)]
        weights.update(zip(theirs, (part.clone() for part in state[ours].split(sizes))))
    parts = [dict(list(weights.items())[i::2]) for i in range(2)] if sharded else [weights]
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, parts):
        torch.save(part, folder / name)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_reading_by_hand_made_directories(tmp_path, sharded, tied):
    """q, k, v or gate, up in the wrong order still load, and give a model that babbles."""
    model, tokens = tiny_model(rope_theta=500.0, tied=tied), some_tokens()
    read = GPT.from_huggingface(directory(tmp_path / "hf", model, sharded, tie_word_embeddings=tied)).eval()
    assert read.config == model.config and torch.equal(read(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("changes", [
    {"model_type": "mistral"}, {"attention_bias": True}, {"mlp_bias": True}, {"sliding_window": 8},
    {"hidden_act": "gelu"}, {"pretraining_tp": 2}, {"head_dim": 16}, {"quantization_config": {"bits": 4}},
    {"model_type": None}, {"rms_norm_eps": "1e-5"},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "llama3"}}], ids=str)
def test_what_our_layer_is_not_is_refused_by_name(tmp_path, changes):
    """A setting that is passed over gives a model that runs and is slightly wrong."""
    name = {"rope_scaling": "rope_type", "rope_parameters": "rope_type",
            "rms_norm_eps": "not supported between"}.get(*changes, *changes)
    with pytest.raises(ValueError, match=name):
        GPT.from_huggingface(directory(tmp_path / "hf", tiny_model(), **changes))


def test_broken_directories_end_in_one_line(tmp_path):
    folder = directory(tmp_path / "hf", tiny_model())
    for change, message in (({"num_hidden_layers": 7}, "no weights named"), ({"hidden_size": 64}, "size"),
                            ({"num_hidden_layers": 5}, "no place here")):
        (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
        with pytest.raises(ValueError, match=message):
            GPT.from_huggingface(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:2000])
    result = script("loop.py", "--hf", folder, "--sweep")
    assert result.returncode == 2 and "cannot be read" in result.stderr and result.stderr.count("\n") == 1
    torch.save({"model.embed_tokens.weight": 3}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no attribute"):
        GPT.from_huggingface(folder)
    os.remove(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds neither"):
        GPT.from_huggingface(folder)
    (folder / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="cannot be read|pip install"):
        GPT.from_huggingface(folder)


def test_without_safetensors_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (directory(tmp_path / "hf", tiny_model()) / "model.safetensors").write_bytes(b"")
    for refused in (lambda: GPT.from_huggingface(tmp_path / "hf"),
                    lambda: export(tiny_model(), str(tmp_path / "out"))):
        with pytest.raises(ValueError, match="pip install safetensors"):
            refused()
    assert not (tmp_path / "out").exists()


def test_commands_on_a_directory_without_a_tokenizer(tmp_path):
    folder = directory(tmp_path / "hf", tiny_model())
    np.arange(400, dtype=np.uint16).__mod__(61).tofile(tmp_path / "t.bin")
    held = ["--hf", folder, "--tokens", tmp_path / "t.bin"]
    for command in (["loop.py", *held, "--sweep"], ["grow.py", *held, "--out", tmp_path / "deep.pt"],
                    ["signatures.py", *held, "--out", tmp_path / "s.json"]):
        result = script(*command)
        assert result.returncode == 0 and "tokens" in result.stdout, result.stderr
    assert load_checkpoint(tmp_path / "deep.pt")[0].config.n_layer == 8
    for command in (["loop.py", *held, "--prompt", "a"], ["evaluate.py", *held],
                    ["loop.py", *held[:2], "--sweep"]):
        result = script(*command)
        assert result.returncode == 2 and "--tokens" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_what_is_exported(tmp_path, tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model, tokens, path = tiny_model(rope_theta=500.0, tied=tied), some_tokens(), loop_path(6, 2, 2, 1)
    export(model, str(tmp_path / "hf"), path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.num_hidden_layers == 8
    with torch.no_grad():
        expected = model(tokens, tokens, path)[0]
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        again = GPT.from_huggingface(tmp_path / "hf").eval()
        assert torch.equal(again(tokens)[0], model(tokens, path=path)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_reading_what_transformers_saves(tmp_path, tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(**{**CONFIG, "tie_word_embeddings": tied})
    theirs, tokens = transformers.LlamaForCausalLM(config).eval(), some_tokens()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ours = GPT.from_huggingface(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, tokens)[0], theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_exporting_by_command(trained, tmp_path):
    """--repeats without --start was passed over; DIR/ left a half-written directory inside itself."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    result = script("loop.py", trained / "ckpt.pt", "--export", f"{tmp_path / 'out'}/", "--repeats", 1)
    assert result.returncode == 0 and "8 layers, without its tokenizer" in result.stdout, result.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    model, checkpoint = load_checkpoint(trained / "ckpt.pt")
    document = torch.tensor([[model.config.separator, 7, 8, 9, 7, 8]])
    read = GPT.from_huggingface(tmp_path / "out")
    assert torch.equal(read(document)[0], model(document, path=loop_path(6, 2, 2, 1))[0])
    for more in ([], ["--repeats", 1, 2], ["--start", 2]):      # a directory that is there; two models; none
        name = tmp_path / ("new" if more else "out")
        result = script("loop.py", trained / "ckpt.pt", "--export", name, *more)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr


def tokenizer_by_hand(**changes):
    """What the tokenizers package writes for GPT-2's kind, with two merges and the token that ends texts."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    vocab = {chr(c): i for i, c in enumerate([*shown, *range(256, 256 + 256 - len(shown))])}
    vocab |= {"lo": 256, "loo": 257, "<end>": 258}
    model = {"type": "BPE", "vocab": vocab, "merges": ["l o", ["lo", "o"]]}
    made = {"normalizer": None, "added_tokens": [{"id": 258, "content": "<end>", "special": True}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "model": {**model, **changes.pop("model", {})}}
    return {**made, **changes}


def written(folder, tokenizer, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 300, "eos_token_id": 258,
                                                    **changes}))
    return folder


def encoding_of(folder):
    return load_encoding({name: read_json(folder, name) for name in ("config.json", "tokenizer.json")})


def test_a_directory_with_a_tokenizer_end_to_end(tmp_path):
    """A prompt is continued with any of the ids the model has, those without a token too; a looped and
    exported model keeps its tokenizer, and the token that its documents begin with."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    folder = directory(tmp_path / "hf", tiny_model(vocab_size=300))
    written(folder, tokenizer_by_hand(), bos_token_id=None)
    encoding = encoding_of(folder)
    assert encoding.encode_ordinary("loo") == [257] and encoding.eot_token == 258
    assert all(encoding.decode([i]) for i in range(300))
    out = tmp_path / "deep"
    for command in (["--prompt", "loop", "--repeats", 0, 1, "--length", 12, "--temperature", 1],
                    ["--export", out, "--repeats", 1]):
        result = script("loop.py", "--hf", folder, *command)
        assert result.returncode == 0, result.stderr
    again = encoding_of(out)
    assert again.encode_ordinary("a loop\n") == encoding.encode_ordinary("a loop\n")
    assert GPT.from_huggingface(out).config.n_layer == 8 and again.eot_token == 258


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Removed", "invert": False}


@pytest.mark.parametrize("changes, reason", [
    ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"), ({"pre_tokenizer": None}, "split"),
    ({"pre_tokenizer": LEVEL}, "ByteLevel"),
    ({"pre_tokenizer": {"pretokenizers": [SPLIT, LEVEL]}}, "Split"),
    ({"pre_tokenizer": {"pretokenizers": [{"type": "Digits", "individual_digits": False},
                                          {**LEVEL, "use_regex": True}]}}, "Digits"),
    ({"pre_tokenizer": {**LEVEL, "use_regex": True, "add_prefix_space": True}}, "space"),
    ({"normalizer": {"type": "NFC"}}, "normalizer"), ({"model": {"type": "Unigram"}}, "Unigram"),
    ({"model": {"byte_fallback": True}}, "byte_fallback"), ({"model": {"dropout": 0.1}}, "dropout"),
    ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ({"model": {"merges": ["lo o", "l o"]}}, "merging order"),
    ({"model": {"merges": ["l o"]}}, "no merge"), ({"model": {"vocab": {"l": 0}, "merges": []}}, "bytes"),
    ({"added_tokens": [{"id": 258, "content": "<end>", "special": False}]}, "not special"),
    ({"model": {"merges": ["lo"]}}, "tokenizer.json"), ({"added_tokens": 3}, "no tokenizer.json")], ids=str)
def test_tokenizers_that_tiktoken_cannot_express(tmp_path, changes, reason):
    """Each of these was, or would be, read into an encoding that splits text in another way, in silence."""
    with pytest.raises(ValueError, match=reason):
        encoding_of(written(tmp_path / "hf", tokenizer_by_hand(**changes)))


@pytest.mark.parametrize("changes", [{"eos_token_id": None}, {"eos_token_id": 300}, {"eos_token_id": [1]},
                                     {"vocab_size": 200, "eos_token_id": 1}], ids=str)
def test_tokens_that_the_model_has_not(tmp_path, changes):
    """An id beyond the embedding is an IndexError far from its cause."""
    with pytest.raises(ValueError, match="token"):
        encoding_of(written(tmp_path / "hf", tokenizer_by_hand(), **changes))


TEXT = "Grown 12 models'll  loop\n\n  345 times, caf\u00e9 \u2603\t7. It's  9 \n end  "
AWKWARD = [TEXT, "", "   ", "a  1", " 1", "x\n\n\ny  ", "models 2026", "don't I'LL we've 'tis",
           "\u00a0\u00a0x \u3000 1\u0085\u200b y\u1680", "\u00bd \u00b2 \u2167 \u0663\u0664 12",
           "a\r\n\r\n  b",
           "\U0001f469\u200d\U0001f467 e\u0301", "\t\t7\n 8", "__x__ ->  ...9!"]
GAPS = r"\p{N}{1,3}|\p{L}+"      # what it does not match is a piece too: Split's "isolated"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")


@pytest.mark.parametrize("kind", ["gpt2", "digits", "llama3", "gaps"])
def test_tokenizers(tmp_path, kind):
    """A pattern that is nearly right agrees on easy text only: spaces before digits, runs of spaces."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pre, split = tokenizers.pre_tokenizers, {"llama3": LLAMA3, "gaps": GAPS}.get(kind)
    level = pre.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [pre.Split(tokenizers.Regex(split), "isolated")] if split else (
        [pre.Digits(individual_digits=True)] if kind == "digits" else [])
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = pre.Sequence([*first, level]) if first else level
    theirs.train_from_iterator([*AWKWARD * 3, "looping and growing models " * 20, "1234  12  1 "],
                               tokenizers.trainers.BpeTrainer(
                                   vocab_size=400, special_tokens=["<end>"],
                                   initial_alphabet=pre.ByteLevel.alphabet()))
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 400}))
    ours = encoding_of(tmp_path)
    for text in AWKWARD:
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode_ordinary(text)) == text
    assert ours.eot_token == 0
