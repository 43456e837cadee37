"""Saved settings are data: written and read back as they are, with nothing of the environment in them."""

import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ghibli.config.files import CHECKSUM_LINE, apply_overrides, from_yaml, to_dataclass, to_yaml
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.resume import chosen_groups, with_values
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_text

CANARY = "canary-51f0"
PIECES = st.sampled_from(
    [
        "${oc.env:CANARY}",
        "${",
        "}",
        "\\",
        "$",
        "{",
        "data.root",
        ":",
        "ジ",
        "'",
        "#",
        "\x85",
        "\u2028",
        "\n",
        "\udce9",
    ]
)


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    return make_config()


def written(config: Config, file: Path, style: str) -> Path:
    write_text(file, to_yaml(replace(config, data=replace(config.data, style=style))))
    return file


def test_the_text_is_that_of_omegaconf(make_config: Callable[..., Config]) -> None:
    for words in ((), ("lora.targets=all", "data.style=', in ink'"), ("finetune=full", "seed=3")):
        config = make_config(*words)
        assert to_yaml(config).partition(CHECKSUM_LINE)[0] == OmegaConf.to_yaml(OmegaConf.structured(config))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(pieces=st.lists(PIECES, max_size=8))
def test_any_text_comes_back(
    config: Config, tmp_path_factory: pytest.TempPathFactory, pieces: list[str]
) -> None:
    style = "".join(pieces)
    read = from_yaml(written(config, tmp_path_factory.mktemp("any") / "config.yaml", style))
    assert read.data.style == style
    assert apply_overrides(read, ["seed=7"], ("seed",)).data.style == style
    assert with_values(read, {"trainer.max_epochs": 9}).data.style == style


def test_a_saved_interpolation_is_not_resolved(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a text, in a number, and in Hydra's own record of the choices."""
    monkeypatch.setenv("CANARY", CANARY)
    plain = OmegaConf.to_yaml(OmegaConf.structured(config))
    file = tmp_path / "config.yaml"
    for line in ("style: '${oc.env:CANARY}'", 'style: "${data.root}${oc.env:CANARY}"'):
        file.write_text(
            "\n".join(f"  {line}" if row.startswith("  style:") else row for row in plain.split("\n"))
        )
        assert CANARY not in repr(from_yaml(file)) and "${oc.env:CANARY}" in repr(from_yaml(file))
    file.write_text(plain.replace(f"seed: {config.seed}", "seed: ${oc.env:CANARY}"))
    with pytest.raises(UserError) as caught:
        from_yaml(file)
    assert CANARY not in str(caught.value) and "seed" in str(caught.value)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "hydra.yaml").write_text(
        "hydra: {runtime: {choices: {model: '${oc.env:CANARY}'}}}"
    )
    assert chosen_groups(RunDir(tmp_path)) == {"model": "${oc.env:CANARY}"}


ODD = (
    None, True, float("nan"), "x", b"x", [], {}, [None], ["x"], [[]], [["ddim"]], [{"a": 1}], {"a": 1},
    {1: 2}, "???", "${oc.env:HOME}",
)  # fmt: skip


@pytest.mark.parametrize("section", [field.name for field in fields(Config) if is_dataclass(field.type)])
def test_a_value_of_any_type_is_taken_as_its_type_or_named(config: Config, section: str) -> None:
    """As a stranger's config.yaml or a command line has it: no other exception, and a text is a text."""
    kind = type(getattr(config, section))
    given = asdict(config)[section]
    for name, expected in typing.get_type_hints(kind).items():
        for value in ODD:
            with suppress(UserError):
                read = getattr(to_dataclass(given | {name: value}, kind), name)
                assert has_type(read, expected), (name, value)


def has_type(value: Any, expected: Any) -> bool:
    """Tell whether a value, and what is in it, has a type of the schema."""
    if typing.get_origin(expected) is list:
        return isinstance(value, list) and all(has_type(one, typing.get_args(expected)[0]) for one in value)
    if type(None) in typing.get_args(expected):
        return value is None or any(has_type(value, one) for one in typing.get_args(expected)[:-1])
    return expected is Any or isinstance(value, typing.get_origin(expected) or expected)
