"""Writes metadata.jsonl beside the images of a folder with captions.txt: what other trainers read."""

import json
import sys
from pathlib import Path

root = Path(sys.argv[1])
table = (root / "captions.txt").read_text(encoding="utf-8")
rows = [line.split("|", 1) for line in table.splitlines() if line]
lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in rows]
(root / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
