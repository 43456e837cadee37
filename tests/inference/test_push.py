"""`ghibli push`: what is listed, what is sent, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ghibli.cli.main import app
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError


def test_push_lists_the_files_and_sends_nothing(exported: tuple[Path, list], run: RunDir) -> None:
    done = CliRunner().invoke(app, ["push", str(run.path), "me/mine"])
    assert done.exit_code == 0, done.output
    assert "run_kohya.safetensors" in done.output and "README.md" in done.output
    assert "nothing was sent" in done.output and "merged" not in done.output
    assert "samples/adapter.png" in done.output  # the grid that the card shows


def test_push_sends_just_that(
    exported: tuple[Path, list], run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from ghibli.inference import push

    asked = {}

    class Api:
        endpoint = "https://hub"

        def create_repo(self, name: str, **options: object) -> None:
            asked["repo"] = (name, options)

        def upload_folder(self, **options: object) -> None:
            asked["upload"] = options

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        push.push(exported[0], "me/mine", private=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(push, "hub_answers", lambda: True)
    done = CliRunner().invoke(app, ["push", str(run.path), "me/mine", "--really"])
    assert "sent to https://hub/me/mine" in done.output and "hf_secret" not in done.output
    assert asked["repo"] == ("me/mine", {"private": True, "exist_ok": True})
    assert set(asked["upload"]["allow_patterns"]) == {name for name, _ in push.files_to_push(exported[0])}
    assert json.dumps(asked["upload"]["allow_patterns"]).count("merged") == 0
    link = shutil.copytree(exported[0], tmp_path / "link", ignore=lambda *_: ["merged"])
    (link / "passwd.md").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"passwd.md is a link: only files of an export are sent"):
        push.files_to_push(link)
    (link / "passwd.md").unlink()
    shutil.rmtree(link / "samples")
    (link / "samples").symlink_to(exported[0] / "samples")
    with pytest.raises(UserError, match=r"samples is a link"):
        push.files_to_push(link)
    (tmp_path / "whole").symlink_to(exported[0])
    with pytest.raises(UserError, match=r"whole is a link"):
        push.files_to_push(tmp_path / "whole")
    empty = shutil.copytree(exported[0], tmp_path / "empty", ignore=lambda *_: ["README.md", "merged"])
    with pytest.raises(UserError, match="holds nothing to send"):
        push.files_to_push(empty)
