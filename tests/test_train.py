"""The main job: pure functions of the step, resuming to the bit, training on, files, bad input, several processes."""
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from functools import partialmethod

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, optional, refused, same, script, some_tokens, tiny_model, works, written

import evaluate
import train
from grow import grow, lidas
from model import get_tokenizer, load_checkpoint


def run_of(folder, name="ckpt.pt"):
    """What a run's end is, but for its settings."""
    checkpoint = load_checkpoint(os.path.join(folder, name))[1]
    return {key: value for key, value in checkpoint.items() if key not in ("args", "tokenizer")}


def stop_at(monkeypatch, step, how=lambda: sys.exit(9)):
    """Something happens to the run before it reads the batch of this step."""
    make = train.make_batch
    monkeypatch.setattr(train, "make_batch", lambda *some: (some[-1] == step and how(), make(*some))[1])


def fork(*command):
    """A script in a fork of this process, which kill -9 may end -> its id."""
    child = os.fork()
    if not child:
        try:
            script(*command)
        finally:
            os._exit(0)
    return child

# --- the schedule and the batches -----------------------------------------------------------------


def arguments(**changes):
    return Namespace(**{**dict(method="lidas", layers=8, block=2, alpha=1.0, steps=100, start=0, constant=80, lr=1.0,
                               warmup=10, seed=0, batch=8, context=4, math_share=0.5), **changes})


def test_learning_rate_is_a_trapezoid():
    rates = [train.learning_rate(arguments(), step) for step in range(101)]
    assert rates[0] == 0.1 and rates[4] == 0.5 and set(rates[9:81]) == {1.0}
    assert rates[90] == 0.5 and rates[99] == pytest.approx(0.05) and rates[100] == 0
    warm = [train.learning_rate(arguments(start=40, warmup=warmup), 40) for warmup in (10, 0)]
    assert warm == [0.1, 1]             # a fresh optimizer warms up


def rows_of(stream):
    """A stream whose row is its number, many times."""
    return lambda number: np.full(5, number + {"general": 0, "math": 10 ** 6}[stream])


STREAMS = {name: rows_of(name) for name in ("general", "math")}


def batch(step, rank=0, world_size=1, **changes):
    return train.make_batch(STREAMS, arguments(**changes), rank, world_size, step)


def test_a_batch_is_a_function_of_seed_step_and_rank():
    for step in (3, 90):                                # in the constant phase, and in the cooldown
        assert torch.equal(batch(step), batch(step)) and batch(step).shape == (8, 5)
        halves = [batch(step, rank, 2) for rank in (0, 1)]
        assert torch.equal(torch.cat(halves), batch(step)) and not torch.equal(*halves)
    assert not torch.equal(batch(90), batch(90, seed=1))


def test_math_comes_in_the_cooldown_only_and_no_row_comes_twice():
    numbers = torch.stack([batch(step)[:, 0] for step in range(100)])           # (steps, rows)
    assert numbers[:80].max() < 10 ** 6 and len(numbers.unique()) == 800
    assert 0.4 < (numbers[80:] >= 10 ** 6).float().mean() < 0.6 and numbers[80:].max() < 10 ** 6 + 20 * 8
    assert max(batch(step, math_share=0.0).max() for step in range(80, 100)) < 10 ** 6

# --- runs -----------------------------------------------------------------------------------------


def test_a_run_grows_and_says_what_it_did(trained):
    rows = [json.loads(line) for line in open(trained / "log.jsonl")]
    growths, lines = [r for r in rows if "growth" in r], [r for r in rows if "growth" not in r]
    assert [r["growth"] for r in growths] == [[0, 1, 0, 1], [0, 1, 2, 1, 2, 3]]
    assert all(np.isfinite(r["loss math"]) for r in growths) and [r["depth"] for r in growths] == [4, 6]
    assert [(r["step"], r["depth"]) for r in lines] == [(0, 2), (8, 2), (10, 4), (16, 4), (20, 6), (24, 6), (30, 6)]
    assert lines[-1]["loss general"] < lines[0]["loss general"] and lines[-1]["lr"] == 0
    model, checkpoint = load_checkpoint(str(trained / "ckpt.pt"))
    spent = [train.training_flops(model, (b["step"] - a["step"]) * 2, 128, b["depth"]) for a, b in zip(lines, lines[1:])]
    assert np.diff([r["flops"] for r in lines]).tolist() == spent and 0.7 < lines[-1]["flops_share"] < 0.95
    assert checkpoint["step"] == 30 and run_of(trained, "stable.pt")["step"] == 24
    assert not any(name.startswith("module.") or "_orig_mod" in name for name in checkpoint["model"])


def test_the_embedding_learns_more_slowly(trained):
    """On the built-in world: at the layers' rate look-ups come late, or never."""
    run = load_checkpoint(str(trained / "stable.pt"))[1]
    rate = train.learning_rate(Namespace(**run["args"]), run["step"] - 1)
    groups = [group for optimizer in run["optimizers"] for group in optimizer["param_groups"]]
    assert [group["lr"] / rate for group in groups] == [pytest.approx(share) for share in (1, 1, 1, 0.3, 0.3)]


@pytest.mark.parametrize("crash", [5, 15, 23, 27])
def test_resumed_equals_uninterrupted(trained, tmp_path, monkeypatch, crash):
    """Killed after each of the log lines: before growth, before stable.pt, in the cooldown; then from another directory."""
    with monkeypatch.context() as patch:
        stop_at(patch, crash)
        assert script("train.py", *TINY_RUN, "--out", tmp_path / "run").returncode == 9
    os.rename(tmp_path / "run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    works("train.py", "--out", "moved", "--resume")
    works("train.py", "--out", "moved", "--resume")         # nothing is left to do
    for name in ("ckpt.pt", "stable.pt"):
        assert same(run_of("moved", name), run_of(trained, name))
    logs = [[json.loads(line) for line in open(folder / "log.jsonl")] for folder in (tmp_path / "moved", trained)]
    assert logs[0] == logs[1] and len(logs[0]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("place, times", [("os.fsync", 3), ("os.replace", 9), ("train.grow_optimizer", 2)])
def test_killed_while_it_writes_or_grows(trained, tmp_path, monkeypatch, place, times):
    """kill -9 with a checkpoint written but not in its place, between the two checkpoints at the end of the constant
    phase, where stable.pt was once lost for good, and with the second growth half done."""
    module, name = place.split(".")
    module = {"os": os, "train": train}[module]
    work, calls = getattr(module, name), []

    def deadly(*arguments):
        calls.append(arguments)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, deadly)
        _, status = os.waitpid(fork("train.py", *TINY_RUN, "--out", tmp_path), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    works("train.py", *TINY_RUN, "--out", tmp_path, *(["--resume"] if (tmp_path / "ckpt.pt").exists() else []))
    for file in ("ckpt.pt", "stable.pt"):
        assert same(run_of(tmp_path, file), run_of(trained, file))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_writers(trained, tmp_path, monkeypatch):
    """The second process on the same --out is refused while the first lives, and the first one is not hurt."""
    read, write = os.pipe()
    with monkeypatch.context() as patch:
        stop_at(patch, 15, lambda: (os.write(write, b"x"), signal.pause()))
        child = fork("train.py", *TINY_RUN, "--out", tmp_path)
    try:
        os.read(read, 1)
        before = (tmp_path / "ckpt.pt").read_bytes()
        refused("another process", "train.py", "--out", tmp_path, "--resume")
        refused("another process", "train.py", "--out", tmp_path, *TINY_RUN)
        assert (tmp_path / "ckpt.pt").read_bytes() == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    works("train.py", "--out", tmp_path, "--resume")        # the lock died with the process
    assert same(run_of(tmp_path), run_of(trained))


def test_two_processes_equal_one(trained, tmp_path):
    """DDP that is not rebuilt after growth trains the new layers on each rank apart, or not at all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29577", "train.py",
               *map(str, TINY_RUN), "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    one, two = run_of(trained)["model"], run_of(tmp_path)["model"]
    for name, w in one.items():
        torch.testing.assert_close(two[name], w, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["baseline", "midas", "stack", "--loop 2-2x2-2", "--path 0-3,2-3"])
def test_every_method_runs(method, tmp_path):
    how = method.split() if " " in method else ["--method", method]
    size = TINY_RUN[:2] + TINY_RUN[4:] if method == "baseline" else TINY_RUN[4:] if " " in method else TINY_RUN
    works("train.py", *size, *how, "--steps", 10, "--evals", 1, "--out", tmp_path)
    model, checkpoint = load_checkpoint(str(tmp_path / "ckpt.pt"))
    expected = {"--loop 2-2x2-2": [0, 1, 2, 3, 2, 3, 4, 5], "--path 0-3,2-3": [0, 1, 2, 3, 2, 3]}
    assert model.config.resolve_path() == expected.get(method, list(range(6))) and checkpoint["step"] == 10


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    refused("not finite", "train.py", *TINY_RUN, "--lr", 999, "--weight-decay", 999, "--out", tmp_path)
    assert torch.isfinite(run_of(tmp_path)["model"]["embed.weight"]).all()

# --- compiled layers ------------------------------------------------------------------------------


ON = arguments(compile="on", device="cpu")


def compiled(model, monkeypatch):
    """As train.py compiles it, but without a C++ compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    return train.prepare(model, ON)


def test_growth_and_paths_do_not_recompile(monkeypatch):
    """Compiling the whole model, or anything that knows its layer's number, compiles anew at every growth."""
    from torch._dynamo.utils import counters
    model, counts, tokens = tiny_model(n_layer=2, eot=5), [], some_tokens(2, 24)
    for _ in range(3):
        training = compiled(model, monkeypatch) if not counts else train.prepare(model, ON)
        counters.clear() if not counts else None
        for path in (None, list(range(model.config.n_layer)) + [0, 1], [0, 0]):
            training(tokens, tokens, path)[1].backward()
            counts.append(counters["stats"]["unique_graphs"])
        model = grow(model, lidas(model.config.n_layer, 2))
    assert counts[0] >= 1 and len(set(counts)) == 1, counts


def test_hooks_fire_in_training_and_evaluation_also_when_layers_are_compiled(monkeypatch):
    """They never fired under no_grad."""
    model, calls, rows = tiny_model(), [], some_tokens(2, 25)
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    training = compiled(model, monkeypatch)
    training(rows[:, :-1], rows[:, 1:].contiguous())[1].backward()
    assert len(calls) == 6
    args = arguments(data="text", context=24)
    run = train.Run(args, model, None, {"general": rows}, {}, [], first=True)
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))       # and one that comes later
    run.report(model, 0)
    assert len(calls) == 13

# --- training on ----------------------------------------------------------------------------------


@pytest.fixture
def on_text(bytes_for_gpt2, tmp_path, monkeypatch):
    """A command on text of one's own, with arguments that are not the default ones; it has run once -> its folder."""
    lines = [json.dumps({"body": f"Mia lives in Dover and keeps {n} cats."}) for n in range(500)]
    questions = [json.dumps({"question": f"{n}+1?", "answer": f"#### {n + 1}"}) for n in range(500)]
    files = written(tmp_path / "text.jsonl", "\n".join(lines)), written(tmp_path / "math.jsonl", "\n".join(questions))
    monkeypatch.chdir(tmp_path)
    command = ["train.py", *TINY_RUN, "--data", "text.jsonl", "--field", "body", "--math", files[1], "--math-share", 0.5,
               "--seed", 3, "--lr", 2e-3, "--weight-decay", 0.1, "--cooldown", 0.4, "--warmup", 7]
    works(*command, "--out", "run")
    return Namespace(run=tmp_path / "run", files=files, command=command)


def test_a_branch_without_changes_is_the_runs_own_end(trained, on_text, tmp_path):
    assert set(run_of("run")["heldout"]) == {"general", "math"}
    for i, run in enumerate((trained, on_text.run)):
        works("train.py", "--init", run / "stable.pt", "--device", "cpu", "--out", f"branch-{i}")
        for key in ("model", "optimizers", "step"):
            assert same(run_of(f"branch-{i}")[key], run_of(run)[key]), (run, key)


def test_a_growth_step_leaves_a_checkpoint_that_is_whole(trained, tmp_path):
    """Its last line of the log had no FLOPs, so that evaluate.py and --init failed until the next one."""
    checkpoint = torch.load(trained / "ckpt.pt", weights_only=True)
    log = checkpoint["log"][:3]                 # at steps 0 and 8, and the growth at step 8
    assert "growth" in log[-1]
    torch.save({**checkpoint, "log": log, "step": 8}, tmp_path / "at_growth.pt")
    works("train.py", "--init", tmp_path / "at_growth.pt", "--device", "cpu", "--out", tmp_path / "on")
    assert "flops" in works("evaluate.py", tmp_path / "at_growth.pt", "--tasks").stdout


def test_the_share_of_flops_goes_on_along_a_branch(trained, tmp_path):
    """The run's own lines and the branch's had two denominators, and the step of the branch stood there twice."""
    for name, options in (("longer", ["--init", trained / "ckpt.pt", "--steps", 40]),
                          ("loop", ["--init", trained / "stable.pt", "--loop", "2-2x2-2"])):
        works("train.py", *options, "--device", "cpu", "--out", tmp_path / name)
        rows = [row for row in run_of(tmp_path / name)["log"] if "growth" not in row]
        shares, steps = [row["flops_share"] for row in rows], [row["step"] for row in rows]
        assert shares == sorted(shares) and len(set(steps)) == len(steps) and steps[-1] == (40 if name == "longer" else 30)
    assert shares[-1] > run_of(trained)["log"][-1]["flops_share"]       # the loop costs more than the run itself


def test_a_folder_that_holds_something_else(trained, tmp_path):
    """A stable.pt was overwritten, a grown model ended --resume in a traceback."""
    folder = tmp_path / "z"
    works("grow.py", trained / "ckpt.pt", "--out", folder / "ckpt.pt")
    refused("--init", "train.py", "--resume", "--out", folder)
    os.rename(folder / "ckpt.pt", folder / "stable.pt")
    refused("holds a run", "train.py", *TINY_RUN, "--out", folder)


def test_a_directory_without_a_tokenizer_takes_one_by_name(on_text, tmp_path):
    optional("transformers")
    works("grow.py", "run/ckpt.pt", "--out", "hf")
    command = ["train.py", "--init", "hf", "--data", "text.jsonl", "--field", "body", "--steps", 2, "--device", "cpu"]
    refused("--encoding", *command, "--out", "on")
    works(*command, "--encoding", "gpt2", "--out", "on2")


def test_math_that_comes_with_a_branch_is_read(on_text, tmp_path):
    """A run without math had stored a share of 0, which the branch took over in silence."""
    command = ["train.py", *TINY_RUN, "--data", "text.jsonl", "--field", "body"]
    works(*command, "--out", "plain")
    works("train.py", "--init", "plain/stable.pt", "--math", on_text.files[1], "--device", "cpu", "--out", "math")
    assert "loss math" in run_of("math")["log"][-1] and not same(run_of("math")["model"], run_of("plain")["model"])


def test_a_run_on_files_is_resumed_from_elsewhere_and_after_its_data_moved(on_text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 27)
        assert script(*on_text.command, "--out", "again").returncode == 9
    refused("--context", "train.py", "--init", "run/ckpt.pt", "--steps", 40, "--context", 256, "--out", "wide")
    shutil.copytree("again", "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    works("train.py", "--resume", "--out", "../again")
    assert same(run_of("../again"), run_of("../run"))
    text, math = [file.rename(file.with_name(f"moved-{file.name}")) for file in on_text.files]
    refused("text.jsonl", "train.py", "--resume", "--out", "../moved")
    # its place may be said: the text is what counts
    refused("changed", "train.py", "--resume", "--out", "../moved", "--data", math, "--math", math)
    works("train.py", "--resume", "--out", "../moved", "--data", text, "--math", math)
    assert same(run_of("../moved")["model"], run_of("../run")["model"])
    text.write_text("\n".join(text.read_text().splitlines()[::-1]))     # it would be tested on what it has trained on
    refused("changed", "train.py", "--init", "../moved/ckpt.pt", "--steps", 40, "--device", "cpu", "--out", "on")


def test_a_loop_in_the_cooldown_is_resumed_to_the_bit(trained, tmp_path, monkeypatch):
    command = ["train.py", "--init", trained / "stable.pt", "--loop", "2-2x2-2", "--device", "cpu"]
    works(*command, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 28)
        assert script(*command, "--evals", 15, "--out", tmp_path / "cut").returncode == 9
    assert run_of(tmp_path / "cut")["step"] == 28
    works("train.py", "--resume", "--out", tmp_path / "cut")
    assert same(run_of(tmp_path / "cut")["model"], run_of(tmp_path / "whole")["model"])
    model, checkpoint = load_checkpoint(str(tmp_path / "cut" / "ckpt.pt"))
    assert model.config.path == [0, 1, 2, 3, 2, 3, 4, 5] and not same(checkpoint["model"], run_of(trained)["model"])
    plain, looped = (run_of(folder)["log"][-1]["flops"] - run_of(trained, "stable.pt")["log"][-1]["flops"]
                     for folder in (trained, tmp_path / "whole"))
    assert plain < looped < plain * 8 / 6               # the head is not visited twice


def test_what_the_next_start_trains_from(trained, tmp_path):
    """A grown model without an optimizer starts a fresh one and says so; a finished run needs more steps."""
    works("grow.py", trained / "ckpt.pt", "--out", tmp_path / "deeper.pt")
    command = ["--steps", 4, "--batch", 2, "--device", "cpu", "--evals", 1]
    printed = works("train.py", "--init", tmp_path / "deeper.pt", *command, "--out", tmp_path / "on").stdout
    assert "fresh" in printed and run_of(tmp_path / "on")["config"]["n_layer"] == 8
    assert run_of(tmp_path / "on")["log"][0]["loss general"] != run_of(tmp_path / "on")["log"][-1]["loss general"]
    refused("--steps", "train.py", "--init", trained / "ckpt.pt", "--device", "cpu", "--out", tmp_path / "x")
    # settings of this command count, also those that the optimizer has stored
    works("train.py", "--init", trained / "stable.pt", "--weight-decay", 0.5, "--device", "cpu", "--out", tmp_path / "wd")
    assert not same(run_of(tmp_path / "wd")["model"], run_of(trained)["model"])
    # what cannot change is named
    for option in ("--method=lidas", "--layers=8", "--width=64", "--encoding=gpt2", "--alpha=1", "--kv-heads=1"):
        refused(option.split("=")[0], "train.py", "--init", trained / "stable.pt", option, "--out", tmp_path / "x")
    for options, message in (
            (["--loop", "2-2x2-3"], "7 layers"), (["--path", "0-6"], "layers 0 to 5"), (["--path", "0-3,5"], "every layer"),
            (["--loop", "2x2", "--path", "0-3"], "--path"), (["--init", trained / "log.jsonl"], "as a checkpoint")):
        refused(message, "train.py", "--init", trained / "stable.pt", *options, "--device", "cpu", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()

# --- files ----------------------------------------------------------------------------------------


def test_held_out_documents_of_files_are_the_last_ones_and_not_trained_on(on_text):
    tokenizer, file = get_tokenizer("gpt2"), str(on_text.files[0])
    row, held, _ = train.open_stream("general", [file], arguments(context=128, field="body"), tokenizer)
    lines = [json.loads(line)["body"] for line in on_text.files[0].read_text().splitlines()]
    heldout = tokenizer.decode(held.flatten().tolist()).split("<|endoftext|>")[1:-1]        # whole documents
    first = lines.index(heldout[0])
    assert len(heldout) > 10 and heldout == lines[first:first + len(heldout)] and first + len(heldout) > 495
    n = len({tuple(row(i)) for i in range(1000)})
    epochs = [[tuple(row(i)) for i in range(n * epoch, n * epoch + n)] for epoch in (0, 1)]
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == n                # each once
    trained_on = tokenizer.decode([token for line in epochs[0] for token in line])
    assert not any(line in trained_on for line in heldout) and lines[0] in trained_on


def test_a_short_last_document_leaves_the_held_out_part_whole():
    """The cut was at the first document's beginning, even where hardly anything follows."""
    assert len(train.split_rows(np.array([0] + [1] * 60000 + [0] + [2] * 10), 0, 128)[1]) == 24

# --- bad input ------------------------------------------------------------------------------------

UINT32 = np.arange(9999, dtype=np.uint32) % 200
BAD_FILES = {       # name: content, what is said
    "none.txt": (None, "none.txt"), "empty.txt": (b"", "too few"), "few.txt": (b"few words", "--context"),
    # an unknown ending fell through to the most permissive reader: trained on as prose
    "array.json": (b'[{"text": "a"}]', "expected .txt"), "table.csv": (b"a,b\n" * 999, "expected .txt"),
    "page.html": (b"<p>" * 999, "expected .txt"), "README": (b"words " * 999, "expected .txt"),
    "x.npy": (b"\x93NUMPY" + b"12" * 999, "expected .txt"), "zip.txt.gz": (b"", "expected .txt"),
    "llama3.bin": (np.array([20240801, 1, 99] + [0] * 352, dtype=np.int32).tobytes(), "4 bytes"),
    # not uint16 tokens of this encoding
    "uint32.bin": (UINT32.tobytes(), "every second"), "odd.bin": (b"123", "3 bytes"), "empty.bin": (b"", "0 bytes"),
    "large.bin": (b"\xff\xff" * 999, "65535"),
    "cut.bin": (np.array([20240520, 1, 9] + [0] * 253, dtype=np.int32).tobytes(), "greater than file size"),
    "broken.jsonl": (b'{"text": "a"}\n{"text"', "line 2"), "list.jsonl": (b'{"text": "a"}\n[1]\n', "line 2"),
    "field.jsonl": (b'{"body": "a"}\n', "--field"), "null.jsonl": (b'{"text": null}\n' * 999, "null.jsonl"),
    "latin.txt": (b"\xff\xfe\x00a", "utf-8"), "latin.jsonl": (b'{"text": "\xff"}', "utf-8"),
    "cut.jsonl.gz": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xabV*I", "cut.jsonl.gz"),
    "none.jsonl.gz": (b"hello", "none.jsonl.gz"), "characters/train.bin": (bytes(9998), "meta.pkl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_end_in_one_line(name, tmp_path, bytes_for_gpt2):
    content, message = BAD_FILES[name]
    (tmp_path / "characters").mkdir()
    written(tmp_path / "characters" / "meta.pkl", b"")          # nanoGPT's: another encoding
    file = tmp_path / name if content is None else written(tmp_path / name, content)
    refused(message, "train.py", *TINY_RUN, "--data", file, "--out", tmp_path / "run")
    assert not any(file.suffix for file in (tmp_path / "run").glob("*"))        # nothing but the lock


BAD = {     # options: what is said
    "--method midway": "invalid choice", "--method looped": "invalid choice", "--block 4": "blocks of 4",
    "--encoding gtp2 --data {text}": "Unknown encoding", "--encoding profiles": "Unknown encoding", "--steps 2": "too few",
    "--loop 1-2x2-1": "--loop", "--path 0-3": "--path", "--width 63": "heads",
    "--math {text} --data {text} --cooldown 0": "--cooldown", "--math-share 0.5 --cooldown 0": "--cooldown",
    "--field body": "--data",
    "--lr fast": "--lr", "--lr nan": "--lr", "--lr 0": "--lr", "--alpha -1": "--alpha", "--heads 5": "heads",
    "--kv-heads 2": "n_kv_head", "--cooldown 1": "a step or more", "--batch 0": "from 1", "--seed -1": "--seed",
    "--data {text} --math-share 0.5": "--math-share", "--data {text} --math {none}": "No such file", "--math {text}": "with --data",
    "--device gpu": "no device", "--out {text}/run": "",
    "--context 16": "16",                               # the built-in tasks do not fit: said before training
    # options that do not apply are named, not passed over
    "--method baseline --alpha 1": "--alpha", "--method baseline --block 2": "--block",
    "--resume": "there is no run in", "--resume --steps 30": "there is no run in",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_options_end_in_one_line(options, tmp_path, bytes_for_gpt2):
    text, out = written(tmp_path / "text.txt", "some words " * 999), tmp_path / "out" / "run"
    options_given = options.format(text=text, none=tmp_path / "none").split()
    refused(BAD[options], "train.py", *TINY_RUN, "--out", out, *options_given)
    assert not any(file.suffix for file in out.glob("*"))       # nothing but the lock


def test_resuming_with_other_settings_or_data_is_refused(trained, tmp_path, monkeypatch):
    for option, value in (("--batch", 8), ("--seed", 5), ("--warmup", 49), ("--steps", 31)):
        refused(option, "train.py", "--out", trained, "--resume", option, value)
    refused("--resume", "train.py", *TINY_RUN, "--out", trained)
    shutil.copytree(trained, tmp_path / "runs" / "first")
    missing = refused("first", "train.py", "--resume", "--out", tmp_path / "runs" / "frist")     # it started anew
    assert not (tmp_path / "runs" / "frist").exists() and not missing.stdout
    row = evaluate.world_row
    monkeypatch.setattr(evaluate, "world_row", lambda *some, **more: row(*some, **more)[::-1].copy())
    refused("changed", "train.py", "--out", tmp_path / "runs" / "first", "--resume")


def test_options_and_devices_of_a_resumed_run(trained, tmp_path):
    """A default that is given is an option too; a run of a GPU goes on without one, and blamed an option not given."""
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    for changed, check, options in (({"device": "cpu" if torch.cuda.is_available() else "cuda:1"}, works, ()),
                                    ({"seed": 7}, lambda *command: refused("--seed", *command), ("--seed", 0))):
        torch.save({**checkpoint, "args": {**checkpoint["args"], **changed}}, tmp_path / "run" / "ckpt.pt")
        check("train.py", "--out", tmp_path / "run", "--resume", *options)
