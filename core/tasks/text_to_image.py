"""Pictures from a text alone."""

from core.tasks.base import Task


class TextToImage(Task):
    """A picture of its caption; there are no further inputs."""
