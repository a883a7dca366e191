"""echolab: training for unified human animation in the manner of EchoMimicV3.

The package itself imports nothing but what the interpreter has loaded, so that a program can take
the working folder off the import path before any other import.
"""

import os
import sys

__version__ = "0.1.0"


def remove_working_directory() -> None:
    """Drop the working folder from `sys.path`, also in child processes.

    It stays if PYTHONPATH names it, and comes last if echolab could not be imported without it: in
    a checkout that is not installed.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    # An empty part means the working folder, mostly by mistake: PYTHONPATH=$PYTHONPATH:x
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
