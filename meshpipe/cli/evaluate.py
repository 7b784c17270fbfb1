"""`meshpipe eval`."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from meshpipe.cli.arguments import parse
from meshpipe.cli.folder_flags import FolderFlags
from meshpipe.cli.joined import advising_on_memory, begin_joined, run_joined, telling_others
from meshpipe.errors import check_whole
from meshpipe.files import expand_fields, expanded
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED
from meshpipe.processes.stop import StopRequest

if TYPE_CHECKING:
    from meshpipe.processes.guard import Guard

DESCRIPTION = "Prints loss, perplexity and metrics of a trained model, or of published weights, on held-out data."


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags:
    """What to evaluate on."""

    data: Path | None = None
    """Folder written by `meshpipe data prepare`, or a text file or folder, which is read as bytes. None takes the
    held-out data of the run."""
    sequence_length: int = 128
    """Bytes per window of a text file or folder."""
    batch_size: int = 32
    """Examples per batch."""
    num_microbatches: int = 1
    """Microbatches per batch, which follow each other through a pipeline."""
    batches: int = 0
    """Batches to evaluate; 0 evaluates all held-out data."""
    step: int | None = None
    """Step of the checkpoint; None takes the newest."""
    json: bool = False
    """Print one JSON object instead of text."""
    compile_cache: str | None = None
    """Folder that keeps compiled programs for later commands; None keeps none."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "num_microbatches"):
            check_whole(name, getattr(self, name))
        check_whole("batches", self.batches, 0)
        if self.step is not None:
            check_whole("step", self.step, 0)
        expand_fields(self, "data", "compile_cache")


@dataclass(frozen=True, kw_only=True)
class EvalFlags(FolderFlags):
    """All flags of the command."""

    evaluation: Annotated[EvaluationFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=EvaluationFlags)


def evaluate(arguments: list[str], *, stop: StopRequest) -> int:
    begin_joined(arguments)
    with telling_others("eval", arguments):
        flags = parse(EvalFlags, arguments, "meshpipe eval", DESCRIPTION)
        asked = flags.evaluation
        with phase("Importing JAX"):
            from meshpipe.generation.held_out import beyond_positions, evaluate_saved, held_out_source, tokens_of_others
            from meshpipe.generation.saved import open_saved
            from meshpipe.processes.coordination import process_index
            from meshpipe.report.tables import make_console, print_text

    def run(guard: "Guard") -> int:
        stop.end_early = guard.end_early
        saved = open_saved(expanded("FOLDER", flags.folder), asked.step, **vars(flags.computed))
        console = flags.take_devices()
        for said in filter(None, (saved.note, saved.generation.notes("It is not used here."))):
            console.print(said, markup=False)
        with phase("Opening the data"):
            source = held_out_source(saved, asked.data, asked.sequence_length)
        for said in filter(None, (tokens_of_others(saved, asked.data), beyond_positions(saved, source))):
            console.print(said, markup=False)
        found = evaluate_saved(
            saved,
            source,
            flags.mesh.build(),
            batch_size=asked.batch_size,
            num_microbatches=asked.num_microbatches,
            num_batches=asked.batches,
            compile_cache=asked.compile_cache,
        )
        examples = min(len(source), asked.batches * asked.batch_size) if asked.batches else len(source)
        if asked.json:
            line = {name: value if math.isfinite(value) else None for name, value in found.items()}
            text = json.dumps({"model": saved.name, "examples": examples, **line})
        else:
            values = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
            text = f"{saved.name}, {examples:,} held-out examples: {values}"
        if process_index() == 0:
            print(text) if asked.json else print_text(make_console(), text)
        return COMPLETED

    return run_joined(flags.distributed, advising_on_memory()(run))
