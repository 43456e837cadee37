"""The layers of ghibli/: a package imports only from lower lines; no circle of files; what else holds."""

import ast
from pathlib import Path

import pytest
from helpers.imports import imports_of

ROOT = Path(__file__).parents[1]
LAYERS: list[set[str]] = [  # bottom up; packages of one line know nothing of each other
    {"runtime"},
    {"config", "images"},
    {"models", "runs"},
    {"diffusion", "demo"},
    {"data", "adapters"},
    {"evaluation"},
    {"training", "sweeps"},
    {"prepare", "inference", "report"},
    {"jury", "app"},
    {"cli", "api"},
]
LINE = {package: line for line, packages in enumerate(LAYERS) for package in packages}
FILES = {  # dotted name -> file
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "ghibli").rglob("*.py"))
}
ENTRY = {"ghibli", "ghibli.__main__"}
HYDRA_MODULES = {  # who may know Hydra and OmegaConf
    "ghibli.config.files", "ghibli.config.hydra_errors", "ghibli.runs.compose", "ghibli.runs.launch",
    "ghibli.runs.resume", "ghibli.sweeps.grid", "ghibli.sweeps.search",
}  # fmt: skip
PRINTING = {  # beside the command line: progress callbacks, and what must reach stderr whatever else happens
    "ghibli.training.callbacks.progress", "ghibli.runs.distributed", "ghibli.runtime.errors",
    "ghibli.demo.pretrain.run", "ghibli.demo.pretrain.near", "ghibli.demo.pretrain.sheets",
    "ghibli.demo.pretrain.training_loop", "ghibli.demo.pretrain.stages", "ghibli.demo.pretrain.tokenizer",
}  # fmt: skip
LATE_IMPORTS = {  # torch and safetensors.torch in low layers, wandb only when it logs, optional extras
    "torch", "safetensors", "wandb", "optuna", "pandas", "sqlalchemy", "pyarrow", "kagglehub", "pillow_heif",
    "bitsandbytes", "IPython",
}  # fmt: skip


def ours(module: str) -> set[str]:
    """The modules of ghibli/ that one imports, wherever in the file."""
    return {name for name in imports_of(FILES[module]) if name in FILES} - {module}


def package_of(module: str) -> str:
    return module.split(".")[1]


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Every set of modules that import each other, by Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in imports[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for module in imports:
        if module not in index:
            visit(module)
    return found


def test_every_package_has_a_line() -> None:
    packages = {path.parent.name for path in (ROOT / "ghibli").glob("*/__init__.py")}
    assert packages | {"api"} == set(LINE)
    loose = {path.stem for path in (ROOT / "ghibli").glob("*.py")}
    assert loose == {"__init__", "__main__", "api"}


@pytest.mark.parametrize("module", sorted(set(FILES) - ENTRY))
def test_imports_only_from_lower_lines(module: str) -> None:
    above = {
        other
        for other in ours(module) - ENTRY
        if package_of(other) != package_of(module) and LINE[package_of(other)] >= LINE[package_of(module)]
    }
    assert not above


def test_no_circle_of_files() -> None:
    assert circles({module: ours(module) for module in FILES}) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("module", sorted(name for name in FILES if FILES[name].stem == "__init__"))
def test_an_init_file_is_one_docstring(module: str) -> None:
    body = ast.parse(FILES[module].read_text()).body
    if module == "ghibli":  # __version__, and `from ghibli import Run, show` without importing either before
        body = [node for node in body if not isinstance(node, ast.Assign)]
        assert [node.name for node in body if isinstance(node, ast.FunctionDef)] == ["__getattr__"]
        body = [node for node in body if not isinstance(node, ast.FunctionDef)]
    assert len(body) == 1 and ast.get_docstring(ast.parse(FILES[module].read_text()))


@pytest.mark.parametrize("module", sorted(set(FILES) - HYDRA_MODULES))
def test_few_modules_know_hydra(module: str) -> None:
    tops = {name.split(".")[0] for name in imports_of(FILES[module])}
    assert not tops & {"hydra", "omegaconf"}


@pytest.mark.parametrize("module", sorted(set(FILES) - PRINTING - ENTRY))
def test_library_modules_log_and_do_not_print(module: str) -> None:
    if module.startswith("ghibli.cli."):
        return
    calls = [
        ast.unparse(n.func) for n in ast.walk(ast.parse(FILES[module].read_text())) if isinstance(n, ast.Call)
    ]
    assert not {"print", "console.print", "sys.stdout.write"} & set(calls)


@pytest.mark.parametrize("module", sorted(set(FILES) - ENTRY))
def test_imports_stand_at_the_top(module: str) -> None:
    """But in the command line, which must answer --help at once, and for what is listed with its reason."""
    if module.startswith("ghibli.cli."):
        return
    late = {
        name
        for function in ast.walk(ast.parse(FILES[module].read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert {name.split(".")[0] for name in late} <= LATE_IMPORTS, late


SILENCERS = (
    "quiet(",
    "quiet =",
    "quiet=True",
    "filterwarnings(",
    "simplefilter(",
    "setLevel(",
    "captureWarnings(",
    "set_verbosity",
)


def test_whatever_silences_a_library_says_why() -> None:
    """A library often tells only its logger, or a warning, that it drops a part of its input."""
    for path in [*FILES.values(), ROOT / "train.py", ROOT / "sweep.py"]:
        tree, lines = ast.parse(path.read_text()), path.read_text().splitlines()
        why = {
            line
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and "ilence" in (ast.get_docstring(function) or "")
            for line in range(function.lineno, (function.end_lineno or 0) + 1)
        }
        for number, line in enumerate(lines, start=1):
            is_call = any(word in line for word in SILENCERS) and "def quiet(" not in line
            if is_call and number not in why and "logger.setLevel(logging.INFO)" not in line:
                assert any(
                    "  # " in near or near.strip().startswith("#") for near in lines[number - 3 : number]
                ), f"{path.relative_to(ROOT)}:{number} does not say why nothing is lost: {line.strip()}"


def test_the_demo_has_no_code_path_of_its_own() -> None:
    """Only where its folder is gets decided by name, and in one module."""
    names_of_commands = {"ghibli.cli.data", "ghibli.cli.options"}
    for module in set(FILES) - {"ghibli.config.paths"} - names_of_commands:
        words = [
            n.value for n in ast.walk(ast.parse(FILES[module].read_text())) if isinstance(n, ast.Constant)
        ]
        assert "demo" not in words, module


def test_no_machine_path_or_registry_host_in_the_repository() -> None:
    forbidden = ["/" + "root/", "/" + "work/", "pypi" + ".org", "python" + "hosted"]
    files = [p for part in ("ghibli", "conf", "tests", "docs") for p in (ROOT / part).rglob("*")]
    files += [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt")]
    for path in files:
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json"}:
            text = path.read_text()
            assert not [word for word in forbidden if word in text], path
