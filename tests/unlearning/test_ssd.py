"""SSD: importances by hand, the invariants of the selection, stored importances, and models of language and images."""

import copy
import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from hfext.unlearning._batches import pad_rows, read_batches
from hfext.unlearning.ssd import Importance, dampening, importance, squared_norm, ssd


def rows(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        ids = torch.randint(3, 128, (3 + i % 4,), generator=g).tolist()
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return made


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Five(nn.Module):
    """Five parameters: y = (w0 x0 + w1 x1) w2 + b, and one that nothing uses."""

    def __init__(self):
        super().__init__()
        self.w, self.scale, self.b = (nn.Parameter(torch.tensor(v)) for v in ([0.5, -1.0], [2.0], [0.25]))
        self.unused = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x, labels=None):
        y = (x @ self.w) * self.scale + self.b
        return {"logits": y[:, None], "loss": None if labels is None else (y - labels).square().mean()}


def batches(seed, count=3, size=2):
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(size, 2, generator=g), "labels": torch.randn(size, generator=g)} for _ in range(count)]


def by_hand(model, data, absolute=False):
    """The mean over batches of squared (absolute) derivatives, written out: d loss / dy = 2 (y - t) / n."""
    found = torch.zeros(5, dtype=torch.float64)
    w, s, b = model.w.detach().double(), model.scale.item(), model.b.item()
    for batch in data:
        x, t = batch["x"].double(), batch["labels"].double()
        h = x @ w
        y = h * s + b
        dy = 2 * y / len(y) if absolute else 2 * (y - t) / len(y)
        g = torch.stack([(dy * s * x[:, 0]).sum(), (dy * s * x[:, 1]).sum(), (dy * h).sum(), dy.sum(), 0 * dy.sum()])
        found += g.abs() if absolute else g.square()
    return found / len(data)


def flat(values):
    return torch.cat([values[name].reshape(-1) for name in ("w", "scale", "b", "unused")]).double()


@pytest.mark.parametrize("label_free", [False, True])
@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_importance_is_the_mean_of_squared_batch_gradients(label_free, unit):
    model, data = Five(), batches(0)
    found = importance(model, data, label_free=label_free, batch_unit=unit)
    split = [{k: v[i : i + 1] for k, v in b.items()} for b in data for i in range(2)] if unit == "sample" else data
    torch.testing.assert_close(flat(found.values), by_hand(model, split, label_free), rtol=1e-5, atol=1e-7)
    assert (found.batch_size, found.batches) == ((2, 3) if unit == "batch" else (1, 6))


def test_brute_force_on_five_parameters():
    model, forget = Five(), batches(1, 1)
    data = [*batches(0), *forget]
    i_f, i_d, old = by_hand(model, forget), by_hand(model, data), flat(state(model))
    for alpha, lam, p in ((0.5, 0.5, 1.0), (1.0, 1.0, 1.0), (1.0, 5.0, 0.5), (2.0, 1.0, 2.0)):
        expected = old.clone()
        for k in range(5):
            if i_f[k] > alpha * i_d[k]:
                expected[k] *= min((lam * i_d[k] / i_f[k]) ** p, 1.0)
        edit = ssd(model, forget, data, alpha=alpha, lam=lam, p=p)
        torch.testing.assert_close(flat(state(model)), expected, rtol=1e-5, atol=0)
        chosen = (i_f > alpha * i_d).double()
        assert edit.report["share"] == pytest.approx(chosen.mean().item())
        assert edit.report["selected"]["w"] == pytest.approx(chosen[:2].mean().item())
        edit.undo()
        assert torch.equal(flat(state(model)), old)


def test_the_selection_and_its_limits():
    f, d = torch.rand(1000), torch.rand(1000)
    for alpha, lam in ((1.0, 1.0), (3.0, 1.0), (3.0, 3.0), (2.0, 0.1)):
        selected, factor = dampening(f, d, alpha, lam)
        assert torch.equal(selected, f > alpha * d) and (factor[~selected] == 1).all()
        assert (factor[selected] < lam / alpha).all() and selected.any()
    assert not dampening(f, d, math.inf, 1.0)[0].any()
    assert (dampening(f, d, 1.0, math.inf)[1] == 1).all()
    # What has no importance to the data at all goes whatever lam is.
    assert dampening(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 1.0]), 1.0, math.inf)[1].tolist() == [0.0, 1.0]
    selected, factor = dampening(f, d, 1.0, 0.0)
    assert (factor[selected] == 0).all() and (factor[~selected] == 1).all()
    selected, factor = dampening(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]), 1.0, 1.0)
    assert selected.tolist() == [True, False, False] and factor.tolist() == [0.0, 1.0, 1.0]


def test_in_a_language_model(tiny_llama):
    model, data = tiny_llama(), rows(8)
    before = state(model)
    stored = importance(model, data, batch_size=4)
    assert not any(p.grad is not None for p in model.parameters())
    # The same rows in the same batches: nothing stands out.
    assert ssd(model, data, data, alpha=1.0, batch_size=4).report["share"] == 0
    for options in ({"alpha": math.inf}, {"lam": math.inf, "alpha": 0.5}):
        ssd(model, data[:4], importance=stored, batch_size=4, **options)
        assert all(torch.equal(p, before[name]) for name, p in state(model).items())
    edit = ssd(model, data[:4], importance=stored, alpha=1.5, batch_size=4)
    mine = importance_of(edit, model, data[:4])
    for name, p in model.named_parameters():
        selected = mine.values[name] > 1.5 * stored.values[name]
        assert edit.report["selected"][name] == selected.float().mean().item()
        assert torch.equal(p[~selected], before[name][~selected])
        assert (p[selected].abs() <= before[name][selected].abs() / 1.5).all()
    assert 0 < edit.report["share"] < 1
    edit.undo()
    assert all(torch.equal(p, before[name]) for name, p in state(model).items())


def importance_of(edit, model, data):
    edit.undo()
    found = importance(model, data, batch_size=4)
    edit.redo()
    return found


def test_padding_does_not_matter_and_batches_are_those_of_the_model(tiny_llama):
    model, data = tiny_llama(), rows(4)
    padded = pad_rows(data)
    wider = {k: nn.functional.pad(v, (0, 5), value=-100 if k == "labels" else 0) for k, v in padded.items()}
    for label_free in (False, True):
        a, b, c = (
            importance(model, given, batch_size=4, label_free=label_free) for given in (data, [padded], iter([wider]))
        )
        for name in a.values:
            assert torch.equal(a.values[name], b.values[name])
            torch.testing.assert_close(a.values[name], c.values[name], rtol=1e-3, atol=1e-7)
    sizes = [len(b["labels"]) for b in read_batches(rows(7), 3, model, "x")]
    assert sizes == [3, 3, 1]
    assert torch.equal(torch.cat([b["labels"][:, 1] for b in read_batches(rows(7), 3, model, "x")]), torch.tensor([r["input_ids"][1] for r in rows(7)]))  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("one", [int, torch.tensor])
def test_rows_of_a_text_classifier(tiny_bert_classifier, one):
    model = tiny_bert_classifier().eval()
    ids = [row["input_ids"] for row in rows(5)]
    data = [{"input_ids": torch.tensor(x), "labels": one(i % 4)} for i, x in enumerate(ids)]
    batch = next(read_batches(data, 5, model, "x"))
    assert batch["labels"].tolist() == [0, 1, 2, 3, 0] and batch["labels"].dtype == torch.long
    assert batch["attention_mask"].sum(1).tolist() == [len(x) for x in ids]
    found = importance(model, data, batch_size=2)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for start in range(0, 5, 2):
        losses = [
            model(torch.tensor([ids[i]]), labels=torch.tensor([i % 4])).loss for i in range(5)[start : start + 2]
        ]
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()), allow_unused=True)
        for p, g in zip(total.values(), grads, strict=True):
            p += 0 if g is None else g.square() / 3
    for name, value in found.values.items():
        torch.testing.assert_close(value, total[name], rtol=1e-3, atol=1e-7)
    assert importance(model, data, batch_unit="sample").batches == 5
    assert pad_rows([{"input_ids": [1], "labels": 0.5}, {"input_ids": [1, 2], "labels": 1.0}])["labels"].tolist() == [
        0.5,
        1.0,
    ]
    with pytest.raises(ValueError, match="1 of 2 rows have one label each"):
        pad_rows([{"input_ids": [1], "labels": 3}, {"input_ids": [1, 2], "labels": [1, 2]}])


def test_the_size_of_a_batch_is_that_of_the_largest(tiny_llama, caplog):
    model = tiny_llama()
    assert importance(model, rows(7), batch_size=3).batch_size == 3
    transformers.utils.logging.enable_propagation()
    try:
        with ssd(model, rows(7), rows(8), batch_size=3):
            assert "rows of the forget set" not in caplog.text
        with ssd(model, rows(2), rows(8), batch_size=3):
            assert "2 rows of the forget set and 3 of all data" in caplog.text
    finally:
        transformers.utils.logging.disable_propagation()


def test_label_free_loss_is_the_squared_norm():
    z = torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = (z[0, 0].norm() ** 2 + z[0, 1].norm() ** 2 + z[1, 0].norm() ** 2) / 3
    torch.testing.assert_close(squared_norm(z, mask), expected)
    torch.testing.assert_close(squared_norm(z), z.square().sum(-1).mean())


def test_a_loss_of_ones_own_and_targets(tiny_llama):
    model, data = tiny_llama(), rows(4)
    own = importance(model, data, loss=lambda m, b: 2 * m(**b).loss)
    plain = importance(model, data)
    torch.testing.assert_close(own.values["lm_head.weight"], 4 * plain.values["lm_head.weight"])
    before = state(model)
    edit = ssd(model, data[:1], data, alpha=0.1, batch_size=1, targets="mlp")
    assert edit.report["selected"] and all("mlp" in name for name in edit.report["selected"])
    changed = [name for name, p in state(model).items() if not torch.equal(p, before[name])]
    assert changed and all("mlp" in name for name in changed)


def test_stored_importance(tiny_llama, tmp_path, caplog):
    model, data = tiny_llama(), rows(8)
    stored, path = importance(model, data, batch_size=4), tmp_path / "importance.safetensors"
    stored.save(path)
    loaded = Importance.load(path)
    assert vars(loaded).keys() == vars(stored).keys() and loaded.batches == 2 and loaded.batch_size == 4
    with ssd(model, data[:4], data, alpha=1.2, batch_size=4):
        expected = state(model)
    with ssd(model, data[:4], importance=loaded, alpha=1.2, batch_size=4):
        assert all(torch.equal(p, expected[name]) for name, p in state(model).items())
    transformers.utils.logging.enable_propagation()
    try:
        with ssd(model, data[:2], importance=loaded, batch_size=2):
            assert "2 rows of the forget set and 4 of all data" in caplog.text
    finally:
        transformers.utils.logging.disable_propagation()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="no importance of SSD"):
        Importance.load(path)
    with pytest.raises(ValueError, match="batch_unit='batch', not 'sample'"):
        ssd(model, data, importance=loaded, batch_unit="sample")
    with pytest.raises(ValueError, match="label_free=False, not True"):
        ssd(model, data, importance=loaded, label_free=True)
    with pytest.raises(ValueError, match="in another shape"):
        ssd(tiny_llama(intermediate_size=32), data, importance=loaded)


def test_half_precision_frozen_weights_and_modes(tiny_gpt2):
    model = tiny_gpt2().to(torch.bfloat16).train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = state(model)
    edit = ssd(model, rows(2), rows(4), alpha=0.7, batch_size=2)
    assert model.training and not model.transformer.h[0].training and not model.lm_head.weight.requires_grad
    assert (model.lm_head.weight.grad == 1).all() and model.transformer.h[1].ln_1.weight.grad is None
    # Dropout is off: the same again finds the same.
    changed = state(model)
    edit.undo()
    ssd(model, rows(2), rows(4), alpha=0.7, batch_size=2)
    assert all(torch.equal(p, changed[name]) for name, p in state(model).items())
    tied = [r["name"] for r in edit.report["parameters"] if r.get("tied")]
    assert tied == ["transformer.wte.weight"] and not torch.equal(changed[tied[0]], before[tied[0]])


def test_a_vit_and_a_peft_model(tiny_llama):
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    vit = transformers.ViTForImageClassification(config)

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            if i >= 6:
                raise IndexError
            return {"pixel_values": torch.full((1, 8, 8), i / 6), "labels": torch.tensor(i % 3)}

    data = Images()
    edit = ssd(vit, [data[0]], data, alpha=1.5, batch_size=1)
    assert 0 < edit.report["share"] < 1
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    grads = [p.requires_grad for p in model.parameters()]
    before = state(model)
    edit = ssd(model, rows(1), rows(4), alpha=1.5, batch_size=1, targets="lora_")
    assert edit.report["share"] > 0 and grads == [p.requires_grad for p in model.parameters()]
    edit.undo()
    edit = ssd(model, rows(1), rows(4), alpha=1.5, batch_size=1)
    assert any("base_layer" in r["name"] for r in edit.report["parameters"])
    edit.undo()
    assert all(torch.equal(p, before[name]) for name, p in state(model).items())


def test_bad_input_is_named(tiny_llama):
    model, data = tiny_llama(), rows(4)
    before = state(model)
    for options, message in (
        ({"alpha": 0.0}, "alpha is 0.0 but must be > 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"lam": -1.0}, "lam is -1.0 but must be >= 0"),
        ({"p": 0.0}, "p is 0.0 but must be > 0"),
        ({"batch_unit": "token"}, "batch_unit is 'token'"),
        ({"targets": "nothing"}, "matches no parameter"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"label_free": True, "loss": print}, "label_free has a loss of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            ssd(model, data, data, **options)
    with pytest.raises(ValueError, match="either `data`"):
        ssd(model, data)
    with pytest.raises(ValueError, match="holds no rows"):
        ssd(model, [], data)
    with pytest.raises(TypeError, match="hold a list"):
        ssd(model, [[1, 2]], data)
    with pytest.raises(ValueError, match="3 input_ids and 2 labels"):
        ssd(model, [{"input_ids": [1, 2, 3], "labels": [1, 2]}], data)
    with pytest.raises(ValueError, match="returns no loss for x"):
        importance(Five(), [{"x": torch.ones(1, 2)}])
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="is not finite"):
        ssd(broken, data, data)
    assert all(torch.equal(p, before[name]) for name, p in state(model).items())
