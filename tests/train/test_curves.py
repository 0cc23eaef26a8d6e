import math

import numpy as np

from tinyvit.train.run_folder import COLOURS, HEIGHT, WIDTH, draw_curves


def has_colour(image, colour):
    return bool((np.abs(image.astype(int) - colour).sum(-1) < 12).any())


def test_a_panel_for_each_figure_training_first():
    lines = [{"kind": "validate", "step": 0, "iou": 0.1}]
    lines += [
        {"kind": "train", "step": s, "loss": 1 / s, "rate": 0.1 * s, "images_per_second": 4.0}
        for s in range(1, 60)
    ]
    lines.append({"kind": "validate", "step": 59, "iou": 0.9})
    image = draw_curves(lines)
    assert image.shape == (HEIGHT, 3 * WIDTH, 3) and image.dtype == np.uint8
    panels = np.split(image, 3, axis=1)
    found = [[has_colour(p, COLOURS[kind]) for kind in ("train", "validate")] for p in panels]
    assert found == [[True, False], [True, False], [False, True]]


def test_a_falling_loss_falls():
    lines = [{"kind": "train", "step": s, "loss": 100.0 - s} for s in range(1, 80)]
    is_line = np.abs(draw_curves(lines).astype(int) - COLOURS["train"]).sum(-1) < 12
    rows, columns = np.nonzero(is_line)
    left = rows[columns < WIDTH / 3].mean()
    right = rows[columns > 2 * WIDTH / 3].mean()
    assert left + HEIGHT / 4 < right  # rows count downwards


def test_nothing_one_point_and_what_is_no_number():
    assert (draw_curves([]) == 255).all()
    lines = [{"kind": "train", "step": 1, "loss": 0.0}, {"kind": "train", "step": 2, "loss": None}]
    lines.append({"kind": "train", "step": 3, "loss": math.inf})
    assert has_colour(draw_curves(lines), COLOURS["train"])


def test_many_figures_do_not_make_a_tower():
    line = {"kind": "train", "step": 1, **{f"figure_{i}": i for i in range(40)}}
    assert draw_curves([line]).shape == (4 * HEIGHT, 3 * WIDTH, 3)
