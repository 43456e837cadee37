"""Which files of a Hugging Face repository are downloaded, and whether the hub can be reached."""

import socket
import urllib.request
from urllib.parse import urlparse

from huggingface_hub import constants

HUB_FILES = {  # options of snapshot_download
    "allow_patterns": ["*/config.json", "*/scheduler_config.json", "tokenizer/*", "*/*.safetensors"],
    "ignore_patterns": ["safety_checker/*", "*fp16*", "*non_ema*"],
}


def hub_answers(endpoint: str | None = None, timeout: float = 5.0) -> bool:
    """Tell within seconds whether the hub can be reached; the libraries retry a dead network for minutes.

    Args:
        endpoint: address of another server; None = the hub.
        timeout: seconds.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    proxies = urllib.request.getproxies()
    address = urlparse(proxies.get("https") or proxies.get("all") or endpoint or constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout):
            return True
    except OSError:
        return False
