"""ghibli/ is a list: a module imports only from modules above it. And what else holds everywhere."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ghibli"
ORDER = [
    "mistakes", "progress", "parallel", "whole_files", "provenance", "run_dir",
    "tensor_cache", "devices", "schema", "trial", "places",
    "config_mistakes", "config", "randomness",
    "scene_canvas", "scene_subjects", "scene_painting", "scenes",
    "near_duplicates", "caption_tables", "captions", "buckets", "base_model", "convert", "latents",
    "compute", "validation", "base_scores", "data",
    "lora", "adapter_files", "kohya", "diffusion", "optimizers",
    "sampling", "module", "checkpoints", "resume_check", "dashboard", "records", "doctor", "callbacks",
    "features", "metrics", "yardstick", "bench", "distance_curve",
    "trainer", "model_card", "finish", "trained", "evaluation",
    "data_lint", "footprint", "preflight", "contact_sheet", "downloads", "prepare", "blip",
    "compare", "study", "ranking",
    "slides_table", "export", "wardrobe", "generate", "restyle", "safety", "studio", "app", "push",
    "report", "grids", "search", "cli_use", "cli", "__main__",
]  # fmt: skip
PACKAGES = {"report"}  # demo/ is data, and how it was made
HYDRA_MODULES = {"hydra", "omegaconf"}


def files_of(module: str) -> list[Path]:
    """The file of a module, or all files of a package."""
    return [PACKAGE / f"{module}.py"] if module not in PACKAGES else sorted((PACKAGE / module).glob("*.py"))


def imported_modules(module: str) -> set[str]:
    """Every module named in an import anywhere in it."""
    return set().union(*map(imports_of, files_of(module)))


def imports_of(path: Path) -> set[str]:
    """Every module named in an import anywhere in a file, `from a import b` as both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_list_is_complete() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"demo"}
    assert packages == PACKAGES
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | packages == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_only_from_above(module: str) -> None:
    below = set(ORDER[ORDER.index(module) + (module in PACKAGES) :])  # a package imports its own parts
    ours = {name.split(".")[1] for name in imported_modules(module) if name.startswith("ghibli.")}
    assert not ours & below


@pytest.mark.parametrize("module", sorted(set(ORDER) - {"config", "config_mistakes", "grids", "search"}))
def test_only_config_and_grids_know_hydra(module: str) -> None:
    tops = {name.split(".")[0] for name in imported_modules(module)}
    assert not tops & HYDRA_MODULES


def test_the_demo_has_no_code_path_of_its_own() -> None:
    """Only where its folder is gets decided by name, and in one module."""
    for module in set(ORDER) - {"base_model", "cli"}:  # cli: the name of a verb
        trees = [ast.parse(path.read_text()) for path in files_of(module)]
        words = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert "demo" not in words, module


def test_no_machine_path_or_registry_host_in_the_repository() -> None:
    root = PACKAGE.parent
    forbidden = ["/" + "root/", "/" + "work/", "pypi" + ".org", "python" + "hosted"]
    files = [p for part in ("ghibli", "conf", "tests", "docs") for p in (root / part).rglob("*")]
    files += [root / name for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt")]
    for path in files:
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json"}:
            text = path.read_text()
            assert not [word for word in forbidden if word in text], path
