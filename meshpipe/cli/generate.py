"""`meshpipe generate`."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from meshpipe.cli.arguments import parse
from meshpipe.cli.folder_flags import FolderFlags
from meshpipe.cli.joined import advising_on_memory, begin_joined, run_joined, telling_others
from meshpipe.cli.prompts import PromptFlags, checked_tokenizer
from meshpipe.cli.written_texts import WrittenTexts
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.files import expand_fields, expanded
from meshpipe.generation.config import SamplingConfig
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED
from meshpipe.processes.stop import StopRequest

if TYPE_CHECKING:
    from rich.console import Console

    from meshpipe.generation.generator import Generator
    from meshpipe.generation.stop_texts import StopTexts
    from meshpipe.processes.guard import Guard

DESCRIPTION = "Continues texts with a trained model, from a run, its checkpoints, or a folder of published weights."


@dataclass(frozen=True, kw_only=True)
class GroupFlags:
    """How many texts run together."""

    batch_size: int = 8
    """Texts per group, at most."""
    in_flight: int | None = None
    """Groups that run at the same time, so that every rank has work. None runs as many as there are ranks."""
    step: int | None = None
    """Step of the checkpoint; None takes the newest."""
    compile_cache: str | None = None
    """Folder that keeps compiled programs for later commands; None keeps none."""

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size)
        if self.in_flight is not None:
            check_whole("in_flight", self.in_flight)
        if self.step is not None:
            check_whole("step", self.step, 0)
        expand_fields(self, "compile_cache")


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(FolderFlags):
    """All flags of the command."""

    prompts: Annotated[PromptFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=PromptFlags)
    sampling: Annotated[SamplingConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplingConfig)
    groups: Annotated[GroupFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=GroupFlags)


def generate(arguments: list[str], *, stop: StopRequest) -> int:
    """Generates; `stop` is entered, and ends the process until the first tokens are known."""
    begin_joined(arguments)
    with telling_others("generate", arguments):
        flags = parse(GenerateFlags, arguments, "meshpipe generate", DESCRIPTION)
        _check_drawn(flags.sampling)
        given = flags.prompts.read()
        with phase("Importing JAX"):
            from meshpipe.generation.saved import open_saved
            from meshpipe.generation.stop_texts import StopTexts
            from meshpipe.processes.coordination import process_index

    def run(guard: "Guard") -> int:
        stop.end_early = guard.end_early
        groups = flags.groups
        folder = expanded("FOLDER", flags.folder)
        saved = open_saved(folder, groups.step, flags.prompts.tokenizer, **vars(flags.computed))
        tokenizer = checked_tokenizer(saved.tokenizer)
        stops = StopTexts(tokenizer, flags.prompts.stop)
        console = flags.take_devices()
        _check_known(flags.sampling.stop_tokens, saved.model)
        prompts = [prompt.encoded(tokenizer) for prompt in given]
        sampling = flags.sampling
        if not flags.prompts.ignore_end:
            ends = () if tokenizer.end is None else (tokenizer.end,)
            sampling = replace(sampling, stop_tokens=(*sampling.stop_tokens, *saved.ends, *ends))
        with phase(f"Reading {saved.name}"):
            generator = saved.generator(
                flags.mesh.build(),
                batch_size=groups.batch_size,
                in_flight=groups.in_flight,
                compile_cache=groups.compile_cache,
            )
        console.print(f"Generating with {saved.name}. {saved.note}".rstrip(), markup=False)
        if said := saved.beyond(max(map(len, prompts), default=0) + sampling.max_tokens):
            console.print(said, markup=False)
        write = _write if process_index() == 0 else None
        written = WrittenTexts(given, tokenizer, stops, as_json=flags.prompts.json, write=write)
        return _generate(generator, prompts, sampling, stops, written, console, stop)

    return run_joined(flags.distributed, advising_on_memory()(run))


def _generate(
    generator: "Generator",
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stops: "StopTexts",
    written: WrittenTexts,
    console: "Console",
    stop: StopRequest,
) -> int:
    """Writes texts as they end; after a signal, those that have ended. Returns the status of the command."""
    from meshpipe.generation.running_group import AHEAD
    from meshpipe.processes.stop_together import StopTogether

    together, stopped = StopTogether(stop, ahead=AHEAD + 2), False

    def should_stop(turn: int) -> bool:
        nonlocal stopped
        if turn == 0:
            stop.begin_steps("the tokens in progress")
        stopped = together.after(turn)
        return stopped

    began = time.perf_counter()
    first: float | None = None
    texts = generator.stream(prompts, sampling, stop_when=stops.is_in, on_end=written.end, should_stop=should_stop)
    console.print(str(generator.caches(prompts, sampling)), markup=False)
    for drawn in texts:
        if first is None:
            first = time.perf_counter() - began
        written.add(drawn.request, drawn.token)
    written.finish()
    _tell_speed(console, written.count, first, time.perf_counter() - began)
    if not stopped:
        return COMPLETED
    assert stop.signal is not None
    console.print(f"Stopped by {stop.signal.name}: {written.ended} of {len(prompts)} texts had ended, and are written.")
    return stop.exit_status


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _check_drawn(sampling: SamplingConfig) -> None:
    """Raises `ArgumentError` for flags about drawing where nothing is drawn."""
    if sampling.temperature == 0 and (sampling.top_k or sampling.top_p < 1):
        name = "top_k" if sampling.top_k else "top_p"
        raise ArgumentError(
            f"`{name}` has no effect at temperature 0, which takes the most likely token. Pass `temperature` as well."
        )


def _check_known(tokens: Sequence[int], model: Any) -> None:
    """Raises `ArgumentError` for tokens that a model does not have."""
    size = model.limits().get(model.input)
    if size is not None and (unknown := [token for token in tokens if token >= size]):
        raise ArgumentError(f"`stop_tokens` must be tokens of the model, 0 to {size - 1}. Got {unknown[0]}.")


def _tell_speed(console: "Console", count: int, first: float | None, seconds: float) -> None:
    if first is None or count < 2:
        console.print(f"{count} token{'' if count == 1 else 's'} in {seconds:.1f} s, with compilation.")
        return
    console.print(
        f"{count} tokens; the first after {first:.1f} s, with compilation, then "
        f"{(count - 1) / max(seconds - first, 1e-9):.1f} tokens/s."
    )
