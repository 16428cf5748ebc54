import pytest

import lowrank_layers as lr
from lowrank_layers import plot


def test_a_recovery_shows_its_objective_and_the_state_that_was_kept():
    result = lr.Recovery(losses=(2.0, 1.0), scores=((0, 0.5), (1, 0.75), (2, 0.25)), best_step=1)
    axes, right = plot.recovery(result).axes
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2]
    scores, kept = right.get_lines()
    assert list(scores.get_ydata()) == [0.5, 0.75, 0.25]
    assert list(kept.get_xydata()[0]) == [1, 0.75]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["objective", "held-out score", "kept"]
    assert len(plot.recovery(lr.Recovery((1.0,), (), 1)).axes) == 1


def test_a_progression_shows_its_stages_and_the_model_that_was_kept():
    def stage(params: int, *scores: float) -> lr.Stage:
        return lr.Stage(lr.Budget(params=params), params, lr.Recovery((1.0,), tuple(enumerate(scores)), 1))

    result = lr.Progression(100, 0.9, (stage(50, 0.5, 0.8), stage(20, 0.1, 0.4)), kept=1)
    factorized, recovered, kept = plot.progression(result).axes[0].get_lines()
    assert factorized.get_xydata().tolist() == [[50, 0.5], [20, 0.1]]
    assert recovered.get_xydata().tolist() == [[100, 0.9], [50, 0.8], [20, 0.4]]
    assert kept.get_xydata().tolist() == [[50, 0.8]]
    with pytest.raises(lr.LowRankError, match="a history without scores"):
        plot.progression(lr.Progression(100, None, (), 0))
