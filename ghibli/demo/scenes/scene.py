"""The demo data: images with captions, made from a seed, each scene in two looks.

"photo" imitates a photograph (muted, soft, hazy, grainy), "drawn" a hand-painted animation (ink lines,
saturated greens and blues, cumulus clouds, flowers). Needs only Pillow and numpy.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ghibli.demo.scenes import backgrounds
from ghibli.demo.scenes.canvas import LOOKS, Canvas
from ghibli.demo.scenes.subjects import COLOURS, PAINTERS, shadow
from ghibli.runtime.files import write_atomically, write_text

# Scene seeds by purpose; disjoint, so that nothing is learned from a test scene.
PRETRAIN_SEEDS = range(0, 1_000_000)
FINETUNE_SEEDS = range(1_000_000, 2_000_000)
EVALUATION_SEEDS = range(2_000_000, 3_000_000)
PRICE_SEEDS = range(3_000_000, 4_000_000)

TIMES = {
    "morning": ("in the morning", "on a sunny morning"),
    "noon": ("at noon", "in the middle of the day"),
    "sunset": ("at sunset", "in the evening"),
    "night": ("at night", "under the moon"),
}
PLACES = {
    "meadow": ("in a meadow", "on a green hill", "in the grass"),
    "lake": ("by a lake", "at the lake"),
    "greenhouse": ("in a greenhouse", "inside a greenhouse", "in the greenhouse"),
    "town": ("in a town", "in the town", "on a street in town"),
    "train": ("on the top of a {}train", "on top of a {}train", "on the top of the {}train"),
}
ON_WATER = ("on a lake", "on the water")
SETTINGS = {
    "girl": ("greenhouse", "greenhouse", "meadow", "lake", "town", "train"),
    "panda": ("train", "train", "greenhouse", "meadow", "lake", "town"),
    "cat": ("train", "greenhouse", "meadow", "lake", "town"),
    "train": ("meadow", "lake", "town"),
    "house": ("meadow", "lake", "town"),
    "tree": ("meadow", "lake", "town", "greenhouse"),
    "boat": ("lake",),
}
HUES = {
    "girl": ("red", "blue", "yellow", "green", "white", "pink", "purple"),
    "panda": ("white",),
    "cat": ("white", "black", "orange", "brown"),
    "train": ("red", "blue", "yellow", "green", "white", "orange"),
    "house": ("red", "blue", "green", "orange", "purple"),
    "tree": ("green", "red", "yellow", "pink", "orange"),
    "boat": ("red", "blue", "yellow", "white", "green", "orange"),
}


@dataclass(frozen=True)
class Scene:
    """The content of one image; x, size and horizon are fractions of the image."""

    seed: int
    subject: str
    colour: str
    setting: str
    time: str
    train_colour: str
    x: float
    size: float
    horizon: float
    caption: str


def compose(seed: int) -> Scene:
    """Compose the scene of a seed, with its caption."""
    rng = np.random.default_rng([seed, 1])

    def pick(options):
        return options[int(rng.random() * len(options))]

    subject = pick(tuple(SETTINGS))
    setting, colour = pick(SETTINGS[subject]), pick(HUES[subject])
    time, train_colour = pick(tuple(TIMES)), pick(HUES["train"])
    x, size, horizon = 0.36 + 0.28 * rng.random(), rng.random(), 0.50 + 0.09 * rng.random()
    caption = make_caption(pick, subject, colour, setting, time, train_colour)
    return Scene(seed, subject, colour, setting, time, train_colour, x, size, horizon, caption)


def make_caption(pick, subject, colour, setting, time, train_colour) -> str:
    """Describe a scene in one short sentence; colour and time are sometimes omitted."""
    article = pick(("a", "a", "a", "the"))
    hue = pick((colour, colour, colour, colour, ""))
    pose = pick(("", "", {"girl": "standing", "panda": "sitting", "cat": "sitting"}.get(subject, "")))
    when = pick((*TIMES[time], TIMES[time][0], ""))
    coloured = {
        "girl": f"in a {hue} dress",
        "house": f"with a {hue} roof",
        "boat": f"with a {hue} sail",
    }
    if subject in coloured:
        what = f"{article} {subject} {coloured[subject]}" if hue else f"{article} {subject}"
    elif subject == "panda" or not hue:
        what = f"{article} {subject}"
    else:
        what = f"{article} {hue} {subject}"
    where = pick(ON_WATER if subject == "boat" else PLACES[setting])
    ridden = pick((train_colour, train_colour, train_colour, ""))
    where = where.format(f"{ridden} " if ridden else "")
    sentence = " ".join(part for part in (what, pose, where, when) if part)
    return sentence.replace("a orange", "an orange")


def paint_setting(canvas: Canvas, scene: Scene, rng):
    """Paint everything behind the subject."""
    horizon = scene.horizon
    backgrounds.sky(canvas, rng, 0.62 if scene.setting == "greenhouse" else horizon)
    if scene.setting == "greenhouse":
        backgrounds.greenhouse(canvas, rng)
    elif scene.setting == "town":
        backgrounds.town(canvas, rng, horizon)
    elif scene.setting == "lake":
        backgrounds.lake(canvas, rng, horizon, shore=scene.subject != "boat")
    else:
        backgrounds.meadow(canvas, rng, horizon)


def paint_subject(canvas: Canvas, scene: Scene):
    """Paint the subject, and the train under it if it rides on one."""
    canvas.light_share = 0.42 if scene.time == "night" else 0.5
    colour, x = COLOURS[scene.colour], scene.x
    if scene.setting == "train":
        foot, length = 0.93, 0.32 + 0.03 * scene.size
        backgrounds.rails(canvas, foot)
        PAINTERS["train"](canvas, 0.5 + 0.4 * (x - 0.5), foot, length, COLOURS[scene.train_colour])
        PAINTERS[scene.subject](canvas, x, foot - length + 0.015, 0.40 + 0.06 * scene.size, colour)
        return
    low, high = {
        "train": (0.33, 0.39),
        "house": (0.50, 0.62),
        "tree": (0.60, 0.72),
        "boat": (0.50, 0.62),
        "girl": (0.54, 0.66),
    }.get(scene.subject, (0.44, 0.56))
    height, foot = low + (high - low) * scene.size, 0.90
    if scene.subject == "train":
        x, foot = 0.5 + 0.3 * (x - 0.5), 0.86
        backgrounds.rails(canvas, foot)
    elif scene.subject == "boat":
        foot = 0.82
    else:
        shadow(canvas, x, foot, 0.36 * height)
    PAINTERS[scene.subject](canvas, x, foot, height, colour)


def draw(scene: Scene, look: str, size: int = 128, grain: bool = True) -> Image.Image:
    """Paint a scene as an RGB image of size x size; `grain` adds film grain to a photo."""
    if look not in LOOKS:
        raise ValueError(f"look must be one of {LOOKS}, not {look!r}")
    rng = np.random.default_rng([scene.seed, 2])
    photo = look == "photo"
    back = Canvas(size if photo else 2 * size, look, scene.time)
    paint_setting(back, scene, rng)
    if photo:
        backgrounds.haze(back)
        soft = back.image.filter(ImageFilter.GaussianBlur(size / 90))
        back = Canvas(2 * size, look, scene.time, soft.resize((2 * size, 2 * size), Image.Resampling.BICUBIC))
    paint_subject(back, scene)
    image = back.image
    if photo:
        image = image.filter(ImageFilter.GaussianBlur(size / 128))
    image = image.resize((size, size), Image.Resampling.BOX if photo else Image.Resampling.LANCZOS)
    return add_grain(image, scene.seed) if photo and grain else image


def add_grain(image: Image.Image, seed: int) -> Image.Image:
    """Add film grain: grey noise with a standard deviation of 2.5 levels (of 255)."""
    rng = np.random.default_rng([seed, 3])
    noise = (rng.random((*image.size, 2)).sum(axis=2) - 1.0) * 6.0
    pixels = np.asarray(image, dtype=np.float64) + noise[:, :, None]
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def write_folder(
    root: Path, look: str, count: int, first_seed: int, size: int = 128, on_progress=None
) -> None:
    """Write root/images/scene_SEED.png and, last, root/captions.txt with `NAME.png|caption` lines.

    checksums.txt holds the sha256 of each file, in the format of `sha256sum --check`. An image depends only
    on its seed and every write is atomic, so several processes may fill the same folder at once.
    on_progress(done, count) is called after every image.
    """
    root, lines, checksums = Path(root), [], []
    for index in range(count):
        scene = compose(first_seed + index)
        name = f"scene_{scene.seed:07d}.png"
        image = draw(scene, look, size)
        write_atomically(root / "images" / name, partial(image.save, format="PNG"))
        lines.append(f"{name}|{scene.caption}\n")
        checksums.append(f"{sha256(root / 'images' / name)}  images/{name}\n")
        if on_progress is not None:
            on_progress(index + 1, count)
    captions = "".join(lines)
    checksums.append(f"{hashlib.sha256(captions.encode()).hexdigest()}  captions.txt\n")
    write_text(root / "checksums.txt", "".join(checksums))
    write_text(root / "captions.txt", captions)


def damaged(root: Path) -> bool:
    """Tell whether a file in a folder of write_folder has changed since; False for any other folder."""
    checksums = Path(root) / "checksums.txt"
    if not checksums.is_file():
        return False
    try:
        lines = [line.split("  ", 1) for line in checksums.read_text(encoding="utf-8").splitlines()]
        return any(sha256(Path(root) / name) != digest for digest, name in lines)
    except (OSError, ValueError):
        return True


def sha256(path: Path) -> str:
    """Hash a file's content: sha256, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
