"""A report about a stranger's run: its texts stay text, and whatever its files hold, there is a page."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.report_material import EVIL, SETTINGS, STATUS, Page, evaluation_of, make_run, page_of
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from ghibli.report import page
from ghibli.runs.folder import RunDir

KINDS = {"sampler", "features", "state", "finetune"}  # words that the page's text is chosen by
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "x", EVIL, "nan", "1e999"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunDir, RunDir]:
    """Two runs of a study without images, which take time, each with an evaluation."""
    made = make_run(tmp_path / "study" / "a"), make_run(tmp_path / "study" / "b", gains=(0, 0.1))
    for run in made:
        run.evaluation.write_text(json.dumps(evaluation_of(1.0, {"1": [2.0, 0.1], "7.5": [1.0, 0.2]})))
        for grid in run.samples.iterdir():
            grid.unlink()
    return made


def with_markup(value: Any, key: str = "") -> Any:
    """Put a tag into every text and every name of a JSON value."""
    if isinstance(value, dict):
        inner = {name: with_markup(one, name) for name, one in value.items()}
        return inner | {f"{EVIL}{len(inner)}": inner[name] for name in list(inner)[:1]}
    if isinstance(value, list):
        return [with_markup(one, key) for one in value]
    return f"{value}{EVIL}" if isinstance(value, str) and key not in KINDS else value


def check_inert(made: Page) -> None:
    assert not [tag for tag, _ in made.tags if tag in ("script", "iframe", "object", "base", "form")]
    assert not [key for _, attributes in made.tags for key in attributes if key.startswith("on")]


def test_no_text_of_any_file_is_markup(runs: tuple[RunDir, RunDir]) -> None:
    for run in runs:
        status = STATUS | {"findings": [{"name": "x", "text": "y"}], "reason": "z"}
        run.status.path.write_text(json.dumps(with_markup(status)))
        run.evaluation.write_text(json.dumps(with_markup(json.loads(run.evaluation.read_text()))))
        run.config.write_text(yaml.safe_dump(with_markup(SETTINGS)))
        for table in (run.probe, run.metrics):
            header, _, rows = table.read_text().partition("\n")
            name = EVIL.replace('"', '""')
            rows = "\n".join(f"{row},1" for row in rows.splitlines())
            table.write_text(f'{header},"probe/val_gain_t{name}"\n{rows}\n')
        (run.samples / f"epoch_{EVIL.replace('/', '')}.png").write_bytes(b"x")
    for folder in (runs[0].path, runs[0].path.parent):
        made = page_of(folder)
        check_inert(made)
        assert EVIL in made.text


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(
    text=st.text(max_size=40),
    place=st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=20),
)
@example(text="[/INST]\x1b[2J {{ x }} </p> \u2028\x85\u202e", place="\n(1) <b> \U0001f600")
def test_any_text_and_any_name_reach_the_page(text: str, place: str) -> None:
    """Word for word, each of their spaces as a space."""
    with tempfile.TemporaryDirectory() as parent:
        run = make_run(Path(parent, f"run{place}"))
        for grid in run.samples.iterdir():
            grid.unlink()
        run.status.update(machine=f"M{text}.")
        made = page_of(run.path)
    for wanted in (f"M{text}.", f"run{place}"):
        shown = wanted.encode("utf-8", "backslashreplace").decode()
        assert " ".join(shown.split()) in made.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["status.json", "evaluation.json", "config.yaml"])
def test_there_is_a_page_whatever_the_values(runs: tuple[RunDir, RunDir], name: str) -> None:
    """Well-formed files of the right keys with values of other types, as a stranger can write them."""
    run, template = runs[0], page.jinja_environment().get_template("page.html.jinja")
    file = run.path / name
    content = yaml.safe_load(file.read_text())
    content.pop("sha256", None)

    def replaced(value: Any, changes: list[tuple[int, Any]]) -> Any:
        """Replace the values at some places, counted through all levels."""
        for place, new in changes:
            inner, below = value, list(value)
            while below:
                key = below[place % len(below)]
                if isinstance(inner[key], dict | list) and inner[key] and place % 3:
                    inner, place = inner[key], place // 3
                    below = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
                else:
                    inner[key], below = new, []
        return value

    @settings(max_examples=20, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(st.tuples(st.integers(0, 10**6), JSON), min_size=1, max_size=3))
    def once(changes: list[tuple[int, Any]]) -> None:
        file.write_text(json.dumps(replaced(json.loads(json.dumps(content)), changes)))
        for folder in (run.path, run.path.parent):
            check_inert(Page(template.render(page=page.page_content([folder]))))

    once()
