"""Hugging Face's Llama directories, read and written: against transformers where it is installed."""
import json
import os

import numpy as np
import pytest
import torch
from conftest import script, some_tokens, tiny_model

from loop import export, loop_path
from model import GPT, load_checkpoint, llama_names, load_encoding, read_llama_encoding

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
    names = [f"part-{i}.bin" for i in range(2)] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, parts):
        torch.save(part, folder / name)
    if sharded:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
            {"weight_map": {key: name for name, part in zip(names, parts) for key in part}}))
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
    {"hidden_act": "gelu"}, {"pretraining_tp": 2}, {"head_dim": 16},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "llama3"}}], ids=str)
def test_what_our_layer_is_not_is_refused_by_name(tmp_path, changes):
    """A setting that is passed over gives a model that runs and is slightly wrong."""
    name = {"rope_scaling": "rope_type", "rope_parameters": "rope_type"}.get(*changes, *changes)
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
    os.remove(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds neither"):
        GPT.from_huggingface(folder)


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


TEXT = "Grown 12 models'll  loop\n\n  345 times, caf\u00e9 \u2603\t7. It's  9 \n end  "


@pytest.mark.parametrize("kind", ["gpt2", "digits", "llama3"])
def test_tokenizers(tmp_path, kind):
    """A pattern that is nearly right agrees on easy text only: spaces before digits, runs of spaces."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pre, split = tokenizers.pre_tokenizers, tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]+")
    level = pre.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    first = {"gpt2": [], "digits": [pre.Digits(individual_digits=True)],
             "llama3": [pre.Split(split, "isolated")]}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = pre.Sequence([*first[kind], level]) if first[kind] else level
    theirs.train_from_iterator([TEXT, "looping and growing models " * 20, "1234  12  1 "],
                               tokenizers.trainers.BpeTrainer(
                                   vocab_size=330, special_tokens=["<end>"],
                                   initial_alphabet=pre.ByteLevel.alphabet()))
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    ours = load_encoding(read_llama_encoding(tmp_path))
    for text in (TEXT, "a  1", " 1", "x\n\n\ny  ", "models 2026"):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode_ordinary(text)) == text
    assert ours.eot_token == 0
    broken = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**broken, "pre_tokenizer": {"type": "Metaspace"}}))
    with pytest.raises(ValueError, match="Metaspace"):
        read_llama_encoding(tmp_path)
