"""`meshpipe generate`."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from meshpipe.cli.arguments import parse
from meshpipe.cli.joined import ModelFlags, advising_on_memory, begin_joined, run_joined, take_devices_of_run
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.files import expand_fields, expanded
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED

if TYPE_CHECKING:
    from rich.console import Console

    from meshpipe.generation.generator import Generator
    from meshpipe.generation.tokenizer import TextTokenizer
    from meshpipe.processes.guard import Guard

DESCRIPTION = "Continues texts with a trained model, from a run, its checkpoints, or a folder of published weights."


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """What to continue, and how to print it."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be repeated."""
    prompts: Path | None = None
    """File with one prompt per line. In a .jsonl file, each line is a JSON string or an object with a `prompt`."""
    chat: bool = False
    """Treat each prompt as a user's message, written by the tokenizer's chat template."""
    json: bool = False
    """Print one JSON object per line, with `prompt`, `text` and `tokens`, instead of text."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one. None takes that of the model."""
    ignore_end: bool = False
    """Continue after the model's end token."""

    def __post_init__(self) -> None:
        expand_fields(self, "prompts", "tokenizer")

    def texts(self) -> list[str]:
        """All prompts, in their order. Raises `ArgumentError` for none, and for a file that cannot be read."""
        found = [*self.prompt, *([] if self.prompts is None else read_prompts(self.prompts))]
        if not found:
            raise ArgumentError("generate needs at least one `prompt`, or a file of `prompts`. Got none.")
        return found


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


def generate(arguments: list[str]) -> int:
    begin_joined(arguments)
    with phase("Importing JAX"):
        from meshpipe.generation.sampling import SamplingConfig
        from meshpipe.generation.saved import open_saved
        from meshpipe.mesh import MeshConfig
        from meshpipe.processes.coordination import process_index
        from meshpipe.processes.join import DistributedConfig
        from meshpipe.report.tables import make_console

    @dataclass(frozen=True)
    class Flags:
        folder: tyro.conf.Positional[Path]
        """The --run-dir or --checkpoint-dir of a run, or a folder of published weights, or of adapters of PEFT."""
        mesh: MeshConfig = field(default_factory=MeshConfig)
        prompts: Annotated[PromptFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=PromptFlags)
        sampling: Annotated[SamplingConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplingConfig)
        computed: Annotated[ModelFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=ModelFlags)
        groups: Annotated[GroupFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=GroupFlags)
        distributed: Annotated[DistributedConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=DistributedConfig)

    flags = parse(Flags, arguments, "meshpipe generate", DESCRIPTION)
    _check_drawn(flags.sampling)
    texts = flags.prompts.texts()

    def run(guard: "Guard") -> int:
        is_first = process_index() == 0
        console = make_console(stderr=True, quiet=not is_first)
        saved = open_saved(
            expanded("FOLDER", flags.folder), flags.groups.step, flags.prompts.tokenizer, **vars(flags.computed)
        )
        tokenizer = checked_tokenizer(saved.tokenizer)
        take_devices_of_run(flags.mesh, console)
        _check_known(flags.sampling.stop_tokens, saved.model)
        prompts = [encoded(tokenizer, text, chat=flags.prompts.chat) for text in texts]
        sampling = flags.sampling
        if not flags.prompts.ignore_end:
            ends = () if tokenizer.end is None else (tokenizer.end,)
            sampling = replace(sampling, stop_tokens=(*sampling.stop_tokens, *saved.ends, *ends))
        with phase(f"Reading {saved.name}"):
            generator = saved.generator(
                flags.mesh.build(),
                batch_size=flags.groups.batch_size,
                in_flight=flags.groups.in_flight,
                compile_cache=flags.groups.compile_cache,
            )
        console.print(f"Generating with {saved.name}. {saved.note}".rstrip(), markup=False)
        written = _Written(texts, tokenizer, as_json=flags.prompts.json)
        began = time.perf_counter()
        for line in written.lines(_drawn(generator, prompts, sampling)):
            if is_first:
                sys.stdout.write(line)
                sys.stdout.flush()
        _tell_speed(console, written, time.perf_counter() - began)
        return COMPLETED

    return run_joined(flags.distributed, advising_on_memory()(run))


def _check_drawn(sampling: Any) -> None:
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


def _drawn(generator: "Generator", prompts: Sequence[Sequence[int]], sampling: Any) -> Iterator[tuple[int, int]]:
    return ((drawn.request, drawn.token) for drawn in generator.stream(prompts, sampling))


class _Written:
    """Makes text of tokens as they come: that of one prompt at once, of several each when all are there."""

    def __init__(self, prompts: Sequence[str], tokenizer: "TextTokenizer", *, as_json: bool) -> None:
        self._prompts, self._tokenizer, self._as_json = prompts, tokenizer, as_json
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.first_seconds: float | None = None

    def lines(self, drawn: Iterator[tuple[int, int]]) -> Iterator[str]:
        streams = len(self._prompts) == 1 and not self._as_json
        shown, began = "", time.perf_counter()
        for request, token in drawn:
            if self.first_seconds is None:
                self.first_seconds = time.perf_counter() - began
                if streams:  # not before, since what compiles says so
                    yield self._prompts[0]
            self.tokens[request].append(token)
            if streams:
                text = self._tokenizer.decode(self.tokens[0])
                if not text.endswith("\ufffd") and text.startswith(shown):  # else a character is not complete yet
                    yield text[len(shown) :]
                    shown = text
        if streams:
            prompt = self._prompts[0] if self.first_seconds is None else ""
            yield prompt + self._tokenizer.decode(self.tokens[0])[len(shown) :] + "\n"
            return
        for number, (prompt, tokens) in enumerate(zip(self._prompts, self.tokens, strict=True)):
            text = self._tokenizer.decode(tokens)
            if self._as_json:
                yield json.dumps({"prompt": prompt, "text": text, "tokens": tokens}, ensure_ascii=False) + "\n"
            else:
                yield f"{'' if number == 0 else chr(10)}--- {number + 1} of {len(self._prompts)}\n{prompt}{text}\n"


def _tell_speed(console: "Console", written: _Written, seconds: float) -> None:
    count = sum(map(len, written.tokens))
    if written.first_seconds is None or count < 2:
        console.print(f"{count} token{'' if count == 1 else 's'} in {seconds:.1f} s, with compilation.")
        return
    rest = seconds - written.first_seconds
    console.print(
        f"{count} tokens; the first after {written.first_seconds:.1f} s, with compilation, then "
        f"{(count - 1) / max(rest, 1e-9):.1f} tokens/s."
    )


def checked_tokenizer(tokenizer: "TextTokenizer | None") -> "TextTokenizer":
    if tokenizer is None:
        raise ArgumentError(
            "Text needs the tokenizer that the model was trained with. Got none, and the folder tells of none. Pass "
            "`tokenizer` FILE."
        )
    return tokenizer


def encoded(tokenizer: "TextTokenizer", text: str, *, chat: bool) -> list[int]:
    """The tokens of a prompt; with `chat`, of the message of a user in the tokenizer's chat template."""
    if not chat:
        return tokenizer.encode(text)
    make = getattr(tokenizer, "template", None)
    template = None if make is None else make()
    if template is None:
        raise ArgumentError("`chat` needs a tokenizer with a chat template. Got one without. Leave `chat` out.")
    return tokenizer.encode(template.render([{"role": "user", "content": text}], prompt=True), special=False)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, a line each. Raises `ArgumentError` for a file or line that cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON may have other ends of lines in its texts
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"`prompts` must name a text file in UTF-8. Got {str(file)!r}: {error}.") from None
    found: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            found.append(line)
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"Every line of `prompts` must be JSON. Got {file}, line {number}: {error}.") from None
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ArgumentError(
                "Every line of `prompts` must be a JSON text, or an object with a text named prompt. "
                f"Got {line!r:.60} in {file}, line {number}."
            )
        found.append(text)
    return found
