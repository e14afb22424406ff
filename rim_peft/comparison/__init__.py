"""Methods side by side: a plan of runs, what is measured of each, and one report."""
