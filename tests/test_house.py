"""The house keeps its own rules: imports run one way, modules stay small, the wheel holds all that the tree does."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from r1distill.data.config import ROOT, names

ROOMS = {
    "pipeline": {"teacher", "students", "data"},
    "students": {"data", "kernels"},
    "teacher": {"data"},
    "data": set(),
    "kernels": set(),
}
MOST_LINES = 450
HEAVY = {"auto_round", "datasets", "math_verify", "peft", "reasoning_gym", "torch", "transformers", "trl", "vllm"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

modules = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
each_module = pytest.mark.parametrize("module", modules, ids=[str(module.relative_to(ROOT)) for module in modules])


def imports(tree: ast.AST):
    """Absolute names that a module imports, wherever in it; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@each_module
def test_imports_run_one_way(module):
    room = module.relative_to(ROOT).parts[0]
    found = imports(ast.parse(module.read_text("utf-8")))
    ours = {name.split(".")[1] for name in found if name.startswith("r1distill.")}
    assert ours <= ROOMS[room] | {room}


@each_module
def test_heavy_libraries_are_imported_where_they_are_used(module):
    if module.relative_to(ROOT).parts[0] == "kernels":
        return  # a Triton kernel is nothing without its compiler
    top = [node for node in ast.parse(module.read_text("utf-8")).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = {name.split(".")[0] for node in top for name in imports(node)}
    assert not found & HEAVY


@each_module
def test_modules_stay_small(module):
    assert len(module.read_text("utf-8").splitlines()) <= MOST_LINES


def test_no_room_is_imported_by_its_bare_name():
    bare = set(ROOMS) | {"configs"}
    for module in modules:
        assert not {name.split(".")[0] for name in imports(ast.parse(module.read_text("utf-8")))} & bare, module


def test_the_package_list_is_the_tree():
    folders = {module.parent.relative_to(ROOT) for module in modules}
    tree = {"r1distill." + ".".join(folder.parts) for folder in folders} | {"r1distill.configs"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == tree


def test_the_lock_pins_every_direct_dependency():
    lock = {}
    for line in (ROOT / "requirements" / "cpu.lock").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            lock[_plain(name)] = version
    extras = PROJECT["project"]["optional-dependencies"]
    direct = PROJECT["project"]["dependencies"] + extras["stages"] + extras["cpu"] + extras["dev"]
    for requirement in direct:
        name, version = re.fullmatch(r"([\w-]+)(?:\[.*\])?(?:[=><]=?([\d.]+))?", requirement).groups()
        assert name == "r1distill" or _plain(name) in lock, f"{name} is not in requirements/cpu.lock"
        if "==" in requirement:
            assert lock[_plain(name)] == version


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


# The commands that answer at once.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["distill", "--help"],
        ["status"],
        ["plan", "--student", "qwen-14b", "--hardware", "8xh200"],
        ["distill", "--dry-run"],
    ],
    ids=" ".join,
)
def test_quick_commands_import_nothing_heavy(arguments, tmp_path):
    code = f"""
import sys
sys.argv = ["r1distill", *{arguments!r}]
from r1distill.pipeline.cli import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code
print("\\nHEAVY", code or 0, [name for name in {sorted(HEAVY)!r} if name in sys.modules])
"""
    environment = {**os.environ, "R1DISTILL_HOME": str(tmp_path / "runs")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.splitlines()[-1] == "HEAVY 0 []", done.stdout + done.stderr


# The wheel.


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was installed, built from a copy of the tree so that nothing stale gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in [*ROOMS, "configs", "pyproject.toml", "README.md", "LICENSE"]:
        path = ROOT / name
        skip = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(path, source / name, ignore=skip) if path.is_dir() else shutil.copy2(path, source / name)
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def use(installed, *arguments):
    """Run Python with the installed wheel and its libraries alone: -S keeps an editable install of the tree out."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]),
        "R1DISTILL_HOME": str(installed.parent / "runs"),
    }
    command = [sys.executable, "-S", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=installed.parent, env=environment)


def test_the_wheel_holds_every_module_and_configuration(installed):
    def files(root, folders):
        found = {file.relative_to(root) for folder in folders for file in (root / folder).rglob("*") if file.is_file()}
        hidden = {file for file in found if any(part == "__pycache__" or part.startswith(".") for part in file.parts)}
        return {str(file) for file in found - hidden if file.suffix != ".md"}

    assert files(ROOT, [*ROOMS, "configs"]) == files(installed / "r1distill", ["."])


def test_the_wheel_works_without_the_tree(installed):
    code = "from r1distill.data import config; print(config.ROOT); print(config.names('students'))"
    done = use(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    root, students = done.stdout.splitlines()
    assert Path(root) == installed / "r1distill" and students == str(names("students"))


def test_the_wheels_command_answers(installed):
    done = use(installed, installed / "bin" / "r1distill", "--help")
    assert done.returncode == 0 and "distill" in done.stdout, done.stderr
    arguments = ["plan", "--student", "qwen-14b", "--hardware", "8xh200", "--json"]
    done = use(installed, installed / "bin" / "r1distill", *arguments)
    assert done.returncode == 0 and json.loads(done.stdout)["fits"], done.stdout + done.stderr
