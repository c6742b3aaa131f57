"""Runs the kernels on a GPU: checks results first, then measures times, in ten minutes at most.

    python benchmarks/gpu_suite.py
    python benchmarks/gpu_suite.py --resume

The first command begins nothing new after ``--minutes``, of which every part has its share and
measures what matters most first; the second one measures what is missing, as often as it is called.
Parts: ``correctness``, ``kernels``, ``connection``, ``training``, ``memory``; benchmarks/README.md
says what each measures. Each writes ``gpu_<part>_<device>.json``, row by row, so that nothing is
lost if it is stopped. ``python benchmarks/gpu_report.py`` makes tables and a picture of the files.
``--toy`` runs everything once at tiny size on a CPU, in Triton's interpreter, to show that it runs:
without any time, since that would be nobody's.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

# In the order of their worth, with their shares of the time; what one leaves goes to the next.
PARTS = {"correctness": 3, "kernels": 3, "connection": 1, "training": 3, "memory": 1}


def main() -> int:
    args = _arguments()
    if args.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    elif os.environ.get("TRITON_INTERPRET") == "1":
        return _refuse("TRITON_INTERPRET=1 is set: unset it, or say --toy")
    import torch

    if not args.toy and not torch.cuda.is_available():
        return _refuse(
            "torch finds no GPU here; --toy runs the suite without one, and times nothing"
        )
    from gpu_bench import Bench
    from gpu_results import Results

    torch.manual_seed(0)
    passed = True
    parts = [part for part in PARTS if part in args.part]
    end = time.monotonic() + 60 * args.minutes
    for number, part in enumerate(parts):
        share = PARTS[part] / sum(PARTS[later] for later in parts[number:])
        bench = Bench(args.toy, share * max(0.0, end - time.monotonic()))
        results = Results(part, bench, args.output, args.resume, args.commit)
        try:
            passed = _run(part, bench, results, args) and passed
        except Exception:  # the other parts may still succeed
            traceback.print_exc()
            passed = False
        print(f"\nwritten: {results.path}", flush=True)
    return 0 if passed else 1


def _run(part: str, bench, results, args: argparse.Namespace) -> bool:
    """Run one part; whether it found no fault."""
    streams = [2] if args.toy else args.streams
    widths = [32] if args.toy else args.widths
    if part == "correctness":
        from gpu_correctness import check

        passed = check(bench, results, args.jobs)
        failed = [row for row in results.rows if row["passed"] is False]
        print(f"\n{len(results.rows) - len(failed)} checks passed, {len(failed)} failed")
        for row in failed:
            print(row)
        return passed
    if part == "kernels":
        from gpu_kernels import measure_kernels

        measure_kernels(bench, results, streams, widths, args.jobs)
    elif part == "connection":
        from gpu_connection import measure_connections

        measure_connections(bench, results, streams, widths)
    elif part == "training":
        from gpu_training import measure_training

        measure_training(bench, results, args.size, args.sequences)
    else:
        from gpu_memory import measure_memory

        measure_memory(bench, results)
    return not any("error" in row and row.get("implementation") == "triton" for row in results.rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--streams", nargs="+", type=int, default=[4, 2, 8])
    parser.add_argument("--widths", nargs="+", type=int, default=[2560, 1280, 4096, 7168])
    parser.add_argument("--size", default="3b", help="family member of the part `training`")
    parser.add_argument("--sequences", type=int, help="per training step, instead of what fits")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, default=8.5, help="begin nothing new after these")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--resume", action="store_true", help="keep rows measured earlier")
    parser.add_argument("--commit", default="", help="of the source, if git does not know it")
    parser.add_argument("--toy", action="store_true", help="tiny, on the CPU, without times")
    args = parser.parse_args()
    if args.toy and args.output == parser.get_default("output"):
        parser.error("--toy needs --output: its files do not belong among the results")
    return args


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
