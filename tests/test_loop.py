"""Paths that loop, the demo, and the scan against running each looped path from the start."""
import re
import shutil

import pytest
import torch
from conftest import optional, refused, some_tokens, tiny_model, works, written

from loop import loop_path, parse_loop, parse_path, scan
from model import score_targets


def test_loop_paths_by_hand():
    assert loop_path(6, 2, 2, 0) == [0, 1, 2, 3, 4, 5]
    assert loop_path(6, 2, 2, 1) == [0, 1, 2, 3, 2, 3, 4, 5]
    assert loop_path(3, 0, 3, 1) == [0, 1, 2, 0, 1, 2]
    assert loop_path(3, 2, 1, 2) == [0, 1, 2, 2, 2]
    for bad in ((6, 5, 2, 1), (6, -1, 2, 1), (6, 0, 0, 1), (6, 0, 2, -1), (6, 0, 7, 0)):
        with pytest.raises(ValueError):
            loop_path(*bad)


def test_paths_as_they_are_written():
    """K counts all visits, as in the papers; ranges are inclusive."""
    assert parse_loop("2-2x3-2") == (6, [0, 1, 2, 3, 2, 3, 2, 3, 4, 5])
    assert parse_loop("4x6") == (4, [0, 1, 2, 3] * 6) and parse_loop("1-1x1-1") == (3, [0, 1, 2])
    assert len(parse_loop("4-4x4-4")[1]) == 24
    assert parse_path("0-3,2-5, 6") == [0, 1, 2, 3, 2, 3, 4, 5, 6] and parse_path("3,1,1") == [3, 1, 1]
    for text in ("", "x", "2x", "0x3", "2x0", "2-2x3-", "-2x3", "2-2-2", "2-2x3-2-1", "2.5x2", "2x-1"):
        with pytest.raises(ValueError):
            parse_loop(text)
    for text in ("", "a", "3-1", "0-", ",", "0,,1", "-1", "0-3;4", "1.5"):
        with pytest.raises(ValueError):
            parse_path(text)


@pytest.mark.parametrize("visits", [2, 3])
@pytest.mark.parametrize("eot", [None, 5])
def test_the_scan_equals_running_each_path_from_the_start(visits, eot):
    model, tokens, targets = tiny_model(eot=eot), some_tokens(7), some_tokens(7, seed=2)
    tokens[3, 9] = 5
    targets[:, :17] = -1                        # three tokens are asked in each row, in one of them one
    targets[4, 17:19] = -1
    targets[:3, 17:] = model(tokens, targets)[0][:3, 17:].argmax(-1)        # so that some are right
    cells = [(start, end) for start in range(6) for end in range(start, 6)]
    paths = [loop_path(6, start, end - start + 1, visits - 1) for start, end in cells] + [[0, 1, 5], [3, 1]]
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.layers]
    measured = list(scan(model, tokens, targets, paths, batch=4))
    assert len(calls) == 2 * (6 + sum((end - start + 1) * (visits - 1) + 5 - end for start, end in cells) + 1 + 2)
    for handle in handles:
        handle.remove()
    for path, (loss, right) in zip([None, *paths], measured, strict=True):
        with torch.no_grad():
            whole_loss, whole_right = score_targets(model, model.hidden(tokens, path), targets)
            row = model(tokens[4:5], targets[4:5], path)[1]
        assert torch.equal(right, whole_right)
        torch.testing.assert_close(loss, whole_loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loss[4], row, atol=1e-5, rtol=1e-5)
    assert measured[0][1].tolist() == [True] * 3 + [False] * 4


def test_a_prompt_along_several_paths(trained):
    command = ["loop.py", trained / "ckpt.pt", "--device", "cpu", "--prompt", "k=4", "--length", 5]
    printed = works(*command, "--loop", "2-2x2-2", "--path", "0-3,5", "0-3,2-5").stdout
    for line in ("2-2x2-2   depth 8   path 0 1 2 3 2 3 4 5", "0-3,5   depth 5   path 0 1 2 3 5"):
        assert line in printed
    by_path = {name: rest for name, rest in re.findall(r"^(\S+)   depth .*\n((?:.*\n){3})", printed, re.M)}
    assert by_path["2-2x2-2"] == by_path["0-3,2-5"] != by_path["0-3,5"]         # losses and text
    assert re.findall(r"depth (\d+)", works(*command).stdout) == ["6", "7", "8", "10"]
    for options, message in ((["--loop", "2-2x2-3"], "7 layers"), (["--path", "0-6"], "layers 0 to 5"),
                             (["--loop", "2,2,1"], "e-LxK-d"), (["--prompt", "k " * 200], "context")):
        refused(message, *command, *options)


def test_the_scan_by_command(trained, tmp_path):
    """It can be stopped and gone on with, also where the model has moved; the rows of another scan are not mixed in."""
    rows, text = tmp_path / "rows.jsonl", written(tmp_path / "a.txt", "Mia lives in Dover. " * 200)
    questions = written(tmp_path / "q.jsonl", '{"question": "1+1?", "answer": 2}\n' * 9)
    command = ["loop.py", trained / "ckpt.pt", "--scan", "-n", 8, "--device", "cpu"]
    whole = works(*command, "--data", text, "--results", rows).stdout
    assert "gain of 2 visits: a.txt" in whole and whole.count("±") == 21 and len(rows.read_text().splitlines()) == 2 * 21 + 2
    before = rows.read_text()
    rows.write_text(before + before)            # twice is once; a block of which one half is there is measured again
    assert works(*command, "--data", text, "--results", rows).stdout == whole
    rows.write_text("".join(before.splitlines(True)[:6]))
    assert works(*command, "--data", text, "--results", rows).stdout == whole and rows.read_text() == before
    moved = shutil.copytree(trained, tmp_path / "moved" / trained.name) / "ckpt.pt"
    printed = works("loop.py", moved, *command[2:], "--data", text, "--results", rows).stdout
    assert re.findall(r"±.*", printed) == re.findall(r"±.*", whole) and len(rows.read_text()) < len(before) * 1.1
    long = written(tmp_path / "long.jsonl", ('{"question": "' + "1 + " * 200 + '1 ?", "answer": 2}\n') * 9)
    for options, message in ((["--task", "hops-9"], "choice: 'hops-9'"), (["--questions", long], "none of 8"), (["-n", 3], "4"),
                             (["--visits", 1], "2 --visits"), (["--plot", "a.xyz"], ".png")):
        refused(message, *command, *options)
    refused("-n goes only with --scan", "loop.py", trained / "ckpt.pt", "-n", 4)
    deeper = tmp_path / "deeper.pt"
    works("grow.py", trained / "ckpt.pt", "--out", deeper)      # the same output head
    wrong = written(tmp_path / "wrong.jsonl", '{"question": "1+1?", "answer": "k k k k k k k k k"}\n' * 9)
    assert "no block changes any answer" in works(*command, "--questions", wrong).stdout
    for blocks, other in ((21, [*command, "--data", text, "--visits", 3]), (21, [*command, "--questions", questions]),
                          (36, ["loop.py", deeper, *command[2:], "--data", text])):
        n = len(rows.read_text().splitlines())
        assert "±" in works(*other, "--results", rows).stdout and len(rows.read_text().splitlines()) == n + 2 * blocks + 2
    optional("matplotlib")
    works(*command, "--data", text, "--results", rows, "--plot", tmp_path / "scan.png")
    assert (tmp_path / "scan.png").read_bytes()[:4] == b"\x89PNG"
    refused("exists", *command, "--plot", tmp_path / "scan.png")


def test_what_is_no_model(trained, tmp_path):
    """The message says what is expected, not only that a config.json is missing."""
    written(tmp_path / "notes.txt", "hello")
    for name, message in ((trained, "as a checkpoint (.pt)"), (tmp_path / "notes.txt", "as a checkpoint (.pt)"),
                          (tmp_path / "none.pt", "none.pt"), (trained / "log.jsonl", "as a checkpoint (.pt)")):
        refused(message, "loop.py", name)
