"""`meshpipe recipes`."""

import sys
from dataclasses import dataclass

from meshpipe.cli.arguments import parse
from meshpipe.processes.exit_codes import COMPLETED, INVALID

NARROW = 110
"""On terminals with fewer columns, what a recipe is about stands below its sizes."""


@dataclass(frozen=True)
class _Nothing:
    """No flags."""


def recipes(arguments: list[str]) -> int:
    """Lists the recipes of the current folder, or those that come with meshpipe if it has none; reports those that
    fail on standard error, with exit code 2.
    """
    about = "Lists the recipes in recipes/, or meshpipe's own where there is no such folder."
    parse(_Nothing, arguments, "meshpipe recipes", about)
    from meshpipe.report.tables import make_console, make_table
    from meshpipe.runs.recipe import RecipeError, discover, folder_of_recipes, shipped

    numbers = ("pipeline", "data", "tensor", "devices")
    console = make_console()
    beside = console.width >= NARROW
    table = make_table("recipe", *numbers, *["about"] * beside, right=numbers, wrap=("about",))
    failures = []
    is_marked = False
    for recipe in discover():
        try:
            config = recipe.config()
        except RecipeError as failure:
            failures.append(failure)
            continue
        is_marked |= config.for_accelerators
        mark = "*" if config.for_accelerators else ""
        sizes = (config.mesh.pipeline, config.mesh.data, config.mesh.tensor, f"{config.mesh.num_devices}{mark}")
        table.add_row(recipe.name, *sizes, *[recipe.summary] * beside)
        if not beside and recipe.summary:
            table.add_row(rest=recipe.summary)
    console.print(table)
    if is_marked:
        console.print("* accelerators; `meshpipe plan` shows the recipe on any machine")
    if folder_of_recipes() == shipped():
        console.print("\nThese come with meshpipe. `meshpipe init DIR` copies them to DIR/recipes, to be changed.")
    for error in failures:
        print(f"meshpipe: {error}", file=sys.stderr)
    return INVALID if failures else COMPLETED
