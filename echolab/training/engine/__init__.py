"""How the network is run: strategies, memory, the fp32 masters and their averages."""
