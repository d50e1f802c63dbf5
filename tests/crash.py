"""
Kills a run at random instants, with kill -9, and checks that it always resumes and ends with the weights of a
run that was left alone, bit for bit. The run writes a checkpoint at every second step and grows twice, so
that kills also fall into writing and growing. By hand, not in CI:

    python tests/crash.py                # 20 kills: some minutes on two cores
    python tests/crash.py --kills 100 --seed 1
"""
import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN = ["--layers", "6", "--width", "32", "--heads", "1", "--context", "128", "--batch", "2", "--steps", "100",
       "--evals", "50", "--device", "cpu", "--compile", "off"]


def start(out, resume=False):
    command = [sys.executable, os.path.join(ROOT, "train.py"), *RUN, "--out", out, *(["--resume"] if resume else [])]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), tempfile.mkdtemp()
    reference, out, begun = os.path.join(folder, "reference"), os.path.join(folder, "killed"), time.time()
    if start(reference).wait():
        sys.exit("the run itself fails: python train.py " + " ".join(RUN))
    whole, kills, steps, finished = time.time() - begun, 0, [], 0
    while kills < args.kills or not finished:
        latest = os.path.join(out, "ckpt.pt")
        process = start(out, resume=os.path.exists(latest))
        try:            # also before the first step, while Python starts
            code = process.wait(rng.uniform(0, whole / 2) if kills < args.kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            if os.path.exists(latest):
                steps.append(torch.load(latest, weights_only=True)["step"])
            continue
        if code:
            sys.exit(f"it did not resume after {kills} kills: exit code {code}")
        for file in ("ckpt.pt", "stable.pt"):
            one, two = (torch.load(os.path.join(run, file), weights_only=True)["model"] for run in (reference, out))
            if not all(torch.equal(w, two[name]) for name, w in one.items()):
                sys.exit(f"other weights in {file} after {kills} kills")
        finished += 1
        shutil.rmtree(out)      # and once more from the start
    shutil.rmtree(folder)
    print(f"{kills} kills, at steps {sorted(steps)}: {finished} runs ended with bitwise the same weights")


if __name__ == "__main__":
    main()
