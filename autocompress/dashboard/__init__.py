"""The Pareto explorer: it reads the store, draws, and submits export jobs; it computes nothing and needs no torch."""
