"""The network, its parameters in files, and the wrapper of frozen networks."""
