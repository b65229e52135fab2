"""The end of a process that has done its work under DeepSpeed on gloo."""

import os
import sys


def leave() -> None:
    """
    End without the interpreter's own end. DeepSpeed keeps process groups and unfinished handles, so a thread of gloo
    may still let go of a tensor then, wait for the interpreter's lock, and abort the process after all is saved
    (pytorch#190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
