from __future__ import annotations

import copy
import threading

import pytest
import torch

from tinyvit.sam.decoder import CHUNK, PromptDecoder, PromptTensors

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order


def features(height=4, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 32, height, width, generator=generator)


def prompts(count, masks=None):
    generator = torch.Generator().manual_seed(count)
    coords = 64 * torch.rand(count, 2, 2, generator=generator)
    labels = torch.randint(0, 2, (count, 2), generator=generator)
    corners = 20 * torch.rand(count, 4, generator=generator)
    boxes = corners + torch.tensor([0.0, 0.0, 30.0, 30.0])
    return PromptTensors((coords, labels), boxes, masks)


@torch.no_grad()
def by_hand(sam, x, given, multimask, early=None):
    grid = x.shape[2:]
    sparse, dense = sam.prompt_encoder(given.points, given.boxes, given.masks, tuple(grid))
    position = sam.prompt_encoder.get_dense_pe(tuple(grid))
    more = () if early is None else (False, early[None])
    return sam.mask_decoder(x, position, sparse, dense, multimask, *more)


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("is_hq", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (2, 4)])
@pytest.mark.parametrize("with_masks", [False, True])
def test_it_is_what_the_modules_say(make_tiny_sam, multimask, is_hq, grid, with_masks):
    sam, x = make_tiny_sam(is_hq=is_hq), features(*grid)
    masks = torch.randn(CHUNK + 3, 1, 4 * grid[0], 4 * grid[1]) if with_masks else None
    early = torch.randn(*grid, 16) if is_hq else None
    given = prompts(CHUNK + 3, masks)
    logits, iou = PromptDecoder(sam).decode(x, given, multimask, interm_features=early)
    wanted_logits, wanted_iou = by_hand(sam, x, given, multimask, early)
    torch.testing.assert_close(logits, wanted_logits, **CLOSE)
    torch.testing.assert_close(iou, wanted_iou, **CLOSE)


def test_answers_can_be_written_to(make_tiny_sam):
    logits, iou = PromptDecoder(make_tiny_sam()).decode(features(), prompts(2))
    logits.zero_()
    iou.add_(1)
    assert not logits.requires_grad


@pytest.mark.parametrize("is_hq", [False, True])
def test_no_prompts_have_no_answers(make_tiny_sam, is_hq):
    decoder = PromptDecoder(make_tiny_sam(is_hq=is_hq))
    logits, iou = decoder.decode(features(), prompts(2).part(0, 0))
    masks = 1 if is_hq else 3
    assert logits.shape == (0, masks, 16, 16)
    assert iou.shape == (0, masks)


def change_by_optimiser(sam):
    sam.mask_decoder.mask_tokens.weight.data.mul_(-1.0)
    sam.prompt_encoder.point_embeddings[1].weight.data.add_(1.0)


def change_by_loading(sam):
    for part in (sam.mask_decoder, sam.prompt_encoder):
        part.load_state_dict({key: 0.7 * value for key, value in part.state_dict().items()})


def change_the_decoder(sam):
    other = sam.mask_decoder.__class__.__new__(sam.mask_decoder.__class__)
    other.__dict__.update(sam.mask_decoder.__dict__)
    other._modules = {**sam.mask_decoder._modules}
    other.iou_token = torch.nn.Embedding(1, 32)
    sam.mask_decoder = other


@pytest.mark.parametrize("change", [change_by_optimiser, change_by_loading, change_the_decoder])
@pytest.mark.parametrize("is_hq", [False, True])
def test_new_weights_are_used(make_tiny_sam, change, is_hq):
    sam, x, given = make_tiny_sam(is_hq=is_hq), features(), prompts(2)
    early = torch.randn(4, 4, 16) if is_hq else None
    decoder = PromptDecoder(sam)
    before = decoder.decode(x, given, interm_features=early)[0]
    change(sam)
    after = decoder.decode(x, given, interm_features=early)[0]
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, by_hand(sam, x, given, True, early)[0], **CLOSE)


def test_features_that_are_overwritten_are_looked_at_again(make_tiny_sam):
    sam, x = make_tiny_sam(), features()
    decoder = PromptDecoder(sam)
    decoder.decode(x, prompts(1))
    x.copy_(features(seed=1))
    found = decoder.decode(x, prompts(1))[0]
    torch.testing.assert_close(found, by_hand(sam, x, prompts(1), True)[0], **CLOSE)


def test_threads_may_share_it(make_tiny_sam):
    sam = make_tiny_sam()
    decoder, found = PromptDecoder(sam), {}

    def work(seed):
        for _ in range(5):
            found[seed] = decoder.decode(features(seed=seed), prompts(2))[0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        wanted = by_hand(sam, features(seed=seed), prompts(2), True)[0]
        torch.testing.assert_close(found[seed], wanted, **CLOSE)


def test_sizes_of_what_the_logits_cover(make_tiny_sam):
    decoder = PromptDecoder(make_tiny_sam())
    assert decoder.pitch == 4
    assert decoder.low_res_size(features(2, 3)) == (8, 12)
    assert decoder.frame(features(2, 3)) == (32, 48)


def test_wrong_calls_say_what_was_wanted(make_tiny_sam):
    decoder = PromptDecoder(make_tiny_sam())
    with pytest.raises(ValueError, match="hq_token_only=True wants a model with Light HQ-SAM"):
        decoder.decode(features(), prompts(1), hq_token_only=True)
    masks = PromptTensors(masks=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\[B, 1, 16, 16\]; came \[1, 1, 8, 8\]"):
        decoder.decode(features(), masks)
    hq = PromptDecoder(make_tiny_sam(is_hq=True))
    with pytest.raises(ValueError, match="wants interm_features, the encoder's early map"):
        hq.decode(features(), prompts(1))


@pytest.mark.parametrize("is_hq", [False, True])
def test_fp64_is_exact(make_tiny_sam, is_hq):
    sam, x, given = make_tiny_sam(is_hq=is_hq), features(), prompts(3)
    early = torch.randn(4, 4, 16) if is_hq else None
    exact = PromptDecoder(sam, precision="fp64")
    logits, iou = exact.decode(x, given, True, interm_features=early)
    double = PromptTensors((given.points[0].double(), given.points[1]), given.boxes.double(), None)
    late = None if early is None else early.double()
    wanted = by_hand(copy.deepcopy(sam).double(), x.double(), double, True, late)
    assert logits.dtype == iou.dtype == torch.float32
    digit = {"rtol": 1e-6, "atol": 1e-6}  # float32's own rounding
    torch.testing.assert_close(logits, wanted[0].float(), **digit)
    torch.testing.assert_close(iou, wanted[1].float(), **digit)


def test_other_precisions_are_refused(make_tiny_sam):
    with pytest.raises(ValueError, match=r"one of \('fp32', 'fp64'\), came 'fp16'"):
        PromptDecoder(make_tiny_sam(), precision="fp16")
