"""The README's snippets do what it says, on a list of layers that is not ours."""
import copy
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, script, some_tokens

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    README = f.read()
TABLES = re.findall(r"```bash\npython (evaluate\.py --table assets/[^`]*)\n```\n\n```text\n(.*?)```",
                    README.replace("\\\n", ""), re.S)


class Other(nn.Module):
    """Someone else's model."""
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_snippets_grow_and_loop():
    idea, grow, loop = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(idea, names := {})
    assert names["path"] == [0, 1, 2, 3, 2, 3, 4, 5] and len(names["deeper"].layers) == 8
    torch.manual_seed(0)
    x, grown, looped, plain = torch.randn(3, 8), Other(), Other(), Other()
    grown.load_state_dict(plain.state_dict())
    looped.load_state_dict(plain.state_dict())
    exec(grow, {"model": grown})
    exec(loop.replace("start=2, block=2", "start=1, block=4"), {"model": looped})
    assert len(grown.layers) == len(looped.layers) == 10
    assert torch.equal(grown(x), looped(x)) and not torch.equal(grown(x), plain(x))
    assert sum(p.numel() for p in looped.parameters()) == sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in grown.parameters()) == sum(p.numel() for p in plain.parameters()) * 10 // 6


def test_snippets_on_a_model_of_transformers():
    """It runs the first config.num_hidden_layers alone: without a new number, the top ones were left out."""
    transformers = pytest.importorskip("transformers")
    _, grow, loop = re.findall(r"```python\n(.*?)```", README, re.S)
    config = transformers.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=40,
                                      num_hidden_layers=6, num_attention_heads=4)
    tokens, logits = some_tokens(), []
    for snippet in ("", grow, loop.replace("start=2, block=2", "start=1, block=4")):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(copy.deepcopy(config)).eval()
        exec(snippet, {"model": model.model})
        model.config.num_hidden_layers = len(model.model.layers)
        logits.append(model(tokens, use_cache=False).logits)
    plain, grown, looped = logits
    assert len(model.model.layers) == 10 and torch.equal(grown, looped) and not torch.equal(grown, plain)


@pytest.mark.parametrize("command, printed", TABLES, ids=[command for command, _ in TABLES])
def test_the_tables_are_what_their_commands_print(command, printed, monkeypatch):
    """Numbers that are typed drift from those that were measured."""
    monkeypatch.chdir(ROOT)
    assert script(*shlex.split(command)).stdout.strip() == printed.strip()


def test_there_are_tables():
    assert len(TABLES) >= 4


@pytest.mark.parametrize("name", ["grow.py", "loop.py", "train.py", "evaluate.py", "signatures.py"])
def test_a_script_is_a_program(name):
    """The other tests call its main in their own process."""
    command = [sys.executable, os.path.join(ROOT, name), "--bad"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and f"{name}: error:" in result.stderr and result.stderr.count("\n") == 1
