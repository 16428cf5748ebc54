from torch import nn

from lowrank_layers.modules import select


def test_select_takes_names_ends_parents_types_and_predicates():
    model = nn.ModuleDict({"enc": nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 1)), "fc": nn.Linear(4, 4)})
    assert select(model, ["fc"], "skip") == {"fc"}
    assert select(model, ["enc.0"], "skip") == {"enc.0"}
    assert select(model, ["0"], "skip") == {"enc.0"}
    assert select(model, ["enc"], "skip") == {"enc", "enc.0", "enc.1"}
    assert select(model, [nn.Conv2d], "skip") == {"enc.1"}
    assert select(model, [lambda name, module: name.endswith("1")], "skip") == {"enc.1"}
