"""transformers' resize_token_embeddings on adapted and factored models: the base is what the plain model becomes."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

import_torchvision()
transformers = pytest.importorskip("transformers")
SIZES = [110, 90, 97]
IDS = torch.arange(3, 11)[None]


def llama(*, tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def logits(model, ids=IDS):
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def resize(model, size, **kwargs):
    torch.manual_seed(7)
    return model.resize_token_embeddings(size, **kwargs)


def trained(model, target, **kwargs):
    lr.add_lora_(model, target, rank=4, **kwargs)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.normal_(std=0.1)
    return model


MODELS = {
    "untied": llama,
    "tied": lambda: llama(tied=True),
}
TARGETS = {
    "embedding": ["embed_tokens"],
    "head": ["lm_head", "q_proj"],
    "both": ["embed_tokens", "lm_head"],
}


def adapters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("names", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("size", SIZES)
def test_the_base_is_the_plain_model_resized_and_known_tokens_keep_their_output(build, names, size):
    plain, model = build(), build()
    trained(model, names)
    before, kept = logits(model), adapters_of(model)
    resize(plain, size)
    assert resize(model, size) is model.get_input_embeddings()
    assert model.config.vocab_size == size
    n = min(size, 97)
    torch.testing.assert_close(logits(model)[..., :n], before[..., :n])
    with lr.lora_disabled(model):
        assert torch.equal(logits(model), logits(plain))
    assert adapters_of(model).keys() == kept.keys()
    new = torch.tensor([[size - 1, 4]])
    torch.testing.assert_close(logits(model, new).shape, logits(plain, new).shape)
    lr.remove_lora_(model)
    assert "resize_token_embeddings" not in vars(model)
    assert torch.equal(logits(model), logits(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("names", TARGETS.values(), ids=TARGETS)
def test_new_rows_learn(names):
    model = trained(llama(), names)
    resize(model, 110)
    optimizer = torch.optim.SGD(lr.lora_parameters(model), lr=1.0)
    ids = torch.tensor([[105, 3, 106, 109]])
    before = [end.weight.detach().clone() for end in (model.model.embed_tokens, model.lm_head)]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = [end.weight.detach() for end in (model.model.embed_tokens, model.lm_head)]
    changed = [bool((a - b)[105].any()) for a, b in zip(before, after, strict=True)]
    assert changed == ["embed_tokens" in names, "lm_head" in names]


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_every_start_and_magnitudes_of_the_head(init, dora):
    plain, model = llama(), trained(llama(), ["lm_head"], init=init, dora=dora)
    before = logits(model)
    for each in (plain, model):
        resize(each, 110)
    torch.testing.assert_close(logits(model)[..., :97], before)
    torch.testing.assert_close(logits(model)[..., 97:], logits(plain)[..., 97:])
    with lr.lora_disabled(model):
        assert torch.equal(logits(model), logits(plain))


def test_several_adapters_and_trained_tokens():
    model = trained(llama(), ["embed_tokens"])
    lr.add_lora_(model, ["lm_head"], rank=2, name="other")
    outputs = {}
    for name in ("default", "other"):
        lr.use_adapter(model, name)
        outputs[name] = logits(model)
    resize(model, 110)
    for name, before in outputs.items():
        lr.use_adapter(model, name)
        torch.testing.assert_close(logits(model)[..., :97], before)


def test_trained_tokens_stay_those_they_are():
    model = lr.add_lora_(llama(), ["q_proj"], rank=2, trainable_tokens=[5, 96])
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.normal_()
    before = model.model.embed_tokens.weight.detach().clone()
    resize(model, 110)
    assert torch.equal(model.model.embed_tokens.weight[:97], before)
    resize(model, 50)
    assert torch.equal(model.model.embed_tokens.weight, before[:50])


FACTORED = {"embedding": ["model.embed_tokens"], "head": ["lm_head"], "both": ["model.embed_tokens", "lm_head"]}


@pytest.mark.parametrize("names", FACTORED.values(), ids=FACTORED)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("adapted", [False, True])
def test_factored_embeddings_and_heads_get_new_rows(names, size, adapted):
    model = llama()
    plan = lr.make_plan(model, rank=8, methods=[lr.SVDMethod()])
    for entry in plan:
        if entry.name not in names:
            plan.drop(entry.name)
    lr.factorize_(model, plan)
    assert all(isinstance(model.get_submodule(name), lr.FactoredModule) for name in names)
    if adapted:
        trained(model, names)
    kinds = [type(model.get_submodule(name)) for name in names]
    before = logits(model)
    resize(model, size)
    n = min(size, 97)
    torch.testing.assert_close(logits(model)[..., :n], before[..., :n])
    assert [type(model.get_submodule(name)) for name in names] == kinds
    for end in (model.model.embed_tokens, model.lm_head):
        assert end.weight.shape == (size, 32)
    assert model.model.embed_tokens.num_embeddings == model.lm_head.out_features == model.config.vocab_size == size
    assert logits(model, torch.tensor([[size - 1]])).shape == (1, 1, size)


def test_new_rows_of_a_factored_embedding_lie_about_the_mean():
    """As transformers draws them: a Gaussian with the mean of the old rows and a tiny covariance."""
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    lr.factorize_(model, lr.make_plan(model, rank=8, methods=[lr.SVDMethod()]))
    mean = model.model.embed_tokens.weight.mean(0).detach()
    resize(model, 100)
    torch.testing.assert_close(model.model.embed_tokens.weight[97:], mean.expand(3, -1), atol=1e-3, rtol=1e-3)


def whole_head():
    return lr.add_lora_(llama(), ["q_proj"], rank=2, modules_to_save=["lm_head"])


def tied_and_factored():
    model = llama()
    lr.factorize_(model, lr.make_plan(model, rank=8))
    model.config.tie_word_embeddings = True
    return model


def tensorized():
    model = llama()
    lr.factorize_(model, lr.make_plan(model, rank=8, methods=[lr.TensorizedMethod()]))
    return model


REFUSED = {
    "merged": (lambda: lr.merge_lora_(trained(llama(), ["lm_head"])), "merged; call unmerge_lora_"),
    "DoRA on an embedding": (lambda: trained(llama(), ["embed_tokens"], dora=True), "DoRA"),
    "DoRA on an embedding, and a head": (lambda: trained(llama(), ["lm_head", "embed_tokens"], dora=True), "DoRA"),
    "a head trained whole": (whole_head, "cannot be resized"),
    "tied and factored": (tied_and_factored, "tie_word_embeddings = False"),
    "T5's shared embedding": (lambda: trained(t5(), ["shared"]), "'encoder.embed_tokens' is a module of its own"),
    "T5's embeddings": (lambda: trained(t5(), ["embed_tokens"]), "'encoder.embed_tokens' is a module of its own"),
    "tensorized": (tensorized, "TensorizedEmbedding, which cannot be resized"),
}


@pytest.mark.parametrize(("build", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_resized_is_refused_before_anything_changes(build, why):
    model = build()
    kinds = [type(module) for module in model.modules()]
    before, state = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(lr.LowRankError, match=f"resize_token_embeddings.*{why}.*Nothing is changed"):
        resize(model, 110)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert model.config.vocab_size == 97


def test_errors_of_transformers_leave_the_adapters_on():
    model = trained(llama(), ["embed_tokens", "lm_head"])
    before = logits(model)
    with pytest.raises(ValueError, match="pad"):
        model.resize_token_embeddings(100, pad_to_multiple_of=2.5)
    assert torch.equal(logits(model), before)


def test_other_arguments_are_passed_on():
    plain, model = llama(), trained(llama(), ["embed_tokens", "lm_head"])
    for each in (plain, model):
        resize(each, 100, pad_to_multiple_of=16, mean_resizing=False)
    assert model.config.vocab_size == 112
    with lr.lora_disabled(model):
        assert torch.equal(logits(model), logits(plain))
    assert model.resize_token_embeddings() is model.get_input_embeddings()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_resize_themselves(clone):
    model = trained(llama(), ["lm_head"])
    other = clone(model)
    before = logits(model)
    resize(other, 110)
    assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(other)[..., :97], before)
    assert len(lr.lora_parameters(other)) == len(lr.lora_parameters(model))


def test_the_base_model_inside_resizes_too():
    model = trained(llama(), ["embed_tokens"])
    before = model.model.embed_tokens.weight.detach().clone()
    resize(model.model, 110)
    assert torch.equal(model.model.embed_tokens.weight[:97], before)


def test_an_encoder_decoder_whose_attention_is_adapted_is_resized_as_it_is():
    plain, model = t5(), lr.add_lora_(t5(), ["q", "v"], rank=2)
    for each in (plain, model):
        resize(each, 110)
    assert torch.equal(logits(model), logits(plain))


def test_models_without_such_layers_keep_transformers_method():
    model = lr.add_lora_(llama(), ["q_proj"], rank=2)
    assert "resize_token_embeddings" not in vars(model)
    resize(model, 110)
    assert logits(model).shape[-1] == 110
    assert isinstance(model.lm_head, nn.Linear)
