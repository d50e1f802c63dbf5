"""
Speed, measured side by side in one process. By hand, not in CI; nothing else should run on the machine.

    python tests/bench.py                                       # 8 layers x 128 wide: minutes on two cores
    python tests/bench.py --shape gpt2 --device cuda                # GPT-2 small's shape, a GPU
    python tests/bench.py --shape smollm --only scan                # SmolLM2-135M's
"""
import argparse
import os
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from loop import loop_path, scan  # noqa: E402
from model import GPT, GPTConfig, pick_device  # noqa: E402

SHAPES = {"small": dict(vocab_size=1024, n_layer=8, n_head=4, n_kv_head=4, n_embd=128, d_ff=344, context=512),
          "gpt2": dict(vocab_size=50304, n_layer=12, n_head=12, n_kv_head=12, n_embd=768, d_ff=2048, context=1024),
          "smollm": dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, d_ff=1536, context=2048)}


def seconds(device, repeats, functions, warmup=2):
    """Median time of a call of each, after some that warm up; in turn, as a machine's speed drifts."""
    times = [[] for _ in functions]
    for _ in range(warmup + repeats):
        for function, taken in zip(functions, times):
            begun = time.perf_counter()
            function()
            if device != "cpu":
                torch.accelerator.synchronize()
            taken.append(time.perf_counter() - begun)
    return [sorted(taken[warmup:])[repeats // 2] for taken in times]


def add(what, unit, count, names, times):
    """One line for each; the last column is the speed as a multiple of the first one's."""
    for name, taken in zip(names, times):
        print(f"{what:<30} {name:<26} {count / taken:>14,.2f} {unit}/s {times[0] / taken:>8.2f}x", flush=True)


def generate(config, args):
    """One row and eight, the same weights in transformers, greedy; and along a loop."""
    from transformers import AutoModelForCausalLM
    model = GPT(config).to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/hf")
        hf = AutoModelForCausalLM.from_pretrained(f"{folder}/hf").to(args.device).eval()
    looped, new = loop_path(config.n_layer, config.n_layer // 2 - 1, 2, 1), min(args.new, config.context - 16)
    for batch in (1, 8):
        prompt = torch.randint(config.vocab_size, (batch, 16), device=args.device)

        def theirs():
            return hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
                               do_sample=False, eos_token_id=None, pad_token_id=0)
        ours = [theirs, lambda: model.generate(prompt, new, temperature=0),
                lambda: model.generate(prompt, new, looped, temperature=0),
                lambda: model.generate(prompt, new, temperature=0, use_cache=False)][:4 if batch == 1 else 3]
        if not torch.equal(theirs(), ours[1]()):
            print("not the same tokens: rounding, or a mistake")
        names = ["transformers", "ours", "ours, two layers looped", "ours, no cache"]
        add(f"generation, {batch} a batch", "tokens", batch * new, names, seconds(args.device, 3, ours, warmup=1))


def scans(config, args):
    """Every block once more on 64 rows of 256 tokens: as loop.py --scan, and each path from the start."""
    model = GPT(config).to(args.device)
    rows = torch.randint(config.vocab_size, (64, min(257, config.context)))
    paths = [loop_path(config.n_layer, start, block, 1)
             for start in range(config.n_layer) for block in range(1, config.n_layer - start + 1)]
    some = paths[::max(1, len(paths) // 12)]            # of the slow way, a sample

    def slowly():
        for path in some:
            with torch.no_grad():
                for part in rows.to(args.device).split(8):
                    model(part[:, :-1], part[:, 1:].contiguous(), path)
    slow, = seconds(args.device, 1, [slowly], warmup=0)
    fast, = seconds(args.device, 1, [lambda: list(scan(model, rows[:, :-1], rows[:, 1:], paths))], warmup=0)
    add(f"scan of {len(paths)} blocks", "blocks", len(paths), ["each from the start", "loop.py --scan"],
        [slow * len(paths) / len(some), fast])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate (default: 256)")
    parser.add_argument("--only", nargs="+", choices=["generate", "scan"], default=["generate", "scan"])
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    args.device, config = pick_device(args.device), GPTConfig(**SHAPES[args.shape])
    torch.set_float32_matmul_precision("high")
    print(f"{args.shape}, {torch.cuda.get_device_name() if args.device == 'cuda' else args.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for name in args.only:
        {"generate": generate, "scan": scans}[name](config, args)


if __name__ == "__main__":
    main()
