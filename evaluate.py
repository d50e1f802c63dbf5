"""
Reasoning primitives and the paper's other tasks, on a small world that is also the built-in training text.

    python evaluate.py out/*/ckpt.pt                     # one table, mean +- std over seeds: a minute a model
    python evaluate.py out/*/ckpt.pt --loop 3,2,1 3,2,2  # the same along looped paths: start,block,repeats
    python evaluate.py out/*/ckpt.pt --sweep             # best block and repeats (claim 2): minutes a model
    python evaluate.py out/*/ckpt.pt --tasks assign-1 --shots 0 1 2 3       # in-context curve (claim 3)
    python evaluate.py out/*/ckpt.pt --tasks assign-1 --finetune 16 64 256  # fine-tuning curve (claim 3)
    python evaluate.py out/gsm8k/ckpt.pt --questions test.jsonl  # a file of questions and answers

A *family* makes puzzles: a body and questions on it. A task asks one of them; training text asks one or all.
Each family's docstring begins with a puzzle, the answer behind `|`, which is no token. Those of MIDAS (arXiv
2409.19044) are copying, assignment and preschool.
"""
import copy
import functools
import itertools
import json
import os
import random
import re
import statistics
import string
import sys
import zlib
from collections import Counter
from fractions import Fraction

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from grow import Parser, at_least, load_checkpoint, make_folder, run_script, token_dtype
from loop import PIECES, ask, continue_text, json_lines, load_encoding, parse_repeats
from model import loop_path, mean_loss

# -----------------------------------------------------------------------------
# the world: who and what there is, and facts about the people that never change

PEOPLE = """Ada Amir Anna Ben Bella Carl Clara Dan Dora Emil Emma Felix Fiona Greta Gus Hana Hugo Ida Ivan
Jack Jane Karl Kira Lars Lena Leo Lily Mara Max Mia Milo Nadia Ned Nina Olaf Olga Omar Otto Paula Pia Quinn
Rosa Rudi Sam Sara Tara Theo Tom Uma Una Vera Viktor Walt Wanda Wim Xena Yara Yuri Zara Zeno""".split()
PLACES = """attic barn beach bridge castle cave cellar forest garden hall harbor kitchen market office park
tower""".split()
THINGS = """apple ball basket bell book bottle candle card coin cup drum feather fork hammer hat key ladder
lamp map mirror pear pen pillow plate ring rope shoe spoon stone ticket whistle wheel""".split()
FACTS = {   # attribute: statements, question, values
    "town": (("{} lives in {}.", "{} has a house in {}.", "The home of {} is {}."), "Where does {} live?",
             "Arden Belmont Colby Dover Eaton Fairview Granby Hilton Kendal Milton Norwood Weston".split()),
    "work": (("{} works as a {}.", "{} earns money as a {}.", "The work of {} is that of a {}."),
             "What is the work of {}?",
             "baker butcher doctor farmer gardener judge lawyer painter pilot sailor teacher weaver".split()),
    "pet": (("{} keeps a {}.", "{} owns a {}.", "The pet of {} is a {}."), "Which animal does {} keep?",
            "cat cow dog donkey duck goat goose horse parrot rabbit sheep turtle".split()),
    "food": (("{} likes to eat {}.", "{} always orders {}.", "The best food for {} is {}."),
             "What does {} like to eat?",
             "bread cake cheese fish honey noodles pasta porridge rice salad soup toast".split()),
}
WORDS = THINGS + PLACES
_rng = random.Random("the world")
RANDOM_WORDS = ["".join(_rng.choices(string.ascii_lowercase, k=3)) for _ in range(50)]      # each one token
TRUTH = {person: {name: _rng.choice(values) for name, (_, _, values) in FACTS.items()} for person in PEOPLE}

# -----------------------------------------------------------------------------
# families: random.Random, options -> body, [(question, answer), ...]

def copying(rng, words):
    """Fill in blank:\n\npum nyj gdq ocu rzk jbw mlz eny kyx uni rzk jbw mlz eny kyx ___. ->|uni

    Ten words, a piece of five of them repeated; asked is the word that followed.
    """
    words = rng.sample(words, 10)
    return ("Fill in blank:\n\n" + " ".join(words),
            [(" " + " ".join(words[i:i + 5]) + " ___. ->", words[i + 5]) for i in range(5)])


WORDINGS = {    # the same puzzle in three wordings: header, assignment, question, what precedes the answer
    "basic": ("Fill in blank:\n\n", "{}={}\n", "{}=___. ->", ""),
    "math": ("The following is a set of simple mathematical equations.\n\n", "{} = {}\n",
             "\nWhat is the numerical value of {}?\nAnswer:", " "),
    "code": ("The following is a very short Python program. Use the program to resolve the value of the "
             "variable in the question.\n\nProgram:\n", "{} = {}\n",
             "\nQuestion:\nWhat is the value of {}?\n\nAnswer:", " "),
}


def assignment(rng, depth=0, wording="basic"):
    """Fill in blank:\n\no=14\ns=4\nu=8\nm=10\nq=12\nm=___. ->|10

    Five variables get five different values; each further level of depth assigns five new variables to
    variables of the level before (k=o). Asked are the last level's, so the answer is one of five values.
    """
    header, line, question, before = WORDINGS[wording]
    names = rng.sample(string.ascii_lowercase, 5 * (depth + 1))
    level = dict(zip(names[:5], rng.sample(range(1, 26), 5)))
    lines = [line.format(*item) for item in level.items()]
    for d in range(1, depth + 1):
        sources = {name: rng.choice(list(level)) for name in names[5 * d:5 * d + 5]}
        lines += [line.format(*item) for item in sources.items()]
        level = {name: level[source] for name, source in sources.items()}
    return header + "".join(lines), [(question.format(name), f"{before}{n}") for name, n in level.items()]


def repeated(rng, words):
    """List: cup ring map key\nAgain:| ring map key     (training text only: how the world teaches to copy)"""
    words, pieces = rng.sample(words, rng.randint(4, 12)), []
    for _ in range(4):
        start = rng.randrange(len(words) - 2)
        pieces.append(("Again:", " " + " ".join(words[start:start + rng.randint(3, 8)])))
    return "List: " + " ".join(words) + "\n", pieces


def known(rng):
    """o=14\ns=4\ns=|4\no=|14     (training text only: assignments said again, in any order)"""
    n = rng.randint(2, 6)
    values = dict(zip(rng.sample(string.ascii_lowercase, n), rng.sample(range(1, 26), n)))
    questions = [(f"{name}=", f"{value}") for name, value in values.items()]
    return ("".join(f"{name}={value}\n" for name, value in values.items()),
            [question for _ in range(3) for question in rng.sample(questions, n)])


def chained(rng):
    """o=14\ns=4\nk=o\nb=o\no| 14\nk=|14     (training text only: the two steps of a depth-1 assignment)

    `o` and `o=` are two tokens: who knows `o=14` need not know `o`. What a bare variable stands for was the
    step that was missing: without it, depth 1 was learned in the cooldown by some seeds only.
    """
    n = rng.randint(1, 4)
    names = rng.sample(string.ascii_lowercase, 2 * n)
    values = dict(zip(names[:n], rng.sample(range(1, 26), n)))
    sources = {name: rng.choice(names[:n]) for name in names[n:]}
    questions = [(name, f" {value}") for name, value in values.items()]
    questions += [(f"{name}=", f"{values[source]}") for name, source in sources.items()]
    return ("".join(f"{name}={value}\n" for name, value in (values | sources).items()),
            [question for _ in range(2) for question in rng.sample(questions, 2 * n)])


def preschool(rng, calculation=True):
    """Fill in blank:\nk=1\nj=8\nl=-k+j\nl=___ ->|-1+8=7

    With calculation as here, or with the bare result (7) as the answer.
    """
    a, b, c = rng.sample(string.ascii_lowercase, 3)
    x, y = rng.randint(1, 9), rng.randint(1, 9)
    sign, op = rng.choice((("", "+"), ("", "-"), ("-", "+"), ("-", "-")))
    value = (-x if sign else x) + (y if op == "+" else -y)
    answer = f"{sign}{x}{op}{y}={value}" if calculation else f"{value}"
    return f"Fill in blank:\n{a}={x}\n{b}={y}\n", [(f"{c}={sign}{a}{op}{b}\n{c}=___ ->", answer)]


def arithmetic(rng):
    """7+5=|12      (training text only: the facts that the word problems need)"""
    x, y, z = rng.randint(0, 20), rng.randint(0, 20), rng.randint(1, 9)
    return "", [(f"{x}+{y}=", f"{x + y}"), (f"{x + y}-{y}=", f"{x}"), (f"{x}+{y}+{z}=", f"{x + y + z}")]


def word_problem(rng):
    """Anna has 3 coins. Ben has 5 coins. Anna finds 4 more coins.
    Question: How many coins does Anna have?\nAnswer:| 7"""
    people, thing = rng.sample(PEOPLE, 2), rng.choice(THINGS) + "s"
    count = {person: rng.randint(1, 9) for person in people}
    body = "".join(f"{person} has {n} {thing}. " for person, n in count.items())
    for _ in range(rng.randint(1, 2)):
        person, n = rng.choice(people), rng.randint(1, 5)
        if n < count[person] and rng.random() < 0.5:
            body, count[person] = body + f"{person} loses {n} {thing}. ", count[person] - n
        else:
            body, count[person] = body + f"{person} finds {n} more {thing}. ", count[person] + n
    questions = [(ask(f"How many {thing} does {person} have?"), f" {n}") for person, n in count.items()]
    questions.append((ask(f"How many {thing} do they have together?"), f" {sum(count.values())}"))
    return body[:-1] + "\n", questions


def passage(rng, n_sentences):
    """A piece of a story -> text, where each thing and each person ended up."""
    people, things, places = rng.sample(PEOPLE, 3), rng.sample(THINGS, 3), rng.sample(PLACES, 5)
    sentences, where = [], {}
    for _ in range(n_sentences):
        person, thing, place = rng.choice(people), rng.choice(things), rng.choice(places)
        if rng.random() < 0.7:
            sentences.append(rng.choice(("{} took the {} to the {}.", "{} carried the {} to the {}.")
                                        ).format(person, thing, place))
            where[f"the {thing}"] = place
        else:
            sentences.append(rng.choice(("{} went to the {}.", "{} walked to the {}.")).format(person, place))
        where[person] = place
    return " ".join(sentences), where


def open_book(rng):
    """Ben took the lamp to the cave. Mia went to the park.\nQuestion: Where is the lamp?\nAnswer:| cave"""
    text, where = passage(rng, rng.randint(3, 5))
    return text + "\n", [(ask(f"Where is {who}?"), f" {place}") for who, place in where.items()]


def closed_book(rng):
    """Question: Where does Mia live?\nAnswer:| Dover     (a fact, stated in training text only)"""
    person = rng.choice(PEOPLE)
    return "", [(ask(question.format(person)), f" {TRUTH[person][name]}")
                for name, (_, question, _) in FACTS.items()]


def story(rng):
    """Text without a question: what happened, and some facts about the people of the world."""
    return passage(rng, rng.randint(2, 4))[0] + "\n" + portrait(rng)[0], [("", "")]


def portrait(rng):
    person = rng.choice(PEOPLE)
    facts = [rng.choice(says).format(person, TRUTH[person][name]) for name, (says, _, _) in FACTS.items()]
    rng.shuffle(facts)
    return " ".join(facts), [("", "")]

# -----------------------------------------------------------------------------
# held-out instances, tasks, and the training text

def is_heldout(instance):
    """One in eight bodies (questions, where there is no body) is never in training text. By its checksum, so
    that training and evaluation agree without sharing anything."""
    return zlib.crc32(instance.encode()) % 8 == 0


def puzzle(family, options, rng, heldout):
    while True:
        body, questions = family(rng, **options)
        questions = [(q, a) for q, a in questions if is_heldout(body or q) == heldout]
        if questions:
            return body, questions


def example(task, rng, heldout=True):
    """One question of a task -> prompt, answer. A held-out one, unless it is to be a shot of a prompt."""
    family, options, _ = TASKS[task]
    body, questions = puzzle(family, options, rng, heldout)
    question, answer = rng.choice(questions)
    return body + question, answer


TASKS = {   # name: family, its options, accuracy of a guess that knows what is asked, but not the answer
    "copy-random": (copying, {"words": RANDOM_WORDS}, 1 / 10),
    "copy-real": (copying, {"words": WORDS}, 1 / 10),
    **{f"assign-{depth}{'' if wording == 'basic' else '-' + wording}":
       (assignment, {"depth": depth, "wording": wording}, 1 / 5)
       for depth in (0, 1, 2) for wording in WORDINGS},
    "preschool": (preschool, {"calculation": False}, 1 / 17),
    "preschool-calc": (preschool, {"calculation": True}, 1 / 17),
    "closed-book": (closed_book, {}, 1 / 12),
    "open-book": (open_book, {}, 0.37),         # among the two to four places of the passage
    "word-problem": (word_problem, {}, 0.09),   # always the most frequent number
}
TEXT = {"story": (story, {}, None), "portrait": (portrait, {}, None), "arithmetic": (arithmetic, {}, None),
        "list-real": (repeated, {"words": WORDS}, None),
        "list-random": (repeated, {"words": RANDOM_WORDS}, None), "known": (known, {}, None),
        "chained": (chained, {}, None), **TASKS}
TASKS_AT_THE_END = ["copy-random", "copy-real", "assign-0", "assign-1", "open-book", "word-problem"]

# The two streams: weights of the documents. Most of the general one is repeats, in which most tokens can
# be worked out: at half that share, looking things up was learned late or never. Assignments in two steps
# wait for the math of the cooldown: with a sixth of the general stream of their kind, even one step was at
# chance after 4,200 of 6,000 steps; a model that looks things up learns two steps within the cooldown.
STREAMS = {
    "general": {"story": 1, "portrait": 3, "closed-book": 3, "open-book": 2, "list-real": 5,
                "list-random": 5, "copy-real": 7, "copy-random": 7, "known": 30, "assign-0": 12,
                "assign-1": 2, "word-problem": 1},
    "math": {**{task: 2 for task in TASKS if task.startswith("assign")}, "chained": 40, "assign-1": 30,
             "assign-2": 4, "preschool": 3, "preschool-calc": 3, "word-problem": 4, "arithmetic": 2,
             "open-book": 1},
}


def document(rng, stream, heldout):
    """One document: a puzzle with all its questions, so that much of the text can be worked out from what
    stands before it, or, one time in ten, some puzzles of a family with a question each, as in a prompt with
    shots. More of these, and copying is learned much later: other puzzles around look alike."""
    family, options, _ = TEXT[rng.choices(list(STREAMS[stream]), list(STREAMS[stream].values()))[0]]
    n = rng.choice((2, 3, 4)) if rng.random() < 0.1 else 1
    text = ""
    for _ in range(n):
        body, questions = puzzle(family, options, rng, heldout)
        questions = rng.sample(questions, len(questions) if n == 1 else 1)
        text += body + "".join(f"{question}{answer}\n" for question, answer in questions) + "\n"
    return text[:-1]


def world_words():
    """The words of the built-in encoding: all pieces that occur in several puzzles of the world."""
    counts, rng = Counter(), random.Random(99)
    for family, options, _ in TEXT.values():
        for _ in range(250):
            body, questions = family(rng, **options)
            text = body + "".join(f"{question}{answer}\n" for question, answer in questions)
            counts.update(set(re.findall(PIECES, text)))
    numbers = [space + str(n) for space in ("", " ") for n in range(100)]
    letters = [" " + letter for letter in string.ascii_lowercase]
    words = {piece for piece, n in counts.items() if n >= 4}
    return sorted(piece for piece in words.union(numbers, letters) if len(piece) > 1)     # one is a byte


FOR_ONE_PROCESS = 10 ** 7       # tokens: some seconds; more are written by several processes


def world_rows(encoding, context, n, stream, heldout, seed):
    """n rows (n, context + 1) of token ids: documents, end-of-text before each, the last one cut."""
    some = functools.partial(some_rows, encoding, context, stream, heldout, seed)
    several = min(16, torch.get_num_threads()) if n * context > FOR_ONE_PROCESS else 0
    blocks = DataLoader(range(n), batch_size=256, collate_fn=some, num_workers=several)
    return np.concatenate([block.numpy() for block in tqdm(
        blocks, f"writing the {stream} stream", leave=False, mininterval=1, disable=None)])


def some_rows(encoding, context, stream, heldout, seed, numbers):
    """Rows of these numbers: each is a pure function of its own."""
    rows = np.empty((len(numbers), context + 1), dtype=token_dtype(encoding))
    for i, number in enumerate(numbers):
        rng, row = random.Random(f"{seed} {stream} {heldout} {number}"), []
        while len(row) <= context:
            row += [encoding.eot_token] + encoding.encode_ordinary(document(rng, stream, heldout))
        rows[i] = row[:context + 1]
    return torch.from_numpy(rows)       # which processes share, so that none waits for another that has died

# -----------------------------------------------------------------------------
# scoring

def prompt_with_shots(task, rng, shots):
    """-> prompt, answer: worked examples, never held out, empty lines between, and a held-out question."""
    prompt, answer = example(task, rng)
    rng = random.Random(rng.random())       # of its own: the questions are the same at every number of shots
    before = "".join("{}{}\n\n".format(*example(task, rng, heldout=False)) for _ in range(shots))
    return before + prompt, answer


def encode_example(encoding, prompt, answer):
    """-> tokens of the prompt, which begins a document, and of the answer."""
    return [encoding.eot_token] + encoding.encode_ordinary(prompt), encoding.encode_ordinary(answer)


def encode_examples(task, encoding, context, n, shots=5, seed=0):
    """n examples of a task -> [(prompt tokens, answer tokens), ...], shots: as many as the longest fits."""
    for shots in range(shots, -1, -1):
        rng = random.Random(f"{seed} {task}")
        examples = [encode_example(encoding, *prompt_with_shots(task, rng, shots)) for _ in range(n)]
        if max(len(prompt) + len(answer) for prompt, answer in examples) <= context:
            return examples, shots
    raise ValueError(f"a question of {task} is longer than the context of {context}")


def padded(examples):
    """[(prompt tokens, answer tokens), ...] -> tokens, targets (n, time): targets are -1 but where a token of
    the answer is predicted. The padding is behind the answer, where nothing looks."""
    tokens = [torch.tensor((prompt + answer)[:-1]) for prompt, answer in examples]
    targets = [torch.tensor([-1] * (len(prompt) - 1) + answer) for prompt, answer in examples]
    return pad_sequence(tokens, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-1)


@torch.no_grad()
def is_right(model, examples, path=None, batch=32):
    """Whether greedy decoding gives the whole answer -> list of bools, one per (prompt, answer): two lists of
    ints, none of them empty.

    In one forward pass: an answer is right when each token of it is the arg-max given the true ones before.
    What follows is not looked at: with tokens of one digit each (SmolLM's), 14 counts where 1 is asked.
    """
    device, right = model.embed.weight.device, []
    for start in range(0, len(examples), batch):
        tokens, targets = padded(examples[start:start + batch])
        asked, best = targets >= 0, torch.full_like(targets, -1)
        hidden = model.hidden(tokens.to(device), path)
        best[asked] = model.head(hidden[asked.to(device)]).argmax(-1).cpu()
        right += (best == targets).all(1).tolist()
    return right


def accuracy(model, encoding, task, n=200, shots=5, path=None, seed=0):
    """Exact match on n held-out examples -> dict: value, se (standard error), n, chance, shots that fit."""
    examples, shots = encode_examples(task, encoding, model.config.context, n, shots, seed)
    return {**proportion(is_right(model, examples, path)), "chance": TASKS[task][2], "shots": shots}


def proportion(right):
    """A list of bools -> dict: value (their mean), its standard error, their number."""
    mean = sum(right) / len(right)
    return {"value": mean, "se": (mean * (1 - mean) / len(right)) ** 0.5, "n": len(right)}


def finetune(model, encoding, task, n_train, n_test=200, lr=1e-3, steps=100, seed=0):
    """Accuracy after fine-tuning a copy on n_train examples: full batch, AdamW, constant learning rate, no
    shots; the mean over some held-out tests in the last third of the steps (MIDAS's protocol, shortened)."""
    tuned = copy.deepcopy(model)
    rng, device = random.Random(f"fine-tuning {seed} {task}"), model.embed.weight.device
    pairs = [encode_example(encoding, *example(task, rng, heldout=False)) for _ in range(n_train)]
    tests, _ = encode_examples(task, encoding, model.config.context, n_test, shots=0, seed=seed)
    tokens, targets = (x.to(device) for x in padded(pairs))     # only the answer is learned
    optimizer, scores = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0), []
    for step in range(1, steps + 1):
        tuned(tokens, targets)[1].backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step > steps * 2 // 3 and (steps - step) % max(1, steps // 15) == 0:
            scores.append(sum(is_right(tuned, tests)) / n_test)
    return sum(scores) / len(scores)


def final_answer(text):
    """What counts of an answer: the part behind GSM8K's ####, else the last number, else all of it."""
    if "####" in text:
        text = text.split("####")[1].strip().split("\n")[0]
    numbers = re.findall(r"(?<!\d)-?\d+(?:,\d{3})*(?:\.\d+|/[1-9]\d*)?", text)
    return str(Fraction(numbers[-1].replace(",", ""))) if numbers else text.strip()


def answer_file(model, encoding, file, n, max_new_tokens):
    """Exact match of the final answer under greedy generation on a .jsonl of `question` and `answer`, the
    first n of them, or all -> list of bools. A question that fills the context by itself counts as wrong."""
    right, too_long = [], 0
    lines = itertools.islice(json_lines(file, {"question": str, "answer": str}), n)
    for number, line in enumerate(tqdm(lines, desc="questions", leave=False, disable=None), 1):
        if not final_answer(line["answer"]):
            raise ValueError(f"{file}, line {number}: the answer is empty")
        prompt = ask(line["question"])
        room = model.config.context - 1 - len(encoding.encode_ordinary(prompt))
        too_long += room < 1
        text = continue_text(model, encoding, prompt, min(max_new_tokens, room)) if room > 0 else ""
        text = re.split("\n\n|\nQuestion:", text)[0]        # a model may go on with a question of its own
        right.append(final_answer(text) == final_answer(line["answer"]))
    if not right:
        raise ValueError(f"{file} holds no questions")
    if too_long:
        tqdm.write(f"{too_long} of {len(right)} questions fill the context of {model.config.context} tokens "
                   f"and count as wrong", file=sys.stderr)
    return right

# -----------------------------------------------------------------------------
# measurements are rows; tables are printed from rows

ROW = {"table": str, "model": str, "column": str, "seed": int, "value": (int, float)}       # and more


def measure(args, run, model, checkpoint):
    """All that was asked for, of one model, one after another -> table, column, score."""
    encoding = load_encoding(checkpoint["encoding"]) if args.tasks or args.questions else None
    if args.questions:
        length = args.length or min(128, model.config.context // 2)
        right = answer_file(model, encoding, args.questions, args.n, length)
        yield "questions", os.path.basename(args.questions), proportion(right)
    elif args.shots:
        for task, shots in itertools.product(args.tasks, args.shots):
            score = accuracy(model, encoding, task, args.n, shots, seed=args.seed)
            if score.pop("shots") == shots:     # else they do not fit the context
                yield f"{task}: accuracy by number of shots", str(shots), score
    elif args.finetune:
        for task, n_train in itertools.product(args.tasks, args.finetune):
            draws = [finetune(model, encoding, task, n_train, args.n, seed=args.seed + i)
                     for i in range(args.draws)]
            score = {"value": statistics.mean(draws), "n": args.n, "chance": TASKS[task][2], "draws": draws}
            if args.draws > 1:
                score["se"] = statistics.stdev(draws) / args.draws ** 0.5
            yield f"{task}: accuracy by number of fine-tuning examples", str(n_train), score
    elif args.sweep:
        yield from sweep(args, run, model, encoding)
    else:
        sizes = {"depth": len(model.config.visits()), "params": sum(p.numel() for p in model.parameters())}
        if "flops" in checkpoint:               # not in what grow.py, --unroll or Hugging Face wrote
            sizes["flops"] = checkpoint["flops"]
        for column, value in () if args.loop else sizes.items():
            yield "tasks", column, {"value": value}
        losses = {f"loss {stream}": rows for stream, rows in checkpoint["heldout"].items()}
        paths = {"own path": None} | {loop: parse_repeats(loop, model.config.n_layer) for loop in args.loop}
        for (loop, path), name in itertools.product(paths.items(), [*losses, *args.tasks]):
            score = ({"value": mean_loss(model, losses[name], path)} if name in losses else
                     accuracy(model, encoding, name, args.n, path=path, seed=args.seed))
            # one table of all tasks, or one each, its columns the paths
            yield *((f"{name} by looped path", loop) if args.loop else ("tasks", name)), score


def sweep(args, run, model, encoding):
    """Claim 2. Of all places of the block and numbers of repeats, the best for each task on the even
    examples, and its accuracy on the odd ones, which did not choose it, beside that along its own path."""
    n_layer = model.config.n_layer
    if args.block > n_layer:
        raise ValueError(f"{run} has {n_layer} layers, no block of {args.block}")
    paths = {(start, repeats): loop_path(n_layer, start, args.block, repeats)
             for start in range(n_layer - args.block + 1) for repeats in args.repeats}
    for task in args.tasks:
        examples, shots = encode_examples(task, encoding, model.config.context, args.n, seed=args.seed)
        right = {key: is_right(model, examples, path) for key, path in {None: None, **paths}.items()}
        best = max(paths, key=lambda key: sum(right[key][::2]))
        tqdm.write(f"{run}: best for {task} is --loop {best[0]},{args.block},{best[1]}", file=sys.stderr)
        for suffix, key in (("", None), (f" best loop of {args.block}", best)):
            yield "sweep", task, {"suffix": suffix, **proportion(right[key][1::2]), "chance": TASKS[task][2],
                                  "shots": shots, "start_repeats": key,
                                  "chosen_at": proportion(right[key][::2])["value"]}


def append_rows(file, rows):
    make_folder(file)
    with open(file, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def print_tables(rows, side_by_side=7):
    """Prints one table per kind of row: a line per model, a column per measurement, the rest of many below.
    Cells are means over the seeds with their standard deviation, or, of one seed, with the standard error of
    its n examples."""
    flops = [row["value"] for row in rows if (row["model"], row["column"]) == ("baseline", "flops")]
    for table in dict.fromkeys(row["table"] for row in rows):
        cells = {}      # {(model, column): {seed: row}}: what is measured again counts once
        for row in (row for row in rows if row["table"] == table):
            place = row["model"] + row.get("suffix", ""), row["column"]
            seeds = cells.setdefault(place, {})
            if (other := seeds.get(row["seed"], row).get("run")) != row.get("run"):
                raise ValueError(f"{other} and {row.get('run')} share the line {place[0]} of a table: give "
                                 f"them results files of their own")
            seeds[row["seed"]] = row
        models, columns = (list(dict.fromkeys(names)) for names in zip(*cells))
        print(f"\n{table}")
        for i in range(0, len(columns), side_by_side):
            band = columns[i:i + side_by_side]
            lines = [["", "seeds", *band]]
            for model in models:
                found = [cells.get((model, column), {}) for column in band]
                if any(found):
                    lines.append([model, str(len(set().union(*found))),
                                  *(cell(list(seeds.values()), max(flops, default=0)) for seeds in found)])
            for key, scale in (("chance", 100), ("shots", 1), ("n", 1)):        # as 20, or as 2-5
                found = [{round(scale * row[key]) for (_, name), seeds in cells.items() if name == column
                          for row in seeds.values() if key in row} for column in band]
                if any(found):
                    lines.append([key, ""] + ["-".join(map(str, sorted({min(x), max(x)}))) if x else ""
                                              for x in found])
            first, *widths = [max(map(len, texts)) for texts in zip(*lines)]
            print("\n" * (i > 0), end="")
            for name, *texts in lines:
                print(f"{name:{first}}" + "".join(f"  {x:>{width}}" for x, width in zip(texts, widths)))


def cell(rows, reference):
    """A cell's text. rows: of one column, one a seed; reference: training FLOPs of the baseline, or 0."""
    if not rows:
        return "-"
    values, column = [row["value"] for row in rows], rows[0]["column"]
    mean = statistics.mean(values)
    if column in ("depth", "params", "flops"):
        share = f"{mean / reference:.0%}" if reference else f"{mean:.1e}"
        return {"depth": f"{mean:.0f}", "params": f"{mean / 1e6:.2f}M", "flops": share}[column]
    spread = statistics.stdev(values) if len(values) > 1 else rows[0].get("se")
    scale, digits = (100, 1) if "n" in rows[0] else (1, 3)     # what is counted in n examples is a percentage
    return f"{scale * mean:.{digits}f}" + ("" if spread is None else f"±{scale * spread:.{digits}f}")

# -----------------------------------------------------------------------------

def load_labelled(args):
    """The models of a command, one after another -> file, name, seed, model, checkpoint. The name, of a line
    in tables, is that of the run's folder less the seed at its end, so that runs that differ in the seed
    share a line. Raises ValueError where others would."""
    files, depths = {}, {}
    for file in args.checkpoints:
        model, checkpoint = load_checkpoint(file, args.device, args.tokens)
        seed = checkpoint.get("args", {}).get("seed", 0)
        folder, name = os.path.split(os.path.abspath(file))
        if os.path.isfile(file):
            name = re.sub(rf"-s?{seed}$", "", os.path.basename(folder)) + f"/{name}".replace("/ckpt.pt", "")
        other, depth = files.setdefault((name, seed), file), len(model.config.visits())
        if other != file or depths.setdefault(name, depth) != depth:
            raise ValueError(f"{other} and {file} would share the line {name} of a table: they must be of "
                             f"one depth, with seeds of their own")
        yield file, name, seed, model, checkpoint


def read_rows(file):
    """The rows that --results wrote. Raises ValueError naming a line that is none."""
    return list(json_lines(file, ROW))


def main():
    parser = Parser(__doc__)
    parser.add_checkpoints(0)       # none with --table
    # what to measure
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS),
                        help="default: all; none behind it: losses only")
    parser.add_argument("-n", type=at_least(2),
                        help="examples a task (default: 200, +-3.5%% at most), or questions (default: all)")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--loop", nargs="+", default=[], metavar="START,BLOCK,REPEATS",
                        help="further paths: of 8 layers, 3,2,1 is the loop that train.py writes as 3-2x2-3")
    others.add_argument("--sweep", action="store_true", help="the best looped block for each task")
    others.add_argument("--shots", type=at_least(0), nargs="+",
                        help="in-context curve: numbers of worked examples, those that fit the context")
    others.add_argument("--finetune", type=at_least(1), nargs="+",
                        help="fine-tuning curve: numbers of examples")
    others.add_argument("--questions", metavar="FILE", help=".jsonl of question and answer in place of tasks")
    parser.add_argument("--block", type=at_least(1), default=2,
                        help="--sweep: layers looped (default: train.py's 2)")
    parser.add_argument("--repeats", type=at_least(1), nargs="+", default=[1, 2, 4],
                        help="--sweep: extra visits (default: 1 2 4)")
    parser.add_argument("--draws", type=at_least(1), default=3,
                        help="--finetune: draws of the examples (default: 3)")
    parser.add_argument("--length", type=at_least(1),
                        help="--questions: longest answer (default: 128, or half the context)")
    # where it goes
    parser.add_argument("--results", metavar="FILE", help="append every measured value to this .jsonl file")
    parser.add_argument("--table", metavar="FILE", help="print the tables of such a file, measure nothing")
    parser.add_argument("--only", default="", help="--table: only the tables whose name contains this")
    parser.add_argument("--columns", nargs="+", default=[], help="--table: only the columns of these names")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines in place of tables")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: 0)")
    parser.add_device()
    args = parser.parse_args()
    if bool(args.checkpoints) == bool(args.table):
        parser.error("name checkpoints to evaluate, or a file of rows with --table")
    if (args.only or args.columns) and not args.table:
        parser.error("--only and --columns go with --table")
    if args.n is None and not args.questions:
        args.n = 200

    rows = read_rows(args.table) if args.table else []
    for file, name, seed, model, checkpoint in load_labelled(args):
        measured = measure(args, file, model, checkpoint)
        for table, column, score in tqdm(measured, desc=file, unit=" rows", leave=False, disable=None):
            rows.append({"table": table, "model": name, "seed": seed, "run": file, "column": column, **score})
            if args.results:
                append_rows(args.results, rows[-1:])
    rows = [row for row in rows if args.only in row["table"]
            and (not args.columns or row["column"] in args.columns)]
    if not rows:
        raise ValueError("there is nothing to show: no task, no such rows, or nothing that fits the context")
    if args.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        print_tables(rows)


if __name__ == "__main__":
    run_script(main)
