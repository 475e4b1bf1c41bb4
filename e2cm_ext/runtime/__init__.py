"""The runtime: stages and exits run, samples leave, survivors are moved together."""
