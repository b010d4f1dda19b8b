"""Rules of the house that a linter does not know."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60  # the rule is "about 40"; docstrings are not counted
OUR_CODE = sorted(path for folder in ("src", "training", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
NODE_PACK = sorted((ROOT / "comfyui").glob("*.py"))
PACKAGE = [path for path in OUR_CODE if path.is_relative_to(ROOT / "src")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in ("*.md", "*.toml", "*.yaml", "*.txt", "Makefile", ".ci/*", "docs/**/*.md", "src/**/*.json",
                    "src/**/*.toml", "src/**/*.html", "src/**/*.css", "src/**/*.js", "src/**/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users|opt|mnt)/\w")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def matching_lines(paths: list[Path], pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name_of(path)}:{number}"
        for path in paths
        for number, line in enumerate(lines_of(path), start=1)
        if pattern.search(line)
    ]


def test_the_lists_of_files_are_not_empty():
    assert len(PACKAGE) > 10 and len(TESTS) > 5 and len(TEXTS) > 5


def test_files_are_short():
    scripts = sorted(ROOT.glob("src/**/*.js")) + sorted(ROOT.glob("src/**/*.css"))
    lengths = {name_of(path): len(lines_of(path)) for path in OUR_CODE + NODE_PACK + TESTS + scripts}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_file_is_left_unfinished():
    assert matching_lines(OUR_CODE + TESTS + TEXTS, UNFINISHED) == []


NAMED_MODULE = re.compile(r"-m ((?:tests|benchmarks|training|tempoquant)(?:\.[a-z_]+)*)(?![\w.{\\])")
NAMED_FILE = re.compile(r"(?<![\w./-])((?:tests|benchmarks|training|src|docs)/[\w./-]+\.(?:py|md|toml|html|png))\b")
GENERATED = {"docs/cli.md"}  # by `make docs`
HISTORY = {"docs/log.md", "CHANGELOG.md"}  # what they tell of has moved since


def test_every_module_and_file_that_a_text_names_exists():
    """A reader who types a command from a docstring, a page or a Makefile finds the program."""
    missing = [
        f"{name_of(path)}:{number} names {named}"
        for path in OUR_CODE + TESTS + TEXTS
        if name_of(path) not in HISTORY and not name_of(path).startswith("docs/decisions")
        for number, line in enumerate(lines_of(path), start=1)
        for named in missing_names(line)
    ]
    assert missing == []


def missing_names(line: str) -> Iterator[str]:
    for module in NAMED_MODULE.findall(line):
        place = module.replace(".", "/")
        if not any(
            (root / f"{place}{end}").exists() for root in (ROOT, ROOT / "src") for end in (".py", "/__main__.py")
        ):
            yield module
    for file in NAMED_FILE.findall(line):
        if not (ROOT / file).exists() and file not in GENERATED:
            yield file


def test_no_text_names_a_path_of_one_machine():
    assert matching_lines(OUR_CODE + TESTS + TEXTS, MACHINE_PATH) == []


def test_functions_are_short():
    assert [found for path in OUR_CODE for found in long_functions(path)] == []


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if length > MAX_FUNCTION_LINES:
                yield f"{name_of(path)}: {node.name} has {length} lines"


def test_nothing_is_unpickled_or_evaluated():
    """A pickle runs whatever its author wrote; weights travel as safetensors."""
    assert [found for path in OUR_CODE for found in unsafe_code(path)] == []


def unsafe_code(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
            if modules & {"pickle", "dill", "cloudpickle", "shelve"}:
                yield f"{where} imports a pickler"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.jit.load", "eval", "exec"):
            yield f"{where} calls {ast.unparse(node.func)}"
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            yield f"{where} passes {node.arg}"


def test_every_module_and_every_public_function_and_class_has_a_docstring():
    assert [found for path in PACKAGE for found in undocumented(path)] == []


def undocumented(path: Path) -> Iterator[str]:
    tree = tree_of(path)
    if tree.body and not ast.get_docstring(tree):
        yield name_of(path)
    for node in tree.body:
        is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{name_of(path)}: {node.name}"


OF_COMFYUI = {"comfy", "comfy_extras", "folder_paths", "nodes"}
COMFYUI_HOSTS = ("src/tempoquant/hosts/comfyui/", "comfyui/", "tests/hosts/comfyui/")


def test_comfyui_is_imported_by_its_host_and_its_nodes_only():
    """It is GPL-3 and not needed by anything else: the wheel works, and is tested, without it."""
    imported = {name_of(path): modules_of(path) & OF_COMFYUI for path in OUR_CODE + NODE_PACK + TESTS}
    found = {name for name, modules in imported.items() if modules}
    assert [name for name in sorted(found) if not name.startswith(COMFYUI_HOSTS)] == []
    assert {"src/tempoquant/hosts/comfyui/loader.py", "comfyui/nodes.py"} <= found


def modules_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_no_folder_is_a_drawer_for_everything():
    drawers = {"utils", "common", "core", "base", "helpers"}
    assert [name_of(path) for path in PACKAGE if drawers & {*path.relative_to(ROOT).parts[:-1], path.stem}] == []


def test_importing_everything_writes_nothing_sets_nothing_and_asks_no_gpu(tmp_path: Path):
    program = """
import contextlib, importlib, os, pkgutil
import diffusers, torch, transformers, typer
with contextlib.suppress(ModuleNotFoundError):
    import ray
before = dict(os.environ)
import tempoquant
for module in pkgutil.walk_packages(tempoquant.__path__, "tempoquant."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            optional = {"triton": "kernels.", "ray": "engines.ray_", "comfy": "hosts.comfyui."}
            assert module.name.startswith("tempoquant." + optional[error.name]), module.name
assert dict(os.environ) == before, "the environment changed"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
"""
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "TMPDIR"), str(tmp_path))
    environment = {**os.environ, **places, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_importing_the_package_and_its_command_line_loads_no_library_that_takes_seconds():
    """Every worker process waits for it, and so does --help; rarely needed modules are imported
    where they are used.
    """
    program = (
        "import sys, tempoquant.cli\n"
        "print(*{'torch', 'diffusers', 'transformers', 'scipy', 'numpy', 'peft', 'ray'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.split() == []


FACTS_OF_A_MODEL = re.compile(
    r"Wan[A-Z]\w*|\w*Transformer3DModel|UMT5\w*|AutoencoderKL\w*|transformer_2|high_noise|low_noise|boundary_ratio"
    r"|expand_timesteps|attn[12]|add_[kv]_proj|^blocks\.$|(?<!\w)blocks\.\d|encoder_hidden_states|patch_embedding"
)
KNOWN_BY_OTHERS = {
    "src/tempoquant/earlier_recipes.py": {
        "high_noise",
        "low_noise",
    },  # keys before there was a mapping
    "src/tempoquant/models/lora/names.py": {"transformer_2"},  # a prefix that trainers put before every key
}


def test_facts_of_a_model_stand_in_its_folder_of_models_and_nowhere_else():
    """Names of classes, components, blocks, linears and inputs, in strings or in code; docstrings
    may give examples.
    """
    folders = [path for path in (ROOT / "src/tempoquant/models").iterdir() if (path / "family.py").is_file()]
    bundled = ROOT / "src/tempoquant/tiny"
    found = {
        name_of(path): facts - KNOWN_BY_OTHERS.get(name_of(path), set())
        for path in PACKAGE
        if not any(path.is_relative_to(folder) for folder in (*folders, bundled))
        and (facts := set(facts_in(tree_of(path))))
    }
    assert {name: facts for name, facts in found.items() if facts} == {}


def facts_in(tree: ast.Module) -> Iterator[str]:
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        texts = [node.value] if isinstance(node, ast.Constant) and id(node) not in docstrings else []
        texts += [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
        texts += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        for text in texts:
            if isinstance(text, str):
                yield from FACTS_OF_A_MODEL.findall(text)
