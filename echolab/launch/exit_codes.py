"""How a run ended, as exit codes that a batch script can act on."""

DONE = 0
FATAL = 1  # a wrong setting, damaged data: the same command would fail again
STOPPED_SAVED = 75  # a signal: a checkpoint was written, the same command goes on
INTERRUPTED = 130  # Ctrl-C twice: what was done since the last checkpoint is lost
