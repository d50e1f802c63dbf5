"""Runs the scripts from the root, on small models, with one thread so that sums come in one order."""
import contextlib
import gc
import importlib
import io
import os
import sys
import types
from unittest import mock

import pytest
import tiktoken
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ["HF_HUB_OFFLINE"] = "1"          # no test asks the network
torch.set_num_threads(1)

import evaluate  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig, complete, estimate_loss, run_script  # noqa: E402

gc.freeze()     # what is imported stays: collecting garbage need not look through it

# most of a tiny run would be its evaluations
evaluate.HOPS, train.QUESTIONS = evaluate.HOPS[:2], 2
train.estimate_loss = lambda model, rows, *more: estimate_loss(model, rows[:4], *more)
train.complete = lambda model, tokenizer, text, length, **more: complete(model, tokenizer, text, 4, **more)


def optional(package):
    """A package that a user may lack. In CI a skip would hide that nothing was tested: there it is an error."""
    return importlib.import_module(package) if os.environ.get("NO_SKIPS") else pytest.importorskip(package)


SIZE = dict(vocab_size=61, n_layer=6, n_head=4, n_kv_head=2, n_embd=32, d_ff=40, context=24)


def tiny_model(seed=0, **changes):
    """A model whose init is large enough that every layer and every visit changes what is generated."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZE, **changes}))
    for p in model.parameters():
        p.data.normal_(std=0.3) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    return model.eval()


def some_tokens(batch=3, time=20, seed=1, vocab_size=61):
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def script(name, *arguments):
    """What `python SCRIPT ...` does -> returncode, stdout, stderr, errors (lines); in this process, since
    importing torch takes longer than most commands do."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code = 0
    with (mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            run_script(importlib.import_module(name.removesuffix(".py")).main)
        except SystemExit as stopped:
            code = stopped.code or 0
    gc.collect()                # a run's lock ends with its process, here with what is left of it
    out, err = (stream.buffer.getvalue().decode() for stream in (out, err))
    return types.SimpleNamespace(returncode=code, stdout=out, stderr=err,
                                 errors=[line for line in err.splitlines() if "error:" in line])


def works(*command):
    result = script(*command)
    assert result.returncode == 0, result.stderr
    return result


def refused(message, *command):
    """A mistake of the user's ends in exit code 2 and one line that says what is wrong."""
    result = script(*command)
    assert result.returncode == 2 and len(result.errors) == 1 and message in result.errors[0], result.stderr
    assert "Traceback" not in result.stderr
    return result


def same(one, other):
    """Whether two checkpoints, or what is in them, are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


TINY_RUN = ["--layers", 6, "--block", 2, "--width", 32, "--heads", 1, "--context", 128, "--batch", 2,
            "--steps", 30, "--cooldown", 0.2, "--warmup", 5, "--evals", 3, "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of one tiny run: grows 2 -> 4 -> 6, cools down with math; ckpt.pt, stable.pt, log.jsonl."""
    out = tmp_path_factory.mktemp("trained") / "lidas"
    works("train.py", *TINY_RUN, "--out", out)
    return out


@pytest.fixture
def bytes_for_gpt2(monkeypatch):
    """GPT-2's encoding is downloaded: here, every byte is a token."""
    encoding = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks={bytes([b]): b for b in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", encoding)


def written(file, content):
    """A file with this text, or these bytes."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file
