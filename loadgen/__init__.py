"""Ask a fleet a trace: the replay client, the swarm that runs it, and the reference cluster it is measured on."""
