"""Runs the scripts from the root, on small models, with one thread so that sums come in one order."""
import contextlib
import importlib
import io
import os
import signal
import sys
import types
from unittest import mock

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(1)

from grow import run_script  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

SIZE = dict(vocab_size=61, n_layer=6, n_head=4, n_kv_head=2, n_embd=32, n_hidden=40, context=24)


def tiny_model(seed=0, **changes):
    """A model whose init is large enough that every layer and every visit changes what is generated."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZE, **changes}))
    for name, p in model.named_parameters():
        p.data.normal_(std=0.3) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    return model.eval()


def some_tokens(batch=3, time=20, seed=1, vocab_size=61):
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def script(name, *arguments):
    """What `python SCRIPT ...` does -> returncode, stdout, stderr; in this process, since importing torch
    takes longer than most commands do."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    handlers, code = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, 0
    with (mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            run_script(importlib.import_module(name.removesuffix(".py")).main)
        except SystemExit as stopped:
            code = stopped.code or 0
    for number, handler in handlers.items():        # train.py's would swallow the Ctrl-C that stops pytest
        signal.signal(number, handler)
    out, err = (stream.buffer.getvalue().decode() for stream in (out, err))
    return types.SimpleNamespace(returncode=code, stdout=out, stderr=err)


TINY_RUN = ["--layers", 6, "--block", 2, "--width", 32, "--heads", 1, "--context", 48, "--batch", 4,
            "--steps", 30, "--evals", 3, "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of one tiny run: grows 2 -> 4 -> 6, cools down with math; ckpt.pt, stable.pt, log.jsonl."""
    out = tmp_path_factory.mktemp("trained") / "lidas"
    result = script("train.py", *TINY_RUN, "--out", out)
    assert result.returncode == 0, result.stderr
    return out
