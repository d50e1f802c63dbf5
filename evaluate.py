"""
Reasoning primitives and the other task families of the paper, on a small world that is also the built-in training text.

    python evaluate.py out/*/ckpt.pt                                 # one table, mean +- std over seeds: a minute a model
    python evaluate.py out/*/ckpt.pt --loop 3,2,1                    # the same along a looped path as well
    python evaluate.py out/*/ckpt.pt --sweep                         # best block and repeats (claim 2): minutes a model
    python evaluate.py out/*/ckpt.pt --tasks assign-1 --shots 0 1 2 3       # in-context curve (claim 3)
    python evaluate.py out/*/ckpt.pt --tasks assign-1 --finetune 16 64 256  # fine-tuning curve (claim 3)
    python evaluate.py out/gsm8k/ckpt.pt --questions test.jsonl      # a file of questions and answers

A *family* makes puzzles: a body and questions on it. A task asks one of them; training text asks one or all. Here is
an assignment of depth 0 (MIDAS, arXiv 2409.19044), the answer behind `|`, which is no token:

    Fill in blank:

    o=14
    s=4
    u=8
    m=10
    q=12
    m=___. ->|10
"""
import random
import re
import zlib
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from model import PIECES

# -----------------------------------------------------------------------------
# the world: who and what there is, and facts about the people that never change

PEOPLE = """Ada Amir Anna Ben Bella Carl Clara Dan Dora Emil Emma Felix Fiona Greta Gus Hana Hugo Ida Ivan Jack Jane
Karl Kira Lars Lena Leo Lily Mara Max Mia Milo Nadia Ned Nina Olaf Olga Omar Otto Paula Pia Quinn Rosa Rudi Sam Sara
Tara Theo Tom Uma Una Vera Viktor Walt Wanda Wim Xena Yara Yuri Zara Zeno""".split()
PLACES = "attic barn beach bridge castle cave cellar forest garden hall harbor kitchen market office park tower".split()
THINGS = """apple ball basket bell book bottle candle card coin cup drum feather fork hammer hat key ladder lamp map
mirror pear pen pillow plate ring rope shoe spoon stone ticket whistle wheel""".split()
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
_rng = random.Random("the world")
TRUTH = {person: {name: _rng.choice(values) for name, (_, _, values) in FACTS.items()} for person in PEOPLE}

# -----------------------------------------------------------------------------
# families: rng -> body, [(question, answer), ...]

def copying(rng, words=None):
    """Fill in blank:\n\npum nyj gdq ocu rzk jbw mlz eny kyx uni rzk jbw mlz eny kyx ___. ->|uni

    Ten words, a piece of five of them repeated; asked is the word that followed. words: None for random letters.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = rng.sample(words, 10) if words else ["".join(rng.choices(letters, k=3)) for _ in range(10)]
    return ("Fill in blank:\n\n" + " ".join(words),
            [(" " + " ".join(words[i:i + 5]) + " ___. ->", words[i + 5]) for i in range(5)])


WORDINGS = {    # the same puzzle in three wordings: header, assignment, question, what stands before the answer
    "basic": ("Fill in blank:\n\n", "{}={}\n", "{}=___. ->", ""),
    "math": ("The following is a set of simple mathematical equations.\n\n", "{} = {}\n",
             "\nWhat is the numerical value of {}?\nAnswer:", " "),
    "code": ("The following is a very short Python program. Use the program to resolve the value of the variable in "
             "the question.\n\nProgram:\n", "{} = {}\n", "\nQuestion:\nWhat is the value of {}?\n\nAnswer:", " "),
}


def assignment(rng, depth=0, wording="basic"):
    """Fill in blank:\n\no=14\ns=4\nu=8\nm=10\nq=12\nm=___. ->|10

    Five variables get five different values; each further level of depth assigns five new variables to variables of
    the level before (k=o). Asked are the last level's, so the answer is one of five values.
    """
    header, line, question, before = WORDINGS[wording]
    names = rng.sample("abcdefghijklmnopqrstuvwxyz", 5 * (depth + 1))
    level = dict(zip(names[:5], rng.sample(range(1, 26), 5)))
    lines = [line.format(*item) for item in level.items()]
    for d in range(1, depth + 1):
        sources = {name: rng.choice(list(level)) for name in names[5 * d:5 * d + 5]}
        lines += [line.format(*item) for item in sources.items()]
        level = {name: level[source] for name, source in sources.items()}
    return header + "".join(lines), [(question.format(name), f"{before}{value}") for name, value in level.items()]


def preschool(rng, calculation=True):
    """Fill in blank:\nk=1\nj=8\nl=-k+j\nl=___ ->|-1+8=7

    With calculation as here, or with the bare result (7) as the answer.
    """
    a, b, c = rng.sample("abcdefghijklmnopqrstuvwxyz", 3)
    x, y = rng.randint(1, 9), rng.randint(1, 9)
    questions = []
    for sign, op in (("", "+"), ("", "-"), ("-", "+"), ("-", "-")):
        value = (-x if sign else x) + (y if op == "+" else -y)
        shown = f"{sign}{x}{op}{y}={value}" if calculation else f"{value}"
        questions.append((f"{c}={sign}{a}{op}{b}\n{c}=___ ->", shown))
    return f"Fill in blank:\n{a}={x}\n{b}={y}\n", [rng.choice(questions)]


def arithmetic(rng):
    """7+5=|12      (training text only: the facts that the word problems need)"""
    x, y, z = rng.randint(0, 20), rng.randint(0, 20), rng.randint(1, 9)
    return "", [(f"{x}+{y}=", f"{x + y}"), (f"{x + y}-{y}=", f"{x}"), (f"{x}+{y}+{z}=", f"{x + y + z}")]


def ask(question):
    return f"Question: {question}\nAnswer:"


def word_problem(rng):
    """Anna has 3 coins. Ben has 5 coins. Anna finds 4 more coins.\nQuestion: How many coins does Anna have?\nAnswer:| 7
    """
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
    """Question: Where does Mia live?\nAnswer:| Dover       (a fact of the world, stated in training text only)"""
    person = rng.choice(PEOPLE)
    return "", [(ask(question.format(person)), f" {TRUTH[person][name]}") for name, (_, question, _) in FACTS.items()]


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
    """One in eight bodies (questions, where there is no body) is never in training text. By its checksum, so that
    training and evaluation agree without sharing anything."""
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


TASKS = {   # name: family, its options, accuracy of a guess among the answers that the question leaves open
    "copy-random": (copying, {}, 1 / 10),
    "copy-real": (copying, {"words": THINGS}, 1 / 10),
    **{f"assign-{depth}{'' if wording == 'basic' else '-' + wording}":
       (assignment, {"depth": depth, "wording": wording}, 1 / 5) for depth in (0, 1, 2) for wording in WORDINGS},
    "preschool": (preschool, {"calculation": False}, 1 / 35),
    "preschool-calc": (preschool, {"calculation": True}, 1 / 35),
    "closed-book": (closed_book, {}, 1 / 12),
    "open-book": (open_book, {}, 1 / 5),
    "word-problem": (word_problem, {}, 1 / 20),
}
TEXT = {"story": (story, {}, None), "portrait": (portrait, {}, None), "arithmetic": (arithmetic, {}, None), **TASKS}
FAMILIES_AT_THE_END = ["copy-random", "copy-real", "assign-0", "assign-1", "open-book", "word-problem"]

# The two streams: weights of the documents. The math stream is what the cooldown adds: worked problems, all wordings.
STREAMS = {
    "general": {"story": 4, "portrait": 3, "closed-book": 2, "open-book": 3, "copy-random": 3, "copy-real": 2,
                "assign-0": 3, "assign-1": 2, "arithmetic": 1, "word-problem": 1},
    "math": {**{task: 1 for task in TASKS if task.startswith("assign")}, "assign-0": 2, "assign-1": 2, "assign-2": 2,
             "preschool": 2, "preschool-calc": 2, "word-problem": 4, "arithmetic": 2, "open-book": 1},
}


def document(rng, stream, heldout):
    """Endless pieces of one document: puzzles of one family, each with one question as in a prompt with shots, or with
    all of them, which makes more of the text something that can be worked out from what came before."""
    family, options, _ = TEXT[rng.choices(list(STREAMS[stream]), list(STREAMS[stream].values()))[0]]
    one = rng.random() < 0.5
    while True:
        body, questions = puzzle(family, options, rng, heldout)
        questions = rng.sample(questions, 1 if one else len(questions))
        yield body + "".join(f"{question}{answer}\n" for question, answer in questions) + "\n"


def world_words():
    """The words of the built-in encoding: all pieces that occur in several documents of the world."""
    counts, rng = Counter(), random.Random(0)
    for stream in STREAMS:
        for _ in range(800):
            pieces = document(rng, stream, heldout=False)
            counts.update({piece for _ in range(4) for piece in re.findall(PIECES, next(pieces))})
    numbers = [space + str(n) for space in ("", " ") for n in range(100)]
    letters = [" " + letter for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = {piece for piece, n in counts.items() if n >= 4 and len(piece) > 1}
    return sorted(words.union(numbers, letters) - {str(n) for n in range(10)})


def world_rows(encoding, context, n, stream, heldout, seed):
    """n rows (n, context + 1) of token ids, uint16: the end-of-text token, then one document, cut."""
    rows = np.empty((n, context + 1), dtype=np.uint16)
    for i in tqdm(range(n), desc=f"writing the {stream} stream", leave=False, mininterval=1):
        rng = random.Random(f"{seed} {stream} {heldout} {i}")
        row = [encoding.eot_token]
        for piece in document(rng, stream, heldout):
            row += encoding.encode_ordinary(piece)
            if len(row) > context:
                break
        rows[i] = row[:context + 1]
    return rows

# -----------------------------------------------------------------------------
# scoring

def prompt_with_shots(task, rng, shots):
    """-> prompt, answer: worked examples that are never held out, an empty line between them, and a held-out question."""
    before = "".join("{}{}\n\n".format(*example(task, rng, heldout=False)) for _ in range(shots))
    prompt, answer = example(task, rng)
    return before + prompt, answer


def encode_examples(task, encoding, context, n, shots=5, seed=0):
    """n examples of a task -> [(prompt tokens, answer tokens), ...], shots. As many shots as the longest one fits."""
    while shots >= 0:
        rng = random.Random(f"{seed} {task}")       # the same questions at every number of shots would need more care
        examples = [prompt_with_shots(task, rng, shots) for _ in range(n)]
        examples = [([encoding.eot_token] + encoding.encode_ordinary(p), encoding.encode_ordinary(a))
                    for p, a in examples]
        if max(len(p) + len(a) for p, a in examples) <= context:
            return examples, shots
        shots -= 1
    raise ValueError(f"a question of {task} is longer than the context of {context}")


@torch.no_grad()
def is_right(model, examples, path=None, batch=32):
    """Whether greedy decoding gives the whole answer -> list of bools, one per (prompt tokens, answer tokens).

    In one forward pass: the answer is right when each of its tokens is the arg-max given the true ones before it.
    """
    was_training = model.training
    model.eval()
    device, right = model.embed.weight.device, []
    for start in range(0, len(examples), batch):
        part = examples[start:start + batch]
        rows = torch.zeros(len(part), max(len(p) + len(a) for p, a in part) - 1, dtype=torch.long)
        for row, (p, a) in zip(rows, part):         # the padding is behind the answer, where nothing looks
            row[:len(p) + len(a) - 1] = torch.tensor(p + a[:-1])
        hidden = model.hidden(rows.to(device), path)
        ends = [x[len(p) - 1:len(p) + len(a) - 1] for x, (p, a) in zip(hidden, part)]
        best = model.head(torch.cat(ends)).argmax(-1).cpu().split([len(a) for _, a in part])
        right += [tokens.tolist() == a for tokens, (_, a) in zip(best, part)]
    model.train(was_training)
    return right


def accuracy(model, encoding, task, n=200, shots=5, path=None, seed=0):
    """Exact match on n held-out examples -> dict of accuracy, its standard error, n, chance and the shots that fit."""
    examples, shots = encode_examples(task, encoding, model.config.context, n, shots, seed)
    mean = sum(is_right(model, examples, path)) / n
    return {"accuracy": mean, "se": (mean * (1 - mean) / n) ** 0.5, "n": n, "chance": TASKS[task][2], "shots": shots}
