"""Edit the expression and the pose of a person in a video, from the command line or from Python."""

import os

__version__ = "0.1.0"

# PyTorch looks at this when it first takes memory: large pages for large tensors, where Linux gives them. They save a
# twentieth of the networks' time on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
