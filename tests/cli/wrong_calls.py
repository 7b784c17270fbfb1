"""Wrong command lines and files, made from a seed: valid ones with one mistake in each."""

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

from meshpipe import make_plan

ROOT = Path(__file__).resolve().parents[2]
TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
LANGUAGE = f"{ROOT / 'recipes' / 'language_model.py'}:debug"

COUNTS = ("steps", "batch-size", "num-microbatches", "mesh.pipeline", "mesh.data", "mesh.tensor", "stages-per-rank")
COUNTS += ("seed", "eval-every", "eval-batches", "measure-every", "skip-nonfinite", "warmup-steps")
NUMBERS = ("learning-rate", "weight-decay", "beta1", "beta2", "momentum", "clip-norm")
CHOICES = ("optimizer", "decay", "sharding", "schedule", "remat", "partition")
OUTPUTS = {"metrics": ".jsonl", "trace": ".json", "checkpoint-dir": "", "compile-cache": ""}
PLAN_OUTPUTS = {"plot": ".png", "save-schedule": ".txt"}
VALID = ("--steps 3", "--seed 4", "--learning-rate 0.1", "--eval-batches 0", "--num-microbatches 2", "--remat full")

Random = random.Random
Call = list[str]


def wrong_call(seed: int, folder: Path) -> Call:
    """The arguments of a wrong call of `meshpipe`; its input files are written to the folder."""
    rng = Random(seed)
    return rng.choice(MISTAKES)(rng, folder)


def _some_valid(rng: Random) -> Call:
    return [word for flag in rng.sample(VALID, rng.randint(0, 2)) for word in flag.split()]


def _word(rng: Random, length: int | None = None) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=length or rng.randint(3, 12))) + "q"


def _with(rng: Random, command: str, flag: str, value: str) -> Call:
    return [command, TINY, *_some_valid(rng), f"--{flag}", value]


def wrong_count(rng: Random, folder: Path) -> Call:
    value = rng.choice(
        [
            str(-rng.randint(1, 10**6)),
            str(rng.randint(2**40, 2**80)),
            f"{rng.random():.3f}",
            rng.choice(["nan", "inf", "-inf", "", " ", "1e3", "0x10", "1,000", "None", "true"]),
            _word(rng),
        ]
    )
    if value == "None":
        value = "none"
    return _with(rng, rng.choice(["train", "plan", "verify"]), rng.choice(COUNTS), value)


def wrong_number(rng: Random, folder: Path) -> Call:
    value = rng.choice([f"-{rng.random() + 0.01:.3f}", "nan", "-inf", "", "1.2.3", "0,1", _word(rng)])
    return _with(rng, rng.choice(["train", "plan", "verify"]), rng.choice(NUMBERS), value)


def wrong_choice(rng: Random, folder: Path) -> Call:
    return _with(rng, rng.choice(["train", "plan", "verify"]), rng.choice(CHOICES), rng.choice(["", _word(rng)]))


def unknown_flag(rng: Random, folder: Path) -> Call:
    return _with(rng, rng.choice(["train", "plan", "verify"]), _word(rng), rng.choice(["", "3", _word(rng)]))


def flag_without_value(rng: Random, folder: Path) -> Call:
    return ["train", TINY, *_some_valid(rng), f"--{rng.choice(COUNTS + NUMBERS + CHOICES)}"]


def unknown_command(rng: Random, folder: Path) -> Call:
    return [_word(rng), *rng.choice([[], [TINY], ["--steps", "3"]])]


def unknown_recipe(rng: Random, folder: Path) -> Call:
    file, function = TINY.rsplit(":", 1)
    names = [
        f"{file}:{function}{_word(rng)}",
        f"{file[:-4]}:{function}",
        file,
        f"{_word(rng)}:{function}",
        ":",
        "",
        ".",
    ]
    names += [f"{_word(rng, 300)}.py:f", f"{folder}:f", "/dev/null:f", f"{file}:"]
    return [rng.choice(["train", "plan", "verify"]), rng.choice(names), *_some_valid(rng)]


def wrong_recipe(rng: Random, folder: Path) -> Call:
    """A file whose function does not return a config, or that is no Python."""
    bodies = ["return 3", "return None", "1 / 0", "raise SystemExit", "import sys; sys.exit('no')", "return Config"]
    bodies += [
        "raise KeyError('a')",
        "return nothing_of_that_name",
        f"import {_word(rng)}",
        "return [",
        "raise GeneratorExit",
    ]
    bodies += ["return Config(model=1, data=2)", "return replace(pipeline(), steps='many')", "assert False", "f()"]
    text = f"from tests.tiny_recipes import *\ndef f():\n    {rng.choice(bodies)}\n"
    (folder / "wrong.py").write_bytes(text.encode() if rng.random() < 0.9 else rng.randbytes(200))
    return [rng.choice(["train", "plan", "verify"]), "wrong.py:f", *_some_valid(rng)]


def wrong_output(rng: Random, folder: Path) -> Call:
    flag, suffix = rng.choice([*OUTPUTS.items(), *PLAN_OUTPUTS.items()])
    command = "plan" if flag in PLAN_OUTPUTS else "train"
    (folder / f"folder{suffix}").mkdir(exist_ok=True)
    (folder / "file").write_text("something")
    (folder / "circle").symlink_to("circle")
    names = [_word(rng, 300) + suffix, "", " ", f"~{_word(rng)}/x{suffix}", f"file/x{suffix}", f"circle/x{suffix}"]
    names += [f"/proc/{_word(rng)}{suffix}", f"{'d/' * rng.randint(1, 3)}{_word(rng, 260)}{suffix}"]
    if suffix:
        names += [f"folder{suffix}", f"{_word(rng)}/x{suffix}"]
    return _with(rng, command, flag, rng.choice(names))


def wrong_input(rng: Random, folder: Path) -> Call:
    """Something else than costs, a plan, text or checkpoints to read."""
    (folder / "empty").mkdir()
    (folder / "noise").write_bytes(rng.randbytes(rng.randint(1, 4000)))
    (folder / "noise.txt").write_bytes(rng.randbytes(rng.randint(1, 4000)))
    other = rng.choice(["empty", "noise", _word(rng), _word(rng, 300), "", "/dev/zero"])
    path = rng.choice(["empty/x", "/dev/null", _word(rng), _word(rng, 300), "", f"~{_word(rng)}"])
    folders = rng.choice(["empty", _word(rng), _word(rng, 300), "", "/dev/null"])
    return rng.choice(
        [
            ["plan", TINY, "--schedule", "auto", "--costs", other],
            ["plan", TINY, "--schedule", rng.choice(["noise.txt", f"{_word(rng)}.txt", "empty.txt"])],
            ["train", LANGUAGE, "--data.path", path],
            ["train", TINY, "--checkpoint-dir", "new", "--init-from", folders],
            ["train", TINY, "--checkpoint-dir", "empty", rng.choice(["--resume", "--resume-from=3"])],
            ["checkpoint", rng.choice(["list", "show", "verify"]), folders],
            ["checkpoint", _word(rng), "empty"],
        ]
    )


def wrong_costs(rng: Random, folder: Path) -> Call:
    layer = {"kind": "Dense", "forward": 1.0, "backward": 2.0, "backward_input": 1.0, "backward_weight": 1.0}
    layer |= {"transfer": 0.0, "parameter_bytes": 288, "activation_bytes": 256}
    setting = {"microbatch_size": 4, "data": 1, "tensor": 1, "remat": "none"}
    costs = {"device": "cpu", "seconds": 1.0, "setting": setting, "layers": [dict(layer) for _ in range(4)]}
    part = rng.choice([setting, costs["layers"][rng.randrange(4)]])  # type: ignore[index]
    name = rng.choice(list(part))
    change = rng.randrange(4)
    if change == 0:
        del part[name]
    elif change == 1:
        part[name] = rng.choice([None, [], {}, -1, True, [1.0], {"a": 1}])
    text = json.dumps(costs)
    if change == 2:
        text = text[: rng.randrange(len(text))]
    elif change == 3:
        text = rng.choice(["[" * 50_000, '{"layers":' * 2_000, "null", "3", "[]", "NaN", text.replace("1.0", "1e999")])
    (folder / "costs.json").write_text(text)
    return ["plan", TINY, "--schedule", "auto", "--costs", "costs.json"]


def wrong_plan(rng: Random, folder: Path) -> Call:
    """A plan with an action lost, doubled or unknown, or of other sizes."""
    lines = make_plan("1f1b", 2, 4).to_text().splitlines()
    place = rng.choice([i for i, line in enumerate(lines) if line.startswith("rank")])
    head, actions = lines[place].split(":")
    row = actions.split()
    index = rng.randrange(len(row))
    change = rng.randrange(4)
    if change == 0:
        del row[index]
    elif change == 1:
        row.insert(index, row[index])
    elif change == 2:
        row[index] = rng.choice(["0X1", "F", "9F0", "0F99", "-1F0", "0F", "0F0.5", "0F" + "9" * 5000])
    lines[place] = f"{head}: {' '.join(row)}"
    if change == 3:
        lines[rng.randrange(len(lines))] = _word(rng)
    (folder / "plan.txt").write_text("\n".join(lines) + "\n")
    return ["plan", TINY, "--num-microbatches", "4", "--schedule", "plan.txt"]


def wrong_launch(rng: Random, folder: Path) -> Call:
    after = ["--", "train", TINY]
    return rng.choice(
        [
            ["launch", "--processes", rng.choice(["0", "-2", "many", "1.5", "", str(10**9)]), *after],
            ["launch", "--processes", "2", "--devices-per-process", rng.choice(["0", "-1", "x"]), *after],
            ["launch", "--processes", "2", "--max-restarts", rng.choice(["-1", "2", "x"]), *after],
            ["launch", "--processes", "2", "--address", rng.choice(["256.0.0.1", "0.0.0.0", "", "a b"]), *after],
            ["launch", "--processes", "2", rng.choice(["--", "train"]), TINY],
            ["launch", "--processes", "2", "--", rng.choice(["plan", "verify", _word(rng)]), TINY],
            ["launch", "--processes", "2", "--", "train"],
            ["launch"],
        ]
    )


def wrong_process(rng: Random, folder: Path) -> Call:
    coordinator = rng.choice(["nowhere", "host:", ":1", "host:99999", "host:x", ""])
    return rng.choice(
        [
            ["train", TINY, "--coordinator", coordinator, "--process-id", "0", "--process-count", "2"],
            [
                "train",
                TINY,
                "--coordinator",
                "localhost:1234",
                "--process-id",
                rng.choice(["2", "-1"]),
                "--process-count",
                "2",
            ],
            ["train", TINY, rng.choice(["--process-id", "--process-count"]), "1"],
            ["train", TINY, "--step-timeout", rng.choice(["nan", "-1", "x"])],
            ["train", TINY, "--transfers", _word(rng)],
            ["verify", TINY, "--updates", rng.choice(["0", "-1", "x", str(10**12)])],
        ]
    )


Mistake = Callable[[Random, Path], Call]
MISTAKES: list[Mistake] = [
    wrong_count,
    wrong_count,
    wrong_number,
    wrong_choice,
    unknown_flag,
    flag_without_value,
    unknown_command,
    unknown_recipe,
    wrong_recipe,
    wrong_output,
    wrong_output,
    wrong_input,
    wrong_input,
    wrong_costs,
    wrong_plan,
    wrong_launch,
    wrong_process,
]
