"""Settings of a cache: given whole, by name, or both; wrong ones are refused by every cache alike."""

import inspect
from dataclasses import fields

import pytest
import torch

import lowrank_layers as lr

CACHES = {
    "LowRankKV": lr.LowRankKV,
    "LowRankAttention": lambda *args, **changes: lr.LowRankAttention(*args, **changes).cache,
    "LowRankCache": lambda *args, **changes: lr.LowRankCache(*args, **changes),
}
OURS = lr.KVSettings(rank=4, keep_recent=8, joint=False)


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_takes_settings_whole_and_by_name(name):
    make = CACHES[name]
    assert make().settings == lr.KVSettings()
    assert make(OURS).settings == OURS
    assert make(4, keep_recent=8, joint=False).settings == OURS
    assert make(rank=4, keep_recent=8, joint=False).settings == OURS
    assert make(OURS, dtype=torch.int8).settings == lr.KVSettings(rank=4, keep_recent=8, joint=False, dtype=torch.int8)


@pytest.mark.parametrize("name", CACHES)
def test_a_misspelt_option_is_refused_with_the_closest_one(name):
    with pytest.raises(lr.LowRankError, match=rf"{name}: got keep_last=.*options are those of KVSettings"):
        CACHES[name](rank=4, keep_last=8)
    with pytest.raises(lr.LowRankError, match=rf"{name}: got keep_recents=.*did you mean keep_recent=\?"):
        CACHES[name](OURS, keep_recents=8)


def test_the_options_are_listed_once():
    options = {field.name for field in fields(lr.KVSettings)}
    for made in (lr.LowRankKV, lr.LowRankAttention, lr.LowRankCache):
        assert not options & set(inspect.signature(made).parameters)
        assert ":class:`KVSettings`" in inspect.getdoc(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 0.5}, "ParameterFraction"),
        ({"value_rank": -1}, "rank -1"),
        ({"keep_recent": -1}, "keep_recent=-1"),
        ({"keep_first": 1.5}, "keep_first=1.5"),
        ({"block": 0}, "block=0"),
        ({"block": True}, "block=True"),
        ({"rope": "during"}, "'before', 'after' or 'tile'"),
        ({"dtype": torch.int64}, "int64"),
        ({"refresh": 0.5}, "refresh=0.5"),
        ({"refresh": "2"}, "refresh='2'"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": 1.5}, "max_length=1.5"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(lr.LowRankError, match=message):
        lr.KVSettings(**changes)
