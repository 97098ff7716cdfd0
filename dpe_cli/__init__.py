"""Edit the expression and the pose of a person in a video, from the command line or from Python."""

__version__ = "0.1.0"
