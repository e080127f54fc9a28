# SPDX-License-Identifier: Apache-2.0
"""The tree as a whole: imports run in one direction, the lower rooms do no I/O, and every module says what it is."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# From the bottom up: a room imports those before it and itself.
ROOMS = ("pallas_kernels", "adaptive", "layers", "experiments", "configs")
BELOW_EXPERIMENTS = ROOMS[:3]
# Configs, command lines, checkpoints and data come from above.
FORBIDDEN_BELOW = {
    "absl", "array_record", "argparse", "clu", "etils", "fsspec", "grain", "h5py", "ml_collections", "optax", "orbax", "rich",
    "sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets", "torch",
}  # fmt: skip
FILE_CALLS = {
    "open", "load", "loadtxt", "save", "savez", "savetxt", "read_text", "read_bytes", "write_text", "write_bytes", "memmap",
    "mkdir", "listdir", "glob", "load_file", "save_file",
}  # fmt: skip
FILE_MODULES = {"io", "os", "pathlib", "safetensors", "shutil", "tempfile"}
# Reading and writing a published checkpoint format is the purpose of these.
READS_FILES = ("layers/hf.py", "layers/hf/")


def modules(*rooms):
    """Paths below the given folders, relative to the root, tests included only when named."""
    found = [path.relative_to(ROOT) for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if "__pycache__" not in path.parts]


def imports(source, path):
    """Absolute dotted names that a module imports, those inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def tops(source, path):
    """First components of everything that a module imports."""
    return {name.split(".")[0] for name in imports(source, path)}


def upward(source, path):
    """Rooms above its own that a module imports, and the tests."""
    place = ROOMS.index(path.parts[0])
    return sorted(tops(source, path) & {*ROOMS[place + 1 :], "tests", "notebooks"})


def file_access(source, path):
    """What in a module below `experiments/` could touch a file."""
    found = {name for name in tops(source, path) if name in FILE_MODULES}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            found |= {f"{name}()"} if name in FILE_CALLS else set()
    return sorted(found)


def violations(rooms, check):
    """`{module: what is wrong}` for all modules of some rooms; the rooms must not be empty."""
    paths = modules(*rooms)
    assert len(paths) > 5, f"found {paths} in {rooms}"
    found = {path.as_posix(): check((ROOT / path).read_text(encoding="utf-8"), path) for path in paths}
    return {path: wrong for path, wrong in found.items() if wrong}


def test_imports_run_in_one_direction():
    assert violations(ROOMS, upward) == {}


def test_kernels_know_no_flax_and_adaptive_only_its_dataclasses():
    assert violations(["pallas_kernels"], lambda source, path: tops(source, path) & {"flax"}) == {}

    def beyond_struct(source, path):
        names = [name for name in imports(source, path) if name.split(".")[0] == "flax"]
        return [name for name in names if not name.startswith("flax.struct")]

    assert violations(["adaptive"], beyond_struct) == {}


def test_layers_use_linen_and_not_nnx():
    assert violations(["layers"], lambda s, p: [name for name in imports(s, p) if name.startswith("flax.nnx")]) == {}


def test_nothing_below_experiments_sees_configs_command_lines_or_data_libraries():
    assert violations(BELOW_EXPERIMENTS, lambda source, path: tops(source, path) & FORBIDDEN_BELOW) == {}


def test_nothing_below_experiments_opens_a_file():
    found = violations(BELOW_EXPERIMENTS, file_access)
    assert {path: wrong for path, wrong in found.items() if not path.startswith(READS_FILES)} == {}


def test_configs_hold_no_logic():
    def logic(source, path):
        return [
            type(node).__name__ for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.ClassDef, ast.While))
        ]

    paths = [path for path in modules("configs") if path.name != "__init__.py"]
    assert {path.as_posix(): logic((ROOT / path).read_text(encoding="utf-8"), path) for path in paths} == {
        path.as_posix(): [] for path in paths
    }


def test_every_module_names_its_licence_first_and_says_what_it_is():
    def incomplete(source, path):
        wrong = [] if source.startswith("# SPDX-License-Identifier: Apache-2.0\n") else ["SPDX line"]
        return wrong + ([] if ast.get_docstring(ast.parse(source)) else ["docstring"])

    assert violations([*ROOMS, "tests"], incomplete) == {}


def test_every_public_function_class_and_method_of_the_libraries_is_documented():
    def undocumented(source, path):
        found = []

        def visit(node, prefix, inside_private=False):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    # A nested function is an implementation detail; so is what a private class holds.
                    # Linen calls `setup`; nobody else does.
                    private = inside_private or child.name.startswith("_") or child.name == "setup"
                    if not private and not ast.get_docstring(child):
                        found.append(f"{prefix}{child.name}")
                    if isinstance(child, ast.ClassDef):
                        visit(child, f"{child.name}.", private)

        visit(ast.parse(source), "")
        return found

    assert violations(BELOW_EXPERIMENTS, undocumented) == {}


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("adaptive", "import layers.t5", ["layers"]),
        ("adaptive", "from layers import t5", ["layers"]),
        ("adaptive", "def f():\n    from experiments.config import x", ["experiments"]),
        ("layers", "from adaptive import tokens\nimport pallas_kernels", []),
        ("layers", "from configs.mrt5 import spans\nimport tests", ["configs", "tests"]),
        ("configs", "from experiments import config", []),
        ("pallas_kernels", "from adaptive.tokens import TokenSet", ["adaptive"]),
    ],
)
def test_the_walk_sees_imports_in_every_form(room, source, wrong):
    assert upward(source, pathlib.PurePath(room, "part", "module.py")) == wrong


def test_the_walk_resolves_relative_imports():
    path = pathlib.PurePath("adaptive", "reduction", "tome.py")
    names = set(imports("from . import match\nfrom .. import budgets\nfrom ..tokens import TokenSet", path))
    assert names == {"adaptive.reduction.match", "adaptive.budgets", "adaptive.tokens.TokenSet"}


def test_the_walk_sees_file_access_in_every_form():
    path = pathlib.PurePath("layers", "module.py")
    assert file_access("import os\nwith open('x') as f:\n    np.load(f)", path) == ["load()", "open()", "os"]
    assert file_access("import jax\nx = jax.numpy.ones(3)", path) == []
