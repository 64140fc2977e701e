"""Try the wheel of a folder in an empty one: `python -m tools.wheel dist`.

The wheel is installed into an environment of its own, which sees the packages of this one (PyTorch
is large) but not the sources; there a model is adapted, trained, merged, saved and loaded.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

TRIAL = """
import sys, tempfile
from pathlib import Path
import torch
from torch import nn
import lora_book as lb

home = Path(lb.__file__).resolve()
assert Path(sys.prefix).resolve() in home.parents, f"not the wheel's: {home}"
assert home.with_name("py.typed").is_file()

def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

x, y = torch.randn(16, 8), torch.randn(16, 2)
model = lb.adapt(base(), "lora", target_modules=["0"], r=2)
optimizer = torch.optim.AdamW(lb.param_groups(model, lr=1e-2))
losses = [
    float(lb.train_step(model, optimizer, lambda: nn.functional.mse_loss(model(x), y)))
    for _ in range(30)
]
assert losses[-1] < losses[0], losses
out = model(x).detach()
with tempfile.TemporaryDirectory() as folder:
    lb.save(model, folder)
    torch.testing.assert_close(lb.load(base(), folder)(x), out)
lb.merge(model)
torch.testing.assert_close(model(x), out)
print(f"lora_book {lb.__version__}: adapted, trained, saved, loaded, merged")
"""


def newest(folder: Path) -> Path:
    "The wheel that was built last in a folder; exits with a sentence if there is none."
    wheels = sorted(folder.glob("lora_book-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit(f"no wheel of lora_book in {folder}: `python -m build --wheel` makes one")
    return wheels[-1]


def environment(folder: Path) -> Path:
    """A new environment that sees this one's packages, whether this one is an environment itself or
    not; its Python.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(own) / "outer.pth").write_text("\n".join(seen) + "\n")
    return python


def tried(wheel: Path) -> None:
    "Install the wheel and run the trial; raises CalledProcessError if either fails."
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        python = environment(place / "env")
        pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "install", "-q", "--no-deps", "--ignore-installed", "--no-index", wheel],
            check=True,
        )
        (place / "empty").mkdir()
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([python, "-c", TRIAL], check=True, cwd=place / "empty", env=clean)
        script = python.with_name("lora-book" + ".exe" * (os.name == "nt"))
        subprocess.run([script, "--version"], check=True, cwd=place / "empty", env=clean)


if __name__ == "__main__":
    tried(newest(Path(sys.argv[1] if len(sys.argv) > 1 else "dist")).resolve())
