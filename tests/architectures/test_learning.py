"""A transformer is trained with the NPU in its loop."""

import pytest

pytest.importorskip("transformers")

from .learning import FINETUNE_RECIPE, learn


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "gain"), [("tflm", 0.0), ("acc16", 0.5)])
def test_a_transformer_learns_on_the_npu(profile: str, gain: float) -> None:
    """A narrow accumulator costs accuracy, and training in the loop wins it back."""
    outcome = learn(profile)
    assert outcome.after >= outcome.before + gain
    assert outcome.after > 95
    assert len(outcome.losses) == FINETUNE_RECIPE.steps
    assert outcome.not_injected == 0
