"""Training: what goes in each step, who keeps the state, how a run is saved and goes on."""
