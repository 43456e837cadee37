"""What training imports, and what it leaves out: in a process of its own, since this one has it all."""

import json

import pytest
from helpers.commands import run_python

TRAINING = """
import json, sys
from ghibli.runtime.lean_imports import lean_imports
with lean_imports():
    from ghibli.prepare import preflight
    from ghibli.training import finalize, session
found = [name for name in ("scipy.signal", "scipy.stats", "matplotlib.pyplot") if name in sys.modules]
from lightning_utilities.core.imports import RequirementCache, package_available
from torchmetrics.utilities import imports as kept
import matplotlib.pyplot, scipy.signal, scipy.stats
print(json.dumps([found, bool(RequirementCache("scipy")), package_available("scipy"),
                  bool(kept._TORCH_GREATER_EQUAL_2_1), bool(kept._SCIPY_AVAILABLE)]))
"""


@pytest.mark.slow
def test_training_loads_no_plots_and_no_statistics_and_others_still_find_them() -> None:
    done = run_python("-c", TRAINING)
    assert json.loads(done.stdout or "null") == [[], True, True, True, False], done.stderr
