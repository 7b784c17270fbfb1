"""Two processes, each with one stage of a published model, compute what `transformers` computes."""

from pathlib import Path

import golden
import pytest
from processes import run_processes

SCRIPT = str(Path(__file__).parent / "golden_logits.py")
NAMES = tuple(golden.CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("names", [NAMES[i::4] for i in range(4)], ids=",".join)
def test_logits_over_two_processes(names: tuple[str, ...], tmp_path: Path) -> None:
    ended = run_processes(2, [SCRIPT, ",".join(names)], tmp_path)
    assert not any(ended.codes), ended
    for log in ended.logs:
        found = [line.split() for line in log.splitlines() if line.startswith("RESULT ")]
        assert [name for _, name, _, _ in found] == list(names), ended
        for _, name, shaped, error in found:
            assert shaped == "True", name
            assert float(error) <= golden.TOLERANCE, name
