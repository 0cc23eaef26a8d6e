import pickle

import tinyvit.train as room
from tinyvit.train import Batch, Task
from tinyvit.train.task import Goal

from .toy_task import ToyTask


def test_the_members_a_task_must_have():
    wanted = {name for name in vars(Task) if not name.startswith("_")} | set(Task.__annotations__)
    assert wanted == {"name", "model", "goal", "sample", "collate", "loss", "validate", "save"}
    task = ToyTask()
    assert all(hasattr(task, name) for name in wanted)
    assert len(task) == 22


def test_a_task_goes_into_worker_processes():
    assert len(pickle.loads(pickle.dumps(ToyTask()))) == 22


def test_the_names_for_types():
    assert Batch.__origin__ is dict
    assert Goal.__origin__ is tuple


def test_the_rooms_list_is_true():
    assert all(getattr(room, name).__doc__ for name in room.__all__ if name != "Batch")
