"""Tasks against published examples and a solver, scoring against real generation, and what must stay apart."""
import argparse
import functools
import gzip
import json
import os
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import optional, refused, some_tokens, tiny_model, works, written

import evaluate as E
from model import get_tokenizer, score_rows


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(E.TOKENIZER)


def questions(task, n=300, **options):
    rng = random.Random(f"tests {task}")
    return [E.example(task, rng, **options) for _ in range(n)]


def encoded(tokenizer, prompt, answer):
    tokens, targets = E.encode_pairs([(prompt, answer)], tokenizer)
    return tokens[0].tolist(), targets[0].tolist()

# --- the world ------------------------------------------------------------------------------------

PUBLISHED = {       # the formats of arXiv 2409.19044, with the answer after |
    "copy-random": r"Fill in blank:\n\n([a-z]{3} ){15}___\. ->\|[a-z]{3}",
    "copy-real": r"Fill in blank:\n\n(\w+ ){14}\w+ ___\. ->\|\w+",
    "assign-0": r"Fill in blank:\n\n(\w=\d+\n){5}\w=___\. ->\|\d+",
    "assign-1": r"Fill in blank:\n\n(\w=\d+\n){5}(\w=[a-z]\n){5}\w=___\. ->\|\d+",
    "assign-0-math": r"The following is a set of simple mathematical equations\.\n\n(\w=\d+\n){5}\n"
                     r"What is the numerical value of \w\?\nAnswer:\| \d+",
    "assign-2-code": r"The following is a very short Python program\. Use the program to resolve the value of the variable"
                     r" in the question\.\n\nProgram:\n(\w=\d+\n){5}(\w=[a-z]\n){10}\nQuestion:\nWhat is the value of \w\?"
                     r"\n\nAnswer:\| \d+",
    "preschool": r"Fill in blank:\n\w=\d\n\w=\d\n\w=-?\w[+-]\w\n\w=___ ->\|-?\d+",
    "preschool-calc": r"Fill in blank:\n\w=\d\n\w=\d\n\w=-?\w[+-]\w\n\w=___ ->\|-?\d[+-]\d=-?\d+",
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_formats_as_published(task):
    for prompt, answer in questions(task, 50):
        assert re.fullmatch(PUBLISHED[task], f"{prompt}|{answer}"), prompt


@pytest.mark.parametrize("task", [task for task in E.TASKS if task.startswith(("assign", "hops"))])
def test_assignments_against_a_solver(task):
    hops = E.TASKS[task].family.keywords["hops"]
    for prompt, answer in questions(task, 50):
        values = dict(re.findall(r"^(\w)=(\w+)$", prompt, re.M))
        asked = (re.findall(r"^(\w)=(?:___.*)?\Z", prompt, re.M) or re.findall(r"value of (\w)\?", prompt))[0]
        links = -1
        while asked in values:
            asked, links = values[asked], links + 1
        assert asked == answer.strip() and links == hops
        assert len({v for v in values.values() if v.isdigit()}) == 5        # chance is one in five


def test_copying_and_preschool_against_a_solver():
    for task in ("copy-random", "copy-real"):
        for prompt, answer in questions(task):
            words = prompt.split()[3:-2]
            assert len(set(words)) == 10 and words[:10][words.index(words[-1]) + 1] == answer
    for prompt, answer in questions("preschool-calc"):
        (a, x), (b, y) = re.findall(r"^(\w)=(\d)$", prompt, re.M)
        sum_ = re.search(r"^\w=(-?\w[+-]\w)$", prompt, re.M)[1].replace(a, x).replace(b, y)
        assert answer == f"{sum_}={eval(sum_)}"


def kind_of(word):
    return next(kind for kind, words in E.CLASSES.items() if word in words)


def test_stories_against_solvers():
    for prompt, answer in questions("word-problem"):
        count = {}
        for person, verb, n in re.findall(r"(\w+) (has|finds|loses) (\d+)", prompt):
            count[person] = count.get(person, 0) + (-int(n) if verb == "loses" else int(n))
        asked = re.search(r"does (\w+) have \?", prompt)
        assert int(answer) == (count[asked[1]] if asked else sum(count.values()))
    for prompt, answer in questions("open-book"):
        who = re.search(r"Where is (?:the )?(\w+) \?", prompt)[1]
        sentence, = [s for s in prompt.split("\n")[0].split(" . ") if re.search(rf"\b{who}\b", s)]
        assert sentence.rstrip(" .").split()[-1] == answer.strip()
    for prompt, answer in questions("rule", shots=12):
        labels, *shots, asked = prompt.split("\n")
        rule = {kind_of(word): label for word, label in (shot.split() for shot in shots)}
        assert answer.strip() in labels.split() and rule.get(kind_of(asked), answer.strip()) == answer.strip()
    assert len(dict(questions("closed-book"))) == len(set(questions("closed-book")))        # facts never change


@pytest.mark.parametrize("task", E.TASKS)
def test_a_task_is_a_function_of_its_seed_and_can_be_guessed_as_often_as_it_says(task, tokenizer):
    assert questions(task, 20) == questions(task, 20)
    pairs = questions(task, 2000 if task == "word-problem" else 300)
    most = Counter(answer for _, answer in pairs).most_common(1)[0][1] / len(pairs)
    assert most < E.TASKS[task].chance + 0.1
    for prompt, answer in pairs[:50]:       # prompt and answer share no token: encoded together they are as apart
        begin, end = tokenizer.encode(prompt), tokenizer.encode(answer)
        assert encoded(tokenizer, prompt, answer) == ([tokenizer.eot, *begin, *end[:-1]], [-1] * len(begin) + end) and end


@pytest.mark.parametrize("stream", E.STREAMS)
def test_training_text_never_contains_a_held_out_instance(stream, tokenizer):
    """Held-out puzzles are known by their checksum: none may stand in the text that is trained on."""
    rng, found = random.Random(0), 0
    text = "\n" + "\n".join(E.document(rng, stream) for _ in range(1500))
    for task in ("closed-book", "open-book", "word-problem", "hops-0", "hops-1"):
        for heldout in (True, False):
            for prompt, _ in questions(task, 100, heldout=heldout):
                assert not (heldout and f"\n{prompt}" in text)
                found += f"\n{prompt}" in text
    assert "Fill in blank:" not in text and "=___" not in text and "___. ->" not in text        # the published formats
    assert found or stream == "math"        # the same search finds what may be there, such as facts asked for


@pytest.mark.parametrize("stream", E.STREAMS)
def test_a_row_is_a_function_of_its_number(stream, tokenizer):
    row = E.world_row(tokenizer, 64, stream, False, 0, 3)
    assert len(row) == 65 and row[0] == tokenizer.eot and (row == E.world_row(tokenizer, 64, stream, False, 0, 3)).all()
    for other in ((stream, False, 0, 4), (stream, False, 1, 3), (stream, True, 0, 3)):
        assert (row != E.world_row(tokenizer, 64, *other)).any()


def test_shots_are_not_the_question_and_never_held_out():
    for task in ("assign-0", "preschool"):
        for (alone, answer), (prompt, same) in zip(questions(task, 30), questions(task, 30, shots=3)):
            assert prompt.endswith(alone) and answer == same        # the same questions at every number of shots
            assert len(re.findall("Fill in", prompt)) == 4 and prompt.count(alone) == 1


def test_as_many_shots_as_fit(tokenizer):
    tokens, _, shots = E.encode_examples("assign-0", tokenizer, 100, 20)
    assert 0 < shots < 5 and tokens.shape[1] <= 100 and len(set(map(tuple, tokens.tolist()))) == 20
    for task, context, shots in (("assign-0", 12, None), ("assign-0", 100, 5), ("rule", 1000, 48)):     # as asked, or none
        with pytest.raises(E.TooLong, match="48 words" if task == "rule" else "context"):
            E.encode_examples(task, tokenizer, context, 20, shots)

# --- scoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, [0, 1, 2, 3, 2, 3, 4, 5]])
@pytest.mark.parametrize("eot", [None, 5])
def test_scoring_equals_greedy_generation(path, eot):
    """Teacher forcing with all tokens the arg-max is the same as generating the whole answer: half of the answers here
    are what the model generates, the others are changed in the last token."""
    model, pairs = tiny_model(eot=eot), []
    for i in range(24):
        prompt, n = [0, *some_tokens(1, 2 + i % 5, seed=i)[0].tolist()], 1 + i % 4
        answer = model.generate(torch.tensor([prompt]), n, path, temperature=0)[0, len(prompt):].tolist()
        answer = answer if i % 2 else answer[:-1] + [(answer[-1] + 1) % 61]
        pairs.append(tuple("".join(f"{token} " for token in some) for some in (prompt[1:], answer)))
    words = get_tokenizer({"words": list(map(str, range(61))), "pattern": r"\d+"})
    right = score_rows(model, *E.encode_pairs(pairs, words), path, batch=7)[1]
    assert right.tolist() == [bool(i % 2) for i in range(24)]


def test_a_prompt_and_its_answer_are_encoded_together(bytes_for_gpt2, monkeypatch):
    """Apart, GPT-2's splitting gave tokens that running text never has, in half of the preschool questions."""
    tokenizer = get_tokenizer({"words": ["<|endoftext|>", "a", "->", "-", "-1", "->-1", "1"], "pattern": r"[-=>1]+|\w"})
    assert tokenizer.encode("a->") == [1, 2] and tokenizer.encode("a->-1") == [1, 5]
    assert encoded(tokenizer, "a->", "-1") == ([0, 1], [-1, 5])
    assert encoded(get_tokenizer("gpt2"), "ab", " c") == ([256, 97, 98, 32], [-1, -1, 32, 99])


def test_fine_tuning_learns_its_examples_and_leaves_the_model_alone(tokenizer):
    model = tiny_model(vocab_size=tokenizer.n_vocab, context=128, n_layer=2)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    score = E.finetune(model, tokenizer, "closed-book", 8, n_test=8, steps=15)["value"]
    assert 0 <= score <= 1 and all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


SAME = [("She has 1,072 left.\n#### 1,072", "#### 1072"), ("so 3 + 4 = 7.", "7"), (" yes ", "yes"), ("18.00", "18"),
        ("#### $3.50", "3.5"), ("-2.5", "-5/2"), ("4/6", "2/3"), ("the range 3-5", "5"), ("it fell to -5.", "-5"),
        ("2*x + 3", "2*x + 3"), ("2*x  + 3", "2*x + 3"), ("0.5", ".5"), ("is .5", "0.5"), ("-$5", "-5"), ("$ is \u22123", "-3"),
        ("-3", "\u22123"), ("-$1,234.50", "-1234.5"), ("first 4\n#### 5", "#### 5"), ("12", "so 3 * 4\n#### 12")]
OTHER = [("5*y + 3", "2*x + 3"), ("3", "2*x + 3"), (".5", "5"), ("5", ".5"), ("5", "-$5"), ("3", "\u22123"), ("2/3", "1/3"),
         ("10", "1"), ("no number", "7"), ("", "7"), ("4 = 7 - 3", "7"), ("yes, it is", "yes"), ("7", "seven"), ("1072", "72")]


@pytest.mark.parametrize("prediction, reference, right", [(*p, True) for p in SAME] + [(*p, False) for p in OTHER])
def test_answers(prediction, reference, right):
    """The rule for predictions, the last number counts, was applied to the reference as well."""
    assert E.is_same(prediction, reference) == right

# --- files ----------------------------------------------------------------------------------------


def jsonl(*items):
    return "".join(json.dumps(item) + "\n" for item in items)


FORMS = {   # ways to write the same two documents
    "a.jsonl": jsonl({"text": "Mia"}, {"text": "14 14"}), "UPPER.JSONL": jsonl({"text": "Mia"}, {"text": "14 14"}),
    "bom.jsonl": "\ufeff" + jsonl({"text": "Mia"}, {"text": "14 14"}),
    "blank.jsonl": "\n" + jsonl({"text": "Mia"}) + "\n  \n" + jsonl({"text": "14 14"}) + "\n\n",
    "crlf.jsonl": jsonl({"text": "Mia"}, {"text": "14 14"}).replace("\n", "\r\n")}


@pytest.mark.parametrize("name", FORMS)
def test_valid_data_in_every_form(name, tmp_path):
    assert list(E.read_pairs(str(written(tmp_path / name, FORMS[name])))) == [("", "Mia"), ("", "14 14")]


def test_fields_questions_and_plain_text(tmp_path):
    file = str(written(tmp_path / "a.jsonl", jsonl({"body": "a"}, {"body": 7})))
    assert list(E.read_pairs(file, "body")) == [("", "a"), ("", "7")]
    for field in (None, "bdoy"):                # a mistyped field was passed over
        with pytest.raises(ValueError, match="body.*--field"):
            list(E.read_pairs(file, field))
    file = str(written(tmp_path / "q.jsonl", jsonl({"question": "1+1?", "answer": 2})))     # an answer that is a number
    for field in (None, "body"):                # --field is of the other files
        assert list(E.read_pairs(file, field)) == [("Question: 1+1?\nAnswer:", " 2")]
        assert list(E.read_pairs(str(written(tmp_path / "A.TXT", "\ufeffa\n\nb")), field)) == [("", "a\n\nb")]


@pytest.mark.parametrize("kind", ["raw", "llm.c", "gz"])
def test_token_files_and_text_give_the_same_tokens(kind, tokenizer, tmp_path):
    tokens = np.array([0, 5, 6, 0, 7, 8] * 9, dtype=np.uint16)
    header = np.array([20240520, 1, len(tokens)] + [0] * 253, dtype=np.int32)
    if kind == "gz":
        text = jsonl({"text": tokenizer.decode([5, 6])}, {"text": tokenizer.decode([7, 8])}) * 9
        file = written(tmp_path / "a.JSONL.gz", gzip.compress(text.encode()))
    else:
        file = written(tmp_path / "a.bin", (header.tobytes() if kind == "llm.c" else b"") + tokens.tobytes())
    assert np.concatenate(list(E.encode_files([str(file)], tokenizer))).tolist() == tokens.tolist()
    assert E.token_rows(str(file), tokenizer, 9, 3).flatten().tolist() == tokens[:30].tolist()


def test_questions_of_a_file(trained, tmp_path, bytes_for_gpt2, capsys):
    file = written(tmp_path / "q.jsonl", "\ufeff" + jsonl({"question": "1+1?", "answer": 2}) + "\n" +
                   jsonl({"question": "2+1?", "answer": "1+2 = 3"}, {"question": "k?", "answer": 0}))
    read = functools.partial(E.read_questions, str(file), get_tokenizer("gpt2"))
    (first, answer), _, (_, zero) = read(99)
    assert first.endswith("1+1?\nAnswer:") and answer.strip() == "2" and zero.strip() == "0"
    assert len(read(99, shots=1, skip=2)) == 1          # the same questions at every number of shots
    assert len(read(26)) == 2 and "1 of 3 do not fit the context of 26" in capsys.readouterr().out     # once: wrong
    with pytest.raises(E.TooLong, match="none of 3"):
        read(9)
    (prompt, _), = read(99, shots=2, skip=2)
    assert prompt.count("Question:") == 3 and "1+1?\nAnswer: 2\n\n" in prompt and prompt.endswith("k?\nAnswer:")
    rows = tmp_path / "rows.jsonl"
    command = ["evaluate.py", trained / "ckpt.pt", "--questions", file, "--device", "cpu", "--length", 4, "--results", rows]
    assert "q.jsonl" in works(*command, "--shots", 1, "--loop", "2-2x2-2").stdout
    assert [json.loads(line)["n"] for line in rows.read_text().splitlines()] == [2, 2]
    for bad in (jsonl({"question": "a", "answer": " "}), jsonl({"question": "a"}), jsonl({"answer": "a"}), "", "[1]", "{",
                jsonl({"question": "a", "answer": None}), jsonl({"question": None, "answer": "a"})):
        written(file, jsonl({"question": "1+1?", "answer": 2}) * bool(bad) + bad)
        refused("q.jsonl", *command)                    # before the first answer, not after the last
    assert len(rows.read_text().splitlines()) == 2


def test_a_question_that_the_model_goes_on_to_ask_is_not_scored(tokenizer, monkeypatch):
    """The last number counts: of the answer, not of what base models write after it."""
    monkeypatch.setattr(E, "complete", lambda *_: " 3 + 4 = 7\nQuestion: 4 + 5 ?\nAnswer: 9")
    pairs = [("Question: 3 + 4 ?\nAnswer:", " 7"), ("Question: 3 + 4 ?\nAnswer:", " 9")]
    assert E.answer_questions(tiny_model(), tokenizer, pairs, 20).tolist() == [True, False]
    for text in ("\n\nThe answer is 7.", "3 + 4\n\nis more than 6.\n#### 7\nQuestion: 4 + 5 ?\n#### 9"):
        monkeypatch.setattr(E, "complete", lambda *_: text)
        assert E.answer_questions(tiny_model(), tokenizer, pairs, 20).tolist() == [True, False]

# --- rows, tables, the command --------------------------------------------------------------------

ROWS = [{"table": "tasks", "model": model, "seed": seed, "column": column, "value": value, **more}
        for model, seed, values in (("baseline", 0, (2.0, 1.0, 0.30)), ("baseline", 1, (2.2, 1.0, 0.50)),
                                    ("lidas", 0, (2.1, 0.8, 0.25)))
        for column, value, more in (("loss general", values[0], {}), ("flops", values[1], {}),
                                    ("assign-0", values[2], {"n": 100, "se": 0.0433, "chance": 0.2}))]


def test_tables_are_printed_from_rows(tmp_path):
    file = written(tmp_path / "rows.jsonl", jsonl(*ROWS, *ROWS))        # what is measured again counts once
    lines = {line.split()[0]: line.split() for line in works("evaluate.py", "--table", file).stdout.splitlines() if line}
    assert lines["baseline"] == ["baseline", "2", "2.100±0.141", "1.000±0.000", "0.400±0.141"]
    assert lines["lidas"] == ["lidas", "1", "2.100", "0.800", "0.250±0.043"]        # one seed: the standard error
    assert lines["chance"] == ["chance", "0.2"] and lines["n"] == ["n", "100"]
    refused("nothing to show", "evaluate.py", "--table", file, "--only", "none")
    for bad in ("[]", "{}", '{"table": "tasks"', json.dumps({**ROWS[0], "value": None})):
        refused("rows.jsonl", "evaluate.py", "--table", written(file, jsonl(ROWS[0]) + bad))


def test_differences_are_paired_by_seed(tmp_path):
    """(2 - 1) - (4 - 2) on seed 0, (5 - 1) - (3 - 2) on seed 1: a mean of 1, deviation 2.83; seed 2 lacks a line."""
    values = {"a": (2, 5, 9), "b": (1, 1), "c": (4, 3, 1), "d": (2, 2, 1)}
    rows = [{**ROWS[0], "model": name, "seed": seed, "value": value} for name, found in values.items()
            for seed, value in enumerate(found)]
    file = written(tmp_path / "rows.jsonl", jsonl(*rows))
    compare = ["evaluate.py", "--table", file, "--compare"]
    printed = works(*compare, *"abcd").stdout.splitlines()
    assert printed[-1].split() == [*"(a-b)-(c-d)".replace("-", " - ").split(), "2", "+1.000±25.420"] and len(printed) == 8
    assert works(*compare, "c", "d").stdout.split()[-5:] == ["c", "-", "d", "3", "+1.000±2.483"]
    assert "(2)" in works("evaluate.py", "--table", written(file, jsonl(*rows, *({**row, "column": "x"} for row in rows[:2])))).stdout
    refused("two lines", *compare, "a")
    refused("two seeds", "evaluate.py", "--table", written(file, jsonl(rows[0], rows[3])), "--compare", "a", "b")
    refused("nothing", *compare, "a", "e")


def test_the_command(trained, tmp_path):
    rows, model = tmp_path / "rows.jsonl", trained / "ckpt.pt"
    common = ["evaluate.py", model, "-n", 8, "--device", "cpu"]
    works(*common, "--tasks", "closed-book", "hops-1", "--loop", "2-2x2-2", "--path", "0-3,5", "--results", rows)
    measured = [json.loads(line) for line in rows.read_text().splitlines()]
    cells = {(row["model"].split("lidas")[-1].strip(), row["column"]) for row in measured}
    assert {("", "hops-1"), ("2-2x2-2", "hops-1"), ("0-3,5", "loss math")} <= cells
    printed = works("evaluate.py", "--table", rows).stdout
    again = works(*common, "--tasks", "closed-book", "hops-1", "--loop", "2-2x2-2", "--path", "0-3,5").stdout
    assert again == printed
    for more, table in ((["--shots", 0, 1], "shots"), (["--finetune", 4], "fine-tuning")):
        assert table in works(*common, "--tasks", "open-book", *more).stdout
    data = written(tmp_path / "a.txt", "Mia lives in Dover . " * 99)
    assert "a.txt" in works(*common, "--tasks", "--data", data).stdout
    assert json.loads(works(*common, "--tasks", "--data", data, "--json").stdout.splitlines()[-1])["column"] == "loss a.txt"
    refused("none.pt", "evaluate.py", model, "none.pt", "--results", tmp_path / "more.jsonl")
    assert not (tmp_path / "more.jsonl").exists()               # noticed before the first model was measured
    stable = works("evaluate.py", model, trained / "stable.pt", "--tasks").stdout
    assert "lidas/stable.pt" in stable
    # two models of one name and seed were once one line; one file is one, however it is written
    shutil.copytree(trained, f"{trained}-s0", dirs_exist_ok=True)
    refused("one name and one seed", "evaluate.py", model, f"{trained}-s0/ckpt.pt", "--tasks")
    shutil.rmtree(f"{trained}-s0")
    assert works("evaluate.py", model, os.path.join(trained, ".", "ckpt.pt"), "--tasks").stdout.count("lidas") == 1


def test_seeds_share_a_line_and_runs_of_other_folders_do_not():
    for name, label in (("out/lidas-s3/ckpt.pt", "lidas"), ("out/lidas-3/stable.pt", "lidas/stable.pt"), ("a-s4/ckpt.pt", "a-s4"),
                        ("x/a-s3/ckpt.pt", "x/a"), ("deeper.pt", "deeper.pt"), ("ckpt.pt", "ckpt.pt"), ("org/Llama", "org/Llama")):
        assert E.label_of(name, {"args": {"seed": 3}}) == (label, 3)


def test_a_task_that_does_not_fit_the_context_is_left_out(tokenizer, capsys):
    """One such task ended the default command, and took the others' table with it."""
    args = argparse.Namespace(tasks=["hops-6", "hops-0"], shots=[0], n=4, loop=[], path=[], questions=None, finetune=None)
    model, checkpoint = tiny_model(vocab_size=tokenizer.n_vocab, context=48), {"tokenizer": E.TOKENIZER}
    assert [table.split(":")[0] for table, *_ in E.measure_tasks(args, model, checkpoint)] == ["hops-0"]
    assert "hops-6 after 0 examples is longer than the context of 48: left out" in capsys.readouterr().out


def test_curves(trained, tmp_path):
    """One seed that had run on from a checkpoint, with a line twice, ended the figure in a traceback."""
    optional("matplotlib")
    printed = works("evaluate.py", trained / "ckpt.pt", "--curves").stdout
    assert all(f"step {step}" in printed for step in (0, 8, 10, 16, 20, 24, 30))        # the last one hid the others
    works("evaluate.py", trained / "ckpt.pt", "--curves", "--plot", tmp_path / "log.png")
    assert (tmp_path / "log.png").read_bytes()[:4] == b"\x89PNG"
    rows = [{"table": "training", "model": f"a step {step}", "seed": seed, "column": "hops-0", "value": 0.5,
             "depth": 2, "x": 0.1 * step} for seed, steps in ((0, (0, 1, 2)), (1, (0, 1, 1, 2, 3))) for step in steps]
    file = written(tmp_path / "rows.jsonl", jsonl(*rows))
    works("evaluate.py", "--table", file, "--plot", tmp_path / "growth.png")
    losses = written(tmp_path / "losses.jsonl", jsonl(*({**row, "column": "loss general"} for row in rows)))
    refused("nothing to draw", "evaluate.py", "--table", losses, "--plot", tmp_path / "empty.png")
    refused("does not go with --plot", "evaluate.py", "--table", file, "--plot", tmp_path / "b.png", "--json")


def test_outputs_overwrite_nothing(trained, tmp_path):
    """An output named like the model destroyed the checkpoint."""
    shutil.copytree(trained, tmp_path / "run")
    model, data = tmp_path / "run" / "ckpt.pt", tmp_path / "run" / "log.jsonl"
    before = {file: file.read_bytes() for file in (model, data)}
    for name, option in (("signatures.py", "--plot"), ("signatures.py", "--results"),
                         ("evaluate.py", "--results"), ("grow.py", "--out"), ("loop.py", "--plot"), ("loop.py", "--results")):
        scan = ["--scan"] if name == "loop.py" else []
        assert not refused("", name, model, *scan, option, model).stdout
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize("options", [
    ["--tasks", "juggling"], ["-n", 0], ["--loop", "2-2x2-3"], ["--loop", "2,2,1"], ["--path", "0-6"], ["--shots", -1], ["--length", 4],
    ["--shots", 1, "--finetune", 4], ["--questions", "none.jsonl"], ["--data", "none.txt"], ["--data", "a.csv"], ["--device", "gpu"],
    ["--finetune", 4, "--loop", "2-2x2-2"], ["--curves", "--plot", "a.xyz"], ["--table", "none.jsonl"]], ids=str)
def test_bad_input_ends_in_one_line(options, trained, tmp_path):
    """Also options that do not apply: they were passed over."""
    results = ["--results", tmp_path / "rows.jsonl"]
    assert not refused("", "evaluate.py", trained / "ckpt.pt", *options, *results).stdout
    assert not list(tmp_path.iterdir())
