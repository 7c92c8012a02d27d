"""The one exception tree.

Every error a user can cause is an `EdgeGemmaError` whose text is one line: what was got, what was expected, what to do.
Only the command line turns it into an exit code; library code raises and never prints.
"""


class EdgeGemmaError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(EdgeGemmaError):
    """A model configuration that is unknown, contradictory or not supported."""


class CheckpointError(EdgeGemmaError):
    """A source checkpoint (safetensors, GGUF, tokenizer.json) that cannot be read or does not fit its configuration."""


class ModelFolderError(EdgeGemmaError):
    """A model folder that is missing, truncated, altered or written by another format version."""


class TokenizerError(EdgeGemmaError):
    """A tokenizer that cannot be read, or ids outside its vocabulary."""


class TemplateError(EdgeGemmaError):
    """A chat template that cannot be rendered with the messages given."""


class ContextFullError(EdgeGemmaError):
    """More tokens than the session's context holds."""


class UsageError(EdgeGemmaError):
    """Arguments that cannot be served: a value out of range, a file that is not there."""


class KernelError(EdgeGemmaError):
    """A kernel that cannot be compiled, or put into memory."""


class AudioError(EdgeGemmaError):
    """Sound that cannot be read, or a microphone that cannot be used."""


class PictureError(EdgeGemmaError):
    """A picture that cannot be read."""


class HubError(EdgeGemmaError):
    """A model hub that cannot be reached, does not know the name, or does not let it be read."""
