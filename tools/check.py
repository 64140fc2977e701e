"""Everything that continuous integration runs: `python -m tools.check`, or what fits into about a
minute: `python -m tools.check --quick`.

Every step runs, whatever became of the ones before. The last line counts: each test of pytest is
one, and so is each other step.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
TYPED = ["lora_book/core", "lora_book/registry.py", "lora_book/__init__.py"]
QUICK = ["test_laws", "test_package", "test_core_saving", "test_core_products"]
BOOK = ["--profile", "smoke", "--renderer", "offline", "--out", "_build/smoke/_site"]


def counted(report: Path) -> tuple[int, int, int]:
    "Tests that passed, failed and were skipped, from a JUnit report; none counts as one failure."
    if not report.is_file():
        return 0, 1, 0
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    return total - failed - errors - skipped, failed + errors, skipped


def step(name: str, command: list, report: Path | None = None) -> tuple[int, int, int]:
    "Run one step; passed, failed, skipped."
    print(f"== {name}: python {' '.join(command)}", flush=True)
    start = time.perf_counter()
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = subprocess.run(
        [PYTHON, *command], cwd=ROOT, env={**os.environ, **limits, **offline}, check=False
    ).returncode
    passed, failed, skipped = counted(report) if report else (int(code == 0), int(code != 0), 0)
    failed += int(code != 0 and not failed)
    print(
        f"== {name}: {'ok' if not failed else 'FAILED'} in {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    return passed, failed, skipped


def steps(quick: bool, report: Path) -> list[tuple]:
    "The steps, in order: what `step` takes."
    chosen = [f"tests/{name}.py" for name in QUICK] if quick else []
    marks = ["-m", "not slow"] if quick else []
    spread = ["-n", "2", "--dist", "worksteal", f"--junitxml={report}"]
    found = [
        ("lint", ["-m", "ruff", "check", "."]),
        ("format", ["-m", "ruff", "format", "--check", "."]),
        ("types", ["-m", "mypy", *TYPED]),
        ("tests", ["-m", "pytest", *spread, *marks, *chosen], report),
        ("book", ["-m", "tools.book", *BOOK]),
    ]
    return found[:-1] if quick else found


def main(arguments: list[str]) -> int:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        results = [step(*one) for one in steps("--quick" in arguments, report)]
    passed, failed, skipped = (sum(column) for column in zip(*results))
    told = f", {skipped} skipped" if skipped else ""
    print(f"all steps took {time.perf_counter() - start:.0f} s")
    print(f"{passed} passed, {failed} failed{told}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
