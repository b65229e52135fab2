"""The end of one of several processes that has done its work."""

import os
import sys


def leave() -> None:
    """
    End without the interpreter's own end.

    A thread of gloo may still hold a tensor of the last collective then, or of DeepSpeed's unfinished handles. To free
    it the thread needs the interpreter's lock, which aborts a process that is ending, after all is saved
    (pytorch#190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
