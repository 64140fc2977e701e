"""Everything that continuous integration runs: `python -m tools.check`.

Every step runs, whatever became of the ones before. The last line counts: each test of pytest is
one, and so is each
other step.
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
    print(
        f"== {name}: {' '.join(Path(part).name if part == PYTHON else part for part in command)}",
        flush=True,
    )
    start = time.perf_counter()
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **limits, **offline}, check=False
    ).returncode
    passed, failed, skipped = counted(report) if report else (int(code == 0), int(code != 0), 0)
    failed += int(code != 0 and not failed)
    print(
        f"== {name}: {'ok' if not failed else 'FAILED'} in {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    return passed, failed, skipped


def main() -> int:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        results = [
            step("lint", [PYTHON, "-m", "ruff", "check", "."]),
            step("format", [PYTHON, "-m", "ruff", "format", "--check", "."]),
            step(
                "tests",
                [PYTHON, "-m", "pytest", "-n", "2", "--dist", "worksteal", f"--junitxml={report}"],
                report,
            ),
            step(
                "book",
                [
                    PYTHON,
                    "-m",
                    "tools.book",
                    "--profile",
                    "smoke",
                    "--renderer",
                    "offline",
                    "--out",
                    "_build/smoke/_site",
                ],
            ),
        ]
    passed, failed, skipped = (sum(column) for column in zip(*results))
    told = f", {skipped} skipped" if skipped else ""
    print(f"all steps took {time.perf_counter() - start:.0f} s")
    print(f"{passed} passed, {failed} failed{told}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
