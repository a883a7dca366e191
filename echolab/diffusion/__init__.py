"""The mathematics of training and sampling: paths, noise levels, objectives, guidance."""
