"""Which files of a Hugging Face repository are downloaded, and whether the hub can be reached."""

import socket
import urllib.request
from urllib.parse import urlparse

from huggingface_hub import constants

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
CLIP_FILES = {  # options of snapshot_download for a network of transformers that reads images
    "allow_patterns": ["config.json", "preprocessor_config.json", "model.safetensors"],
    "ignore_patterns": [],
}
PART_FILES = {  # for one network of diffusers
    "allow_patterns": ["config.json", "*.safetensors"],
    "ignore_patterns": ["*fp16*", "*non_ema*", "*/*"],
}
HUB_FILES = {  # for model.path
    "allow_patterns": [  # no code, no pickle, no adapter
        *(
            f"{part}/{name}"
            for part in ("text_encoder", "unet", "vae")
            for name in ("config.json", "*.safetensors")
        ),
        "scheduler/scheduler_config.json",
        *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    ],
    "ignore_patterns": ["*fp16*", "*non_ema*"],
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
