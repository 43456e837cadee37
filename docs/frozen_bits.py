"""Train the demo in 32, 8 and 4 bits and print the gains: python docs/frozen_bits.py [KEY=VALUE ...]

Each adapter is scored twice, on the base that it was trained on and on the full one, where it is used.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from ghibli.adapters.files import read_adapter
from ghibli.adapters.trained import run_base
from ghibli.evaluation.gain import Gain, paired_gain
from ghibli.inference.layer_scorer import make_scorer
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def gain_on_full_base(run: RunDir) -> Gain:
    """Score a run's adapter on the base of full precision, on the run's held-out items."""
    config = finished_config(run)
    base = run_base(run, config)
    adapter = read_adapter(run.adapter, base, "adapter")
    scorer = make_scorer(run, config, base, adapter)
    every = range(len(scorer.batches))
    untouched = scorer.losses(every, guidance=1)
    scorer.put(adapter.layers)
    return paired_gain(scorer.losses(every), untouched)


def main() -> None:
    """Train three runs and print a row for each."""
    print("| `model.frozen_bits` | gain on its own base | gain on the full base |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for bits in ("null", "8", "4"):
            run = RunDir(Path(folder) / bits)
            words = [f"model.frozen_bits={bits}", f"hydra.run.dir={run.path}", *sys.argv[1:]]
            subprocess.run([sys.executable, str(TRAIN), "model=demo", "data=demo", *words], check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
            own = Gain(run.status.read()["gain"], run.status.read()["gain_se"])
            print(f"| {bits} | {own} | {gain_on_full_base(run)} |", flush=True)


if __name__ == "__main__":
    main()
