"""How long `import lora_book` takes, as a ratio to `import torch`: fresh interpreters, in turn.

    python -m benchmarks.imports [--rounds N] [--out FILE]

CPU time of the child, its start included; the first round, which fills the disk's cache, isn't
counted.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.timing import quotients, setting, store, summary

GOAL, CASES = 1.3, ("import torch", "import lora_book")


def cpu_seconds(statement: str) -> float:
    "CPU seconds of a fresh interpreter that runs one statement."
    before = os.times()
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


def main() -> None:
    "Measure, print, and write it as JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    spent = [[cpu_seconds(case) for case in CASES] for _ in range(args.rounds + 1)][1:]
    torch, ours = ([list(times)] for times in zip(*spent, strict=True))
    store(
        [{"name": CASES[1], **summary(quotients(ours, torch)), "goal": GOAL}],
        args.out,
        setting(rounds=args.rounds),
    )


if __name__ == "__main__":
    main()
