"""The handlers that draw a prompt, and those that keep the settings column as it should be.

Gradio calls a handler with the values of its input components by position. A handler takes gradio's own
arguments first and the values as `*values`, of which `Settings` collects those of the settings.
"""

import math
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ghibli.adapters.model_card import public_name
from ghibli.app.answers import errors_in_words, errors_on_page
from ghibli.app.commands import draw_command
from ghibli.app.images import WIDTH, checked, sample_grids
from ghibli.app.session import PROGRESS, AppSession
from ghibli.app.settings import RANGES, SETTINGS, Settings, check_prompt, stored_settings, text_of
from ghibli.config.schema import Config
from ghibli.images.grid import to_image
from ghibli.inference.generate import generate_images, settings_grid
from ghibli.inference.request import parse_axis, unused_negative
from ghibli.inference.safety import has_checker
from ghibli.runtime.terminal import one_line


@dataclass(frozen=True)
class Drawing:
    """The handlers, which share a session."""

    session: AppSession

    @errors_on_page
    def on_runs_changed(self, names: list[str], guidance: Any, suggested: Any) -> list[Any]:
        """Return guidance, suggested guidance, the safety checker's switch and the sample grids of some runs.

        Args:
            guidance, suggested: on the page, and by the last call; what the visitor chose is kept. The slider
                reaches both, however high a run's scan or training guidance puts them.
        """
        with self.session.lock:
            model = self.session.model_of(names)
        base = model.config.model.path
        available = has_checker(base)
        label = f"Safety checker ({f'of {base}' if available else f'{base} has none'})"
        shown = model.guidance if guidance == suggested else guidance
        reach = gr.update(maximum=math.ceil(max(RANGES["guidance"][1], model.guidance, shown)))
        return [
            reach | {"value": shown} if guidance == suggested else reach,
            model.guidance,
            gr.update(value=available, interactive=available, label=label),
            sample_grids(names),
        ]

    @errors_in_words(frames=2, commands=2)
    def draw(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """Generate with the base and with the adapter; return both images, a status line and both commands.

        Args:
            values: those of Settings.
        """
        start, settings = time.monotonic(), Settings(*values)
        with self.session.turn(str(request.session_hash), progress) as count:
            model = self.session.model_of(settings.runs)
            asked = settings.request(model.config.model.resolution)
            base = generate_images(model, replace(asked, scale=0.0), "base", count)
            trained = generate_images(model, asked, "trained", count) if settings.runs else base
            images, notes = checked([to_image(base[0]), to_image(trained[0])], model, settings.safe)
            notes += unused_negative(asked.negative, asked.guidance)
            for image, scale in zip(images, (0.0, asked.scale), strict=True):
                image.info.update(text_of(replace(asked, scale=scale), model).items())
        sources = self.session.sources(settings, model)
        commands = [draw_command(replace(settings, scale=0.0), sources), draw_command(settings, sources)]
        self.remember(request, settings, images, commands)
        return [*images, status_line(notes, start), *commands]

    @errors_in_words(frames=1, commands=1)
    def grid(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """Draw a sheet over the values of one setting or two; return it, a status line and the command.

        Args:
            values: those of Settings, then name and values of the setting to the right and of that down.
        """
        start, settings = time.monotonic(), Settings(*values[: len(SETTINGS)])
        names, listed = values[len(SETTINGS) :: 2], values[len(SETTINGS) + 1 :: 2]
        for text in (*names, *listed):
            check_prompt(text)
        words = [f"{name}={value}" for name, value in zip(names, listed, strict=True) if value.strip()]
        axes = [parse_axis(word, "X/Y grid") for word in words]
        with self.session.turn(str(request.session_hash), progress) as count:
            model = self.session.model_of(settings.runs)
            asked = settings.request(model.config.model.resolution)
            sheet = settings_grid(model, asked, axes, count)
            (sheet,), notes = checked([sheet], model, settings.safe)
        sheet.thumbnail((4 * WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
        command = draw_command(settings, self.session.sources(settings, model), words)
        sheet.info.update(text_of(asked, model))
        self.session.history.add(str(request.session_hash), [(sheet, f"grid: {' '.join(words)}", command)])
        return [sheet, status_line(notes, start), command]

    def remember(
        self, request: gr.Request, settings: Settings, images: list[Image.Image], commands: Iterable[str]
    ) -> None:
        """Put the base's image and the trained one into the history, the second only if it is another."""
        labels = [f"{one}: {settings.prompt[:60]}" for one in ("base", "trained")]
        drawn = list(zip(images, labels, commands, strict=True))
        self.session.history.add(str(request.session_hash), drawn if settings.runs else drawn[:1])

    @errors_on_page
    def settings_of(self, file: str | None, *current: Any) -> list[Any]:
        """Return the values of Settings that are stored in a PNG file; what it does not name is kept.

        Args:
            current: those of Settings on the page.
        """
        return list(current) if file is None else self.found(stored_settings(Path(file)), current)

    def found(self, stored: dict[str, Any], current: Iterable[Any]) -> list[Any]:
        """Return the values of Settings that were stored with an image, else the current ones.

        Raises:
            UserError: a value that no request may have.
        """
        now, offered = dict(zip(SETTINGS, current, strict=True)), self.session.runs()
        found = {name: stored[name] for name in SETTINGS if name in stored and name != "runs"}
        if "adapters" in stored:
            found["runs"] = [name for name in stored["adapters"] if name in offered]
        asked = Settings(**(now | found | {"safe": bool(now["safe"])}))
        asked.request(64)  # refuses what no request may be
        beyond = out_of_reach({name: getattr(asked, name) for name in RANGES})
        asked = replace(asked, **{name: now[name] for name in beyond})
        lost = [*not_offered(stored, offered, self.session.config_of(asked.runs)), *beyond.values()]
        if lost:
            gr.Warning(escape(one_line(f"taken from the image, except for {'; '.join(lost)}")))
        else:
            gr.Info("settings taken from the image")
        return [getattr(asked, name) for name in SETTINGS]


def out_of_reach(values: dict[str, float]) -> dict[str, str]:
    """Say of the settings that the page's sliders cannot show what they are, by name."""
    return {
        name: f"{name} {values[name]:g}, which is not from {low:g} to {high:g}"
        for name, (low, high) in RANGES.items()
        if not low <= values[name] <= high
    }


def not_offered(stored: dict[str, Any], offered: Container[str], config: Config) -> Iterator[str]:
    """Say what else of an image's settings the page has nothing for.

    Args:
        stored: with the image, by parsed_settings.
        offered: the paths of the runs to choose from.
        config: of what the page draws with once the rest is taken.
    """
    names, base, side = stored.get("adapters", []), stored.get("base"), config.model.resolution
    for name in names:
        if name not in offered:
            yield f"{name[:80]}, which is no finished run here"
    weights = stored.get("weights")
    for name, weight in zip(names, weights if isinstance(weights, list) else [], strict=False):
        if weight != 1:
            yield f"the weight {str(weight)[:20]} of {name[:80]}"
    if isinstance(base, str) and base != public_name(config.model.path):
        yield f"its base {base[:80]}"
    if stored.get("size", [side, side]) != [side, side]:
        yield f"its size: the page draws {side}x{side} px"


def status_line(notes: list[str], start: float) -> str:
    """Join notes and the seconds since `start`."""
    return " ".join([*notes, f"{time.monotonic() - start:.1f} s"])
