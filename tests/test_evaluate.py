"""Tasks against published examples and solvers, scoring against real generation, and what must stay apart."""
import json
import random
import re
import shutil
import statistics
from collections import Counter

import pytest
import torch
from conftest import script, some_tokens, tiny_model

import evaluate as E
from loop import load_encoding


def questions(task, n=2000):
    rng = random.Random(f"guesses {task}")
    return [(prompt, answer.strip()) for prompt, answer in (E.example(task, rng) for _ in range(n))]


def test_what_can_be_right_without_an_answer():
    """The chance levels of the tables, and the shortcuts that README names. Open-book's once was 20%."""
    named, last = [], []
    for prompt, answer in questions("open-book"):
        places = [word for word in re.findall("[a-z]+", prompt.split("\n")[0]) if word in E.PLACES]
        assert answer in places
        named.append(1 / len(set(places)))
        last.append(answer == places[-1])
    assert statistics.mean(named) == pytest.approx(E.TASKS["open-book"][2], abs=0.01)
    assert statistics.mean(last) == pytest.approx(0.53, abs=0.02)
    counts = Counter(answer for _, answer in questions("word-problem"))
    assert counts.most_common(1)[0][1] / 2000 == pytest.approx(E.TASKS["word-problem"][2], abs=0.01)
    for task, expected in ("assign-1", 0.46), ("assign-2", 0.58):
        share = []
        for prompt, answer in questions(task):
            value = {}
            for name, given in re.findall(r"(\w)=(\w+)\n", prompt):
                value[name] = value.get(given, given)
            counts = Counter(list(value.values())[-5:]).most_common()
            most = [number for number, n in counts if n == counts[0][1]]
            share.append((answer in most) / len(most))
        assert statistics.mean(share) == pytest.approx(expected, abs=0.03), task


@pytest.fixture(scope="module")
def encoding():
    return load_encoding(E.world_words())


def test_rows_of_several_processes_are_those_of_one(encoding, monkeypatch):
    alone = E.world_rows(encoding, 32, 5, "general", False, seed=0)
    monkeypatch.setattr(E, "FOR_ONE_PROCESS", 0)
    assert (E.world_rows(encoding, 32, 5, "general", False, seed=0) == alone).all() and len(alone) == 5


class Scripted:
    """Stands in for random.Random: sample() gives what it is told, in order."""
    def __init__(self, *samples):
        self.samples = list(samples)

    def sample(self, population, k):
        taken = self.samples.pop(0)
        assert len(taken) == k and all(x in population for x in taken)
        return taken

    def choice(self, population):
        return population[0]


def test_copying_as_published():
    words = "pum nyj gdq ocu rzk jbw mlz eny kyx uni".split()
    body, questions = E.copying(Scripted(words), words)
    assert body + questions[4][0] == ("Fill in blank:\n\npum nyj gdq ocu rzk jbw mlz eny kyx uni "
                                      "rzk jbw mlz eny kyx ___. ->") and questions[4][1] == "uni"


def test_assignment_as_published():
    body, questions = E.assignment(Scripted(list("osumq"), [14, 4, 8, 10, 12]))
    assert body + questions[3][0] == "Fill in blank:\n\no=14\ns=4\nu=8\nm=10\nq=12\nm=___. ->"
    assert questions[3][1] == "10"
    body, questions = E.assignment(Scripted(list("osumqabcde"), [14, 4, 8, 10, 12]), depth=1)
    assert body.endswith("q=12\na=o\nb=o\nc=o\nd=o\ne=o\n") and questions[2] == ("c=___. ->", "14")


def test_wordings_as_published():
    body, questions = E.assignment(Scripted(list("nsumq"), [14, 4, 8, 10, 12]), wording="math")
    assert body.startswith("The following is a set of simple mathematical equations.\n\nn = 14\n")
    assert (body + questions[0][0]).endswith("What is the numerical value of n?\nAnswer:")
    assert questions[0][1] == " 14"
    body, _ = E.assignment(Scripted(list("nsumq"), [14, 4, 8, 10, 12]), wording="code")
    assert body.startswith("The following is a very short Python program. Use the program to resolve the "
                           "value of the variable in the question.\n\nProgram:\n")


def test_preschool_as_published():
    class Rng(Scripted):
        def randint(self, low, high):
            return self.numbers.pop(0)

        def choice(self, questions):
            return questions[2]     # of +x+y, +x-y, -x+y, -x-y
    rng = Rng(list("kjl"))
    rng.numbers = [1, 8]
    body, [(question, answer)] = E.preschool(rng)
    assert body + question == "Fill in blank:\nk=1\nj=8\nl=-k+j\nl=___ ->" and answer == "-1+8=7"


@pytest.mark.parametrize("task", [task for task in E.TASKS if task.startswith("assign")])
def test_assignment_against_a_solver(task):
    rng = random.Random(0)
    for _ in range(50):
        prompt, answer = E.example(task, rng)
        values = dict(re.findall(r"^(\w) ?= ?(\w+)$", prompt, re.M))
        value = (re.findall(r"^(\w)=___", prompt, re.M) or re.findall(r"value of (\w)\?", prompt))[0]
        links = -1
        while value in values:
            value, links = values[value], links + 1
        assert value == answer.strip() and links == E.TASKS[task][1]["depth"]
        assert len({v for v in values.values() if v.isdigit()}) == 5        # chance is one in five


def test_word_problems_against_a_solver():
    rng = random.Random(0)
    for _ in range(200):
        prompt, answer = E.example("word-problem", rng)
        count = {}
        for person, verb, n in re.findall(r"(\w+) (has|finds|loses) (\d+)", prompt):
            count[person] = count.get(person, 0) + (-int(n) if verb == "loses" else int(n))
        asked = re.search(r"does (\w+) have\?", prompt)
        assert int(answer) == (count[asked[1]] if asked else sum(count.values()))


def test_open_book_answers_are_the_last_place():
    rng = random.Random(0)
    for _ in range(200):
        prompt, answer = E.example("open-book", rng)
        who = re.search(r"Where is (the )?(\w+)\?", prompt)[2]
        sentences = [s for s in prompt.split("\n")[0].split(". ") if re.search(rf"\b{who}\b", s)]
        assert sentences[-1].rstrip(".").split()[-1] == answer.strip()


def test_closed_book_facts_never_change():
    asked = {E.example("closed-book", random.Random(seed)) for seed in range(300)}
    assert len(dict(asked)) == len(asked)       # one answer per question


@pytest.mark.parametrize("task", E.TASKS)
def test_answers_are_tokens_of_their_own(task, encoding):
    """Encoded together, prompt and answer could share a token at the border: never learned as it is asked."""
    rng = random.Random(0)
    for _ in range(20):
        prompt, answer = E.example(task, rng)
        encode = encoding.encode_ordinary
        assert encode(prompt) + encode(answer) == encode(prompt + answer) and encode(answer)
        assert encoding.decode(encode(prompt)) == prompt


def test_the_encoding_is_small_and_takes_any_text(encoding):
    assert encoding.n_vocab <= 1024
    text = "Ünïcode, 12345 and\r\n\ttabs: ☃"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


@pytest.mark.parametrize("stream", E.STREAMS)
def test_training_text_never_contains_a_held_out_instance(stream):
    """Held-out puzzles are known by their checksum: none may stand in the text that is trained on."""
    text, rng = "", random.Random(0)
    for _ in range(1000):
        text += "\n" + E.document(rng, stream, heldout=False)
    rng, found = random.Random(1), 0
    for task in E.TASKS:
        for _ in range(40):
            prompt, answer = E.example(task, rng)
            assert f"\n{prompt}" not in text
            found += f"\n{E.example(task, rng, heldout=False)[0]}" in text
    assert found or stream == "math"        # the same search finds what may be there, such as facts asked for


def test_shots_are_not_the_question_and_never_held_out():
    rng = random.Random(0)
    for task in ("assign-0", "closed-book", "preschool"):
        for _ in range(50):
            prompt, _ = E.prompt_with_shots(task, rng, 3)
            *shots, question = re.split("\n\n" if task == "closed-book" else r"\n\n(?=Fill)", prompt)
            assert len(shots) == 3 and all(question not in shot for shot in shots)


def test_questions_are_the_same_at_every_number_of_shots():
    prompts = [[E.prompt_with_shots("assign-0", rng, shots)[0] for _ in range(5)]
               for shots in (0, 2) for rng in [random.Random(3)]]
    assert all(more.endswith(none) and len(more) > len(none) for none, more in zip(*prompts))


def test_as_many_shots_as_fit(encoding):
    examples, shots = E.encode_examples("assign-0", encoding, 100, 20, shots=5)
    assert 0 < shots < 5 and max(len(p) + len(a) for p, a in examples) <= 100
    with pytest.raises(ValueError, match="context"):
        E.encode_examples("assign-0", encoding, 12, 20)


@pytest.mark.parametrize("path", [None, [0, 1, 2, 3, 2, 3, 4, 5]])
def test_scoring_equals_greedy_generation(path):
    """Teacher forcing with all tokens the arg-max is the same as generating the whole answer: half of the
    answers here are what the model generates, half of those are changed in the last token."""
    model = tiny_model()
    prompts = [some_tokens(1, 3 + i % 5, seed=i)[0].tolist() for i in range(24)]
    examples = []
    for i, prompt in enumerate(prompts):
        n = 1 + i % 4
        answer = model.generate(torch.tensor([prompt]), n, path, temperature=0)[0, len(prompt):].tolist()
        examples.append((prompt, answer if i % 2 else answer[:-1] + [(answer[-1] + 1) % 61]))
    assert E.is_right(model, examples, path, batch=7) == [bool(i % 2) for i in range(24)]
    assert model.training is False


def test_accuracy_comes_with_its_error(encoding):
    model = tiny_model(vocab_size=encoding.n_vocab, context=128)
    score = E.accuracy(model, encoding, "assign-0", n=20)
    assert score["n"] == 20 and score["chance"] == 0.2 and 0 <= score["value"] <= 1
    assert score["se"] == pytest.approx((score["value"] * (1 - score["value"]) / 20) ** 0.5)


def test_fine_tuning_learns_its_examples_and_leaves_the_model_alone(encoding):
    model = tiny_model(vocab_size=encoding.n_vocab, context=128, n_layer=2)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    score = E.finetune(model, encoding, "closed-book", 8, n_test=8, steps=15)
    assert 0 <= score <= 1 and all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_final_answers():
    assert E.final_answer("She has 1,072 left.\n#### 1,072\nmore") == "1072"
    assert E.final_answer("so 3 + 4 = 7.") == "7" and E.final_answer(" yes ") == "yes"
    assert E.final_answer("-2.5") == "-5/2" and E.final_answer("18.00") == "18"
    assert E.final_answer("#### $3.50") == E.final_answer("3.5") and E.final_answer("1/0") == "0"
    assert E.final_answer("#### 2/3") != E.final_answer("#### 1/3") and E.final_answer("4/6") == "2/3"
    assert E.final_answer("the range 3-5") == "5" and E.final_answer("it fell to -5.") == "-5"


ROWS = [{"table": "tasks", "model": model, "seed": seed, "column": column, "value": value, **more}
        for model, seed, values in (("baseline", 0, (2.0, 1e12, 0.30)), ("baseline", 1, (2.2, 1e12, 0.50)),
                                    ("lidas", 0, (2.1, 8e11, 0.25)))
        for column, value, more in (("loss general", values[0], {}), ("flops", values[1], {}),
                                    ("assign-0", values[2], {"n": 100, "se": 0.0433, "chance": 0.2}))]


def test_tables_are_printed_from_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS + ROWS))     # the second time counts once
    result = script("evaluate.py", "--table", file)
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert lines["baseline"] == ["baseline", "2", "2.100±0.141", "100%", "40.0±14.1"]
    assert lines["lidas"] == ["lidas", "1", "2.100", "80%", "25.0±4.3"]        # one seed: the standard error
    assert lines["chance"] == ["chance", "20"] and lines["n"] == ["n", "100"]
    file.write_text("".join(json.dumps({**ROWS[0], "run": run}) + "\n" for run in ("a/ckpt.pt", "b/ckpt.pt")))
    result = script("evaluate.py", "--table", file)             # the second one alone was once shown
    assert result.returncode == 2 and "a/ckpt.pt and b/ckpt.pt" in result.stderr and not result.stdout


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"table": "tasks"', json.dumps({**ROWS[0], "value": None}),
                                  json.dumps({**ROWS[0], "model": 3})])
def test_a_line_that_is_no_row_is_named(line, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + f"\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        E.read_rows(file)


def test_models_that_would_share_a_line_are_refused(trained, tmp_path):
    """Two models of one name and one seed were once one line: the second one's numbers."""
    shutil.copytree(trained, tmp_path / "lidas")
    result = script("evaluate.py", trained / "ckpt.pt", tmp_path / "lidas" / "ckpt.pt", "--tasks")
    assert result.returncode == 2 and "share the line lidas" in result.stderr, result.stderr
    result = script("evaluate.py", trained / "ckpt.pt", trained / "stable.pt", "--tasks")
    assert result.returncode == 0 and "lidas/stable.pt" in result.stdout, result.stderr


def test_the_command(trained, tmp_path):
    rows = tmp_path / "rows.jsonl"
    result = script("evaluate.py", trained / "ckpt.pt", "-n", 8, "--tasks", "closed-book", "--loop", "2,2,1",
                    "--results", rows)
    assert result.returncode == 0, result.stderr
    measured = [json.loads(line) for line in rows.read_text().splitlines()]
    columns = [(row["table"], row["column"]) for row in measured]
    assert ("closed-book by looped path", "own path") in columns
    assert ("loss math by looped path", "2,2,1") in columns
    assert {row["model"] for row in measured} == {"lidas"}
    for more, table in ((["--sweep", "--repeats", 1], "sweep"), (["--shots", 0, 1], "shots"),
                        (["--finetune", 4, "--draws", 1], "fine-tuning")):
        result = script("evaluate.py", trained / "ckpt.pt", "-n", 8, "--tasks", "closed-book", *more)
        assert result.returncode == 0 and table in result.stdout, result.stderr


def test_a_question_that_the_model_goes_on_to_ask_is_not_scored(tmp_path, encoding, monkeypatch):
    """The last number counts: of the answer, not of what base models write behind it."""
    monkeypatch.setattr(E, "continue_text", lambda *_: " 3 + 4 = 7\nQuestion: 4 + 5?\nAnswer: 9")
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "3 + 4?", "answer": "7"}\n{"question": "3 + 4?", "answer": "9"}\n')
    assert E.answer_file(tiny_model(), encoding, str(file), None, 20) == [True, False]


def test_questions_from_a_file(trained, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "1+1?", "answer": "two\\n#### 2"}\n' * 3)
    result = script("evaluate.py", trained / "ckpt.pt", "--questions", file, "--length", 8)
    assert result.returncode == 0 and "q.jsonl" in result.stdout, result.stderr
    file.write_text(json.dumps({"question": "1+1?" * 99, "answer": "2"}))
    result = script("evaluate.py", trained / "ckpt.pt", "--questions", file)
    assert result.returncode == 0 and "1 of 1 questions fill the context" in result.stderr, result.stderr
    file.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "1+1?", "answer": " "}\n')
    result = script("evaluate.py", trained / "ckpt.pt", "--questions", file)
    assert result.returncode == 2 and "line 2: the answer is empty" in result.stderr, result.stderr
    file.write_text('{"question": "1+1?", "answer": "2"}\n{"question": 3}\n')
    result = script("evaluate.py", trained / "ckpt.pt", "--questions", file)
    assert result.returncode == 2 and "line 2" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["none.pt"], ["--tasks", "juggling"], ["-n", 0], ["--loop", "1,2"],
                                     ["--loop", "9,9,9"], ["--table", "none.jsonl"],
                                     ["--only", "none"], ["--sweep", "--block", 7], ["--shots", 1, "--sweep"],
                                     ["--tasks", "--sweep"], ["--shots", 1, "--loop", "2,2,1"]])
def test_bad_input_ends_in_one_line(command, trained):
    checkpoint = [] if command in ([], ["none.pt"]) or "--table" in command else [trained / "ckpt.pt"]
    result = script("evaluate.py", *checkpoint, *command)
    assert result.returncode == 2 and "error" in result.stderr, result.stderr
    assert result.stderr.strip().count("\n") == 0, result.stderr
