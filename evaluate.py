"""
The built-in world: reasoning tasks, and the training text made of them. And the scoring of any model.

    python evaluate.py out/*/ckpt.pt                    # one table, mean +- std over seeds: a minute for each
    python evaluate.py out/*/ckpt.pt --tasks hops-3 --loop 3-2x1-3 3-2x2-3 3-2x3-3      # along loops (claims 2 and 4)
    python evaluate.py out/*/ckpt.pt --tasks rule --shots 0 1 2 4 8 16      # in-context curve (claim 3)
    python evaluate.py out/*/ckpt.pt --tasks hops-4 --finetune 16 64 256    # fine-tuning curve (claim 3)
    python evaluate.py MODEL --questions test.jsonl --shots 2       # questions and answers of your own
    python evaluate.py out/*/ckpt.pt --curves --plot growth.png     # the log of the runs: hops against training FLOPs
    python evaluate.py --table assets/results.jsonl --only tasks --compare lidas baseline   # a difference, its interval

A *family* makes puzzles: a body and questions on it. Training text asks all of them, a task asks one. Each family's
docstring begins with a puzzle; ` / ` is a line break, and the answer stands after `|`, which is not a token. Copying,
assignment and preschool are the reasoning primitives of MIDAS (arXiv 2409.19044), in their published formats, which
training text never has.
"""
import copy
import gzip
import itertools
import json
import os
import random
import re
import statistics
import string
import zlib
from collections import defaultdict, namedtuple
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from loop import command_parser, paths_of
from model import (between, complete, estimate_loss, get_tokenizer, load_checkpoint, pick_device,
                   positive_int, read_options, run_script, score_rows)

# --- the words and the facts of the world ---------------------------------------------------------

NAMES = string.ascii_lowercase + string.ascii_uppercase[:9]     # of variables: hops-6 needs 35
NUMBERS = [str(n) for n in range(40)]                           # their values
PEOPLE = """Ada Amir Anna Ben Bella Carl Clara Dan Dora Emil Emma Felix Fiona Greta Gus Hana Hugo Ida Ivan
Jack Jane Karl Kira Lars Lena Leo Lily Mara Max Mia Milo Nadia Ned Nina Olaf Olga Omar Otto Paula Pia Quinn
Rosa Rudi Sam Sara Tara Theo Tom Uma Una Vera Viktor Walt Wanda Wim Xena Yara Yuri Zara Zeno""".split()
CLASSES = {kind: words.split() for kind, words in {
    "place": "attic barn beach bridge castle cave forest garden harbor market park tower",
    "thing": "ball basket book bottle candle cup drum hammer key lamp ring spoon",
    "town": "Arden Belmont Colby Dover Eaton Fairview Granby Hilton Kendal Milton Norwood Weston",
    "work": "baker butcher doctor farmer gardener judge lawyer painter pilot sailor teacher weaver",
    "pet": "cat cow dog donkey duck goat goose horse parrot rabbit sheep turtle",
    "food": "bread cake cheese fish honey noodles pasta porridge rice salad soup toast"}.items()}
FACTS = {   # kind of the value: two statements, a question
    "town": ("{} lives in {} .", "The home of {} is {} .", "Where does {} live ?"),
    "work": ("{} works as a {} .", "The work of {} is {} .", "What is the work of {} ?"),
    "pet": ("{} keeps a {} .", "The pet of {} is a {} .", "Which animal does {} keep ?"),
    "food": ("{} likes to eat {} .", "{} always orders {} .", "What does {} like to eat ?")}
_rng = random.Random("the world")       # the same in every run
LABELS = sorted({"".join(_rng.choices(string.ascii_lowercase, k=3)) for _ in range(24)})        # random words
TRUTH = {person: {kind: _rng.choice(CLASSES[kind]) for kind in FACTS} for person in PEOPLE}
REAL = [word for words in CLASSES.values() for word in words]       # real words, for copying
# the words of the published formats: training text has them in random order only
FORMAT = """Fill in blank : ___ . -> The following is a set of simple mathematical equations What numerical
value Answer very short Python program Use the to resolve variable question Program Question""".split()
# every other word of the families' sentences: a word that is not listed cannot be encoded
OTHERS = """+ - = ? How Where Which always animal as carried do does eat finds has have home keep keeps like likes live
lives loses many more orders pet they together took work works""".split()
# a word is one token, whatever stands around it; a name that is assigned is another token than its value
PIECES = r"\b[A-Za-z]=|___|->|\n|[A-Za-z]+|\d+|\S"
SYMBOLS = [*NAMES, *(f"{name}=" for name in NAMES), *NUMBERS]
WORDS = sorted({*SYMBOLS, *PEOPLE, *REAL, *LABELS, *FORMAT, *OTHERS, "\n"})
TOKENIZER = {"words": ["<|endoftext|>", *WORDS], "pattern": PIECES}     # for get_tokenizer

# --- families: random.Random, options -> body, ["question|answer", ...] ----------------------------

def lookups(rng, hops=1):
    """o=14 / s=4 / k=o / k=|14 / o| 14     each name is asked three times, a quarter of the time without its ="""
    plain = rng.random() < 0.5      # numbers only
    n, further = (rng.randint(2, 6), 0) if plain else (rng.randint(2, 5), rng.randint(2, 8))
    # 1. numbers for n names; each further name is that of an earlier one, at most `hops` away from a number
    names = rng.sample(NAMES, n + further)
    value = dict(zip(names[:n], rng.sample(NUMBERS, n)))
    distance, body = dict.fromkeys(value, 0), [f"{name}={number}" for name, number in value.items()]
    for name in names[n:]:
        source = rng.choice([other for other in distance if distance[other] < hops])    # near enough to a number
        value[name], distance[name] = value[source], distance[source] + 1
        body.append(f"{name}={source}")
    # 2. each name three times, in three orders
    asked = [name for _ in range(3) for name in rng.sample(names, len(names))]
    questions = [f"{name}| {value[name]}" if rng.random() < 0.25 else f"{name}=|{value[name]}" for name in asked]
    return "\n".join(body) + "\n", questions


def lists(rng):
    """cup 7 zor k key / 7 zor k| key      pieces of a list again: of any words, so that copying is learned as such"""
    words, pieces = rng.sample(rng.choice((WORDS, SYMBOLS)), rng.randint(3, 8)), []
    for _ in range(3):
        start = rng.randrange(len(words) - 2)       # a piece has three words or more
        *piece, last = words[start:start + rng.randint(3, 6)]
        pieces.append(f"{' '.join(piece)}| {last}")
    return " ".join(words) + "\n", pieces


def rule(rng, lines=16):
    """zor mip kel uni / cat| zor / spoon| mip / dog| zor     each class of words has a label, a new one every time"""
    kinds, labels = rng.sample(list(CLASSES), 4), rng.sample(LABELS, 4)     # the rule
    words = [f"{word}| {label}" for kind, label in zip(kinds, labels) for word in CLASSES[kind]]
    if lines > len(words):
        raise TooLong(f"{lines} lines of a rule that is about {len(words)} words")
    words = rng.sample(words, lines)
    return " ".join(rng.sample(labels, 4)) + "\n", words        # the labels first, so that a guess is one of four


def open_book(rng):
    """Ben took the lamp to the cave . Mia took the key to the park . / Where is the lamp ?| cave"""
    people, things, places = (rng.sample(x, 4) for x in (PEOPLE, CLASSES["thing"], CLASSES["place"]))     # candidates
    body = " ".join(f"{who} {rng.choice(('took', 'carried'))} the {thing} to the {place} ."
                    for who, thing, place in zip(people, things, places))
    # a person is where the thing is
    where = [*zip(people, places), *((f"the {thing}", place) for thing, place in zip(things, places))]
    return body + "\n", [f"Where is {what} ?| {place}" for what, place in where]


def portrait(rng):
    """Mia lives in Dover . The pet of Mia is a goat .     facts about a person, which never change"""
    person = rng.choice(PEOPLE)
    # one of the two statements of each kind, in any order
    facts = [rng.choice(FACTS[kind][:2]).format(person, TRUTH[person][kind]) for kind in FACTS]
    return " ".join(rng.sample(facts, 4)) + "\n", ["|"]     # no question is asked: an empty one


def closed_book(rng):
    """Where does Mia live ?| Dover"""
    person = rng.choice(PEOPLE)
    return "", [f"{FACTS[kind][2].format(person)}| {TRUTH[person][kind]}" for kind in FACTS]


def arithmetic(rng):
    """7 + 5 =| 12"""
    x, y = rng.randint(0, 19), rng.randint(0, 19)
    return "", [f"{x} + {y} =| {x + y}", f"{x + y} - {y} =| {x}"]       # no body: never below zero


def sums(rng):
    """k=1 / j=8 / k + j =| 9 / j - k =| 7     arithmetic on variables"""
    a, b = rng.sample(NAMES, 2)
    x, y = rng.randint(1, 9), rng.randint(1, 9)
    return (f"{a}={x}\n{b}={y}\n",
            [f"{a} + {b} = {x} + {y} =| {x + y}", f"{b} - {a} =| {y - x}", f"- {a} + {b} = - {x} + {y} =| {y - x}",
             f"- {a} - {b} =| {-x - y}", f"{a} - {b} = {x} - {y} =| {x - y}", f"{a} + {b} =| {x + y}"])


def word_problem(rng):
    """Anna has 3 key . Ben has 5 key . Anna finds 4 more . / How many does Anna have ?| 7"""
    people = rng.sample(PEOPLE, 2)
    # what the two have; whose number changes, and by how much
    count, who, n = [rng.randint(1, 9), rng.randint(1, 9)], rng.randrange(2), rng.randint(1, 9)
    word = rng.choice(CLASSES["thing"])
    body = " ".join(f"{person} has {c} {word} ." for person, c in zip(people, count))
    loses = n < count[who] and rng.random() < 0.5       # nobody has fewer than one
    body += f" {people[who]} loses {n} ." if loses else f" {people[who]} finds {n} more ."
    count[who] += -n if loses else n
    return body + "\n", [f"How many does {people[who]} have ?| {count[who]}",
                         f"How many do they have together ?| {sum(count)}"]


# from here on families of tasks only
WORDINGS = {    # of one puzzle: header, question. All but `bare` are the published ones
    "bare": ("", "{}=|"),
    "basic": ("Fill in blank:\n\n", "{}=___. ->|"),
    "math": ("The following is a set of simple mathematical equations.\n\n",
             "\nWhat is the numerical value of {}?\nAnswer:| "),
    "code": ("The following is a very short Python program. Use the program to resolve the value of the "
             "variable in the question.\n\nProgram:\n", "\nQuestion:\nWhat is the value of {}?\n\nAnswer:| ")}


def chains(rng, hops, wording="bare"):
    """o=14 / s=4 / k=s / b=o / k=|4     five chains side by side, each level a permutation of the last: every value is
    right equally often, and no shortcut beats a guess. The primitive "variable assignment" is the same puzzle in a
    published wording: Fill in blank:\n\no=14\ns=4\nu=8\nm=10\nq=12\nm=___. ->|10"""
    header, question = WORDINGS[wording]
    names, numbers = (NAMES, NUMBERS) if wording == "bare" else (NAMES[:26], NUMBERS[1:26])     # as published
    names, level, body = rng.sample(names, 5 * (hops + 1)), {}, header
    for i in range(0, len(names), 5):       # a level, assigned to the one before it; the first to numbers
        source = dict(zip(names[i:i + 5], rng.sample(list(level) or numbers, 5)))
        body += "".join(f"{name}={other}\n" for name, other in source.items())
        level = {name: level.get(other, other) for name, other in source.items()}       # the number of each name
    return body, [question.format(name) + number for name, number in level.items()]      # of the last level


def copying(rng, words):
    """Fill in blank:\n\npum nyj gdq ocu rzk jbw mlz eny kyx uni rzk jbw mlz eny kyx ___. ->|uni"""
    words = rng.sample(words, 10)       # the list, then five of it again: which word is next?
    return ("Fill in blank:\n\n" + " ".join(words),
            [f" {' '.join(words[i:i + 5])} ___. ->|{words[i + 5]}" for i in range(5)])


def preschool(rng, calculation):
    """Fill in blank:\nk=1\nj=8\nl=-k+j\nl=___ ->|-1+8=7      or only |7"""
    a, b, c = rng.sample(string.ascii_lowercase, 3)
    x, y = rng.randint(1, 9), rng.randint(1, 9)
    sign, op = rng.choice((("", "+"), ("", "-"), ("-", "+"), ("-", "-")))       # before x, before y
    value = int(f"{sign}{x}") + int(f"{op}{y}")
    answer = f"{sign}{x}{op}{y}={value}" if calculation else value
    return f"Fill in blank:\n{a}={x}\n{b}={y}\n", [f"{c}={sign}{a}{op}{b}\n{c}=___ ->|{answer}"]

# --- training text and tasks ----------------------------------------------------------------------

STREAMS = {     # family: its share of the documents, as a weight
    "general": {lookups: 65, lists: 20, rule: 4, open_book: 2, portrait: 4, closed_book: 5},
    "math": {partial(lookups, hops=3): 60, lists: 10, arithmetic: 8, sums: 14, word_problem: 8}}

# chance: of a guess among the possible answers (of word problems: of the most frequent one). shots: worked examples
# before a question, five in the published formats
Task = namedtuple("Task", "family chance shots", defaults=[0])
TASKS = {
    **{f"hops-{hops}": Task(partial(chains, hops=hops), 1 / 5) for hops in range(7)},
    "copy-random": Task(partial(copying, words=LABELS), 1 / 5, 5),
    "copy-real": Task(partial(copying, words=REAL), 1 / 5, 5),
    **{f"assign-{depth}{end}": Task(partial(chains, hops=depth, wording=wording), 1 / 5, 5)
       for depth in range(3) for wording, end in (("basic", ""), ("math", "-math"), ("code", "-code"))},
    # a pair of signs has 17 possible answers
    "preschool": Task(partial(preschool, calculation=False), 1 / 17, 5),
    "preschool-calc": Task(partial(preschool, calculation=True), 1 / 17, 5),
    "rule": Task(rule, 1 / 4, 12), "closed-book": Task(closed_book, 1 / 12),
    "open-book": Task(open_book, 1 / 4), "word-problem": Task(word_problem, 1 / 12)}
HOPS = [f"hops-{hops}" for hops in range(5)]        # what the log of a run shows


def puzzle(family, rng, heldout):
    """One puzzle -> body, [(question, answer), ...]. One in eight bodies (questions, where there is none) is held out,
    never in training text: by its checksum, so that there is no list to keep, and none to leak."""
    while True:     # until one is on the side that is asked for
        body, questions = family(rng)
        pairs = [question.split("|") for question in questions]
        pairs = [(q, a) for q, a in pairs if (zlib.crc32((body or q).encode()) % 8 == 0) == heldout]
        if pairs:
            return body, pairs


def document(rng, stream, heldout=False):
    """One document: a puzzle with all its questions. One time in ten it has a random format: two to four puzzles of a
    family in a row, with the same random words of FORMAT before each and around its questions. So the words of the
    published formats are known, but not their order."""
    family, = rng.choices(list(STREAMS[stream]), list(STREAMS[stream].values()))    # by weight
    if family is portrait or rng.random() < 9 / 10:
        body, questions = puzzle(family, rng, heldout)
        return body + "".join(f"{q}{a}\n" for q, a in questions)
    header, before, after = (" ".join(rng.choices(FORMAT + ["\n"], k=rng.randint(0, most))) for most in (8, 4, 4))
    text = ""
    for _ in range(rng.randint(2, 4)):
        body, questions = puzzle(family, rng, heldout)
        questions = rng.sample(questions, min(len(questions), 3))       # some of them: a row has room for few
        text += f"{header}\n{body}" + "".join(f"{before} {q} {after} {a.strip()}\n" for q, a in questions) + "\n"
    return text


def example(task, rng, shots=0, heldout=True):
    """-> prompt, answer. Before the question stand `shots` worked examples that are not held out, an empty line after
    each. Of a rule they are earlier lines of the same puzzle."""
    family = TASKS[task].family
    if family is rule:
        body, [*before, (question, answer)] = puzzle(partial(rule, lines=shots + 1), rng, heldout)
        return body + "".join(f"{q}{a}\n" for q, a in before) + question, answer
    body, questions = puzzle(family, rng, heldout)
    question, answer = rng.choice(questions)        # training text asks all, a task one
    rng = random.Random(rng.random())       # another generator: the next question is the same at any number of shots
    before = "".join("{}{}\n\n".format(*example(task, rng, heldout=False)) for _ in range(shots))
    return before + body + question, answer


def world_row(tokenizer, context, stream, heldout, seed, number):
    """Row `number` of a stream: (context + 1) token ids, a pure function of the arguments."""
    rng, row = random.Random(f"{seed} {stream} {heldout} {number}"), []
    while len(row) <= context:      # whole documents, the last one cut
        row += [tokenizer.eot] + tokenizer.encode(document(rng, stream, heldout))
    return np.array(row[:context + 1])

# --- files of text and of questions ---------------------------------------------------------------

def read_items(file, field="text"):
    """The objects in the lines of a .jsonl or .jsonl.gz file, or of a .txt or .md file one: {field: its text}."""
    number = 1
    with (gzip.open if file.lower().endswith(".gz") else open)(file, "rt", encoding="utf-8-sig") as f:
        try:
            if file.lower().endswith((".txt", ".md")):
                yield {field: f.read()}     # the loop finds no more lines
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield {**json.loads(line)}      # a TypeError for a list or a number
        except (ValueError, TypeError, EOFError, gzip.BadGzipFile, zlib.error) as error:    # also what is not UTF-8
            raise ValueError(f"{file}, line {number}: {error}")


def read_pairs(file, field=None):
    """Of each document prompt, answer: "" and its `field` ("text" by default), or its "question" and "answer"."""
    field = field or "text"
    for item in read_items(file, field):
        texts = {name: value for name, value in item.items() if isinstance(value, (str, int, float))}   # 7 is a text
        if field in texts:
            yield "", str(texts[field])
        elif texts.keys() >= {"question", "answer"}:
            yield f"Question: {texts['question']}\nAnswer:", f" {texts['answer']}"
        else:
            raise ValueError(f"{file}: no text in {', '.join(item)}: --field names what is read")


def check_text_file(file):
    """Raises OSError for a file that does not exist, ValueError for an ending that is not read."""
    os.stat(file)
    if not file.lower().endswith((".txt", ".md", ".jsonl", ".jsonl.gz", ".bin")):
        raise ValueError(f"{file}: expected .txt, .md, .jsonl, .jsonl.gz or .bin")


def bin_tokens(file, tokenizer):
    """A .bin file of tokens -> (n,): raw uint16 (nanoGPT), or after a header of 256 int32 (llm.c, modded-nanogpt)."""
    if os.path.exists(os.path.join(os.path.dirname(file), "meta.pkl")):
        raise ValueError(f"{file} has its own characters as tokens (meta.pkl beside it): give the text itself")
    size = os.path.getsize(file)
    if size == 0 or size % 2:
        raise ValueError(f"{file} is not a uint16 token file ({size} bytes)")
    header, tokens = np.fromfile(file, np.int32, 256), np.memmap(file, np.uint16, mode="r")
    kinds = {20240520: np.uint16, 20240801: np.uint32}      # whose tokens follow a header: GPT-2's, Llama 3's
    if len(header) == 256 and header[0] in kinds:           # its third number is how many they are
        tokens = np.memmap(file, kinds[header[0]], mode="r", offset=1024, shape=(int(header[2]),))
    elif len(tokens) > 8 and not tokens[1::2][:1000].any():
        raise ValueError(f"{file} is not a uint16 token file: every second number is 0, as in uint32")
    if (tokens.itemsize == 2) != (tokenizer.n_vocab <= 2 ** 16):       # such as GPT-2's tokens for a Llama 3
        raise ValueError(f"{file} holds tokens of {tokens.itemsize} bytes, not of a vocabulary of {tokenizer.n_vocab}")
    if tokens.max() >= tokenizer.n_vocab:       # the model would fail, or learn nonsense, much later
        raise ValueError(f"{file} holds token {tokens.max()}, beyond the {tokenizer.n_vocab} of its --encoding")
    return tokens


def encode_files(files, tokenizer, field=None):
    """Yields the tokens of all files, part by part, an end-of-text token before each document; after it the eos of a
    Llama that begins and ends documents with two tokens."""
    end = [token for token in tokenizer.stop[1:2] if token != tokenizer.eot]
    for file in files:
        check_text_file(file)
        if file.lower().endswith(".bin"):
            yield bin_tokens(file, tokenizer)
            continue
        for pair in tqdm(read_pairs(file, field), f"encoding {file}", unit=" documents", leave=False, disable=None):
            yield np.array([tokenizer.eot] + tokenizer.encode("".join(pair)) + end)


def token_rows(file, tokenizer, context, n):
    """The first n rows (n, T + 1), T at most 256, of a file of text, for a held-out loss."""
    width = min(context, 256) + 1       # of the last token only the prediction counts
    tokens = itertools.chain.from_iterable(encode_files([file], tokenizer))
    tokens = [int(token) for token in itertools.islice(tokens, n * width)]      # the rest is not read
    if len(tokens) < width:
        raise ValueError(f"{file} has {len(tokens)} tokens, fewer than a row of {width}")
    return torch.tensor(tokens[:len(tokens) // width * width]).view(-1, width)      # (rows, T + 1)

# --- questions and their scores -------------------------------------------------------------------

class TooLong(ValueError):
    """More examples than the context, or the puzzle, has room for."""


def encode_pairs(pairs, tokenizer):
    """[(prompt, answer), ...] -> tokens, targets (n, T): targets are -1 except where the answer is predicted. The
    padding is after the answer, where nothing looks."""
    tokens, targets = [], []
    for prompt, answer in pairs:
        # encoded together, as in running text, and split where the prompt alone would be encoded otherwise
        alone, both = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
        same = len(os.path.commonprefix([alone, both]))     # it takes lists as well
        # prompt a b, answer c d -> tokens eot a b c, targets -1 -1 c d
        tokens.append(torch.tensor([tokenizer.eot] + both[:-1]))
        targets.append(torch.tensor([-1] * same + both[same:]))
    return pad_sequence(tokens, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-1)


@lru_cache      # a log line or another path asks the same questions again
def encode_examples(task, tokenizer, context, n, shots=None, seed=0):
    """n different examples of a task, or all that it has, each after `shots` worked ones; by default the task's own
    number, or fewer where the longest would not fit -> tokens, targets (n, T), shots. Raises TooLong if they do not."""
    seeds = {}      # {question: the seed that makes it}
    for i in range(20 * n):     # closed-book has only some tens of questions: each is asked once
        name = f"{seed} {task} {i}"
        seeds.setdefault(example(task, random.Random(name))[0], name)
        if len(seeds) == n:
            break
    for number in range(TASKS[task].shots, -1, -1) if shots is None else [shots]:
        pairs = [example(task, random.Random(name), number) for name in seeds.values()]
        tokens, targets = encode_pairs(pairs, tokenizer)        # (n, T)
        if tokens.shape[1] <= context:
            return tokens, targets, number
    raise TooLong(f"a question of {task} after {number} examples is longer than the context of {context}")


def read_questions(file, tokenizer, context, n=None, shots=0, skip=0):
    """A .jsonl of `question` and `answer` -> [(prompt, answer), ...], those that fit the context. The first `shots`
    lines are worked examples of all others; the first `skip` are not asked: any number of shots asks the same."""
    pairs = list(read_pairs(file))
    if len(pairs) <= skip or not all(prompt and answer.strip() for prompt, answer in pairs):
        raise ValueError(f"{file}: expected a question and an answer in each line, and more lines than shots ({skip})")
    before = "".join(f"{prompt}{answer}\n\n" for prompt, answer in pairs[:shots])
    asked = [(before + prompt, answer) for prompt, answer in pairs[skip:][:n]]
    fitting = [pair for pair in asked if len(tokenizer.encode("".join(pair))) < context]    # after eot
    if not fitting:
        raise TooLong(f"none of {len(asked)} questions fits the context of {context}")
    if len(fitting) < len(asked):
        tqdm.write(f"{len(asked) - len(fitting)} of {len(asked)} do not fit the context of {context}: left out")
    return fitting


def examples_of(args, tokenizer, context):
    """What a scan (loop.py) asks: --data, --questions or --task -> tokens, targets (n, T)"""
    if args.data:
        rows = token_rows(args.data, tokenizer, context, args.n)
        return rows[:, :-1], rows[:, 1:]        # every token is predicted
    if args.questions:
        return encode_pairs(read_questions(args.questions, tokenizer, context, args.n), tokenizer)
    return encode_examples(args.task, tokenizer, context, args.n, seed=args.seed)[:2]


def proportion(right):
    """(n,) bool -> dict: value (their mean), its standard error, their number."""
    mean, n = right.float().mean().item(), len(right)       # of n coins that fall so with chance `mean`
    return {"value": mean, "se": (mean * (1 - mean) / n) ** 0.5, "n": n}


def accuracy(model, tokenizer, task, n=200, shots=None, path=None):
    """Exact match on n held-out examples -> dict: value, se (standard error), n, chance, shots that fit."""
    tokens, targets, shots = encode_examples(task, tokenizer, model.config.context, n, shots)
    _, right = score_rows(model, tokens, targets, path)     # (n,)
    return {**proportion(right), "chance": TASKS[task].chance, "shots": shots}


def finetune(model, tokenizer, task, n_train, n_test=200, lr=1e-3, steps=100):
    """Accuracy after fine-tuning a copy on n_train examples: full batch, AdamW, constant learning rate, no shots; the
    mean over held-out tests in the last third of the steps (MIDAS's protocol, shortened), and over three draws of
    examples -> dict: value, se (standard error over the draws), n, chance."""
    values = []
    for draw in range(3):
        tuned, rng = copy.deepcopy(model), random.Random(f"fine-tuning {draw} {task}")
        pairs = [example(task, rng, heldout=False) for _ in range(n_train)]
        tokens, targets = (x.to(model.embed.weight.device) for x in encode_pairs(pairs, tokenizer))     # (n_train, T)
        tests = encode_examples(task, tokenizer, model.config.context, n_test, shots=0, seed=draw)[:2]  # (n_test, T)
        # a fresh optimizer: the run's own moments are of other text
        optimizer, scores = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0), []
        for step in range(1, steps + 1):
            tuned(tokens, targets)[1].backward()    # all examples in each step; only the answer is learned
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step > steps * 2 // 3 and (steps - step) % 6 == 0:       # six tests in 100 steps
                scores.append(score_rows(tuned, *tests)[1].float().mean().item())
        values.append(statistics.mean(scores))
    return {"value": statistics.mean(values), "se": statistics.stdev(values) / 3 ** 0.5, "n": len(tests[0]),
            "chance": TASKS[task].chance}


def is_same(prediction, reference):
    """Whether a text gives the reference answer: what stands after GSM8K's ####, where it does. A number is compared
    with the last number of the prediction, any other answer as a whole."""
    number = r"(?<![\w.)])-?\$?(?:\d+/[1-9]\d*|\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"     # -$1,234.50, .5, 3/4
    # one kind of minus
    prediction, reference = (text.replace("−", "-").split("####")[-1].strip() for text in (prediction, reference))
    if not re.fullmatch(number, reference):     # text: the whole of it counts
        return prediction.split() == reference.split()
    found = re.findall(number, prediction)[-1:]     # the last number is the answer, as in GSM8K's scoring
    # as fractions, so that 4/6 is 2/3 and 18.00 is 18
    values = [Fraction(re.sub("[$,]", "", text)) for text in (*found, reference)]
    return len(values) == 2 and values[0] == values[1]


def answer_questions(model, tokenizer, questions, length, path=None):
    """Whether the greedy continuation of each prompt gives its answer -> (n,) bool"""
    right = []
    for prompt, answer in tqdm(questions, desc="questions", leave=False, disable=None):
        text = complete(model, tokenizer, prompt, length, path)
        # it may ask on by itself; before #### there may be paragraphs
        text = re.split("\nQuestion:" if "####" in text else "\n\n|\nQuestion:", text.strip())[0]
        right.append(is_same(text, answer))
    return torch.tensor(right)

# --- measurements are rows, and tables and figures are made of rows -------------------------------

def curves(args, model, checkpoint):
    """What the log of a model's run has at each step: yields table, step, column, score."""
    for row in checkpoint.get("log", []):
        for column in [] if "growth" in row else row:       # after growth the step has a line once more
            if column.startswith(("hops-", "loss ")):
                yield "training", f"step {row['step']}", column, {
                    "value": row[column], "x": row["flops_share"], "depth": row["depth"]}


def measure_tasks(args, model, checkpoint):
    """What was asked for, of one model: yields table, path as it is written, column, score, such as
    "along paths", "3-2x2-3", "hops-2", {"value": 0.83, "se": 0.03, "n": 200}."""
    paths = {"": None} | paths_of(args, model.config)       # the first is the model's own
    table, curve = "along paths" if len(paths) > 1 else "tasks", args.finetune or args.shots
    by = "fine-tuning examples" if args.finetune else "shots"
    # 1. FLOPs, a share of a plain model's, and losses
    heldout = {} if curve or args.questions else checkpoint["heldout"]
    if heldout and table == "tasks" and checkpoint.get("log"):
        yield table, "", "flops", {"value": checkpoint["log"][-1]["flops_share"]}
    for name, (where, path) in itertools.product(heldout, paths.items()):
        yield table, where, f"loss {name}", {"value": estimate_loss(model, heldout[name], path)}
    # 2. questions of each task, or of a file, by the number of examples where this is asked for
    asked = [os.path.basename(args.questions)] if args.questions else args.tasks
    tokenizer = get_tokenizer(checkpoint["tokenizer"]) if asked else None
    for task, examples, (where, path) in itertools.product(asked, curve or [None], paths.items()):
        try:
            if args.finetune:
                score = finetune(model, tokenizer, task, examples, args.n)
            elif args.questions:
                questions = read_questions(args.questions, tokenizer, model.config.context, args.n, examples or 0,
                                           skip=max(curve or [0]))
                score = proportion(answer_questions(model, tokenizer, questions, args.length, path))
            else:
                score = accuracy(model, tokenizer, task, args.n, examples, path)
        except TooLong as error:        # the others' table counts
            tqdm.write(f"{error}: left out")
            continue
        title, column = (f"{task}: accuracy by number of {by}", str(examples)) if curve else (table, task)
        yield title, where, column, score


def label_of(name, checkpoint):
    """A model's line in tables, and its seed: out/lidas-s0/ckpt.pt -> lidas, 0, out/lidas-s0/stable.pt ->
    lidas/stable.pt, 0. The seeds of a method share a line."""
    seed = checkpoint["args"].get("seed", 0)        # a model of Hugging Face has no args
    folder, file = os.path.split(name.removeprefix(os.path.join("out", "")))
    folder = re.sub(rf"-s?{seed}$", "", folder)     # lidas-s0 or lidas-0
    return folder if folder and file == "ckpt.pt" else os.path.join(folder, file), seed


def rows_of_models(args, measure):
    """What a command measures of its models, one after another -> rows, each appended to --results as it comes."""
    device, rows, seen = pick_device(args.device), [], {}
    for name in args.models:    # a mistyped one is noticed before the first is measured
        if name.endswith(".pt"):
            os.stat(name)
    # one name for one file, however it is written
    for name in dict.fromkeys(os.path.relpath(name) if os.path.exists(name) else name for name in args.models):
        model, checkpoint = load_checkpoint(name, device)
        label, seed = label_of(name, checkpoint)
        if (other := seen.setdefault((label, seed), name)) != name:     # they would be one line
            raise ValueError(f"{other} and {name} have one name and one seed: rename a folder")
        if args.data:           # in place of the model's own held-out text
            text = token_rows(args.data, get_tokenizer(checkpoint["tokenizer"]), model.config.context, 64)
            checkpoint["heldout"] = {os.path.basename(args.data): text}
        measured = tqdm(measure(args, model, checkpoint), desc=name, unit=" rows", leave=False, disable=None)
        for table, where, column, score in measured:
            line = f"{label} {where}".strip()
            rows.append({"table": table, "model": line, "seed": seed, "column": column, **score})
            append_rows(args.results, rows[-1:])        # at once: a command that is stopped leaves what it has
    return rows


def append_rows(file, rows):
    if file:        # --results was given
        with open(file, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(file):
    """The rows of a file that --results wrote."""
    rows, names = list(read_items(file)), {"table", "model", "seed", "column"}
    if not all(row.keys() >= names and isinstance(row.get("value"), (int, float)) for row in rows):
        raise ValueError(f"{file} has rows that --results did not write")
    return rows


def tables_of(rows):
    """-> of each table its name, {(model, column): {seed: row}}, models, columns. Of a row twice the last counts."""
    tables = defaultdict(lambda: defaultdict(dict))     # a cell that has no row is {}
    for row in rows:
        tables[row["table"]][row["model"], row["column"]][row["seed"]] = row
    for table, cells in tables.items():
        yield table, cells, *(list(dict.fromkeys(x)) for x in zip(*cells))


def differences(rows, names):
    """Of the models' rows 1 - 2, or (1 - 2) - (3 - 4), paired by seed, as rows of one more model."""
    title = "{} - {}" if len(names) == 2 else "({} - {}) - ({} - {})"
    for _, cells, _, columns in tables_of(rows):
        for column in columns:
            found = [cells[name, column] for name in names]     # {seed: row} each
            seeds = set.intersection(*map(set, found))      # those that all have; of one there is no interval
            for seed in seeds if len(seeds) > 1 else ():
                value = sum(sign * by_seed[seed]["value"] for sign, by_seed in zip((1, -1, -1, 1), found))
                yield {**found[0][seed], "model": title.format(*names), "value": value, "paired": True}


def cell(rows, seeds):
    """rows: one per seed -> their mean ± standard deviation; of one seed ± the standard error of its examples; of a
    difference ± half of its 95% interval, by Student's t. Their number follows where their line has more `seeds`."""
    if not rows:
        return "-"
    n, paired = len(rows), "paired" in rows[0]
    mean = statistics.mean(row["value"] for row in rows)
    spread = statistics.stdev(row["value"] for row in rows) if n > 1 else rows[0].get("se")
    if paired:      # there are at least two
        student = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)       # t of 95%, of 2 to 10 seeds and more
        spread *= student[min(n - 2, 8)] / n ** 0.5
    digits = 4 if "loop" in rows[0] else 3      # a scan's gains are small
    text = f"{mean:+.{digits}f}" if paired else f"{mean:.{digits}f}"
    return text + ("" if spread is None else f"±{spread:.{digits}f}") + (f" ({n})" if n < seeds else "")


def print_tables(rows):
    """A line per model, a column per measurement; the other way round where these are more than eight."""
    for table, cells, names, columns in tables_of(rows):
        lines = [["", "seeds", *columns]]       # texts, the heading first
        for name in names:
            found = [list(cells[name, column].values()) for column in columns]      # a row per seed, each
            seeds = max(map(len, found))        # a cell may have fewer
            lines.append([name, str(seeds), *(cell(some, seeds) for some in found)])
        for key in ("chance", "shots", "n"):    # what the scores of a column share
            texts = []
            for column in columns:
                found = {row[key] for name in names for row in cells[name, column].values() if key in row}
                ends = sorted({min(found), max(found)}) if found else []        # 5, or 2-5
                texts.append("-".join(f"{round(x, 2):g}" for x in ends))
            if any(texts):
                lines.append([key, "", *texts])
        lines = [*zip(*lines)] if len(columns) > 8 else lines       # more would be too wide
        # as wide as the longest text of each column, the first one to the left
        first, *widths = [max(map(len, texts)) for texts in zip(*lines)]
        print(f"\n{table}")
        for name, *texts in lines:
            print("  ".join([name.ljust(first), *map(str.rjust, texts, widths)]).rstrip())


def plot_lines(file, rows, xlabel, ylabels):
    """A panel for each column: mean and range over the seeds of each model against the rows' x, with a dot where the
    model grows. ylabels: {column: what its axis says}; other columns are left out."""
    from matplotlib.figure import Figure
    tables = list(tables_of([row for row in rows if "x" in row and row["column"] in ylabels]))
    if not tables:
        raise ValueError("there is nothing to draw: no rows of these models are of " + ", ".join(ylabels))
    _, cells, names, columns = tables[0]
    lines = {}      # {model: [model step 0, model step 390, ...]}
    for point in names:
        lines.setdefault(re.sub(" (step|visit) .*", "", point), []).append(point)
    figure = Figure(figsize=(3 * len(columns), 3), layout="constrained")
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        for i, (line, points) in enumerate(lines.items()):
            # of each step or visit a row per seed; where a seed lacks one, it is left out. x, y (points, seeds)
            found = [list(cells[point, column].values()) for point in points]
            found = [some for some in found if len(some) == max(map(len, found))]
            x, y = (np.array([[row[key] for row in some] for some in found]) for key in ("x", "value"))
            # the model grows where the next line of the log is of a deeper one
            grows = np.flatnonzero(np.diff([some[0].get("depth", 0) for some in found]))
            axis.plot(x.mean(1), y.mean(1), color=f"C{i}", label=line,
                      marker="o" if len(grows) else "", markevery=grows, ms=4)
            axis.fill_between(x.mean(1), y.min(1), y.max(1), color=f"C{i}", alpha=0.15, lw=0)
        if column in TASKS:
            axis.axhline(TASKS[column].chance, color="grey", linewidth=0.7, linestyle=":")      # a guess
            axis.set_ylim(0, 1.02)
        axis.set(title=column, xlabel=xlabel, ylabel=ylabels[column])
    figure.axes[0].legend(fontsize="small")
    figure.savefig(file, dpi=120)


CONFLICTS = {   # an option: those that would mean nothing beside it
    "questions": ("tasks", "data", "finetune", "curves"), "shots": ("data",), "plot": ("json", "compare"),
    "finetune": ("loop", "path", "data", "shots", "curves"), "curves": ("loop", "path", "tasks", "data", "shots", "n"),
    "table": "loop path tasks data questions finetune curves shots n results device".split()}


def main():
    parser = command_parser(__doc__)
    parser.add_argument("models", nargs="*", help="checkpoints (.pt), or Hugging Face names or directories")
    # what to measure
    parser.add_argument("--tasks", nargs="*", action="extend", choices=TASKS, help="default: all; if none: losses only")
    parser.add_argument("-n", type=positive_int, help="examples of a task (default: 200), or questions (default: all)")
    parser.add_argument("--shots", type=between(0, 1000, int), nargs="+", help="in-context curve: numbers of examples")
    parser.add_argument("--finetune", type=positive_int, nargs="+", help="fine-tuning curve: numbers of examples")
    parser.add_argument("--curves", action="store_true", help="the log of the runs: accuracy and losses by step")
    parser.add_argument("--questions", metavar="FILE", help=".jsonl of question and answer in place of tasks")
    parser.add_argument("--length", type=positive_int, default=128, help="longest answer to them (default: 128)")
    parser.add_argument("--data", metavar="FILE", help="text for the held-out loss, in place of the checkpoint's own")
    # where it goes
    parser.add_argument("--results", metavar="FILE", help="append every measured value to this .jsonl file")
    parser.add_argument("--table", metavar="FILE", help="print the tables of such a file, measure nothing")
    parser.add_argument("--only", default="", help="--table: only where \"table: model\" has this pattern")
    parser.add_argument("--compare", nargs="+", metavar="LINE",
                        help="lines 1 - 2 of a table, or (1 - 2) - (3 - 4), with ± half of the 95%% interval")
    parser.add_argument("--plot", metavar="FILE.png", help="a figure of --curves, or of their rows in --table")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines in place of tables")
    args, _ = read_options(parser, CONFLICTS, requires={"questions": ("length",), "table": ("only",)})
    if bool(args.models) == bool(args.table):
        raise ValueError("name models to evaluate, or a file of rows with --table")
    if args.plot and not (args.curves or args.table):
        raise ValueError("--plot goes with --curves, or with their rows in --table")
    if args.compare and len(args.compare) not in (2, 4):
        raise ValueError("--compare takes two lines, or four")
    args.n = args.n or (None if args.questions else 200)
    args.tasks = list(TASKS) if args.tasks is None else args.tasks
    # 1. the rows
    rows = read_rows(args.table) if args.table else rows_of_models(args, curves if args.curves else measure_tasks)
    rows = [row for row in rows if re.search(args.only, f"{row['table']}: {row['model']}")]
    if args.compare:
        rows = [row for row in rows if row["model"] in args.compare]
        rows += differences(rows, args.compare)
        if not any("paired" in row for row in rows):
            raise ValueError("there is nothing to compare: no table has all of these lines, with two seeds or more")
    # 2. what is shown of them
    if not rows:
        raise ValueError("there is nothing to show: no task, no such rows, or nothing that fits the context")
    if args.plot:
        plot_lines(args.plot, rows, "share of a plain model's FLOPs", dict.fromkeys(HOPS, "accuracy"))
    elif args.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        print_tables(rows)


if __name__ == "__main__":
    run_script(main)
