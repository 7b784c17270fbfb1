"""`meshpipe advise`, called in this process, and its winner, trained."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import golden
import jax
import pytest

from meshpipe.advise.layout import Layout
from meshpipe.cli import main
from meshpipe.cli.advise import AdviseFlags, command_of
from meshpipe.cli.arguments import configure
from meshpipe.processes.join import DistributedConfig
from meshpipe.runs.recipe import find

RECIPES = Path(__file__).resolve().parents[1] / "tiny_recipes.py"
FINETUNE = Path(__file__).resolve().parents[2] / "recipes" / "finetune.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert jax.device_count() == 8
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.py").write_text(RECIPES.read_text())
    return tmp_path


PIPELINE = Layout(pipeline=2, data=2, sharding="fully-sharded", schedule="zb-v", stages_per_rank=2, num_microbatches=4)


@pytest.mark.parametrize(
    ("layout", "given", "flags"),
    [
        (Layout(data=4), "", "--mesh.data 4"),
        (
            PIPELINE,
            "--json --data.path=prepared --top 3 --steps 7",
            "--mesh.pipeline 2 --mesh.data 2 --sharding fully-sharded --schedule zb-v --num-microbatches 4 "
            "--data.path=prepared --steps 7",
        ),
        (
            replace(PIPELINE, remat="layer", partition="1,3,4"),
            "--usable-memory=9GiB --mesh.pipeline=2 --num_microbatches 4 --lora.targets query up --lora.rank 2 --force "
            "--sharding fully-sharded --checkpoint-dir tuned --compile 0",
            "--mesh.pipeline 2 --mesh.data 2 --sharding fully-sharded --schedule zb-v --num-microbatches 4 "
            "--remat layer --partition 1,3,4 --lora.targets query up --lora.rank 2 --force --checkpoint-dir tuned",
        ),
    ],
)
def test_the_command_has_what_the_recipe_has_not_and_what_was_given(
    folder: Path, layout: Layout, given: str, flags: str
) -> None:
    shutil.copytree(golden.FOLDER / "qwen3", "Qwen3-0.6B")
    recipe, init = f"{FINETUNE}:lora", "--init-from Qwen3-0.6B"
    arguments = f"{init} --target gpu:h100:4 {given}".split()
    _, config, _ = configure("advise", [recipe, *arguments], "", AdviseFlags())
    laid_out = layout.configure(config)
    written = command_of(recipe, find(recipe).config(), laid_out, arguments)
    start, *rest = written.split(f" {init}")
    assert start.split()[:3] == ["meshpipe", "train", recipe]
    assert (start.split()[3:] + " ".join(rest).split()) == flags.split()
    _, parsed, _ = configure("train", shlex.split(written)[2:], "", DistributedConfig())
    assert parsed == laid_out


@pytest.mark.slow
def test_the_command_of_the_winner_trains_in_its_layout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.depth", "5", "--steps", "1", "--mesh.pipeline", "2"]
    assert main(["advise", "tiny:pipeline", "--target", "gpu:h100:2", "--compile", "0", "--json", *flags]) == 0
    advice = json.loads(capsys.readouterr().out)
    best, (meshpipe, *command) = advice["best"][0], shlex.split(advice["command"])
    assert meshpipe == "meshpipe"
    assert best["pipeline"] * best["data"] * best["tensor"] == 2
    assert best["step_seconds"] == pytest.approx(sum(best["step_parts"].values()))
    assert best["memory"] == pytest.approx(sum(best["memory_parts"].values()))
    assert {"--model.depth", "--steps"} <= set(command)  # what was asked for besides
    assert main([*command, "--metrics", "m.jsonl"]) == 0
    start, *_ = (json.loads(line) for line in Path("m.jsonl").read_text().splitlines())
    same = ("pipeline", "data", "tensor", "num_microbatches", "schedule", "remat")
    assert {name: start["layout"][name] for name in same} == {name: best[name] for name in same}


@pytest.mark.slow
def test_the_command_keeps_what_was_given_for_published_weights(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(golden.FOLDER / "llama3", folder / "weights")
    (folder / "recipes" / "finetune.py").write_text((RECIPES.parents[1] / "recipes" / "finetune.py").read_text())
    lines = [f'{{"text": "{number} quick brown foxes jump over the lazy dog."}}\n' for number in range(400)]
    (folder / "text.jsonl").write_text("".join(lines))
    prepare = "data prepare text.jsonl --tokenizer weights --to prepared --sequence-length 16"
    assert main(prepare.split()) == 0
    own = ["--target", "gpu:h100:2", "--compile=0", "--json"]
    given = shlex.split(
        "--init-from weights --data.path prepared --lora.rank 2 --batch-size=4 --steps 1 --eval-batches 0"
    )
    capsys.readouterr()
    assert main(["advise", "finetune:lora", *own, *given, "--mesh.tensor", "1"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    assert command.endswith(" ".join(given))
    assert not {"--target", "--compile=0", "--json"} & set(command.split())
    assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


def test_tables_name_every_family_and_why_it_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["advise", "tiny:single", "--target", "gpu:h100:4", "--compile", "0", "--mesh.tensor", "1", "--top", "2"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("recipes/tiny.py:single on gpu:h100:4" if "recipes/" in out else "tiny:single on gpu:h100:4")
    rows = [line.split("   ")[0].strip() for line in out.splitlines()]
    assert {"data", "pipeline", "pipeline + data"} <= set(rows)
    assert out.count("won") == 1
    assert "\n3 " not in out
    assert "\n  meshpipe train tiny:single --mesh." in out


def test_each_row_is_another_layout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--compile", "0", "--mesh.tensor", "1", "--mesh.pipeline", "2", "--top", "6", "--json"]
    assert main(["advise", "tiny:single", "--target", "gpu:h100:2x2", *flags]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    what = ("pipeline", "data", "tensor", "sharding", "stages_per_rank", "num_microbatches")
    assert len({tuple(row[name] for name in what) for row in best}) == len(best) > 3


CORES = {
    "name": "cores",
    "platform": "cpu",
    "device_kind": "cpu",
    "flops": {"float32": 1e10},
    "memory_bytes": 2**30,
    "memory_bandwidth": 1e10,
    "host_link": 1e9,
    "network_link": 1e9,
    "host_latency": 1e-5,
    "network_latency": 1e-5,
    "devices_per_host": 8,
    "efficiency": {"products": 1.0, "memory": 1.0, "links": 1.0, "network": 1.0},
}


@pytest.mark.slow
def test_the_best_are_compiled_for_the_devices_of_a_described_machine(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("cores.json").write_text(json.dumps(CORES))
    flags = ["--compile", "2", "--json", "--mesh.tensor", "1", "--remat", "none"]
    assert main(["advise", "tiny:single", "--target", "cores.json:2", *flags]) == 0
    advice = json.loads(capsys.readouterr().out)
    how = [best["how"] for best in advice["best"]]
    assert how[:2] == ["compiled", "compiled"]
    assert set(how[2:]) == {"estimated"}
    first, second = advice["best"][:2]
    assert first["family"] != second["family"]  # the best of each, before others of the same
    assert 0 < first["step_seconds"] <= second["step_seconds"]
    assert first["memory"] > 0
    shown = {family["family"]: family["best"]["step_seconds"] for family in advice["families"] if family["best"]}
    assert shown[first["family"]] == first["step_seconds"]


@pytest.mark.slow
def test_layouts_of_this_machine_are_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--compile", "2", "--json", "--mesh.tensor", "1", "--remat", "none"]
    assert main(["advise", "tiny:single", "--target", "here:2", *flags]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert [found["how"] for found in best[:2]] == ["measured", "measured"]
    assert 1e-4 < best[0]["step_seconds"] <= best[1]["step_seconds"]


@pytest.mark.slow
def test_settled_flags_are_kept_and_searched_around(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settled = ["--mesh.pipeline", "4", "--schedule", "zb-h1", "--num-microbatches=4"]
    assert main(["advise", "tiny:single", "--target", "gpu:h100:8", "--compile", "0", "--json", *settled]) == 0
    for best in json.loads(capsys.readouterr().out)["best"]:
        assert (best["pipeline"], best["schedule"], best["num_microbatches"]) == (4, "zb-h1", 4)


@pytest.mark.slow
def test_nothing_that_fits_exits_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "advise",
                "tiny:single",
                "--target",
                "gpu:h100:2",
                "--compile",
                "0",
                "--remat",
                "none",
                "--usable-memory",
                "100B",
            ]
        )
        == 1
    )
    out = capsys.readouterr().out
    assert "does not fit: pipeline 2 needs" in out
    assert "of 100 B at least" in out
    assert "Nothing fits." in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--target must say which devices to find a layout for. Got none."),
        (["--target", "here:many"], "--target here takes a number of devices, such as here:4."),
        (["--target", "here:9000"], "with at most 4 virtual devices for each core. Got"),
        (["--target", "gpu:h100"], "--target must say what machine, and how many devices"),
        (["--target", "gpu:h200:8", "--partition", "cost"], "advise settles --partition itself."),
        (["--target", "gpu:h100:8", "--schedule", "auto"], "--schedule must be one of gpipe, "),
        (["--target", "gpu:h100:7", "--mesh.data", "7"], "must be a multiple of --num-microbatches * --mesh.data"),
        (["--target", "gpu:h100:8", "--mesh.pipeline", "3"], "Got no such layout with pipeline 3."),
        (["--target", "gpu:h100:8", "--top", "0"], "must be"),
        (["--target", "gpu:h100:8", "--usable-memory", "much"], "must be a number of bytes"),
    ],
)
def test_what_cannot_be_exits_2(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["advise", "tiny:single", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
