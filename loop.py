"""
Looping: visiting a block of layers again, with the same weights. It needs only a path, so any checkpoint can
be looped at inference, trained to loop or not (claim 2 of the paper), and a model trained to loop is one
whose config carries the path (Loop(e-LxK-d) of arXiv 2502.17416: e layers, L visited K times, d layers).

    python loop.py out/lidas/ckpt.pt --prompt "k=4" --start 3 --block 2 --repeats 0 1 2 4    # seconds
    python loop.py out/lidas/ckpt.pt --sweep --block 2          # held-out loss, start x repeats: a minute
    python loop.py out/looped/ckpt.pt --unroll untied.pt        # the looped model, every visit untied
    python loop.py out/lidas/ckpt.pt --export DIR               # for transformers, vLLM, llama.cpp
    python loop.py --hf SmolLM-135M --prompt "2+2=" --start 12 --block 4 --repeats 0 1   # any Llama directory
"""
import gzip
import itertools
import json
import os
import re
import shutil
import zlib

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from grow import Parser, at_least, grow, load_checkpoint, run_script, save_derived, token_dtype, tokens_of
from model import llama_names, loop_path, mean_loss, one_line, read_json, refuse_others


def parse_loop(text):
    """Loop(e-LxK-d), or Loop(LxK), of arXiv 2502.17416 -> (stored layers, path).

    "2-2x3-2" -> (6, [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]); "4x6" -> (4, [0, 1, 2, 3] * 6).
    Raises ValueError for other text.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)x(\d+)(?:-(\d+))?", text)
    if not match:
        raise ValueError(f"a loop is written e-LxK-d or LxK, as in 2-2x3-2 or 4x6, not {text!r}")
    before, block, visits, behind = (int(group or 0) for group in match.groups())
    if block < 1 or visits < 1:
        raise ValueError(f"a loop of {block} layers visited {visits} times is none: {text!r}")
    n_layer = before + block + behind
    return n_layer, loop_path(n_layer, before, block, visits - 1)


def parse_repeats(text, n_layer):
    """START,BLOCK,REPEATS, as in "3,2,1" -> loop_path of them. Raises ValueError for other text."""
    if not re.fullmatch(r"\d+,\d+,\d+", text):
        raise ValueError(f"--loop takes START,BLOCK,REPEATS, as in 3,2,1, not {text}")
    return loop_path(n_layer, *map(int, text.split(",")))


def unroll(model, path=None):
    """The model along a path (its own unless given) as a plain one, each visit untied: that is growing it."""
    return grow(model, path)

# -----------------------------------------------------------------------------
# text: encodings for any checkpoint, what a model writes, files of lines

# of the built-in world: an assigned variable with its equals sign, the blank to fill in, words and numbers
# below 100 with the space before them, single other characters
PIECES = r"""(?<![A-Za-z])[a-z] ?=| ?___\.? ->|\n+| ?[A-Za-z]+| ?\d{1,2}| ?[^\sA-Za-z\d]|\s"""
# how GPT-2 splits text, and how SmolLM does, which gives every digit a token
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
DIGITS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
# what tiktoken can be, of a tokenizer's settings; the empty ones stand for each other
BYTE_PAIRS = {"type": ["BPE"], "byte_fallback": [False, None], "dropout": [None, 0.0], "normalizer": [None],
              "continuing_subword_prefix": [None, ""], "end_of_word_suffix": [None, ""],
              "add_prefix_space": [False]}
# every byte of ordinary text: vocabularies in use lack control characters and bytes that no text has
TEXT_BYTES = {*b"\t\n\r", *range(32, 127), *range(128, 192), *range(194, 241)}


def load_encoding(spec):
    """What a checkpoint has as its encoding -> tiktoken.Encoding with an end-of-text token: of a name that
    tiktoken knows, of a list of words, or of {"config.json": dict, "tokenizer.json": dict} of a Hugging Face
    directory. Raises ValueError where that is not to be had.

    A list makes an encoding of the 256 bytes and those words, so that every text can be encoded and decoded.
    """
    if isinstance(spec, dict):
        try:
            return llama_encoding(spec["config.json"], spec["tokenizer.json"])
        except ValueError as error:
            raise ValueError(f"tokenizer.json is none that tiktoken can express: {error}")
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"there is no tokenizer.json as the tokenizers package writes it, so that only "
                             f"--tokens FILE.bin works: {error!r}")
    if not isinstance(spec, str):
        tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in spec]
        return tiktoken.Encoding("words", pat_str=PIECES, special_tokens={"<|endoftext|>": len(tokens)},
                                 mergeable_ranks={t: i for i, t in enumerate(tokens)})
    if spec not in tiktoken.list_encoding_names():
        raise ValueError(f"no encoding {spec!r}: tiktoken knows {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(spec)
    except Exception as error:      # whatever the network stack raises: the cause is in the message
        raise ValueError(f"tiktoken could not load {spec!r}: it downloads the vocabulary on first use. "
                         f"Offline, set TIKTOKEN_CACHE_DIR to a folder that holds it ({one_line(error)})")


def llama_encoding(config, tokenizer):
    """config.json, tokenizer.json -> tiktoken.Encoding, of byte-level BPE as GPT-2's, SmolLM's, Llama 3's.
    Begin-of-text, or else the end's token, begins a document. Raises ValueError for any other kind."""
    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    *first, last = pre.get("pretokenizers", [pre])
    refuse_others({**model, "normalizer": tokenizer.get("normalizer"),
                   "add_prefix_space": last.get("add_prefix_space", False)}, BYTE_PAIRS)
    kinds, pattern = [step.get("type") for step in [*first, last]], None
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        pattern = GPT2
    elif kinds == ["Digits", "ByteLevel"] and first[0]["individual_digits"] and last.get("use_regex", True):
        pattern = DIGITS
    elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        split = first[0]["pattern"].get("Regex") if first[0]["behavior"] == "Isolated" else None
        # what lies between two matches is a piece too; tiktoken would leave it out
        pattern = split and rf"(?:{split})|(?:(?!{split})[\s\S])+"
    if pattern is None:
        raise ValueError(f"text split by {kinds} with these settings is not supported")
    if not all(token["special"] for token in tokenizer["added_tokens"]):
        raise ValueError("added tokens that are not special are not supported")

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]       # bytes that stand for themselves
    others = sorted({*range(256)} - {*shown})
    byte = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = [left + right for left, right in merges]
    order = [vocab[token] for token in merged]
    if order != sorted(order):
        raise ValueError("its ids are not in merging order")
    if not model.get("ignore_merges") and not set(vocab) <= set(byte) | set(merged):
        raise ValueError("it has tokens that no merge makes")
    tokens = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
    if not TEXT_BYTES <= {token[0] for token in tokens if len(token) == 1}:
        raise ValueError("it lacks single bytes of text")

    ids = {*range(config["vocab_size"])}
    begin = config.get("eos_token_id") if config.get("bos_token_id") is None else config["bos_token_id"]
    if not isinstance(begin, int) or not ids.issuperset([begin, *vocab.values()]):
        raise ValueError(f"its ids must be below config.json's vocab_size {len(ids)}, also the one that "
                         f"begins a document: bos_token_id, or else eos_token_id, not {begin}")
    special["<|endoftext|>"] = begin        # tiktoken's name for it
    # the model may generate any id, also those without a token, so that each needs a text
    unnamed = ids - {*vocab.values(), *special.values()}
    special |= {f"<|unnamed {i}|>": i for i in sorted(unnamed)}
    return tiktoken.Encoding("huggingface", pat_str=pattern, special_tokens=special, mergeable_ranks=tokens)


def continue_text(model, encoding, text, length, path=None, temperature=0.0):
    """What the model writes behind a text that begins a document: up to `length` tokens -> text, which ends
    where the document does: at the first special token, or id that is no token."""
    tokens = [encoding.eot_token] + encoding.encode_ordinary(text)
    new = model.generate(torch.tensor([tokens], device=model.embed.weight.device), length, path, temperature,
                         stop=encoding.eot_token)[0, len(tokens):].tolist()
    ordinary = {encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    return encoding.decode(list(itertools.takewhile(ordinary.__contains__, new)))


def json_lines(file, *layouts):
    """The dicts in the lines of a .jsonl or .jsonl.gz file, each of one of the layouts: {name: type} of what
    it must have, as {"question": str, "answer": str}. Raises ValueError naming a line that has none."""
    number = 0
    with (gzip.open if str(file).endswith(".gz") else open)(file, "rt", encoding="utf-8") as f:
        try:
            for number, line in enumerate(f, 1):
                item = json.loads(line)
                if not any(all(isinstance(item.get(name), kind) for name, kind in layout.items())
                           for layout in layouts):
                    raise ValueError
                yield item
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8 text (behind line {number})")
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise ValueError(f"{file} is not a whole gzip file")
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{file}, line {number}: not a JSON object with " +
                             " or ".join(" and ".join(layout) for layout in layouts))


def ask(question):
    return f"Question: {question}\nAnswer:"


def texts_of(file):
    """The documents of a .txt, .jsonl or .jsonl.gz file. Raises ValueError for what is none."""
    if file.endswith((".jsonl", ".jsonl.gz")):
        for line in json_lines(file, {"text": str}, {"question": str, "answer": str}):
            asked = not isinstance(line.get("text"), str)
            yield f"{ask(line['question'])} {line['answer']}" if asked else line["text"]
    else:
        try:
            with open(file, encoding="utf-8") as f:
                yield f.read()
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8 text")


def encode(files, encoding, write):
    """Writes the tokens of all files, an end-of-text token before each document."""
    dtype = token_dtype(encoding)
    for file in files:
        if file.endswith(".bin"):
            tokens = tokens_of(file)
            for start in range(0, len(tokens), 2 ** 24):
                part = np.array(tokens[start:start + 2 ** 24])
                if part.max() >= encoding.n_vocab:
                    raise ValueError(f"{file} holds token {part.max()}, but {encoding.name} has "
                                     f"{encoding.n_vocab}: name the encoding it was made with by --encoding")
                write(part.astype(dtype).tobytes())
        else:
            for text in tqdm(texts_of(file), desc=f"encoding {file}", unit=" documents", leave=False):
                write(np.array([encoding.eot_token] + encoding.encode_ordinary(text), dtype=dtype).tobytes())

# -----------------------------------------------------------------------------
# writing a Hugging Face directory

def export(model, folder, path=None, source=None):
    """Writes the model along a path, every visit untied, as a Hugging Face Llama directory (config.json and
    model.safetensors), which transformers, vLLM and llama.cpp open. Raises ValueError where there is one.
    source: the Hugging Face directory that the model comes from, whose tokenizer goes with it."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("--export needs the package: pip install safetensors")
    folder = os.path.normpath(folder)       # "DIR/" + ".part" would lie inside DIR
    if os.path.exists(folder):
        raise ValueError(f"{folder} exists: choose a new directory")
    untied = unroll(model, path)
    config, names, weights = untied.config, llama_names(untied.config), {}
    for ours, p in untied.named_parameters():       # names a tied head once
        theirs = names[ours]
        heads = [config.n_head, config.n_kv_head, config.n_kv_head] if len(theirs) == 3 else [1] * len(theirs)
        parts = p.detach().split([len(p) // sum(heads) * n for n in heads])
        weights.update({name: part.clone() for name, part in zip(theirs, parts)})
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "vocab_size": config.vocab_size, "num_hidden_layers": config.n_layer, "hidden_act": "silu",
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head,
        "hidden_size": config.n_embd, "intermediate_size": config.n_hidden, "attention_bias": False,
        "max_position_embeddings": config.context, "rms_norm_eps": config.norm_eps, "mlp_bias": False,
        "rope_theta": config.rope_theta, "tie_word_embeddings": config.tied,
        "bos_token_id": config.separator, "eos_token_id": config.separator}
    part = f"{folder}.{os.getpid()}.part"                 # renamed when whole: nothing is left half-written
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    try:
        save_file(weights, os.path.join(part, "model.safetensors"), metadata={"format": "pt"})
        if source:
            ids = read_json(source, "config.json")
            settings |= {name: ids.get(name) for name in ("bos_token_id", "eos_token_id")}
            for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                         "special_tokens_map.json"):
                if os.path.exists(os.path.join(source, name)):
                    shutil.copy(os.path.join(source, name), part)
        with open(os.path.join(part, "config.json"), "w", encoding="utf-8") as f:
            json.dump(settings, f, indent=2)
        os.replace(part, folder)
    except Exception as error:              # safetensors has errors of its own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{folder} could not be written: {one_line(error)}")

# -----------------------------------------------------------------------------

def show(model, checkpoint, args):
    """The same prompt continued at each repeat count, with the held-out loss there."""
    encoding = load_encoding(checkpoint["encoding"])
    for repeats in args.repeats:
        path = loop_path(model.config.n_layer, args.start, args.block, repeats)
        losses = "  ".join(f"{name} {mean_loss(model, rows, path):.4f}"
                           for name, rows in checkpoint["heldout"].items())
        torch.manual_seed(args.seed)
        text = continue_text(model, encoding, args.prompt, args.length, path, args.temperature)
        print(f"\nrepeats {repeats}   depth {len(path)}   path {' '.join(map(str, path))}\n"
              f"held-out loss: {losses}")
        print(f"{args.prompt}|{text}")


def sweep(model, checkpoint, args):
    """Held-out loss for every place of the block (rows) and number of repeats (columns)."""
    n_layer = model.config.n_layer
    for name, rows in checkpoint["heldout"].items():
        print(f"\nheld-out {name} loss, block of {args.block}\n{'start':>7}" +
              "".join(f"{f'repeats {r}':>12}" for r in args.repeats))
        for start in range(n_layer - args.block + 1):
            losses = [mean_loss(model, rows, loop_path(n_layer, start, args.block, r)) for r in args.repeats]
            print(f"{start:>7}" + "".join(f"{loss:>12.4f}" for loss in losses))


def main():
    parser = Parser(__doc__)
    parser.add_checkpoints(most=1)
    parser.add_argument("--prompt", default="",
                        help="text to continue (default: nothing, a document's beginning)")
    parser.add_argument("--start", type=int, help="first layer of the looped block (default: a middle block)")
    parser.add_argument("--block", type=int, default=2, help="layers per block (default: 2, as train.py's)")
    parser.add_argument("--repeats", type=int, nargs="+",
                        help="extra visits; 0 visits each layer once, also one that was trained to loop "
                             "(default: 0 1 2 4)")
    parser.add_argument("--sweep", action="store_true", help="table of held-out loss, start x repeats")
    parser.add_argument("--unroll", metavar="FILE", help="save the model along its path, every visit untied; "
                                                         "with one number of --repeats along that loop")
    parser.add_argument("--export", metavar="DIR", help="the same as a Hugging Face directory")
    # sampling
    parser.add_argument("--length", type=at_least(1), default=48,
                        help="length of the continuation (default: 48)")
    parser.add_argument("--temperature", type=at_least(0, float), default=0.0,
                        help="0 is greedy, so that runs compare (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, same for all repeats (default: 0)")
    parser.add_device()
    args = parser.parse_args()

    model, checkpoint = load_checkpoint(args.checkpoints[0], args.device, args.tokens)
    given = args.start is not None or args.repeats is not None
    if args.start is None:
        args.start = (model.config.n_layer - args.block) // 2
    if args.unroll or args.export:
        if given and len(args.repeats or []) != 1:
            raise ValueError("--unroll and --export write one model: give one number of --repeats")
        path = model.config.visits() if not given else loop_path(
            model.config.n_layer, args.start, args.block, args.repeats[0])
    if args.unroll:
        save_derived(args.unroll, unroll(model, path), checkpoint)
        print(f"saved {args.unroll}: {len(path)} layers from {model.config.n_layer}")
    if args.export:
        source = args.checkpoints[0] if os.path.isdir(args.checkpoints[0]) else None
        export(model, args.export, path, source)
        print(f"saved {args.export}: {len(path)} layers, " +
              (f"with the tokenizer files of {source}" if source else "without its tokenizer"))
        if model.config.separator is not None:
            print("Llama has no mask between documents: give it one document at a time")
    if args.unroll or args.export:
        return
    args.repeats = args.repeats or [0, 1, 2, 4]
    if not checkpoint["heldout"] and args.sweep:
        raise ValueError("the sweep needs held-out tokens: --tokens FILE.bin")
    for repeats in args.repeats:        # every path is checked before the first is run
        loop_path(model.config.n_layer, args.start, args.block, repeats)
    (sweep if args.sweep else show)(model, checkpoint, args)


if __name__ == "__main__":
    run_script(main)
