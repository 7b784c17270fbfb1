"""`import meshpipe` imports nothing else, and offers the names that type checkers see."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import meshpipe

SOURCE = Path(meshpipe.__file__)


def test_the_table_is_what_type_checkers_see() -> None:
    seen = {}
    (block,) = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If)]
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for name in node.names:
            assert name.asname == name.name  # it is exported
            seen[name.name] = f"meshpipe.{name.name}" if node.module == "meshpipe" else node.module
    assert seen == meshpipe._MODULES | {"run": "meshpipe.runs.function"}


def test_every_name_can_be_imported() -> None:
    for name in meshpipe._MODULES:
        assert getattr(meshpipe, name) is not None
    assert set(meshpipe._MODULES) <= set(dir(meshpipe))
    with pytest.raises(AttributeError, match="has no attribute 'Trainr'"):
        _ = meshpipe.Trainr


def test_a_command_listens_to_signals_before_it_imports_jax() -> None:
    program = "import sys; import meshpipe.cli; print(sorted({'jax', 'flax', 'numpy', 'optax'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_help_does_not_import_jax() -> None:
    program = (
        "import sys\n"
        "from meshpipe.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    status = main([*command.split(), '--help'])\n"
        "    assert status == 0 and not {'jax', 'flax', 'optax'} & sys.modules.keys(), (command, status)\n"
    )
    commands = ["generate", "eval", "data prepare", "weights import", "weights export", "train", "plan", "advise"]
    run = subprocess.run([sys.executable, "-c", program, *commands], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
