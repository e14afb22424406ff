"""Compare methods: a plan of runs, their measurements, and one report."""
