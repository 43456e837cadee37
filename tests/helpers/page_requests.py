"""What a browser sends to the page of `ghibli app`, without a browser."""

import json
import urllib.request
from typing import Any

RUN = "outputs/train/run"  # the finished run of tests/app/conftest.py
NO_STRUCTURE = [None, "", None, 1, None]  # no mask, no ControlNet


def call(address: str, index: int, data: list[Any]) -> dict[str, Any]:
    """Send what a browser would; return the last event."""
    body = json.dumps({"data": data, "fn_index": index, "session_hash": "forged"}).encode()
    url = f"{address}gradio_api/queue/join"
    urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}))
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=forged") as events:
        for line in events:
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if event["msg"] == "process_completed":
                    return event
    raise AssertionError("no answer")


def index_of(address: str, name: str) -> int:
    """Return the index by which the page calls the click handler of a button."""
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    return next(
        call["id"] for call in config["dependencies"] if [ids[name], "click"] in map(list, call["targets"])
    )


def upload(address: str, content: bytes) -> str:
    """Upload a photo; return its path on the server."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}gradio_api/upload", head + content + b"\r\n--x--\r\n", form)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)[0]
