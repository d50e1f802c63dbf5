"""Llama directories, in and out, against transformers itself."""
import json
import os
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import optional, refused, same, some_tokens, tiny_model, works, written

from evaluate import encode_files
from loop import loop_path
from model import GPT, get_tokenizer, load_checkpoint

transformers = optional("transformers")
tokenizers = optional("tokenizers")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
SIZE = dict(vocab_size=300, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
            intermediate_size=40, max_position_embeddings=24, rope_parameters=PLAIN, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2, pad_token_id=None)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def llama(**changes):
    """A LlamaForCausalLM whose layers all count."""
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZE, **changes})).eval()
    for p in hf.parameters():
        p.data.normal_(std=0.3) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    return hf


def tokenizer_like(kind):
    """Byte-level BPE: SmolLM's special tokens, or Llama 3's, which puts one before every text."""
    special = {"smol": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "llama3": ["<|begin|>", "<|end|>", "<|im_start|>"]}[kind]
    pre = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["looping and growing models " * 20], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    if kind == "llama3":
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=special[0], eos_token=special[-1])
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture
def directory(tmp_path):
    """A model with tokenizer, chat template and generation config, as SmolLM has them."""
    hf = llama()
    hf.generation_config = transformers.GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=2)
    hf.save_pretrained(tmp_path / "hf")
    tokenizer_like("smol").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("rope", [PLAIN, LLAMA3, LINEAR], ids=["plain", "llama3", "linear"])
@pytest.mark.parametrize("tied, kv_heads", [(True, 2), (False, 4), (False, 1)])
def test_logits_are_transformers_own(tmp_path, rope, tied, kv_heads):
    """q, k, v or gate, up in the wrong order, or other rope frequencies, still give a model that babbles."""
    theirs = llama(rope_parameters=rope, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    ours, tokens = GPT.from_pretrained(tmp_path / "hf").eval(), some_tokens(vocab_size=300)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, tokens)[0], theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    path = loop_path(6, 2, 2, 1)
    ours.save_pretrained(tmp_path / "deep", path)           # and back: the loop untied, a model like any other
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deep").eval()
    assert theirs.config.num_hidden_layers == 8 and theirs.config.rope_parameters == {**theirs.config.rope_parameters, **rope}
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens, tokens, path)[0], atol=1e-4, rtol=1e-4)
    again = GPT.from_pretrained(tmp_path / "deep").eval()
    assert torch.equal(again(tokens)[0], ours(tokens, path=path)[0])
    assert theirs.config.bos_token_id == 1 and theirs.config.eos_token_id == 2
    prompt = tokens[:1, :6]
    assert torch.equal(ours.generate(prompt, 12, path, temperature=0), theirs.generate(
        prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None))


@pytest.mark.parametrize("tied", [True, False])
def test_our_own_models_are_exported_in_float32_and_bfloat16(tmp_path, tied):
    model, tokens = tiny_model(tied=tied, eot=5), some_tokens()
    tokens[tokens == 5] = 6
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        model.save_pretrained(out, dtype=dtype)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        assert theirs.dtype == dtype and theirs.config.eos_token_id == 5
        again = GPT.from_pretrained(out)
        rounded = {name: w.to(dtype).float() for name, w in model.state_dict().items()}
        assert same(again.state_dict(), rounded)
    with pytest.raises(ValueError, match="exists"):
        model.save_pretrained(out)
    assert len(list(tmp_path.iterdir())) == 2
    with torch.no_grad():
        torch.testing.assert_close(again(tokens, tokens)[0], theirs.float()(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [
    {"model_type": "mistral"}, {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"head_dim": 16},
    {"pretraining_tp": 2}, {"sliding_window": 8}, {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}}], ids=str)
def test_what_our_layer_is_not_is_refused_by_name(tmp_path, changes):
    """A setting that is passed over gives a model that runs and is slightly wrong."""
    llama(**{key: value for key, value in changes.items() if key == "head_dim"}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    name = "rope_type" if "rope_parameters" in changes else next(iter(changes))
    refused(name, "loop.py", tmp_path)


def test_broken_directories_end_in_one_line(tmp_path):
    refused("none", "loop.py", tmp_path / "none")
    llama().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for changes, message in (({"num_hidden_layers": 7}, "layers.6"), ({"num_hidden_layers": 5}, "layers.5")):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **changes}))
        refused(message, "loop.py", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    refused("tokenizer", "loop.py", tmp_path / "hf")        # it has none, and is asked to write
    broken = written(tmp_path / "hf" / "tokenizer.json", "{bad")        # was exported without its tokenizer
    refused("", "grow.py", tmp_path / "hf", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    broken.unlink()
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    refused("", "loop.py", tmp_path / "hf")


def test_without_transformers_a_line_says_what_to_install(tmp_path, monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("pip install transformers", "loop.py", "SomeName/SomeModel")
    refused("pip install transformers", "grow.py", trained / "ckpt.pt", "--out", tmp_path / "llama")
    assert not list(tmp_path.iterdir())


def test_special_tokens_mean_those_tokens(tmp_path):
    for kind, eot in (("smol", 0), ("llama3", 0)):
        theirs = tokenizer_like(kind)
        theirs.save_pretrained(tmp_path / kind)
        written(tmp_path / kind / "generation_config.json", '{"eos_token_id": [7, 8]}')
        ours = get_tokenizer({"files": {file.name: file.read_bytes() for file in (tmp_path / kind).iterdir()}})
        for text in ("<|im_start|>user\nGrown 345 models'll  loop\n\n caf\u00e9 \u2603<|im_end|>", "", " a  1"):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.encode("half \ud83d") == ours.encode("half ?")
        assert ours.encode("<|im_start|>a")[0] == theirs.convert_tokens_to_ids("<|im_start|>")
        assert ours.decode(ours.encode("looping \u2603 models")) == "looping \u2603 models"
        # what begins a document is not what ends a turn
        text = written(tmp_path / "a.txt", "looping")
        tokens = [eot, *ours.encode("looping"), theirs.eos_token_id]        # as transformers' generate ends a text
        assert np.concatenate(list(encode_files([str(text)], ours))).tolist() == tokens
        assert ours.eot == eot and ours.n_vocab == len(theirs)
        assert ours.stop == (eot, theirs.eos_token_id, 7, 8)        # a chat's further ends end no document


def test_everything_survives_a_checkpoint(directory, tmp_path):
    """Hugging Face -> .pt -> Hugging Face, by commands: tokenizer, chat template, generation config."""
    works("grow.py", directory, "--path", "0-3,2-5", "--out", tmp_path / "deep.pt")
    works("grow.py", tmp_path / "deep.pt", "--path", "0-7", "--out", tmp_path / "deep", "--dtype", "bfloat16")
    works("grow.py", directory, "--path", "0-3,2-5", "--out", tmp_path / "direct")
    ours, tokens, text = GPT.from_pretrained(directory), some_tokens(vocab_size=300), "a loop\n<|im_end|> 12"
    for out in (tmp_path / "deep", tmp_path / "direct"):
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        before = transformers.AutoTokenizer.from_pretrained(directory)
        assert theirs.encode(text) == before.encode(text) and theirs.chat_template == before.chat_template == TEMPLATE
        config = transformers.GenerationConfig.from_pretrained(out)
        assert (config.temperature, config.top_p, config.eos_token_id) == (0.6, 0.9, 2)
    assert torch.equal(GPT.from_pretrained(tmp_path / "direct")(tokens)[0], ours(tokens, path=loop_path(6, 2, 2, 1))[0])
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deep", dtype="auto").dtype == torch.bfloat16
    refused("exists", "grow.py", directory, "--out", tmp_path / "deep")
    # a directory by itself is an export, and nothing grows
    works("grow.py", tmp_path / "deep.pt", "--out", tmp_path / "same")
    assert GPT.from_pretrained(tmp_path / "same").config.n_layer == 8
    assert sorted(os.listdir(tmp_path)) == ["deep", "deep.pt", "direct", "hf", "same"]


def test_an_export_that_fails_leaves_nothing_of_its_name(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_bytes", mock.Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError):
        GPT.from_pretrained(directory).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands_on_a_directory(directory, tmp_path):
    """Look, scan, ask, measure, train on."""
    text = written(tmp_path / "a.txt", "looping and growing models 12 times. " * 99)
    questions = written(tmp_path / "q.jsonl", '{"question": "1?", "answer": 2}\n' * 8)
    assert "<|im_start|>a|" in works("loop.py", directory, "--prompt", "<|im_start|>a", "--loop", "2-2x2-2").stdout
    assert "±" in works("loop.py", directory, "--scan", "--data", text, "-n", 8).stdout
    works("signatures.py", directory, "--data", text, "--rows", 4)
    works("evaluate.py", directory, "--tasks", "--data", text)
    assert "q.jsonl" in works("evaluate.py", directory, "--questions", questions, "--length", 3).stdout
    # what train.py sets, every command measures with; puzzles of the built-in world are not what it is trained on
    assert load_checkpoint(str(directory))[0].config.eot == 0
    refused("--data", "train.py", "--init", directory, "--device", "cpu", "--out", tmp_path / "run")
    command = ["train.py", "--init", directory, "--data", text, "--device", "cpu", "--batch", 2]
    printed = works(*command, "--loop", "2-2x2-2", "--steps", 6, "--evals", 2, "--out", tmp_path / "run").stdout
    assert "fresh" in printed and "depth 8" in printed
    model, checkpoint = load_checkpoint(str(tmp_path / "run" / "ckpt.pt"))
    assert model.config.path == loop_path(6, 2, 2, 1) and model.config.context == 24
    assert not same(checkpoint["model"], GPT.from_pretrained(directory).state_dict())
    works("grow.py", tmp_path / "run" / "ckpt.pt", "--out", tmp_path / "untied")         # along its own path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "untied").eval()
    tokens = some_tokens(vocab_size=300)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens, tokens)[0], atol=1e-4, rtol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "untied").chat_template == TEMPLATE


def test_tokens_that_the_model_does_not_have(directory, tmp_path):
    """A tokenizer with more tokens than the embedding is an IndexError far from its cause."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(50)])
    tokenizer.save_pretrained(directory)
    text = written(tmp_path / "a.txt", "looping <extra49> models 12 times. " * 99)
    for command in (["loop.py", directory, "--prompt", "<extra49>"], ["loop.py", directory, "--scan", "--data", text],
                    ["train.py", "--init", directory, "--data", text, "--device", "cpu", "--out", tmp_path / "run"]):
        refused("token", *command)
