"""`meshpipe recipes`."""

import sys
from dataclasses import dataclass

from meshpipe.cli.arguments import parse
from meshpipe.processes.exit_codes import COMPLETED, INVALID


@dataclass(frozen=True)
class _Nothing:
    """No flags."""


def recipes(arguments: list[str]) -> int:
    """Lists the recipes of the current folder, or those that come with meshpipe if it has none; reports those that
    fail on standard error, with exit code 2.
    """
    about = "Lists the recipes in the folder recipes/, or those that come with meshpipe where there is none."
    parse(_Nothing, arguments, "meshpipe recipes", about)
    from meshpipe.report.tables import make_console, make_table
    from meshpipe.run.recipe import RecipeError, discover, folder_of_recipes, shipped

    table = make_table(
        "recipe", "pipeline", "data", "tensor", "devices", "about", right=("pipeline", "data", "tensor", "devices")
    )
    failures = []
    for recipe in discover():
        try:
            mesh = recipe.config().mesh
        except RecipeError as failure:
            failures.append(failure)
            continue
        sizes = (mesh.pipeline, mesh.data, mesh.tensor, mesh.num_devices)
        table.add_row(recipe.name, *map(str, sizes), recipe.summary)
    console = make_console()
    console.print(table)
    if folder_of_recipes() == shipped():
        console.print("\nThese come with meshpipe. `meshpipe init DIR` copies them to DIR/recipes, to be changed.")
    for error in failures:
        print(f"meshpipe: {error}", file=sys.stderr)
    return INVALID if failures else COMPLETED
