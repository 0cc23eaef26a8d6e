from .presets import PRESETS as PRESETS
from .presets import Preset as Preset
from .verify import ChangedFileError as ChangedFileError
from .verify import Verified as Verified
from .verify import verify as verify
from .writing import ParityError as ParityError
from .writing import export_model as export_model
