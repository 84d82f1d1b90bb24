"""Fuzz what takes bytes from outside, guided by coverage, for as long as one likes.

Run from the root of the project: python -m scripts.fuzz [TARGET...] [--seconds N]

Each target runs in a process of its own, one after the other, and goes on from the corpus of the
last run in build/fuzz/<target>. An input that makes one fail is put into tests/property/kept, where
the tests run it from then on. Needs atheris (`make fuzz` installs it). Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.support.modules import ROOT
from tests.support.outside import KEPT, TARGETS

CORPUS = ROOT / "build/fuzz"
SECONDS = 60
LONGEST_INPUT = 4096
RUN = "--run"  # of this script by itself: one target, in the process of the fuzzer


def fuzz(name: str) -> None:
    """Run one target until libFuzzer's own options end it."""
    import atheris

    with atheris.instrument_imports(include=["agent", "hpack", "yaml"]):
        import importlib

        for module in [name for name in sys.modules if name.split(".")[0] in ("agent", "tests")]:
            del sys.modules[module]
        targets = importlib.import_module("tests.support.outside").TARGETS
    atheris.Setup([sys.argv[0], *sys.argv[3:]], lambda data: targets[name].run(bytes(data)))
    atheris.Fuzz()


def run(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own; say whether nothing failed."""
    corpus, kept = CORPUS / name, KEPT / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(TARGETS[name].samples()):
        (corpus / f"sample-{number}").write_bytes(sample)
    prefix = corpus.parent / f"{name}-"
    command = [
        sys.executable, "-m", "scripts.fuzz", RUN, name, str(corpus),
        f"-max_total_time={seconds}", f"-max_len={LONGEST_INPUT}", f"-artifact_prefix={prefix}",
        "-print_final_stats=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    sys.stdout.write(f"{name}: {_summary(done.stderr)}\n")
    if done.returncode == 0:
        return True
    sys.stdout.write(done.stdout[-3000:] + done.stderr[-3000:])
    kept.mkdir(parents=True, exist_ok=True)
    for path in corpus.parent.glob(f"{name}-*"):
        path.rename(kept / path.name.removeprefix(f"{name}-"))
    return False


def _summary(report: str) -> str:
    wanted = ("stat::number_of_executed_units", "stat::average_exec_per_sec")
    lines = [line.split() for line in report.splitlines() if line.startswith(wanted)]
    return ", ".join(f"{line[0].removeprefix('stat::').rstrip(':')} {line[-1]}" for line in lines)


def main() -> int:
    """Fuzz the targets that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for each target")
    given = parser.parse_args()
    if unknown := set(given.targets) - TARGETS.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    results = [run(name, given.seconds) for name in given.targets or TARGETS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == [RUN]:
        fuzz(sys.argv[2])
    else:
        sys.exit(main())
