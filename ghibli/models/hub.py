"""Which files of a Hugging Face repository are fetched, and whether the hub answers."""

HUB_FILES = {  # what is downloaded of a hub repository
    "allow_patterns": ["*/config.json", "*/scheduler_config.json", "tokenizer/*", "*/*.safetensors"],
    "ignore_patterns": ["safety_checker/*", "*fp16*", "*non_ema*"],
}


def hub_answers(endpoint: str | None = None, timeout: float = 5.0) -> bool:
    """True when the hub can be asked at all: the libraries would retry a dead network for minutes.

    Args:
        endpoint: another server's address instead of the hub's.
    """
    import socket
    from urllib.parse import urlparse
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    proxies = getproxies()
    address = urlparse(proxies.get("https") or proxies.get("all") or endpoint or constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout):
            return True
    except OSError:
        return False
