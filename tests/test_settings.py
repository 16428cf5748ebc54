"""Settings passed whole, in short, and changed by name: one value comes out, or an error that names the option."""

import pytest

import lowrank_layers as lr
from lowrank_layers.settings import settings_from

WHOLE = lr.KVSettings(rank=4, block=32)


@pytest.mark.parametrize(
    ("given", "changes", "expected"),
    [
        (WHOLE, {}, WHOLE),
        (WHOLE, {"block": 8}, lr.KVSettings(rank=4, block=8)),
        (WHOLE, {"rank": 8}, lr.KVSettings(rank=8, block=32)),
        (None, {}, lr.KVSettings()),
        (None, {"rank": 8}, lr.KVSettings(rank=8)),
        (8, {}, lr.KVSettings(rank=8)),
        (lr.Energy(0.9), {"keep_first": 0}, lr.KVSettings(rank=lr.Energy(0.9), keep_first=0)),
    ],
)
def test_one_value_comes_out(given, changes, expected):
    assert settings_from(lr.KVSettings, given, changes, "f") == expected


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        (
            WHOLE,
            {"keep_recents": 8},
            r"f: got keep_recents=.*did you mean keep_recent=\?.*KVSettings: rank, value_rank",
        ),
        (WHOLE, {"xyz": 8}, r"f: got xyz=, which is no option\. The options"),
        (8, {"rank": 4}, "f: got rank twice, 8 and 4"),
        (WHOLE, {"block": 0}, "block=0"),
        ({"rank": 4}, {}, "rank {'rank': 4}"),
    ],
)
def test_what_is_no_setting_is_refused(given, changes, message):
    with pytest.raises(lr.LowRankError, match=message):
        settings_from(lr.KVSettings, given, changes, "f")
