"""Random command lines: each runs, or says in one line why not; never a traceback, never half a folder."""
import os
import random

import pytest
from conftest import TINY_RUN, script

import evaluate
import grow
import loop
import signatures
import train

NUMBERS = ["-1", "0", "1", "2", "3", "7", "1e9", "nan", "inf", "", "two", "2.5"]
PLACES = ["2,2,1", "0,1,1", "5,2,1", "1,2", "a,b,c", "-1,2,1", ""]
# script: {option: values to draw from, None where it takes none}; every command starts with one that works
OPTIONS = {
    train: {
        **{name: NUMBERS for name in (
            "--layers", "--block", "--alpha", "--width", "--heads", "--kv-heads", "--context", "--batch",
            "--lr", "--warmup", "--cooldown", "--weight-decay", "--seed", "--math-share", "--evals")},
        "--steps": ["-1", "0", "3", "5", "x"], "--loop": ["2-2x2-2", "1x2", "2x", "0x1", ""],
        "--method": ["lidas", "baseline", "looped", "stack", "none"],
        "--data": ["none.txt", ".", "{checkpoint}"], "--math": ["none.txt"],
        "--init": ["none.pt", "{checkpoint}"],
        "--encoding": ["world", "none"],
        "--device": ["cpu", "gpu", "cuda:99", "meta"], "--compile": ["off", "maybe"], "--resume": [None]},
    grow: {
        "--method": ["midas", "lidas", "up"], "--block": NUMBERS,
        "--out": ["{folder}/deep.pt", "{checkpoint}/x.pt"]},
    loop: {
        "--start": NUMBERS, "--block": NUMBERS, "--repeats": NUMBERS, "--length": ["-1", "0", "3", "x"],
        "--hf": ["none", "{folder}"], "--tokens": ["none.bin", "{checkpoint}"],
        "--export": ["{folder}/llama"],
        "--temperature": ["0", "1", "-1", "nan"], "--prompt": ["", "k=1\n", "\N{SNOWMAN}"],
        "--unroll": ["{folder}/untied.pt", "{checkpoint}/x"], "--seed": ["0", "-1", "x"],
        "--device": ["cpu", "gpu"]},
    evaluate: {
        "-n": ["0", "1", "4", "x"], "--tasks": ["closed-book", "juggling"], "--loop": PLACES,
        "--shots": NUMBERS[:6],
        "--finetune": ["0", "2", "x"], "--draws": ["0", "1"], "--block": NUMBERS, "--repeats": NUMBERS[:5],
        "--questions": ["none.jsonl", "{checkpoint}"], "--table": ["none.jsonl", "{checkpoint}"],
        "--results": ["{folder}/new/rows.jsonl", "{checkpoint}/x"], "--only": ["tasks", "none"],
        "--sweep": [None], "--json": [None], "--columns": ["assign-0", "none"], "--seed": ["0", "-1", "x"]},
    signatures: {
        "--rows": ["0", "1", "x"], "--stream": ["general", "math", "prose"], "--block": NUMBERS,
        "--loop": PLACES, "--reduce": ["max", "mean", "sum"],
        "--results": ["{folder}/new/rows.jsonl"],
        "--out": ["{folder}/s.json", "{checkpoint}/s.json"]},
}


def command(module, rng, checkpoint, folder):
    start = {train: [*map(str, TINY_RUN), "--steps", "4", "--width", "16", "--evals", "1", "--compile", "off",
                     "--out", f"{folder}/run"],
             grow: [checkpoint, "--out", f"{folder}/deep.pt"], loop: [checkpoint, "--length", "3"],
             evaluate: [checkpoint, "-n", "4", "--tasks", "closed-book"],
             signatures: [checkpoint, "--rows", "2", "--out", f"{folder}/s.json"]}[module]
    if rng.random() < 0.1 and module is not train:
        start = [f"{folder}/none.pt"] + start[1:]
    for option in rng.sample(list(OPTIONS[module]), rng.randint(1, 3)):
        value = rng.choice(OPTIONS[module][option])
        start.append(option)
        if value is not None:
            start.append(value.replace("{folder}", folder).replace("{checkpoint}", checkpoint))
    return start


@pytest.mark.parametrize("seed", range(210))
def test_a_random_command_line(seed, trained, tmp_path, monkeypatch):
    rng = random.Random(seed)
    module = list(OPTIONS)[seed % len(OPTIONS)]
    arguments = command(module, rng, str(trained / "stable.pt"), str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = script(f"{module.__name__}.py", *arguments)
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode in (0, 2) and len(errors) == (result.returncode == 2), (arguments, errors)
    if result.returncode == 2:
        left = {name for name in os.listdir(tmp_path)} - {"data"}
        assert not left or left == {"run"} and os.path.exists(tmp_path / "run" / "ckpt.pt"), (arguments, left)
