"""tiny_vit.py: settings, copies, pickles, the meta device, gradients."""

import copy
import io
import json
import pickle

import pytest
import torch

from tinyvit.modules import TinyViT

CLASSIFIER = {"strides": (2, 2, 2), "neck_dim": None}


class TestSettings:
    @pytest.mark.parametrize(
        "given, kept, sizes",
        [
            (96, 96, [(24, 24), (12, 12), (6, 6), (6, 6)]),
            ([96, 96], 96, [(24, 24), (12, 12), (6, 6), (6, 6)]),
            ((64, 100), (64, 100), [(16, 25), (8, 13), (4, 7), (4, 7)]),
            ([33], 33, [(9, 9), (5, 5), (3, 3), (3, 3)]),
        ],
    )
    def test_set_imgsz(self, make_tiny_vit, given, kept, sizes):
        model = make_tiny_vit()
        model.set_imgsz(given)
        assert model.img_size == kept
        assert model.patches_resolution == model.patch_embed.patches_resolution == sizes[0]
        assert model.patch_embed.num_patches == sizes[0][0] * sizes[0][1]
        assert [layer.input_resolution for layer in model.layers] == sizes
        for layer, size in zip(model.layers, sizes, strict=True):
            inside = [m for m in layer.modules() if hasattr(m, "input_resolution")]
            assert {module.input_resolution for module in inside} == {size}
        assert make_tiny_vit(img_size=given).img_size == kept

    def test_set_imgsz_default(self, make_tiny_vit):
        model = make_tiny_vit()
        model.set_imgsz()
        assert model.img_size == 1024

    @pytest.mark.parametrize(
        "given, error",
        [
            (0, ValueError),
            ([0, 0], ValueError),
            ([-64, 64], ValueError),
            ((64, 64, 3), ValueError),
            (64.0, TypeError),
            ("64", TypeError),
            (None, TypeError),
        ],
    )
    def test_set_imgsz_refuses_and_changes_nothing(self, make_tiny_vit, given, error):
        model = make_tiny_vit()
        with pytest.raises(error, match="imgsz must be") as caught:
            model.set_imgsz(given)
        assert str(caught.value).endswith(f"got {given!r}")
        assert (model.img_size, model.layers[0].input_resolution) == (64, (16, 16))
        with pytest.raises(error, match="img_size must be"):
            make_tiny_vit(img_size=given)

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"depths": ()}, "depths must name at least one stage"),
            ({"strides": (2, 2)}, r"strides wants 3 numbers .* got \(2, 2\)"),
            ({"num_heads": (1, 5, 2, 3)}, "num_heads must divide dim, got dim=12, num_heads=5"),
            ({"window_sizes": (4, 0, 5, 2)}, r"window_sizes must be positive, got \(4, 0, 5, 2\)"),
            ({"num_heads": (0, 2, 2, 3)}, r"num_heads must be positive, got \(0, 2, 2, 3\)"),
            ({"mbconv_expand_ratio": 0.1}, "at least 1 hidden channel, got 0.1 for in_chans=8"),
            ({"mlp_ratio": 0.0}, "hidden_features must be at least 1, got 0"),
            ({"local_conv_size": 4}, "local_conv_size must be odd.*got 4"),
            ({"stem": "patch"}, "stem must be 'conv' or 'pointwise', got 'patch'"),
            ({"drop_path_rate": 1.5}, "drop_path must be a probability between 0 and 1"),
        ],
    )
    def test_contradictions(self, make_tiny_vit, change, words):
        with pytest.raises(ValueError, match=words):
            make_tiny_vit(**change)

    def test_train_eval_train(self, make_tiny_vit, image):
        model = make_tiny_vit()
        x = image(2, 32, 32)
        wanted = model(x)
        assert model.train() is model and model.training
        model(x)
        assert model.eval() is model
        assert not torch.equal(model(x), wanted)  # the batch has moved the statistics
        model.train()
        model.train()
        assert model(x).shape == wanted.shape

    def test_drop_path_acts_in_training(self, make_tiny_vit, image):
        model = make_tiny_vit(drop_path_rate=0.5).freeze_batch_stats().train()
        x = image(8, 32, 32)
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))

    def test_attention_biases_get_gradients_in_eval_mode(self, make_tiny_vit, image):
        model = make_tiny_vit()
        model(image(2, 40, 40)).square().sum().backward()
        tables = [p for n, p in model.named_parameters() if n.endswith("attention_biases")]
        assert len(tables) == 4
        assert all(table.grad.abs().max() > 0 for table in tables)

    def test_freeze_batch_stats(self, make_tiny_vit, image):
        model = make_tiny_vit(drop_path_rate=0.0)
        x = image(2, 32, 32)
        wanted = model(x)
        assert model.freeze_batch_stats() is model
        frozen = copy.deepcopy(model).train()
        assert torch.equal(frozen(x), wanted)
        assert torch.equal(frozen.eval()(x), wanted)
        assert not torch.equal(frozen.freeze_batch_stats(False).train()(x), wanted)

    def test_set_grad_checkpointing(self, make_tiny_vit, image):
        model = make_tiny_vit().train()
        saving = copy.deepcopy(model)
        saving.set_grad_checkpointing()
        assert saving.arguments()["use_checkpoint"] and not model.arguments()["use_checkpoint"]
        x = image(2, 40, 40)
        for one in (model, saving):
            one(x).square().sum().backward()
        # the same operations on the same numbers
        for (name, p), q in zip(model.named_parameters(), saving.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == ("head" in name)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        assert all(map(torch.equal, model.buffers(), saving.buffers()))
        saving.set_grad_checkpointing(False)
        assert not saving.arguments()["use_checkpoint"]


class TestCopies:
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"img_size": (48, 80), "in_chans": 4, "num_classes": 0, "use_checkpoint": True},
            {**CLASSIFIER, "mlp_ratio": 2.0, "mbconv_expand_ratio": 3.0, "local_conv_size": 5},
            {"stem": "pointwise", "head": False, "drop_rate": 0.1, "drop_path_rate": 0.2},
            {"layer_lr_decay": 0.8},
        ],
    )
    def test_arguments_round_trip(self, make_tiny_vit, image, change):
        model = make_tiny_vit(**change)
        arguments = model.arguments()
        assert json.loads(json.dumps(arguments)) == arguments
        again = TinyViT(**arguments).eval()
        assert again.arguments() == arguments
        again.load_state_dict(model.state_dict())
        x = image(1, 20, 30, channels=model.in_chans)
        assert torch.equal(again(x), model(x))
        assert repr(again) == repr(model)

    def test_arguments_name_every_argument(self, make_tiny_vit, describe_arguments):
        listed = ", ".join(describe_arguments(TinyViT))
        for name in make_tiny_vit().arguments():
            assert f"{name}=" in listed
        assert len(make_tiny_vit().arguments()) == 18

    def test_arguments_after_another_head(self, make_tiny_vit):
        model = make_tiny_vit(head=False)
        model.reset_classifier(3)
        again = TinyViT(**model.arguments())
        assert list(again.state_dict()) == list(model.state_dict()) or (
            set(again.state_dict()) == set(model.state_dict())
        )

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_compute_the_same_on_their_own(self, make_tiny_vit, image, copied):
        model = make_tiny_vit()
        x = image(1, 30, 50)
        wanted = model(x)
        other = copied(model)
        assert torch.equal(other(x), wanted)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(other(x), wanted)

    def test_a_pickle_holds_little_more_than_the_weights(self):
        model = TinyViT(embed_dims=(64, 128, 160, 320), num_heads=(2, 4, 5, 10)).eval()
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        sizes = []
        for thing in (model, model.state_dict()):
            file = io.BytesIO()
            torch.save(thing, file)
            sizes.append(file.tell())
        assert sizes[0] <= 1.02 * sizes[1]

    def test_meta_device(self, make_tiny_vit, image):
        model = make_tiny_vit()
        with torch.device("meta"):
            empty = TinyViT(**model.arguments())
        assert all(tensor.is_meta for tensor in empty.state_dict().values())
        assert empty(image(2, 40, 40).to("meta")).shape == (2, 16, 3, 3)
        filled = empty.to_empty(device="cpu").eval()
        filled.load_state_dict(model.state_dict())
        x = image(1, 40, 40)
        assert torch.equal(filled(x), model(x))

    def test_default_dtype(self, image):
        torch.set_default_dtype(torch.float64)
        try:
            model = TinyViT(img_size=16, embed_dims=(4, 8, 8, 8), num_heads=(1, 2, 2, 2)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert model(image(1, 16, 16, dtype=torch.float64)).dtype == torch.float64

    def test_a_model_built_by_hand_has_no_image_spec(self, make_tiny_vit):
        assert make_tiny_vit().image_spec is None


def test_gradients_are_right(make_tiny_vit, image):
    model = make_tiny_vit(
        embed_dims=(4, 4, 8, 8), depths=(1, 1, 1, 1), window_sizes=(2, 2, 2, 2),
        num_heads=(1, 1, 2, 2), neck_dim=4, num_classes=2,
    ).double()  # fmt: skip
    names = [name for name, _ in model.named_parameters()]

    def run(x, *parameters):
        by_name = dict(zip(names, parameters, strict=True))
        y = torch.func.functional_call(model, by_name, x)
        # a sum of squares keeps layer norm's output from being constant in some directions
        return y.sin().sum((2, 3))

    x = image(1, 40, 24, dtype=torch.float64).requires_grad_()
    inputs = (x, *(parameter.detach().requires_grad_() for parameter in model.parameters()))
    # fast_mode: one random projection of the whole Jacobian, over every parameter and pixel
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    small = image(1, 8, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x).sin(), (small,))
