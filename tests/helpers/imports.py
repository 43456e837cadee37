"""The imports of a source file."""

import ast
from pathlib import Path


def imports_of(path: Path) -> set[str]:
    """Every module named in an import anywhere in a file, `from a import b` as both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names
