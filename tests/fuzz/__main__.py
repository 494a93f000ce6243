"""Other cases than CI's, for as long as told: `python -m tests.fuzz --seconds 300 --seed 7`."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time

from tests.fuzz.fuzzing import RANDOM

# Of one round, which takes a minute or two: a failing one spends most of it on finding a smaller case.
ROUND_TIMEOUT_S = 1800


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="no round begins after these")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; 0 draws one")
    parser.add_argument("--only", default="", help="the part, as pytest's -k")
    chosen = parser.parse_args()
    seed, ends_at, rounds = (
        chosen.seed or random.SystemRandom().randrange(1, 10**6),
        time.monotonic() + chosen.seconds,
        0,
    )
    while rounds == 0 or time.monotonic() < ends_at:
        print(f"round {rounds + 1}, seed {seed}; again with: make fuzz SECONDS=1 SEED={seed}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-o", f"timeout={ROUND_TIMEOUT_S}", "tests/fuzz"]
        command += [f"--hypothesis-profile={RANDOM}", f"--hypothesis-seed={seed}", "-k", chosen.only]
        if (code := subprocess.run(command, check=False).returncode) != 0:
            print(f"failed with seed {seed}; again with: make fuzz SECONDS=1 SEED={seed}")
            return code
        seed, rounds = seed + 1, rounds + 1
    print(f"{rounds} rounds, none failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
