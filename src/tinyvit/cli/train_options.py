"""The options of ``tinyvit train`` that all tasks share: one row for each setting of the loop.

The names are those of ``tinyvit.train.TrainSettings``. What a task takes besides is in
``task_options``.
"""

from __future__ import annotations

from tinyvit.cli.option_rows import Row

__all__ = ["CONTROL", "LOOP"]

LENGTH, RATES = "How long and how fast", "How it learns"
MACHINE, LOG = "What it runs on", "What is written"

CONTROL = (
    Row(
        "resume",
        "flag",
        "Go on with the run in the folder, with its choices; where there is none, begin it.",
        flags=("--resume/--no-resume",),
    ),
    Row(
        "config",
        "text",
        "Read choices from a file of 'name = value' lines; options go before it. The names are "
        "those of the options with _ for -, as in settings.toml and task.toml of a run.",
        metavar="FILE.toml",
    ),
    Row("as_json", "flag", "Print one JSON object on stdout at the end.", flags=("--json/--text",)),
)
"""What is no setting: how the command itself behaves."""

LOOP = (
    Row("folder", "text", "Folder of the run.", flags=("--output", "-o"), metavar="RUN_FOLDER"),
    Row("epochs", "int", "Passes over the data.", 10, group=LENGTH),
    Row("steps", "int", "Steps of the optimiser, instead of epochs.", group=LENGTH),
    Row(
        "batch_size",
        "int",
        "Samples of a step, over all processes together.",
        8,
        group=LENGTH,
    ),
    Row(
        "accumulate",
        "int",
        "Parts that a step's samples are computed in, one after the other: less memory.",
        1,
        group=LENGTH,
        is_free=True,
    ),
    Row("drop_last", "flag", "Leave out an epoch's last, smaller step.", False, group=LENGTH),
    Row("seed", "int", "Source of all chance.", 0, group=LENGTH),
    Row("learning_rate", "float", "The highest rate.", 1e-3, ("--lr", "--learning-rate"),
        group=RATES),
    Row("warmup_steps", "int", "Steps in which the rate rises.", 0, ("--warmup", "--warmup-steps"),
        group=RATES),
    Row("final_rate", "float", "The last rate, as a part of the highest.", 0.01, group=RATES),
    Row("layer_decay", "float", "Factor on the rate from a block to the one before it.", 1.0,
        group=RATES),
    Row("optimiser", "text", "AdamW for everything, or Muon for the matrices of linear layers: "
        "a step takes longer, and fewer may do.", "adamw", ("--optimiser", "--optimizer"),
        ("adamw", "muon"), group=RATES),
    Row("weight_decay", "float", "Decay of matrices and kernels.", 0.05, group=RATES),
    Row("beta1", "float", "AdamW's memory of the gradient.", 0.9, group=RATES),
    Row("beta2", "float", "AdamW's memory of its square.", 0.999, group=RATES),
    Row("clip_norm", "float", "Largest norm of the gradient; 0 for none.", 1.0,
        ("--clip", "--clip-norm"), group=RATES),
    Row("ema_decay", "float", "Memory of averaged weights, such as 0.999; 0 for none.", 0.0,
        ("--ema", "--ema-decay"), group=RATES),
    Row("drop_path", "float", "Stochastic depth of the last block. By default the model's.",
        group=RATES),
    Row(
        "moving",
        "text",
        "What may change: all; a part alone; or low-rank additions to frozen weights.",
        "full",
        ("--move", "--moving"),
        ("full", "decoder", "neck", "head", "lora"),
        group=RATES,
    ),
    Row("lora_rank", "int", "Rank of the low-rank additions.", 8, group=RATES),
    Row(
        "batch_stats",
        "text",
        "Statistics of batch norms: kept, moved by each process, or by all together (GPUs). auto "
        "keeps those that were learnt before.",
        "auto",
        words=("auto", "frozen", "own", "synchronised"),
        group=RATES,
    ),
    Row("device", "text", "cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.", "auto",
        group=MACHINE, is_free=True),
    Row("workers", "int", "Processes that prepare samples; 0 prepares them in the main one.", 0,
        group=MACHINE, is_free=True),
    Row("precision", "text", "What to compute in; bf16 by autocast.", "fp32",
        words=("fp32", "bf16"), group=MACHINE),
    Row("bf16", "flag", "Short for --precision bf16, and for fp32.", flags=("--bf16/--fp32",),
        group=MACHINE),
    Row("grad_checkpointing", "flag", "Compute activations twice instead of keeping them.", False,
        group=MACHINE, is_free=True),
    Row("channels_last", "flag", "Keep maps and kernels in channels-last memory.", True,
        group=MACHINE, is_free=True),
    Row("log_every", "int", "Steps between two lines of the log.", 10, group=LOG, is_free=True),
    Row("validate_every", "int", "Steps between two measurements; 0: after each epoch.", 0,
        group=LOG, is_free=True),
    Row("validate_at_start", "flag", "Measure before the first step as well.", False, group=LOG,
        is_free=True),
    Row("save_every", "int", "Steps between two saved states; 0: after each measurement.", 0,
        group=LOG, is_free=True),
    Row("tensorboard", "flag", "Write TensorBoard's files too, if it is installed.", True,
        group=LOG, is_free=True),
)  # fmt: skip
"""The settings of the loop; ``bf16`` is another way to say ``precision``."""
