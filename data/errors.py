"""The project's exceptions.

R1DistillError            something failed while running (exit 1)
└── RequestError          what was asked for can't be met: a bad configuration, missing hardware or file (exit 2)

Every message says what was expected, what was found and what to do next.
"""


class R1DistillError(Exception):
    """Root of everything that this package raises on purpose."""

    exit_code = 1


class RequestError(R1DistillError):
    """The request can't be met as it stands; nothing was started."""

    exit_code = 2
