"""What is exported is loaded by transformers, and computes what was imported."""

from pathlib import Path

import golden
import numpy as np
import pytest

from meshpipe.exchange.exporting import export_weights
from meshpipe.exchange.importing import import_weights


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CONFIGS)
def test_an_export_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import_weights(golden.FOLDER / name, tmp_path / "imported")
    export_weights(tmp_path / "imported", tmp_path / "exported")
    ids = np.load(golden.FOLDER / name / "expected.npz")["ids"]
    found = []
    for folder in (golden.FOLDER / name, tmp_path / "exported"):
        model = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            found.append(model(torch.from_numpy(ids).long()).logits.numpy())
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_allclose(
        found[1], np.load(golden.FOLDER / name / "expected.npz")["logits"], atol=golden.TOLERANCE
    )
