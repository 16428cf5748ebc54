import pytest

from lowrank_layers import plot

pytestmark = pytest.mark.usefixtures("headless")


def shown(axis):
    """The labels of the ticks within the limits."""
    low, high = axis.get_view_interval()
    places = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label.get_text() for place, label in places if low <= place <= high]


@pytest.mark.parametrize(
    ("sizes", "labels"),
    [
        ((2_150, 3_300), ["2,500", "3,000"]),
        ((449, 9_000), ["500", "1,000", "2,000", "5,000", "10,000"]),
        ((890, 2_000_000), ["1,000", "10,000", "100,000", "1,000,000"]),
        ((0.09, 120), ["0.1", "1", "10", "100"]),
    ],
)
def test_logarithmic_axes_have_few_round_ticks(sizes, labels):
    figure = plot.size_score_front({"ours": [(size, 90.0) for size in sizes]})
    figure.canvas.draw()
    assert shown(figure.axes[0].xaxis) == labels
    assert not list(figure.axes[0].xaxis.get_minorticklocs())


def test_steps_are_whole_numbers():
    figure = plot.losses({"ours": [3.0, 2.0, 1.0]})
    figure.canvas.draw()
    assert shown(figure.axes[0].xaxis) == ["1", "2", "3"]
