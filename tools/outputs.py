"""Store the outputs of notebooks in the notebooks: `python -m tools.outputs [NOTEBOOK ...]`
(default: all).

Each runs in its own kernel, as many at a time as settings.ini has workers; nbdev-clean then removes
what changes from run to run. A notebook with a failing cell is left as it was.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.book import ROOT
from tools.settings import load_settings


def store(path: str) -> str:
    "Execute one notebook in place and clean it; the message of the cell that failed, or nothing."
    limits = {
        "OMP_NUM_THREADS": str(load_settings(ROOT / "settings.ini").threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tools.execute", path, path]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **limits}, capture_output=True, text=True, check=False
    )
    print(f"{path:<48} {'FAILED' if done.returncode else 'stored'}", flush=True)
    return done.stdout + done.stderr if done.returncode else ""


def main(paths: list) -> int:
    every = (
        path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
    )
    notebooks = paths or sorted(str(path.relative_to(ROOT)) for path in every)
    with ThreadPoolExecutor(load_settings(ROOT / "settings.ini").workers) as pool:
        messages = [message for message in pool.map(store, notebooks) if message]
    for path in notebooks:
        subprocess.run(
            [Path(sys.executable).with_name("nbdev-clean"), "--fname", path], cwd=ROOT, check=True
        )
    print("\n".join(messages), file=sys.stderr)
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
