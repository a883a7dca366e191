"""echolab: training for unified human animation in the manner of EchoMimicV3.

This module imports only modules that the interpreter has already loaded, so that a program can
remove the working directory from the import path before any other import.
"""

import os
import sys

__version__ = "0.1.0"


def remove_working_directory() -> None:
    """Remove the working directory from `sys.path`, also in child processes.

    Keep the working directory if PYTHONPATH names it.  Append the folder of echolab if it is not on
    the path, as in a checkout that is not installed.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    # Ignore empty entries, which mean the working directory, mostly by mistake: $PYTHONPATH:x
    named = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    here, end = os.getcwd(), sys.path.index(os.path.dirname(os.__file__))
    if here not in map(os.path.abspath, named):
        sys.path[:end] = [part for part in sys.path[:end] if os.path.abspath(part) != here]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if root not in map(os.path.abspath, sys.path):
        sys.path.append(root)
        named.append(root)
    if named:
        os.environ["PYTHONPATH"] = os.pathsep.join(named)
