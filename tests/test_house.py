"""The house keeps its own rules: layers, packages, style, types. pytest tests/test_house.py"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "moe_compose"

#: Low to high; nobody imports upwards. Modules of one level may import each other.
LEVELS = [
    {"errors", "version"},
    {"checkpoint", "architectures"},
    {"routing", "surgery"},
    {"kernels", "runtime"},
    {"calibration"},
    {"evaluation"},
    {"recovery", "composition"},
    {"training"},
    {"tradeoff"},
    {"validation"},
    {"reporting"},
    {"recipe"},
    {""},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}

#: Only ever imported in the process that runs a forward pass.
WORKER = {f"validation/forward_{name}.py" for name in ("worker", "model", "layers", "cover")}

#: Only ever imported by a calibration that runs, or by statistics that are read.
MEASURING = {
    f"calibration/{name}.py"
    for name in (
        *("calibrate", "calls", "observe", "once", "pairs", "ranks", "residual", "router"),
        *("sampling", "leave_out", "masked_error"),
        *("similarity", "stats", "files", "criteria", "losses", "aimer"),
        *("grouping", "alignment", "sequence"),
    )
}

#: Only ever imported by a refit that runs.
SOLVING = {f"recovery/{name}.py" for name in ("homes", "layer", "ridge")}

#: Only ever imported by routers that are being made from text.
ROUTING = {
    f"composition/{name}.py"
    for name in ("blocks", "forcing", "measure", "new_row", "rows", "search", "statistics")
}

#: Of training, what is imported by a training that runs; its options are read without torch.
TRAINING = {
    f"training/{name}.py"
    for name in (
        *("balance", "batches", "chosen", "engine", "freezing", "loop", "masters", "measure"),
        *("objectives", "routers", "state", "train", "ffn", "layerwise", "one_layer"),
        "adapters",
    )
}

#: Heavy packages, and the rooms (or single modules) that may import them at module level.
HEAVY = {
    "torch": {
        "routing",
        "kernels",
        "runtime",
        "evaluation",
        *WORKER,
        *MEASURING,
        *SOLVING,
        *ROUTING,
        *TRAINING,
    },
    "transformers": {"training/freezing.py"},
    "numpy": set(),
    "triton": {"kernels"},
}

#: Packages, and the rooms (or single modules) that may import them at all. The hook registers the
#: kernels with transformers, which is all it does.
AT_ALL = {
    "transformers": {
        "runtime",
        "training",
        "validation",
        "kernels/hook.py",
        "calibration/tokenizer.py",
    },
    "triton": {"kernels"},
}


def room_of(path: Path) -> str:
    first = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, node) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node
            yield from ((f"{node.module}.{a.name}", node) for a in node.names)


FILES = sorted(LIBRARY.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_imports_upwards(path):
    mine = LEVEL[room_of(path)]
    for name, _ in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "moe_compose" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= mine, f"{path.name} imports {name}"
        assert parts[0] != "moe_compose_cli", "the library does not know its command line"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    for node in ast.parse(path.read_text()).body:
        for name, _ in imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            package = name.split(".")[0]
            if package in HEAVY:
                mine = {room_of(path), path.relative_to(LIBRARY).as_posix()}
                assert mine & HEAVY[package], f"{path.name} imports {package} on import"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_are_known_to_their_rooms_only(path):
    for name, _ in imports(ast.parse(path.read_text())):
        package = name.split(".")[0]
        rooms = AT_ALL.get(package)
        mine = {room_of(path), path.relative_to(LIBRARY).as_posix()}
        assert rooms is None or mine & rooms, f"{path.name} imports {package}"


#: Of transformers, what may run code that came with a checkpoint.
AUTO = re.compile(r"Auto[A-Z]\w+|pipeline|(from_pretrained|from_config)")

#: The one module that calls it, and the worker, which runs without this package.
CALLERS = {"runtime/pretrained.py", "validation/engines/worker.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_transformers_is_asked_in_one_place_and_told_not_to_run_code(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            found += [a.name for a in node.names if AUTO.fullmatch(a.name)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name not in ("from_pretrained", "from_config"):
                continue
            found.append(name)
            assert "trust_remote_code" in {k.arg for k in node.keywords}, (path, node.lineno)
    assert not found or path.relative_to(LIBRARY).as_posix() in CALLERS, (path, found)


def test_the_library_never_prints():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "input", "exit"}, path


def test_one_module_of_the_command_line_prints():
    def prints(path: Path) -> bool:
        calls = (n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        return any(isinstance(f, ast.Name) and f.id in {"print", "Console"} for f in calls)

    assert [p.name for p in (ROOT / "cli").rglob("*.py") if prints(p)] == ["output.py"]


#: Programs that are named like a family.
ENGINES = re.compile(r"llama\.cpp|llama-server")


def strings(tree: ast.AST):
    """Every string of a module that is no docstring, also inside f-strings."""
    holders = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, holders)]
    first = [body[0].value for body in bodies if body and isinstance(body[0], ast.Expr)]
    docstrings = {id(node) for node in first}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
            if isinstance(text, str):
                yield text


def families_in(source: str, families: set[str]) -> set[str]:
    """`model_type`s and classes that a module's strings name."""
    texts = (ENGINES.sub("", text) for text in strings(ast.parse(source)))
    return families & {word for text in texts for word in re.findall(r"\w+", text)}


@pytest.fixture(scope="module")
def families() -> set[str]:
    from moe_compose.architectures import all_architectures

    forms = all_architectures().values()
    return {form.model_type for form in forms} | {form.hf_class for form in forms}


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if room_of(p) != "architectures"] + sorted((ROOT / "cli").rglob("*.py")),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_only_architectures_know_families(path, families):
    assert not families_in(path.read_text(), families)


@pytest.mark.parametrize(
    "source",
    [
        'if kind == "mixtral": pass',
        'x = {"mixtral": 1}',
        'match kind:\n    case "mixtral": pass',
        'f"give {x}, such as mixtral."',
        'x = "MixtralForCausalLM"',
        'def f():\n    "A docstring."\n    "mixtral"',
        'x = b"mixtral"',
        'x = "llama.cpp runs a llama"',
    ],
)
def test_a_family_is_found_wherever_it_is_named(source, families):
    assert families_in(source, families)


@pytest.mark.parametrize("source", ['"""As in mixtral."""', "mixtral = 1", 'x = "llama.cpp"'])
def test_a_family_may_be_written_about(source, families):
    assert not families_in(source, families)


def test_every_package_is_listed():
    """A package missing from the list works in an editable install and is absent from the wheel."""
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        ".".join(p.parent.relative_to(ROOT).parts).replace("cli", "moe_compose_cli", 1)
        if p.is_relative_to(ROOT / "cli")
        else ".".join(p.parent.relative_to(ROOT).parts)
        for folder in ("moe_compose", "cli")
        for p in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_style():
    run("ruff", "check", "--no-cache", ".")
    run("ruff", "format", "--check", "--no-cache", ".")


def test_types():
    run("mypy")
