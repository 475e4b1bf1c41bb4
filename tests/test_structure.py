"""The layout of the repository: small files, one importer of the compiled module, test modules that stand alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "e2cm_ext", ROOT / "tests"
MAX_LINES, MAX_ENTRIES = 450, 25
MODULES = sorted(PACKAGE.rglob("*.py"))
TEST_MODULES = sorted(TESTS.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every name that the file imports, as `package.module.name`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_only_native_imports_the_compiled_module():
    importers = [relative(path) for path in MODULES if any("_native" in name.split(".") for name in imports_of(path))]
    assert importers == ["e2cm_ext/native.py"]


def test_files_of_the_package_are_short():
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_the_top_level_of_the_package_has_few_entries():
    entries = {path.name.split(".")[0] for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= MAX_ENTRIES, sorted(entries)


@pytest.mark.parametrize("path", TEST_MODULES, ids=relative)
def test_test_modules_import_no_test_module(path):
    """Nor does code that they start as a process of its own."""
    names = {part for name in imports_of(path) for part in name.split(".")}
    assert not {name for name in names if name.startswith("test_")}
    assert not re.findall(r"^\s*(?:from|import) test_\w+", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_marker_is_used():
    (markers,) = re.findall(r"^markers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    registered = set(re.findall(r'^ *"(\w+):', markers, re.MULTILINE))
    assert "slow" in registered
    sources = [path.read_text(encoding="utf-8") for path in TEST_MODULES]
    used = {name for source in sources for name in re.findall(r"pytest\.mark\.(\w+)", source)}
    assert registered <= used, registered - used
