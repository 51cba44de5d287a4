"""The exceptions and the warning of the package.

Ops raise ``RuntimeError`` and Python functions ``ValueError`` or ``TypeError``, as in PyTorch; the classes here are for what PyTorch has no
word for.
"""


class BuildError(RuntimeError):
    """A technique's C++ library could not be built or loaded; the message holds the compiler's first lines and what to do."""


class CorruptFileError(ValueError):
    """A file written by `torch_cpu_ext.save_checkpoint` is damaged, or was written by a newer version of the package."""


class FallbackWarning(UserWarning):
    """The pure-PyTorch reference runs in place of the compiled kernels; given once a technique."""
