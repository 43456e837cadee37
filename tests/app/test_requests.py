"""What other programs than a browser may ask of the page."""

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from helpers.page_requests import NO_STRUCTURE, RUN, call, index_of
from typer.testing import CliRunner

from ghibli.cli.main import app as command_line
from ghibli.runtime.errors import UserError

pytest.importorskip("gradio")
from gradio import processing_utils

from ghibli.app import page
from ghibli.app.address import find_address
from ghibli.app.parts import UPLOAD_LIMIT


def test_a_port_that_is_taken(address: str) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    result = CliRunner().invoke(command_line, ["app", "model=demo", "data=demo", "--port", port])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"--port {port} on 127.0.0.1 cannot be used")


def test_a_port_that_another_program_takes_first(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = int(address.rstrip("/").rpartition(":")[2])
    found = iter([("127.0.0.1", taken)])
    monkeypatch.setattr(page, "find_address", lambda *words: next(found, None) or find_address(*words))
    served, moved = page.serve(["model=demo", "data=demo"], "127.0.0.1", None)
    try:
        assert moved != address
        assert urllib.request.urlopen(moved).status == urllib.request.urlopen(address).status == 200
    finally:
        served.close()


def test_no_file_of_this_machine_is_shown(address: str, outside: Path) -> None:
    secret = outside / RUN / "config.yaml"
    for path in (secret, "/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    grid = next((outside / RUN / "samples").glob("*.png"))
    photo = {"path": str(grid), "meta": {"_type": "gradio.FileData"}}
    settings = ["a lake", "", "ddim", 1, 2, 0, 1, False, 0.5, "img2img", *NO_STRUCTURE]
    event = call(address, index_of(address, "restyle"), [[], photo, *settings])
    assert not event["success"] and "data" not in event["output"]


def test_a_run_that_is_not_offered_is_refused(address: str) -> None:
    settings = ["a lake", "", "ddim", 1, 2, 0, 1, False, 1]
    event = call(address, index_of(address, "draw"), [["/etc"], *settings])
    assert not event["success"]
    event = call(address, index_of(address, "draw"), [[RUN], *settings])
    assert event["success"]


def test_a_photo_that_is_too_large_is_refused(address: str) -> None:
    limit = int(UPLOAD_LIMIT.removesuffix("mb")) * 10**6
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = head + bytes(limit + 2 * 10**6) + b"\r\n--x--\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, form))
    assert refused.value.code == 413


@pytest.mark.parametrize("at", [1, 2, 15])  # the photo's file, a text, a control image
def test_no_url_is_fetched(address: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio takes one in the place of an upload, and would store whatever it serves, of any size."""
    fetched: list[str] = []

    async def get(url: str, **_: Any) -> Any:
        fetched.append(url)
        raise OSError("no network")

    monkeypatch.setattr(processing_utils.sh, "get", get)
    settings = ["a lake", "", "ddim", 1, 2, 0, 1, False, 0.5, "img2img", *NO_STRUCTURE]
    values: list[Any] = [[], None, *settings]
    values[at] = {"path": "https://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
    event = call(address, index_of(address, "restyle"), values)
    assert not event["success"] and not fetched
    assert event["output"]["error"] == "a URL is no file: save it and choose the file"
