"""A few kills of the campaign, one in every phase; `fault_campaign.py` does as many as one likes."""

from pathlib import Path

import pytest
from fault_campaign import PHASES, campaign

SEED = 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="measures memory in /proc")
def test_whatever_is_killed_the_run_goes_on_as_if_it_was_not(tmp_path: Path) -> None:
    outcomes, problems = campaign(tmp_path, 2, len(PHASES), SEED)
    assert not problems, "\n".join(problems)
    assert {outcome.kill.victim for outcome in outcomes} == {0, 1}
    assert all(outcome.megabytes < 2000 for outcome in outcomes), outcomes
