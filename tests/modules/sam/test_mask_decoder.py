"""The mask decoder: shapes, which masks, every grid, gradients, compilers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinyvit.modules.sam.mask_decoder import MLP, MaskDecoder, TwoWayTransformer

C = 16


@pytest.fixture
def decoder(randomise):
    transformer = TwoWayTransformer(2, C, 4, 24)
    return randomise(MaskDecoder(transformer_dim=C, transformer=transformer)).eval()


def inputs(count=3, tokens=2, size=(3, 5), images=1):
    generator = torch.Generator().manual_seed(7)
    shapes = ((images, C, *size), (1, C, *size), (count, tokens, C), (count, C, *size))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("multimask, masks", [(True, 3), (False, 1)])
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (2, 7)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_shapes(decoder, count, size, multimask, masks):
    low_res, iou = decoder(*inputs(count, size=size), multimask)
    assert low_res.shape == (count, masks, 4 * size[0], 4 * size[1])
    assert iou.shape == (count, masks)


def test_the_single_mask_is_the_first_and_the_others_follow(decoder):
    low_res, iou = decoder.predict_masks(*inputs())
    single, several = decoder(*inputs(), False), decoder(*inputs(), True)
    assert torch.equal(torch.cat((single[0], several[0]), 1), low_res)
    assert torch.equal(torch.cat((single[1], several[1]), 1), iou)


def test_by_the_steps_of_the_paper(decoder):
    image, image_pe, sparse, dense = inputs(count=1)
    own = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))[None]
    tokens, cells = decoder.transformer(image + dense, image_pe, torch.cat((own, sparse), 1))
    upscaled = decoder.output_upscaling(cells.transpose(1, 2).reshape(1, C, 3, 5))[0]
    low_res, iou = decoder.predict_masks(image, image_pe, sparse, dense)
    for index, mlp in enumerate(decoder.output_hypernetworks_mlps):
        weights = mlp(tokens[0, 1 + index])
        wanted = sum(weight * plane for weight, plane in zip(weights, upscaled, strict=True))
        # float32 sums of two products in another order
        torch.testing.assert_close(low_res[0, index], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(iou[0], decoder.iou_prediction_head(tokens[0, 0]))


def test_one_image_for_all_prompts_is_each_prompt_alone(decoder):
    image, image_pe, sparse, dense = inputs()
    low_res, iou = decoder(image, image_pe, sparse, dense, True)
    for n in range(3):
        one = slice(n, n + 1)
        alone = decoder(image, image_pe, sparse[one], dense[one], True)
        # the same sums, in batches of another size
        torch.testing.assert_close(alone, (low_res[one], iou[one]), rtol=1e-4, atol=1e-5)


def test_an_image_for_each_prompt(decoder):
    images, image_pe, sparse, dense = inputs(images=3)
    together = decoder(images, image_pe, sparse, dense, False)
    for n in range(3):
        one = slice(n, n + 1)
        alone = decoder(images[one], image_pe, sparse[one], dense[one], False)
        torch.testing.assert_close(
            alone, tuple(part[one] for part in together), rtol=1e-4, atol=1e-5
        )


def test_gradients_reach_every_parameter_and_the_image(decoder):
    image, *others = inputs()
    image.requires_grad_()
    low_res, iou = decoder.predict_masks(image, *others)
    (low_res.sin().sum() + iou.square().sum()).backward()
    dead = [
        name
        for name, p in decoder.named_parameters()
        if not name.endswith("k_proj.bias") and (p.grad is None or not p.grad.any())
    ]  # softmax does not see a bias of the keys
    assert dead == []
    assert image.grad.any()


def test_half_precision(decoder):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low_res, iou = decoder(*inputs(), True)
    with torch.no_grad():
        exact = decoder(*inputs(), True)
    # 8 bits through two layers: a tenth of the largest value at most
    for half, full in zip((low_res, iou), exact, strict=True):
        assert float((half.float() - full).abs().max()) < 0.1 * float(full.abs().max())
    low_res, _ = decoder.bfloat16()(*(x.bfloat16() for x in inputs()), True)
    assert low_res.dtype == torch.bfloat16


def test_compiles_in_one_graph(decoder):
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs(), True), decoder(*inputs(), True))


@pytest.mark.parametrize(
    "position, shape",
    [
        (0, (2, C, 3, 5)),
        (0, (1, C + 1, 3, 5)),
        (1, (1, C, 3, 4)),
        (1, (2, C, 3, 5)),
        (2, (3, 2, C + 1)),
        (3, (1, C, 3, 5)),
        (3, (3, C, 5, 3)),
    ],
)
def test_shapes_that_do_not_go_together(decoder, position, shape):
    given = inputs()
    given[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"image_embeddings \[1 or N, 16, h, w\]") as caught:
        decoder(*given, True)
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_mlp(randomise, sigmoid):
    mlp = randomise(MLP(4, 6, 2, 3, sigmoid_output=sigmoid))
    x = torch.randn(5, 4)
    first, second, third = mlp.layers
    wanted = third(F.relu(second(F.relu(first(x)))))
    assert torch.equal(mlp(x), wanted.sigmoid() if sigmoid else wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_it_can_be_traced_for_any_number_of_prompts(decoder):
    """No shape is compared while tracing: a comparison would warn, and warnings are errors."""

    class Multi(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, image, image_pe, sparse, dense):
            return self.decoder(image, image_pe, sparse, dense, True)

    with torch.no_grad():
        traced = torch.jit.trace(Multi(), inputs(count=1, tokens=2))
        for count, tokens in ((1, 2), (3, 5)):
            for one, wanted in zip(
                traced(*inputs(count, tokens)), decoder(*inputs(count, tokens), True), strict=True
            ):
                torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)
