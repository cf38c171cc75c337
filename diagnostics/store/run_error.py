"""What is wrong with a run, as data: a reader that knows more adds to it, and nobody has to look into its text."""

from typing import Any


class RunError(ValueError):
    """Something is wrong with a run, or with what is asked of it. Its text is one sentence.

    Attributes:
        reason: what is wrong. About a `file`: what was expected there, and what came. About the run itself, a predicate: "is not an Optiscope run".
        subject: what was given: "run", one to be read; "store", one to be written to; "lineage", the number of one.
        place: where it is, as the user gave it; None where whoever raises this does not know.
        file: the file, array or group within the run that it is about; None where that is the run.
        advice: what to do; None where whoever raises this does not know.

    >>> print(RunError("expected a file, got none", file="update/step/c/0").told(place="run.zarr", advice="open it again"))
    run: run.zarr: update/step/c/0: expected a file, got none; open it again
    >>> print(RunError("is not an Optiscope run", place="x.zarr"))
    run: x.zarr is not an Optiscope run
    """

    def __init__(self, reason: str, *, subject: str = "run", place: Any = None, file: str | None = None, advice: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.subject, self.place, self.file, self.advice = reason, subject, place, file, advice

    def __str__(self) -> str:
        parts = [self.subject, *(str(part) for part in (self.place, self.file) if part is not None)]
        text = f"{': '.join(parts)} {self.reason}" if self.file is None and self.place is not None else f"{': '.join(parts)}: {self.reason}"
        return text if self.advice is None else f"{text}; {self.advice}"

    def told(
        self,
        *,
        subject: str | None = None,
        place: Any = None,
        folder: str | None = None,
        file: str | None = None,
        advice: str | None = None,
    ) -> "RunError":
        """The same with what had not been told; a `subject` takes the place of the one before, and `folder` is where in the run its file is."""
        own = self.file or file
        return RunError(
            self.reason,
            subject=subject or self.subject,
            place=place if self.place is None else self.place,
            file="/".join(part for part in (folder, own) if part) or None,
            advice=advice if self.advice is None else self.advice,
        )
