"""Every error a user can meet, as one tree.

MoestroError                 one clear line; the command line prints it and exits with status 2
├── ConfigError              a field, a recipe or a flag holds a value that cannot work
├── RegistryError            no method, paper or study of that name
├── DataError                a data file is missing, empty or not what its name says
├── FamilyError              a model family that Moestro does not know
├── LoadError                a checkpoint is damaged, incomplete or unsafe
├── SaveError                a checkpoint could not be written; nothing half-written is left
├── LedgerError              an expert was not touched, or touched twice
├── PlanError                a plan does not fit the model it is applied to
├── TraceError               a routing trace is damaged or does not fit
├── StoreError               experts could not be read while serving; the request fails, the server goes on
├── ContextError             a router or an edit used the forward context against its rules
└── TrainError               a training run cannot go on
    └── NonFiniteError       a NaN or an infinity appeared; the message names the tensor
"""


class MoestroError(Exception):
    """Base of all errors a user can cause or meet. The message is one line with numbers and a way out."""

    exit_status = 2


class ConfigError(MoestroError):
    """A field, a recipe or a flag holds a value that cannot work."""


class RegistryError(MoestroError):
    """No method, paper or study of that name."""


class DataError(MoestroError):
    """A data file is missing, empty or not what its name says."""


class FamilyError(MoestroError):
    """A model family that Moestro does not know."""


class LoadError(MoestroError):
    """A checkpoint is damaged, incomplete or unsafe to read."""


class SaveError(MoestroError):
    """A checkpoint could not be written; nothing half-written is left behind."""


class LedgerError(MoestroError):
    """An expert was not touched, or touched twice."""


class PlanError(MoestroError):
    """A plan does not fit the model it is applied to."""


class TraceError(MoestroError):
    """A routing trace is damaged or does not fit the model."""


class StoreError(MoestroError):
    """Experts could not be read while serving. The request fails; the store can be asked again."""


class ContextError(MoestroError):
    """A router or an edit used the forward context against its rules."""


class TrainError(MoestroError):
    """A training run cannot go on."""


class NonFiniteError(TrainError):
    """A NaN or an infinity appeared during training; the message names the tensor."""
