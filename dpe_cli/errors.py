"""The failures that a user can mend, each with its exit code."""

from typing import Any


class DPEError(Exception):
    """A failure the user can mend. `remedy` says how, in the imperative."""

    exit_code = 1

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem, remedy)  # both, so that it can be pickled by a worker process

    def __str__(self) -> str:
        return "; ".join(self.args)


class InputError(DPEError):
    """An input is missing, unreadable or unsupported."""

    exit_code = 3


class UsageError(InputError):
    """Options contradict each other or the input, or there is nothing by the name that one was given."""

    exit_code = 2


class FaceError(DPEError):
    """No usable face was found."""

    exit_code = 4


class WeightsError(DPEError):
    """Weights are missing, damaged or of another model."""

    exit_code = 5


class DeviceError(DPEError):
    """The device does not exist or its memory is too small."""

    exit_code = 6


class OutputError(DPEError):
    """The output exists already or cannot be written."""

    exit_code = 7


class ConsentError(DPEError):
    """The site's policy asks for consent, and none was shown; or what was shown is none."""

    exit_code = 9


class QualityError(DPEError):
    """The result is worse than what was asked for; `report` (a report.Report) tells how."""

    exit_code = 10  # 8 is for batches

    def __init__(self, problem: str, remedy: str, report: Any = None):
        super().__init__(problem, remedy)
        self.report = report


class ManifestError(DPEError):
    """The list of a batch is wrong: that is wrong usage."""

    exit_code = 2
