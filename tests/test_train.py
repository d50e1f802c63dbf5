"""The main job: pure functions of the step, resuming to the bit, files, bad input, two processes."""
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, script, tiny_model

import evaluate
import train
from grow import load_checkpoint
from loop import encode, load_encoding, texts_of


def weights(folder, name="ckpt.pt"):
    return load_checkpoint(os.path.join(folder, name))[1]


def same_weights(one, other):
    return one["model"].keys() == other["model"].keys() and all(
        torch.equal(w, other["model"][name]) for name, w in one["model"].items())

# -----------------------------------------------------------------------------
# the schedule and the batches


def arguments(**changes):
    return Namespace(**{**dict(method="lidas", layers=8, block=2, depth=8, alpha=1.0, steps=100,
                               cooldown=0.2, lr=1.0, warmup=10, seed=0, batch=8, context=4,
                               math_share=0.5), **changes})


def test_learning_rate_is_a_trapezoid():
    rates = [train.learning_rate(arguments(), step) for step in range(100)]
    assert rates[0] == 0.1 and rates[4] == 0.5 and set(rates[9:81]) == {1.0}
    assert rates[90] == 0.5 and rates[99] == pytest.approx(0.05)
    assert train.learning_rate(arguments(), 100) == 0


def test_growth_fills_the_constant_phase_and_the_cooldown_runs_at_full_depth():
    assert train.stages(arguments()) == [(0, 2), (8, 4), (24, 6), (48, 8), (80, 8)]
    assert train.stages(arguments(method="baseline")) == [(0, 8), (80, 8)]
    assert train.stages(arguments(depth=12))[-2:] == [(48, 8), (80, 12)]


def test_flops_of_a_run_add_up_stage_by_stage():
    args, config = arguments(), tiny_model().config
    flops = [train.flops_until(args, config, step) for step in range(101)]
    per_step = np.diff(flops)
    assert flops[0] == 0 and len(set(per_step[:8])) == 1 and len(set(per_step[48:])) == 1
    for before, step in ((8, 8), (24, 24), (48, 48)):
        assert per_step[step] > per_step[before - 1]
    assert per_step[99] == train.flops_until(arguments(method="baseline"), config, 1)


STREAMS = {"general": np.arange(50 * 5).reshape(50, 5), "math": 1000 + np.arange(30 * 5).reshape(30, 5)}


def test_a_batch_is_a_function_of_seed_step_and_rank():
    args = arguments()
    one, again = train.batch_of(STREAMS, args, 3), train.batch_of(STREAMS, args, 3)
    assert torch.equal(one[0], again[0]) and torch.equal(one[0][:, 1:], one[1][:, :-1])
    assert not torch.equal(one[0], train.batch_of(STREAMS, args, 4)[0])
    assert not torch.equal(one[0], train.batch_of(STREAMS, arguments(seed=1), 3)[0])
    halves = [train.batch_of(STREAMS, args, 3, rank, 2)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), one[0]) and not torch.equal(*halves)


def test_an_epoch_shows_every_row_once():
    """A loader that draws with replacement, or whose epochs overlap, sees some rows never."""
    args = arguments(batch=10, steps=1000)
    seen = torch.cat([train.batch_of(STREAMS, args, step)[0][:, 0] for step in range(10)])
    assert sorted(seen[:50].tolist()) == sorted(seen[50:].tolist()) == list(range(0, 250, 5))
    assert seen[:50].tolist() != seen[50:].tolist()


def test_math_comes_in_the_cooldown_only():
    shares = [(train.batch_of(STREAMS, arguments(), step)[0] >= 1000).any(1).float().mean()
              for step in range(100)]
    assert max(shares[:80]) == 0 and 0.3 < sum(shares[80:]) / 20 < 0.7
    none = [train.batch_of(STREAMS, arguments(math_share=0.0), step)[0].max() for step in range(80, 100)]
    assert max(none) < 1000

# -----------------------------------------------------------------------------
# runs


def test_a_run_grows_and_says_what_it_did(trained):
    rows = [json.loads(line) for line in open(trained / "log.jsonl")]
    growths, lines = [r for r in rows if "growth" in r], [r for r in rows if "growth" not in r]
    assert [r["growth"] for r in growths] == [[0, 1, 0, 1], [0, 1, 2, 1, 2, 3]]
    assert all(np.isfinite([r["loss before"], r["loss after"]]).all() for r in growths)
    assert [r["step"] for r in lines] == [0, 10, 20, 24, 30]
    assert lines[-1]["depth"] == 6 and lines[0]["depth"] == 2
    assert lines[-1]["loss general"] < lines[0]["loss general"] and lines[-1]["lr"] == 0
    assert 0.7 < lines[-1]["flops_share"] < 0.95
    checkpoint = weights(trained)
    assert checkpoint["growth"] == [{"step": r["step"], "path": r["growth"]} for r in growths]
    assert checkpoint["step"] == 30 and weights(trained, "stable.pt")["step"] == 24
    assert not any(name.startswith("module.") or "_orig_mod" in name for name in checkpoint["model"])


@pytest.mark.parametrize("crash", [5, 11, 27])
def test_resumed_equals_uninterrupted(trained, tmp_path, monkeypatch, crash):
    """A crash before a growth, just before another one, and inside the cooldown."""
    out, batch_of = tmp_path / "run", train.batch_of

    def crashing(streams, args, step, *ranks):
        if step == crash:
            raise RuntimeError("the power failed")
        return batch_of(streams, args, step, *ranks)
    with monkeypatch.context() as patch:
        patch.setattr(train, "batch_of", crashing)
        with pytest.raises(RuntimeError):
            script("train.py", *TINY_RUN, "--compile", "off", "--out", out)
    assert weights(out)["step"] == {5: 0, 11: 10, 27: 24}[crash]
    assert script("train.py", "--out", out, "--resume").returncode == 0
    assert weights(out)["args"]["compile"] == "off"         # kept, as the device is
    assert same_weights(weights(out), weights(trained))
    timeless = [[{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
                 for line in open(folder / "log.jsonl")] for folder in (out, trained)]
    assert timeless[0] == timeless[1]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("place, times", [("os.fsync", 7), ("os.replace", 13), ("train.grow_optimizer", 2)])
def test_killed_while_it_writes_or_grows(trained, tmp_path, place, times):
    """kill -9 with a checkpoint written but not yet in its place, between the two checkpoints at the end of
    the constant phase, where stable.pt was once lost for good, and with the second growth half done."""
    code = f"""if True:
        import os, signal, train
        work, calls = {place}, []
        def deadly(*arguments):
            calls.append(arguments)
            if len(calls) == {times}:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments)
        {place} = deadly
        train.main()"""
    out, env = tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, TINY_RUN), "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert weights(out)["step"] == {7: 0, 13: 20, 2: 10}[times]
    assert script("train.py", *TINY_RUN, "--out", out, "--resume").returncode == 0
    assert same_weights(weights(out), weights(trained))
    assert sorted(os.listdir(out)) == ["ckpt.pt", "log.jsonl", "stable.pt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(trained, tmp_path):
    command = [sys.executable, "train.py", *map(str, TINY_RUN), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    while "step     10/30" not in (line := process.stdout.readline()):
        assert line, "the run ended before its tenth step"
    process.send_signal(signal.SIGTERM)
    rest = process.communicate()[0]
    assert process.returncode == 143 and "--resume" in rest
    assert 10 <= weights(tmp_path / "run")["step"] < 30
    assert script("train.py", "--out", tmp_path / "run", "--resume").returncode == 0
    assert same_weights(weights(tmp_path / "run"), weights(trained))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_disk_that_fills_up_costs_the_new_checkpoint_only(trained, tmp_path):
    """The system refuses what is larger than a checkpoint of 4 layers, in the middle of writing one of 6."""
    import resource
    out, limit = tmp_path / "run", os.path.getsize(trained / "ckpt.pt") * 9 // 10
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        result = script("train.py", *TINY_RUN, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.returncode == 2 and "ckpt.pt could not be written" in result.stderr, result.stderr
    assert sorted(os.listdir(out)) == ["ckpt.pt", "log.jsonl"] and weights(out)["step"] == 10
    assert script("train.py", "--out", out, "--resume").returncode == 0
    assert same_weights(weights(out), weights(trained))


def test_a_directory_that_becomes_read_only_costs_the_new_checkpoint_only(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    shutil.copy(out / "stable.pt", out / "ckpt.pt")     # as it was at the end of the constant phase
    before = (out / "ckpt.pt").read_bytes()
    out.chmod(0o555)
    if os.access(out, os.W_OK):
        pytest.skip("root, or Windows, may write to a read-only directory")
    result = script("train.py", "--out", out, "--resume")
    out.chmod(0o755)
    assert result.returncode == 2 and "could not be written: [Errno 13]" in result.stderr, result.stderr
    assert (out / "ckpt.pt").read_bytes() == before
    assert script("train.py", "--out", out, "--resume").returncode == 0
    assert same_weights(weights(out), weights(trained))


def test_two_processes_equal_one(trained, tmp_path):
    """DDP that is not rebuilt after growth trains the new layers on each rank apart, or not at all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29577",
               "train.py", *map(str, TINY_RUN), "--out", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    one, two = weights(trained), weights(tmp_path / "run")
    for name, w in one["model"].items():
        torch.testing.assert_close(two["model"][name], w, atol=2e-4, rtol=1e-3)


def test_another_cooldown_from_the_end_of_the_constant_phase(trained, tmp_path):
    same, looped = tmp_path / "same", tmp_path / "looped"
    assert script("train.py", "--init", trained / "stable.pt", "--out", same).returncode == 0
    assert same_weights(weights(same), weights(trained))
    command = ["--init", trained / "stable.pt", "--loop", "2-2x2-2", "--out", looped]
    assert script("train.py", *command).returncode == 0
    assert weights(looped)["config"]["path"] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert script("train.py", "--out", looped, "--resume").returncode == 0      # nothing left to do


def test_a_cooldown_takes_the_loop_and_the_math_that_it_is_given(trained, tmp_path, monkeypatch):
    """Each of these once trained something else than was asked for, in silence."""
    one, two, three, four, five, six = (tmp_path / name for name in ("1", "2", "3", "4", "5", "6"))
    assert script("train.py", *TINY_RUN, "--method", "looped", "--steps", 10, "--out", one).returncode == 0
    assert weights(one)["config"]["path"] == [0, 1, 2, 2, 3, 4]
    assert script("train.py", "--init", one / "stable.pt", "--loop", "1-1x2-3", "--out", two).returncode == 0
    assert weights(two)["config"]["path"] == [0, 1, 1, 2, 3, 4]
    text = bad_file(tmp_path, "text.txt", b"some words and more of them " * 99)
    assert script("train.py", *TINY_RUN, "--data", text, "--encoding", "world", "--steps", 10,
                  "--out", three).returncode == 0
    assert script("train.py", "--init", three / "stable.pt", "--math", text, "--out", four).returncode == 0
    assert weights(three)["args"]["math_share"] == 0.0 and weights(four)["args"]["math_share"] == 0.75
    whole = text.read_bytes()
    for changed in (whole.replace(b"some", b"many"), b"many" + whole[4:]):     # the last: no held-out row
        text.write_bytes(changed)
        for command in (["--resume", "--out", three], ["--init", three / "stable.pt", "--out", six]):
            assert "changed" in script("train.py", *command).stderr
    text.write_bytes(whole)
    # the world's general text, math of one's own
    assert script("train.py", "--init", one / "stable.pt", "--math", text, "--out", six).returncode == 0
    assert all(torch.equal(weights(six)["heldout"][name], weights(source)["heldout"][other])
               for name, source, other in (("general", one, "general"), ("math", three, "general")))
    assert "--out" in script("train.py", "--init", one / "stable.pt").stderr
    # deeper than its constant phase, resumed
    command = ["--init", one / "stable.pt", "--loop", "1-2x3-2", "--out", five, "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", lambda *_: sys.exit(3))
        assert script("train.py", *command).returncode == 3
    assert script("train.py", *command).returncode == 0
    assert weights(five)["config"]["path"] == [0, 1, 2, 1, 2, 1, 2, 3, 4] and len(weights(five)["log"]) > 2


@pytest.mark.parametrize("method", ["baseline", "midas", "stack", "looped"])
def test_every_method_runs(method, tmp_path):
    out = tmp_path / method
    assert script("train.py", *TINY_RUN, "--method", method, "--steps", 10, "--out", out).returncode == 0
    model, checkpoint = load_checkpoint(out / "ckpt.pt")
    assert len(model.config.visits()) == 6 and checkpoint["step"] == 10


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    result = script("train.py", *TINY_RUN, "--lr", 1e30, "--out", tmp_path / "run")
    assert result.returncode == 2 and "not finite" in result.stderr and "--resume" in result.stderr
    assert torch.isfinite(weights(tmp_path / "run")["model"]["embed.weight"]).all()


def test_growth_and_paths_do_not_recompile():
    """Compiling the whole model, or anything that knows its layer's number, compiles anew at every growth."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model, compiled = tiny_model(n_layer=2), []
    tokens = torch.randint(61, (2, 24))
    for _ in range(3):
        for module in [*model.layers, model.loss]:
            module.compile(dynamic=False, backend="aot_eager")
        for path in (None, list(range(model.config.n_layer)) + [0, 1], [0, 0]):
            model(tokens, tokens, path)[1].backward()
            compiled.append(counters["stats"]["unique_graphs"])
        model = train.grow(model, train.METHODS["lidas"](model.config.n_layer, 2))
    assert compiled[0] >= 1 and len(set(compiled)) == 1, compiled

# -----------------------------------------------------------------------------
# files


LINES = [f"Mia lives in Dover and keeps {n} cats." for n in range(400)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same documents in every format."""
    folder = tmp_path_factory.mktemp("files")
    jsonl = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    (folder / "a.jsonl").write_text(jsonl)
    with gzip.open(folder / "a.jsonl.gz", "wt") as f:
        f.write(jsonl)
    encoding = load_encoding(evaluate.world_words())
    tokens = np.concatenate([[encoding.eot_token] + encoding.encode_ordinary(line) for line in LINES])
    tokens.astype(np.uint16).tofile(folder / "raw.bin")
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    with open(folder / "header.bin", "wb") as f:
        f.write(header.tobytes() + tokens.astype(np.uint16).tobytes())
    (folder / "a.txt").write_text("\n".join(LINES))
    (folder / "qa.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n' * 500)
    return folder, encoding, tokens


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "raw.bin", "header.bin"])
def test_every_format_gives_the_same_tokens(files, name):
    folder, encoding, tokens = files
    written = bytearray()
    encode([str(folder / name)], encoding, written.extend)
    assert np.array_equal(np.frombuffer(bytes(written), dtype=np.uint16), tokens)


def test_plain_text_is_one_document_and_questions_are_asked(files):
    folder, encoding, _ = files
    assert list(texts_of(str(folder / "a.txt"))) == ["\n".join(LINES)]
    assert next(texts_of(str(folder / "qa.jsonl"))) == "Question: 1+1?\nAnswer: #### 2"


def test_held_out_rows_of_files_are_the_last_ones_and_not_trained_on(files, tmp_path):
    folder, encoding, tokens = files
    args = Namespace(out=str(tmp_path / "run"), context=48, encoding="world")
    rows, heldout = train.file_stream(args, encoding, [str(folder / "a.jsonl")])
    whole = np.concatenate((rows, heldout)).reshape(-1)
    assert np.array_equal(whole, tokens[:len(whole)]) and len(tokens) - len(whole) < 49
    assert len(heldout) == -(-(len(rows) + len(heldout)) // 20)


def test_another_encoding_is_not_served_from_the_cache(files, tmp_path):
    """Token files that outlive a change of the encoding train on noise, with a loss that looks fine."""
    folder, encoding, _ = files
    args = Namespace(out=str(tmp_path / "run"), context=48, encoding="world")
    other = load_encoding(evaluate.world_words()[::-1])
    for produce in (lambda e: train.world_stream(args, e, "math", 4)[0],
                    lambda e: train.file_stream(args, e, [str(folder / "a.jsonl")])[0]):
        assert encoding.decode(produce(encoding)[0]) == other.decode(produce(other)[0])


def test_training_on_files(files, tmp_path):
    folder, encoding, _ = files
    command = [*TINY_RUN, "--encoding", "world", "--data", folder / "a.jsonl", folder / "raw.bin", "--math",
               folder / "qa.jsonl", "--out", tmp_path / "run"]
    assert script("train.py", *command).returncode == 0
    checkpoint = weights(tmp_path / "run")
    assert set(checkpoint["heldout"]) == {"general", "math"}
    losses = [row["loss math"] for row in checkpoint["log"] if "loss math" in row]
    assert losses[-1] < losses[0]

# -----------------------------------------------------------------------------
# bad input


def bad_file(folder, name, content=b""):
    (folder / name).write_bytes(content)
    return folder / name


BAD = {
    "missing file": (lambda d: ["--data", d / "none.txt"], "no file"),
    "empty file": (lambda d: ["--data", bad_file(d, "empty.txt"), "--encoding", "world"], "too short"),
    "unknown method": (lambda d: ["--method", "midway"], "invalid choice"),
    "block that does not divide": (lambda d: ["--block", 4], "blocks of 4"),
    "context too long": (lambda d: ["--data", bad_file(d, "s.txt", b"few words"), "--encoding", "world"],
                         "--context"),
    "token beyond the vocabulary": (lambda d: ["--data", bad_file(d, "t.bin", b"\xff\xff" * 999),
                                               "--encoding", "world"], "65535"),
    "odd byte count": (lambda d: ["--data", bad_file(d, "o.bin", b"123"), "--encoding", "world"], "3 bytes"),
    "cut token file": (lambda d: ["--data", bad_file(d, "c.bin", np.array(
        [20240520, 1, 9] + [0] * 253, dtype=np.int32).tobytes()), "--encoding", "world"], "cut short"),
    "broken line": (lambda d: ["--data", bad_file(d, "b.jsonl", b'{"text": "a"}\n{"text"'), "--encoding",
                               "world"], "line 2"),
    "line without text": (lambda d: ["--data", bad_file(d, "n.jsonl", b'{"body": "a"}\n'), "--encoding",
                                     "world"], "line 1"),
    "text that is none": (lambda d: ["--data", bad_file(d, "z.jsonl", b'{"text": null}'), "--encoding",
                                     "world"], "line 1"),
    "not UTF-8": (lambda d: ["--data", bad_file(d, "u.txt", b"\xff\xfe\x00a"), "--encoding", "world"],
                  "UTF-8"),
    "cut gzip": (lambda d: ["--data", bad_file(d, "g.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:-9]),
                            "--encoding", "world"], "gzip"),
    "damaged gzip": (lambda d: ["--data", bad_file(d, "d.jsonl.gz", gzip.compress(b"{}")[:12] + b"?" * 9),
                                "--encoding", "world"], "gzip"),
    "unknown encoding": (lambda d: ["--data", bad_file(d, "e.txt", b"a b"), "--encoding", "gtp2"],
                         "no encoding"),
    "math too short": (lambda d: ["--math", bad_file(d, "m.txt", b"a b")], "too short"),
    "no loop": (lambda d: ["--method", "looped", "--loop", "2x"], "e-LxK-d"),
    "loop against layers": (lambda d: ["--method", "looped", "--loop", "2x2"], "contradicts"),
    "nothing to loop": (lambda d: ["--method", "looped", "--layers", 2], "3 layers"),
    "loop with growth": (lambda d: ["--loop", "2-2x2-2"], "--method looped"),
    "too few steps": (lambda d: ["--steps", 2], "too few"),
    "no number": (lambda d: ["--lr", "fast"], "invalid float"),
    "lr of nan": (lambda d: ["--lr", "nan"], "--lr"),
    "lr of 0": (lambda d: ["--lr", 0], "above 0"),
    "alpha of 0": (lambda d: ["--alpha", 0], "above 0"),
    "heads": (lambda d: ["--heads", 5], "n_head"),
    "foreign checkpoint": (lambda d: ["--init", bad_file(d, "ckpt.pt", b"hello")], "not a whole checkpoint"),
    "unwritable out": (lambda d: ["--out", bad_file(d, "file", b"") / "run"], "file"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(make, message, tmp_path):
    out = tmp_path / "out" / "run"
    result = script("train.py", *TINY_RUN, "--out", out, *make(tmp_path))
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 2 and len(errors) == 1 and message in errors[0], errors
    assert not out.exists()


def test_resuming_with_other_settings_and_running_twice_are_refused(trained, tmp_path):
    assert "--batch" in script("train.py", "--out", trained, "--resume", "--batch", 8).stderr
    assert "--resume" in script("train.py", *TINY_RUN, "--out", trained).stderr
    assert "stable.pt" in script("train.py", "--init", trained / "ckpt.pt", "--out", tmp_path / "x").stderr
    cut = tmp_path / "cut.pt"
    cut.write_bytes((trained / "ckpt.pt").read_bytes()[:5000])
    assert "not a whole checkpoint" in script("train.py", "--init", cut, "--out", tmp_path / "y").stderr
    assert not (tmp_path / "y").exists()
