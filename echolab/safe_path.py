"""Keep the working folder off the import path, of this process and of all that it starts.

Python puts it in front for `python -m` and `python -c`: a file `secrets.py` that came with a data
set would be executed in place of the library's module.  This module imports nothing but what the
interpreter has loaded by itself, so that it can be the first to be imported.
"""

import os
import sys


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
