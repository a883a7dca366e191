"""What watches over the steps: spikes, replicas, slow ranks, memory; and how a run goes back."""
