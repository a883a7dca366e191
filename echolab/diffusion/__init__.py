"""Training objectives and sampling: path, noise levels, guidance, solvers, long video."""
