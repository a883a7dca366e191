"""Detection of loss spikes, the host memory limit, and the event log of a run."""
