"""Make the tables and figures of docs/understanding.md: `python docs/understanding.py`.

It runs docs/influence.py, then docs/price.py; finished runs of either are not trained again.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent

for name, words in (("influence", []), ("price", ["threads=1"])):
    sys.argv = [f"{name}.py", *words]
    runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
