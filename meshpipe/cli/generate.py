"""`meshpipe generate`."""

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import tyro

from meshpipe.cli.arguments import parse
from meshpipe.cli.folder_flags import FolderFlags
from meshpipe.cli.joined import advising_on_memory, begin_joined, run_joined, telling_others
from meshpipe.cli.output import loss_of_output, reader_is_gone
from meshpipe.cli.prompts import PromptFlags, checked_tokenizer, encode_prompts
from meshpipe.cli.written_texts import WrittenTexts
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.files import expand_fields, expanded
from meshpipe.generation.config import SamplingConfig
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED, FAILED
from meshpipe.processes.stop import StopRequest

if TYPE_CHECKING:
    from rich.console import Console

    from meshpipe.generation.generator import Generator
    from meshpipe.generation.stop_texts import StopTexts
    from meshpipe.generation.tokenizer import TextTokenizer
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
            from meshpipe.generation.lengths import check_stop_tokens
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
        check_stop_tokens(saved.model, flags.sampling.stop_tokens)
        prompts = encode_prompts(given, tokenizer)
        ends = () if flags.prompts.ignore_end else saved.ends
        sampling = replace(flags.sampling, stop_tokens=(*flags.sampling.stop_tokens, *ends))
        with phase(f"Reading {saved.name}"):
            generator = saved.generator(
                flags.mesh.build(),
                batch_size=groups.batch_size,
                in_flight=groups.in_flight,
                compile_cache=groups.compile_cache,
                ends=ends,
            )
        console.print(f"Generating with {saved.name}. {saved.note}".rstrip(), markup=False)
        longest = max(map(len, prompts), default=0) + sampling.max_tokens
        unused = saved.generation.notes("It is not used here.", of_ends=flags.prompts.ignore_end)
        for said in filter(None, (unused, _drawn_by(saved.generation.drawn, sampling), saved.beyond(longest))):
            console.print(said, markup=False)
        write = _write if process_index() == 0 else None
        decode = partial(_decode, tokenizer, prompts)
        written = WrittenTexts(given, decode, stops, as_json=flags.prompts.json, write=write)
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
        if stop.signal is None and loss_of_output() is not None:
            stop.signal = signal.SIGPIPE
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
    lost = loss_of_output()
    of_all = f"{written.ended} of {len(prompts)} texts had ended"
    if lost is None:
        console.print(f"Stopped by {stop.signal.name}: {of_all}, and are written.")
    else:
        console.print(f"Stopped, as standard output can no longer be written: {of_all}.")
    return stop.exit_status if lost is None or reader_is_gone(lost) else FAILED


def _decode(tokenizer: "TextTokenizer", prompts: Sequence[Sequence[int]], number: int, tokens: Sequence[int]) -> str:
    from meshpipe.generation.tokenizer import decode_after

    return decode_after(tokenizer, prompts[number], tokens)


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


def _drawn_by(given: Mapping[str, float], sampling: SamplingConfig) -> str:
    """A sentence about how a published model draws tokens, where this command does not; else empty."""
    without = {"top_k": 0, "top_p": 1.0}
    flags = [f"--{name.replace('_', '-')} {value:g}" for name, value in given.items() if value != without.get(name)]
    if sampling.temperature > 0 or not given.get("temperature"):
        return ""
    return f"Takes the most likely tokens. Its generation_config.json draws them: {' '.join(flags)} would do the same."


def _tell_speed(console: "Console", count: int, first: float | None, seconds: float) -> None:
    if first is None or count < 2:
        console.print(f"{count} token{'' if count == 1 else 's'} in {seconds:.1f} s, with compilation.")
        return
    console.print(
        f"{count} tokens; the first after {first:.1f} s, with compilation, then "
        f"{(count - 1) / max(seconds - first, 1e-9):.1f} tokens/s."
    )
