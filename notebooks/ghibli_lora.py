# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a Ghibli LoRA in a session that may die
#
# For Kaggle and Colab, and for your own machine. Run it from top to bottom. When the session has died, run
# it again from top to bottom in a new one: what was done is skipped, and training goes on at the last
# checkpoint. The result is that of a session that never died, on a CPU to the bit.
#
# - **Kaggle**: switch on a GPU and the internet on the right, and set Persistence to "Files only". You may
#   add the data set "Real to Ghibli Image Dataset (5K)" as an input; otherwise it is downloaded.
# - **Colab**: choose a GPU runtime. Everything that must survive goes to your Google Drive.
# - **Elsewhere** it trains the small demo of this repository, which needs neither a GPU nor a download.

# %% tags=["parameters"]
REPOSITORY = "https://github.com/YOU/ghibli-lora-lab"  # your copy of the repository
DEMO = None  # True: the small demo, also on Kaggle and Colab; None: only elsewhere
FOLDER = None  # keeps run and cache; None: a place that survives the session
CAPTION = "a scene"  # of images that have none, such as all of the Kaggle set
EXTRA = []  # further settings, such as ["lora.rank=16", "data.epochs=5"]

# %%
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

KAGGLE = Path("/kaggle/working").is_dir()
COLAB = find_spec("google") is not None and find_spec("google.colab") is not None
if DEMO is None:
    DEMO = not (KAGGLE or COLAB)


def do(*words):
    """Run a Python command, show what it prints, and stop here if it fails."""
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode != 0:
        raise RuntimeError(f"this failed: {' '.join(map(str, words))}")


# %% [markdown]
# ## Install
#
# It downloads some GB of packages, once in each session.

# %%
if not Path("train.py").is_file():
    if Path("../train.py").is_file():  # opened in notebooks/
        os.chdir("..")
    else:
        if not Path("ghibli-lora-lab").is_dir():
            subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "ghibli-lora-lab"], check=True)
        os.chdir("ghibli-lora-lab")
try:
    version("ghibli-lora-lab")
except PackageNotFoundError:
    do("-m", "pip", "install", "--quiet", "-e", ".[hub,notebook]")
sys.path.insert(0, os.getcwd())

if FOLDER is not None:
    KEPT = Path(FOLDER)
elif KAGGLE:
    KEPT = Path("/kaggle/working/ghibli")
elif COLAB:
    from google.colab import drive

    drive.mount("/content/drive")
    KEPT = Path("/content/drive/MyDrive/ghibli")
else:
    KEPT = Path("outputs/notebook")
RUN, CACHE, EXPORT = KEPT / "run", KEPT / "cache", KEPT / "export"

# %% [markdown]
# ## Get the base and the images
#
# `prepare` downloads Stable Diffusion 1.5 (4.3 GB) and the images, checks both and notes where they are.

# %%
if DEMO:
    SETTINGS = ["model=demo", "data=demo"]
else:
    ATTACHED = Path("/kaggle/input/real-to-ghibli-image-dataset-5k-paired-images")
    DATA = ATTACHED if ATTACHED.is_dir() else "kaggle"
    do("-m", "ghibli", "prepare", "--data", DATA, "--caption", CAPTION)
    SETTINGS = ["model=sd15", "data=ghibli", "compute=t4"]  # 16 GB; docs/training-sd15.md has other cards
SETTINGS += [f"cache_dir={CACHE}", "checkpoint.every_n_steps=10", "logger=csv", *EXTRA]

# %% [markdown]
# ## Check
#
# Settings, images, memory and disk, before anything is trained.

# %%
if not RUN.is_dir():
    do("-m", "ghibli", "check", *SETTINGS)

# %% [markdown]
# ## Train
#
# The first time this starts a run. Afterwards it resumes the same run at its last checkpoint; at most ten
# steps are lost. A finished run is not trained again.

# %%
do("train.py", *SETTINGS, f"hydra.run.dir={RUN}")

# %% [markdown]
# ## Did it learn?
#
# The gain is by how much the loss on held-out images is below the base's; the band is its 95 % interval. In
# the grid the base is above, and below it the adapter, from the same noise.

# %%
from ghibli import Run, show

run = Run(RUN)
show(run)

# %%
run.probe[
    ["epoch", "probe/val_gain", "probe/val_gain_se", "probe/train_gain", "probe/val_loss", "probe/price"]
]

# %% [markdown]
# ## Export and download
#
# `adapter.zip` holds the adapter for diffusers, for ComfyUI and A1111, its card and the newest grid. Every
# file was read back and compared before it is said to be written.

# %%
if not EXPORT.is_dir():
    do("-m", "ghibli", "export", RUN, "--to", EXPORT)
run.grid().save(EXPORT / "grid.png")
ZIP = Path(shutil.make_archive(str(KEPT / "adapter"), "zip", EXPORT))
if COLAB:
    from google.colab import files

    files.download(str(ZIP))
print(f"{ZIP}: {ZIP.stat().st_size / 1e6:.1f} MB")  # Kaggle lists it on the right, below Output

# %% [markdown]
# ## Use it
#
# The file for ComfyUI and A1111 goes into their `loras` folder. In diffusers, with the unpacked folder:
#
# ```python
# pipeline.load_lora_weights("adapter")
# pipeline.unet.eval()  # else dropout stays on
# ```
#
# `ghibli generate`, `restyle`, `evaluate` and `report` take the run's folder: docs/README.md says which page
# explains what.
