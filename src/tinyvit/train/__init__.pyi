from .loop import Result as Result
from .loop import train as train
from .run_folder import DivergedError as DivergedError
from .run_folder import Progress as Progress
from .settings import TrainSettings as TrainSettings
from .task import Batch as Batch
from .task import Task as Task
