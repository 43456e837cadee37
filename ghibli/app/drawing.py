"""The handlers that draw a prompt, and those that keep the settings column as it should be.

Gradio calls a handler with the values of its input components by position. A handler takes gradio's own
arguments first and the values as `*values`, of which `Settings` collects those of the settings.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ghibli.app.answers import errors_in_words, errors_on_page
from ghibli.app.commands import draw_command
from ghibli.app.images import WIDTH, checked, sample_grids
from ghibli.app.session import PROGRESS, AppSession
from ghibli.app.settings import SETTINGS, Settings, check_prompt, stored_settings, text_of
from ghibli.images.grid import to_image
from ghibli.inference.generate import generate_images, settings_grid
from ghibli.inference.request import parse_axis, unused_negative
from ghibli.inference.safety import has_checker


@dataclass(frozen=True)
class Drawing:
    """The handlers, which share a session."""

    session: AppSession

    @errors_on_page
    def on_runs_changed(self, names: list[str], guidance: Any, suggested: Any) -> list[Any]:
        """Return guidance, suggested guidance, the safety checker's switch and the sample grids of some runs.

        Args:
            guidance, suggested: on the page, and by the last call; what the visitor chose is kept.
        """
        with self.session.lock:
            model = self.session.model_of(names)
        base = model.config.model.path
        available = has_checker(base)
        label = f"Safety checker ({f'of {base}' if available else f'{base} has none'})"
        return [
            gr.update(value=model.guidance) if guidance == suggested else gr.skip(),
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
        runs = [name for name in stored.pop("adapters", []) if isinstance(name, str) and name in offered]
        found = {name: stored[name] for name in SETTINGS if name in stored}
        found["runs"] = runs or now["runs"]
        asked = Settings(**(now | found | {"safe": bool(now["safe"])}))
        asked.request(64)  # refuses what no request may be
        gr.Info("settings taken from the image")
        return [getattr(asked, name) for name in SETTINGS]


def status_line(notes: list[str], start: float) -> str:
    """Join notes and the seconds since `start`."""
    return " ".join([*notes, f"{time.monotonic() - start:.1f} s"])
