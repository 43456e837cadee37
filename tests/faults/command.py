"""The command line of the harness: does faults, records what happened, writes the table."""

import argparse
import tempfile
from pathlib import Path

import torch

from . import corrupt, fuzz, kill, machine, table


def main() -> int:
    """Returns 1 when a fault was not survived."""
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, count in (("kill", 50), ("corrupt", 200), ("machine", None), ("fuzz", None)):
        one = verbs.add_parser(verb)
        one.add_argument("--scratch", type=Path, help="a folder for the runs; default: a temporary one")
        one.add_argument("--no-record", action="store_true", help=f"do not write {table.RECORD}")
        if count is not None:
            one.add_argument("--count", type=int, default=count)
            one.add_argument("--seed", type=int, default=0)
    verbs.choices["kill"].add_argument("--jobs", type=int, default=1, help="runs at a time")
    verbs.choices["fuzz"].add_argument("--only", default="", help="the tests with this in their names")
    verbs.add_parser("table")
    words = parser.parse_args()
    if words.verb == "table":
        table.write()
        return 0
    torch.set_num_threads(1)  # as the runs in processes of their own have it: rounding depends on it
    with tempfile.TemporaryDirectory(prefix="ghibli-faults-") as temporary:
        scratch = (words.scratch or Path(temporary)).resolve()
        if words.verb == "kill":
            result = kill.kill_runs(words.count, words.seed, words.jobs, scratch)
            sound = result["equal"] == result["runs"]
        elif words.verb == "corrupt":
            result = corrupt.corrupt_files(words.count, words.seed, scratch)
            sound = not result["broken"]
        elif words.verb == "fuzz":
            result = fuzz.fuzz_all(words.only)
            sound = all(one["passed"] for one in result["tests"])
        else:
            result = machine.all_faults(scratch)
            sound = all(one["outcome"] != machine.FAILED for one in result["faults"])
    if not words.no_record:
        table.record(words.verb, result)
    return 0 if sound else 1
