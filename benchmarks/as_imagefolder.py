"""Write metadata.jsonl beside the images of a folder with captions.txt, as other trainers expect it."""

import json
import sys
from pathlib import Path

root = Path(sys.argv[1])
lines = (root / "captions.txt").read_text(encoding="utf-8")
rows = [line.split("|", 1) for line in lines.split("\n") if line]
records = [json.dumps({"file_name": name, "text": caption}) for name, caption in rows]
(root / "images" / "metadata.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
