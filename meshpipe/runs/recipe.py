"""Recipes: Python functions that return the complete configuration of a run, found by name."""

import ast
import difflib
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from meshpipe.config import Config
from meshpipe.errors import errors_name_flags
from meshpipe.files import expanded

FOLDER = Path("recipes")
"""Folder, relative to the current one, where short names are looked up."""


def shipped() -> Path:
    """The folder of the recipes that come with meshpipe: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "shipped_recipes"  # where pyproject.toml has the wheel put them
    return inside if inside.is_dir() else package.parent / FOLDER


def folder_of_recipes() -> Path:
    """The folder where short names are looked up: `FOLDER` of the current folder, or that of the shipped recipes."""
    return FOLDER if FOLDER.is_dir() else shipped()


class RecipeError(ValueError):
    """A recipe does not exist or fails; the message names it and the remedy."""


@dataclass(frozen=True)
class Recipe:
    """A function in a file, not yet run."""

    file: Path
    function: str
    summary: str = ""
    """The first line of its docstring."""

    @property
    def name(self) -> str:
        """The name for `find`: without folder and suffix for a recipe in `folder_of_recipes()`."""
        file = self.file.stem if self.file.parent == folder_of_recipes() else str(self.file)
        return f"{file}:{self.function}"

    def config(self) -> Config:
        """Runs the file and then the function.

        Raises `RecipeError` with file and line when either fails or the result is not a `Config`.
        """
        function = getattr(_run_file(self.file), self.function)
        try:
            with errors_name_flags(False):  # a recipe is Python, and has arguments
                config = function()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # including sys.exit: a recipe must not end a command, least of all silently
            raise RecipeError(
                f"The recipe {self.name} fails{_where(error, self.file)}: {_message_of(error)}"
            ) from error
        if not isinstance(config, Config):
            raise RecipeError(
                f"A recipe returns a meshpipe.Config. Got {type(config).__name__} from {self.name}. "
                f"Return a Config from {self.function} in {self.file}."
            )
        return config


def discover(folder: Path | None = None) -> list[Recipe]:
    """The recipes of a folder, by default of `folder_of_recipes()`, by file name and line. Runs none of them.

    A recipe is a public function without required arguments that is annotated as returning `Config`.
    Raises `RecipeError` when one of its files is not Python.
    """
    folder = folder_of_recipes() if folder is None else folder
    files = sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))
    return [recipe for file in files for recipe in _recipes_in(file)]


def find(name: str) -> Recipe:
    """The recipe with a name: `FILE.py:FUNCTION`, or `FILE:FUNCTION` for a file in `folder_of_recipes()`.

    Raises `RecipeError` with the closest names when there is none.
    """
    file_name, colon, function = name.rpartition(":")
    if not colon or not file_name or not function:
        raise RecipeError(f"A recipe is FILE.py:FUNCTION, or FILE:FUNCTION. Got {name!r}.{_suggest(name)}")
    file = expanded("RECIPE", file_name) if file_name.endswith(".py") else _short_name(file_name)
    try:
        exists = file.is_file()
    except OSError:  # a name that is too long
        exists = False
    if not exists:
        raise RecipeError(f"There is no file {file}, which the recipe {name!r} names.{_suggest(name)}")
    summaries = _functions(file)
    if function not in summaries:
        raise RecipeError(f"There is no function {function} in {file}.{_suggest(name, file)}")
    return Recipe(file, function, summaries[function])


def _short_name(name: str) -> Path:
    # Shell completion leads to `recipes/FILE:FUNCTION`, which is unambiguous.
    return Path(f"{name}.py") if Path(name).parent == FOLDER else folder_of_recipes() / f"{name}.py"


def _suggest(name: str, file: Path | None = None) -> str:
    """A sentence with the likely intended names: functions of `file`, or else recipes of `folder_of_recipes()`."""
    if file is None and FOLDER.is_dir() and name in _shipped_names():
        return f" It comes with meshpipe: `meshpipe init DIR` copies it to DIR/{FOLDER}."
    try:
        known = [recipe.name for recipe in (_recipes_in(file) if file else discover())]
    except RecipeError:
        known = []
    if not known:
        return f" There is no recipe in {file or f'the folder {folder_of_recipes().resolve()}'}."
    wanted = name.rpartition("/")[2].replace(".py:", ":")
    if file:
        functions = {other.rpartition(":")[2]: other for other in known}
        near = [functions[f] for f in difflib.get_close_matches(wanted.rpartition(":")[2], functions, n=1)]
        return f" Did you mean {near[0]}?" if near else f" It has {', '.join(functions)}."
    # A file without a function, or a function without a file; else a typing error.
    near = [other for other in known if wanted == other or wanted.removesuffix(".py") in other.split(":")]
    near = near or difflib.get_close_matches(wanted, known, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else " `meshpipe recipes` lists all recipes."


def _shipped_names() -> list[str]:
    return [f"{recipe.file.stem}:{recipe.function}" for recipe in discover(shipped())]


def _syntax_tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise RecipeError(f"A recipe is a Python file. Got {file},{line}: {error}. Correct the file.") from error


def _functions(file: Path) -> dict[str, str]:
    """The functions callable without arguments, by name, with the first line of their docstrings."""
    return {function.name: _summary(function) for function in _definitions(file)}


def _recipes_in(file: Path) -> list[Recipe]:
    return [
        Recipe(file, function.name, _summary(function))
        for function in _definitions(file)
        if not function.name.startswith("_") and _returns_config(function)
    ]


def _definitions(file: Path) -> list[ast.FunctionDef]:
    functions = [node for node in _syntax_tree(file).body if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if not _required_arguments(node.args)]


def _required_arguments(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    return positional > len(arguments.defaults) or any(default is None for default in arguments.kw_defaults)


def _returns_config(function: ast.FunctionDef) -> bool:
    annotation = ast.unparse(function.returns) if function.returns else ""
    return annotation.strip("'\"").rpartition(".")[2] == "Config"


def _summary(function: ast.FunctionDef) -> str:
    return (ast.get_docstring(function) or "").partition("\n")[0]


def _run_file(file: Path) -> ModuleType:
    """Runs a recipe file as its own module, which can import neighbouring files like a script."""
    for folder in (str(file.resolve().parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"meshpipe_recipes.{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their annotations up in the module that defines them.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        what = _message_of(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        raise RecipeError(f"The recipe file {file} fails{_where(error, file)}: {what}") from error
    return module


def _message_of(error: BaseException) -> str:
    """The message of an error, or its type if it has no message."""
    if isinstance(error, SystemExit):
        return f"it calls sys.exit: {error}" if isinstance(error.code, str) else f"it calls sys.exit({error.code})"
    return str(error) or type(error).__name__


def _where(error: BaseException, file: Path) -> str:
    """The last line of the recipe's own file that an error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    return f" on line {lines[-1]}" if lines else ""
