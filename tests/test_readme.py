"""What README, RESULTS.md and the docstrings tell people to type is what the scripts take, and the numbers are rows."""
import argparse
import importlib
import os
import re
import shlex
from unittest import mock

import pytest
import torch
from conftest import ROOT, works

SCRIPTS = ["loop.py", "grow.py", "evaluate.py", "train.py", "signatures.py"]


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read().replace("\\\n", " ")


README, RESULTS = read("README.md"), read("assets/RESULTS.md")
SAID = {name: importlib.import_module(name[:-3]).__doc__ for name in SCRIPTS} | {"README.md": README, "RESULTS.md": RESULTS}
# `python X.py ...` at the start of a line, in backticks, after && or a variable
COMMANDS = [(where, *found) for where, text in SAID.items() for found in dict.fromkeys(re.findall(
    rf"(?:python|torchrun --nproc_per_node=\d+) ({'|'.join(SCRIPTS)})((?:\"[^\"\n]*\"|[^\n`#)&;])*)", text))]
TABLES = re.findall(r"python (evaluate\.py --table assets/[^`\n]*)\n```\n+```text\n(.*?)```", RESULTS, re.S)


class Parsed(Exception):
    pass


@pytest.mark.parametrize("where, name, options", COMMANDS, ids=[f"{c[0]}: {c[1]}{c[2]}".strip() for c in COMMANDS])
def test_a_command_is_one_that_the_script_takes(where, name, options, capsys):
    parse = argparse.ArgumentParser.parse_args

    def stub(parser, *arguments, **named):      # the command ends where it has been understood
        parse(parser, *arguments, **named)
        raise Parsed
    words = shlex.split(re.sub(r"\s\d?>.*|\s\|.*", "", options))
    words = [word for word in words if not word.startswith(("$", "..."))]
    with (mock.patch("sys.argv", [name, *words]), mock.patch.object(argparse.ArgumentParser, "parse_args", stub)):
        try:
            with pytest.raises(Parsed):
                importlib.import_module(name[:-3]).main()
        except SystemExit:
            pytest.fail(capsys.readouterr().err.strip().splitlines()[-1])


def test_there_are_commands():
    assert {name for where, name, _ in COMMANDS if where in SCRIPTS} == set(SCRIPTS)


def test_the_snippets_run():
    """In order, in one namespace: a snippet that begins with nothing of its own gets a model of someone else."""
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        if "model" not in names and "model =" not in snippet:
            names["model"] = torch.nn.Module()
            names["model"].layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))
        exec(snippet, names)


@pytest.mark.parametrize("command, printed", TABLES, ids=[command for command, _ in TABLES])
def test_the_tables_are_what_their_commands_print(command, printed, monkeypatch):
    """Numbers that are typed drift from those that were measured."""
    monkeypatch.chdir(ROOT)
    assert works(*shlex.split(command)).stdout.strip() == printed.strip()
