"""No setting is NaN or infinite, wherever it stands."""

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import REPO, SMALL
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ghibli.config import paths
from ghibli.config.checks import not_finite, require, require_finite, share
from ghibli.config.schema import Config
from ghibli.runs.compose import register, to_config
from ghibli.runtime.errors import UserError


def float_keys(section: type = Config, prefix: str = "") -> list[str]:
    """Every key of the schema that takes a float, a list of them or nothing; and some of the trainer's."""
    keys = []
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            keys += float_keys(field.type, f"{prefix}{field.name}.")
        elif "float" in str(field.type) and "dict" not in str(field.type):
            keys.append(prefix + field.name)
    return keys


KEYS = [
    *float_keys(),
    "trainer.gradient_clip_val",
    "+trainer.limit_train_batches",
    "+trainer.val_check_interval",
]
PARSER = OverridesParser.create()


@pytest.fixture(scope="module")
def composed(images: Path) -> DictConfig:
    """conf/train.yaml, shrunk, as Hydra composes it."""
    register()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return compose("train", overrides=[*SMALL, f"data.root={images}", "data.draw=null"])


@pytest.mark.parametrize("key", KEYS)
def test_no_key_takes_what_is_not_finite(composed: DictConfig, key: str) -> None:
    """Whatever Hydra reads the words as is put where it would put it, without composing all again."""
    is_list = key in ("optimizer.betas", "sample.guidance", "evaluate.scales", "loss.timestep_parameters")
    for value in ("nan", "inf", "-inf"):
        typed = PARSER.parse_override(f"{key}=[0.9,{value}]" if is_list else f"{key}={value}")
        cfg = deepcopy(composed)
        OmegaConf.update(cfg, typed.key_or_group, typed.value(), force_add=typed.is_add())
        with pytest.raises(UserError) as caught:
            to_config(cfg)
        assert key.lstrip("+").rpartition(".")[2] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "word", ["loss.guidance=nan", "optimizer.betas=[0.9,-inf]", "+trainer.limit_train_batches=inf"]
)
def test_no_command_line_has_what_is_not_finite(make_config: Callable[..., Config], word: str) -> None:
    key, _, _ = word.partition("=")
    with pytest.raises(UserError, match=key.rpartition(".")[2]):
        make_config(word)


def test_the_schema_has_the_keys_that_are_meant() -> None:
    assert {"loss.guidance", "optimizer.lr", "model.adapter_scale", "evaluate.scales", "lora.alpha"} <= set(
        KEYS
    )


def test_where_the_number_stands_is_named() -> None:
    nan, inf = float("nan"), float("inf")
    found: Any = {"a": [1.0, {"b": inf}], "c": "nan", "d": None}
    assert list(not_finite(found)) == [(".a[1].b", inf)]
    with pytest.raises(UserError, match=r"^loss.guidance=inf is not a finite number$"):
        require_finite("loss", {"guidance": inf})
    with pytest.raises(UserError, match=r"^--scale nan is not a finite number$"):
        require_finite("--scale", nan)
    with pytest.raises(UserError, match=r"^optimizer.betas=\[0.9, nan\] is out of range: two numbers$"):
        require(True, "optimizer.betas", [0.9, nan], "two numbers")


@pytest.mark.parametrize(
    ("text", "value"), [("1%", 0.01), ("0.01", 0.01), (" 2.5 %", 0.025), ("1e-3", 0.001), ("99.9%", 0.999)]
)
def test_a_share_is_a_percentage_or_a_fraction(text: str, value: float) -> None:
    assert share("--lose", text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["", "%", "one", "1%%", "1_0%", "1,5%", "nan", "inf", "-1%", "0", "1", "100%", "5"]
)
def test_any_other_share_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError) as caught:
        share("--lose", text)
    assert str(caught.value).startswith(f"--lose {text} is ") and "1%" in str(caught.value)


def test_frozen_bits_without_its_package_is_refused_before_anything_is_loaded(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    message = "model.frozen_bits=4 needs bitsandbytes, which is not installed: python -m pip install"
    with pytest.raises(UserError, match=message):
        paths.check_paths(make_config("model.frozen_bits=4"))
    paths.check_paths(make_config())
