"""One kill of the campaign in every phase; `fault_campaign.py` runs any number."""

from pathlib import Path

import pytest
from fault_campaign import PHASES, campaign

SEED = 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="measures memory in /proc")
def test_after_any_kill_the_run_resumes_with_the_same_losses(tmp_path: Path) -> None:
    outcomes, problems = campaign(tmp_path, 2, len(PHASES), SEED)
    assert not problems, "\n".join(problems)
    assert {outcome.kill.victim for outcome in outcomes} == {0, 1}
    assert all(outcome.megabytes < 2000 for outcome in outcomes), outcomes
