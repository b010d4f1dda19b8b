"""Every error TempoQuant raises on purpose, drawn once.

    TempoQuantError
    ├── RecipeError        a recipe names an unknown key, format or value
    ├── SettingsError      a size, number of frames or steps, or a seed that no model can run
    ├── ModelError         the model is missing, of the wrong class, or holds NaN/Inf weights
    ├── CalibrationError   calibration inputs are missing, overlap with evaluation, or hold NaN/Inf
    │   └── HessianError   a Hessian is not positive definite, even in float64
    ├── CheckpointError    a quantized checkpoint is truncated, altered, or of an unknown version
    ├── EvaluationError    an evaluation's results are missing, damaged, or of an unknown version
    ├── OutputError        the output folder or file cannot be written as asked
    ├── HubError           the hub refuses, cannot be reached, or holds something else
    ├── DeviceError        a GPU stopped working in the middle of it
    └── UnsupportedError   the operation cannot be right on a 4-bit layer (such as fuse_lora)

Each message is one sentence or two: what was wrong, where, with which numbers, and what to do about
it.
"""


class TempoQuantError(Exception):
    """Base class of every error that TempoQuant raises on purpose."""


class RecipeError(TempoQuantError):
    """A recipe names an unknown key, format or value."""


class SettingsError(TempoQuantError):
    """A sampling setting that no model can run."""


class ModelError(TempoQuantError):
    """The model is missing, of the wrong class, or unusable."""


class CalibrationError(TempoQuantError):
    """Calibration inputs are missing, malformed, or not finite."""


class HessianError(CalibrationError):
    """A Hessian is not positive definite, even in float64."""


class CheckpointError(TempoQuantError):
    """A quantized checkpoint is truncated, altered, or of an unknown version."""


class EvaluationError(TempoQuantError):
    """Results of an evaluation are missing, damaged, or of an unknown version."""


class OutputError(TempoQuantError):
    """The output folder or file cannot be written as asked."""


class HubError(TempoQuantError):
    """The hub refuses an upload, cannot be reached, or holds something else."""


class DeviceError(TempoQuantError):
    """A GPU stopped working, and this process cannot use it again."""


class UnsupportedError(TempoQuantError):
    """The operation cannot be right on a 4-bit layer."""
