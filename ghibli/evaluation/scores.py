"""The scores that a finished run has left: those of its best epoch."""

from ghibli.evaluation.gain import Probe, best_epoch
from ghibli.runs.folder import RunDir, read_checkpoint
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import is_whole


def best_probe(run: RunDir) -> Probe | None:
    """Read the best epoch's scores from best.ckpt; None if that is missing, damaged or holds no epoch."""
    if not is_whole(run.best_checkpoint):
        return None
    try:
        history = [Probe(**probe) for probe in read_checkpoint(run.best_checkpoint)["probe"]]
    except (UserError, KeyError, TypeError):  # of another program
        return None
    return history[best_epoch(history)] if len(history) > 1 else None
