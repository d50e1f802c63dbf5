"""
Speed, measured side by side in one process. By hand, not in CI; nothing else should run on the machine.

    python tests/bench.py                   # 8 layers x 128 wide x 128 context: 1 to 2 minutes on two cores
    python tests/bench.py --shape gpt2 --batch 64               # GPT-2 small's shape, a GPU: 80 seconds
    python tests/bench.py --shape gpt2 --batch 1 --repeats 3    # the same on two cores: 13 to 20 minutes
"""
import argparse
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from grow import default_device, peak_flops, training_flops  # noqa: E402
from loop import loop_path  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from signatures import all_signatures  # noqa: E402
from train import batch_of, prepare  # noqa: E402

SHAPES = {
    "small": dict(vocab_size=1024, n_layer=8, n_head=4, n_kv_head=4, n_embd=128, n_hidden=344, context=128),
    "gpt2": dict(vocab_size=50304, n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_hidden=2048,
                 context=1024),
}


def seconds(device, repeats, *functions, warmup=2):
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


def training_step(shape, batch, device, compiled, fused, separator=None):
    torch.manual_seed(0)
    config = GPTConfig(**shape, separator=separator)
    model = GPT(config).to(device)
    run = torch.compile(model) if compiled == "model" else prepare(model, compiled == "layer", False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    tokens = torch.randint(config.vocab_size, (batch, config.context), device=device)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = run(tokens, tokens)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=16, help="rows in a training step (default: 16)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls, of which the median is shown")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], default=default_device())
    args = parser.parse_args()
    shape, batch, device = SHAPES[args.shape], args.batch, args.device
    config = GPTConfig(**shape)
    device_name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{args.shape} on {device_name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"batch {batch}")

    print(f"\n{'training step':<36}{'tokens/s':>12}{'MFU':>8}")
    peak, variants = peak_flops(device), {
        "eager, AdamW not fused": (None, False), "eager": (None, True), "layers compiled": ("layer", True),
        "the same, with documents (train.py)": ("layer", True, 0), "model compiled": ("model", True)}
    steps = [training_step(shape, batch, device, *how) for how in variants.values()]
    for name, step_time in zip(variants, seconds(device, args.repeats, *steps)):
        rate = batch * config.context / step_time
        mfu = f"{training_flops(config, rate) / peak:.0%}" if peak else "-"
        print(f"{name:<36}{rate:>12,.0f}{mfu:>8}", flush=True)
    stream = np.zeros((10_000, config.context + 1), dtype=np.uint16)
    run = argparse.Namespace(batch=batch, steps=10_000, cooldown=0.2, math_share=0.5, seed=0)
    time_taken, = seconds(device, 100, lambda: batch_of({"general": stream, "math": stream}, run, 9_000))
    print(f"making its batch: {time_taken * 1e3:.2f} ms, "
          f"{time_taken * rate / (batch * config.context):.2%} of the last of these steps")

    config = GPTConfig(**{**shape, "context": max(512, config.context)})
    model = GPT(config).to(device)
    looped = loop_path(config.n_layer, config.n_layer // 2 - 1, 2, 1)
    print(f"\n{'generation to 512 tokens':<36}{'tokens/s':>12}{'last 16':>10}")
    for name, path, cache in (("plain, cached", None, True), ("plain, not cached", None, False),
                              ("looped, cached", looped, True), ("looped, not cached", looped, False)):
        def taken(prompt, new):
            prompt = torch.zeros(1, prompt, dtype=torch.long, device=device)
            return seconds(device, 1, lambda: model.generate(prompt, new, path, use_cache=cache), warmup=0)[0]
        taken(16, 4)
        print(f"{name:<36}{496 / taken(16, 496):>12,.1f}{16 / (taken(496, 17) - taken(496, 1)):>10,.1f}",
              flush=True)

    rows = torch.randint(config.vocab_size, (8, 129))
    time_taken, = seconds(device, 1, lambda: all_signatures(model, rows, 2), warmup=0)
    print(f"\nall signatures, 8 rows of 128 tokens: {time_taken:.1f} s")


if __name__ == "__main__":
    main()
